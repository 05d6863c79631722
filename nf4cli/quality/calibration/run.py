"""--calibration: the pass over the model before a conversion, and again to prove one."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from ...convert.listener import Listener, Stage

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ...callbacks import Notify
    from ...checkpoint.given_codes import CodeSource
    from ...checkpoint.importance_file import ImportanceFile
    from ...checkpoint.types import Checkpoint
    from ...engines.protocol import Engine
    from ...format.config import QuantConfig
    from ...output.report import Report
    from ...planning.plan import Plan
    from .passes import Calibration, Fixed

TOKENS, LENGTH, DAMPING = 32_768, 512, 0.05
"""By default; docs/quality.md has what they were measured to give."""
_SHORTEST, _MOST_DAMPING, _MOST = 8, 100, 2**40


@dataclass(frozen=True)
class Calibrating:
    """What is asked of a calibration.

    Attributes:
        texts: files and directories.
        tokens, length: how many are run through the model, and in windows of how many.
        damping: of gptq.
        save: where the importance file is wanted as well.
    """

    texts: tuple[Path, ...]
    tokens: int = TOKENS
    length: int = LENGTH
    damping: float = DAMPING
    save: Path | None = None

    @staticmethod
    def of(
        texts: Sequence[Path] | None, tokens: int, length: int, damping: float, save: Path | None
    ) -> Calibrating | None:
        """None where there is no text.

        Raises:
            UsageError: numbers that make no calibration.
        """
        from ...errors import UsageError

        if length < _SHORTEST:
            raise UsageError(f"--calibration-length {length:,} is below {_SHORTEST}")
        if tokens < length:
            raise UsageError(
                f"--calibration-tokens {tokens:,} is less than one window of {length:,}"
            )
        if not 0 < damping <= _MOST_DAMPING:
            raise UsageError(f"--damping {damping} is not above 0 and at most {_MOST_DAMPING}")
        return Calibrating(tuple(texts), tokens, length, damping, save) if texts else None

    def windows(self, model: Path) -> tuple[NDArray[np.int64], dict[str, Any]]:
        """(int64 [sequences, length], what the importance file shall say of them)."""
        from ..texts import digest_of, read_documents, sequences
        from .text import open_tokenizer

        documents = read_documents(self.texts)
        tokenizer = open_tokenizer(model)
        count = max(1, self.tokens // self.length)
        found = sequences(documents, tokenizer, self.length, count)
        return found, {
            "text": digest_of(documents), "tokens": int(found.size), "length": self.length,
        }  # fmt: skip


@dataclass(frozen=True)
class Calibrated:
    """Attributes:
    importance: the file, in a directory that is there only while this is.
    codes: of gptq.
    """

    importance: ImportanceFile
    codes: CodeSource | None


@contextmanager
def calibrated(
    asked: Calibrating, plan: Plan, output: Path, engine: Engine, device: str | None, resume: bool,
    listener: Listener,
) -> Iterator[Calibrated]:  # fmt: skip
    """Calibrate a plan's model; what was measured stays beside `output` until the end.

    Args:
        plan: without importance; its weights to quantize are those that are measured.
        engine, device: that will convert, and where the model runs.
        resume: go on where an earlier run stopped.

    Raises:
        UsageError: there is no model to run.
    """
    _require_model(plan)
    from ...checkpoint.atomic_file import AtomicFile
    from ...checkpoint.given_codes import calibrated as codes_of
    from ...checkpoint.importance_file import load

    if resume and (there := _finished(asked, plan, output)) is not None:
        yield Calibrated(there, None)
        return
    scratch = output.absolute().parent / f".{output.name}.calibration"
    if scratch.exists() and not resume:
        shutil.rmtree(scratch)
    names = [t.name for t in plan.tensors if t.state is not None]
    with _kept(scratch, listener.note):
        calibration = _pass(
            asked, plan.checkpoint, plan.config, names, scratch, engine, device,
            listener.note, None,
        )  # fmt: skip
        _run(calibration, plan.checkpoint.name, listener)
    file = scratch / "importance.dat"
    calibration.save(file)
    if asked.save is not None:
        with AtomicFile(asked.save, "--save-importance") as copy:
            copy.write(file.read_bytes())
    codes = codes_of(calibration.codes_files()) if plan.config.method == "gptq" else None
    yield Calibrated(load(file), codes)
    shutil.rmtree(scratch)


@contextmanager
def _kept(scratch: Path, notify: Notify) -> Iterator[None]:
    """Says what a calibration leaves that did not come to its end, and removes an empty one."""
    from .passes import blocks_done

    try:
        yield
    except BaseException:
        done = blocks_done(scratch)
        if done:
            notify(f"{done:,} blocks are calibrated and kept in {scratch}: --resume goes on there")
        else:
            shutil.rmtree(scratch, ignore_errors=True)
        raise


def _finished(asked: Calibrating, plan: Plan, output: Path) -> ImportanceFile | None:
    """The importance of an output that is there already and was calibrated in the same way."""
    from ...checkpoint.discovery import IMPORTANCE
    from ...checkpoint.importance_file import load
    from ...convert.output_place import holds_output
    from ...errors import InputError
    from ..texts import digest_of, read_documents

    if not holds_output(output):
        return None
    try:
        there = load(output / IMPORTANCE)
    except InputError:
        return None
    wanted = {"method": plan.config.method, "length": asked.length}
    if plan.config.method == "gptq":
        wanted["damping"] = asked.damping
    same = all(there.about.get(name) == value for name, value in wanted.items())
    tokens = there.about.get("tokens")
    enough = isinstance(tokens, int) and asked.length <= tokens <= asked.tokens
    text = there.about.get("text") == digest_of(read_documents(asked.texts))
    return there if same and enough and text else None


def _require_model(plan: Plan) -> None:
    from ...errors import UsageError

    checkpoint = plan.checkpoint
    if checkpoint.is_file or not checkpoint.config:
        raise UsageError(
            f"{checkpoint.root} is no model that transformers can run: give a directory with "
            "config.json, or use --scale search, which needs no data"
        )
    if any(t.weight.scale is not None for t in plan.tensors):
        raise UsageError(
            f"{checkpoint.name} is stored in float8, which calibration does not run: use --scale "
            "search, or the checkpoint in 16 bit"
        )


def _run(calibration: Calibration, what: str, listener: Listener) -> None:
    with listener.stage(Stage("calibrating", calibration.nbytes, what)) as progress:
        calibration.progress = progress
        calibration.run()


def _pass(
    asked: Calibrating, model: Checkpoint, config: QuantConfig, names: Iterable[str],
    scratch: Path, engine: Engine, device: str | None, notify: Notify, fixed: Fixed | None,
) -> Calibration:  # fmt: skip
    from .gptq import Feedback
    from .passes import Calibration, Settings
    from .text import torch_device

    tokens, about = asked.windows(model.root)
    said = {**about, "model": model.name, "method": config.method}
    if config.method == "gptq":
        said["damping"] = asked.damping
    settings = Settings(config.method, feedback=Feedback(asked.damping))
    recipe = replace(config, keep=(), importance="")  # what decides about scales and codes
    return Calibration(
        model.root, tokens, scratch, list(names), recipe, engine, settings, said,
        device=torch_device(device), notify=notify, fixed=fixed,
    )  # fmt: skip


def prove(
    texts: Sequence[Path], path: Path, source: Path, engine: Engine, device: str | None,
    report: Report, listener: Listener,
) -> None:  # fmt: skip
    """Measure again, with this text, what an output records of its calibration.

    Args:
        device: as `--device` says it.

    Raises:
        UsageError: it was not calibrated.
        InputError: the text or the source cannot be read.
    """
    from ...checkpoint.discovery import IMPORTANCE, MANIFEST, open_checkpoint
    from ...checkpoint.importance_file import load
    from ...checkpoint.packed import load_weights
    from ...checkpoint.reader import ShardReaders
    from ...errors import UsageError
    from ...output.manifest import Manifest
    from ..texts import digest_of, read_documents
    from .reproduce import compare, matrices

    manifest = Manifest.from_file(path / MANIFEST)
    if not manifest.config.importance:
        raise UsageError(f"{path} was not calibrated: leave --calibration out")
    recorded = load(path / IMPORTANCE)
    said = recorded.about
    found = digest_of(read_documents(texts))
    if said.get("text") != found:
        report.add(
            "calibration",
            IMPORTANCE,
            f"{IMPORTANCE} was measured on another text: SHA-256 {said.get('text')}, and this has "
            f"{found}",
        )
        return
    asked = Calibrating(
        tuple(texts), _number(said, "tokens"), _number(said, "length"),
        float(_number(said, "damping")) if "damping" in said else DAMPING,
    )  # fmt: skip
    output, model = open_checkpoint(path), open_checkpoint(source)
    names = [name for name, record in manifest.tensors.items() if record.state is not None]
    with ShardReaders(output.shards) as readers, TemporaryDirectory(prefix="nf4-") as scratch:
        fixed = matrices(load_weights(output, readers), readers, engine)
        again = _pass(
            asked, model, manifest.config, names, Path(scratch), engine, device,
            listener.note, fixed,
        )  # fmt: skip
        _run(again, model.name, listener)
        compare(recorded, again, report)


def _number(said: Mapping[str, Any], name: str) -> Any:
    """A number that an importance file gives of its calibration."""
    from ...checkpoint.discovery import IMPORTANCE
    from ...errors import InputError

    value = said.get(name)
    if type(value) not in (int, float) or not 0 < float(str(value)) < _MOST:
        raise InputError(
            f"{IMPORTANCE} says {name!r} is {value!r}, expected a number: it is damaged"
        )
    return value
