"""Calibrate a model before its conversion, and again to prove an output (--calibration)."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from ...convert.listener import Listener, Stage
from .defaults import DAMPING, LENGTH, TOKENS

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

_SHORTEST, _MOST_DAMPING, _MOST = 8, 100, 2**40


@dataclass(frozen=True)
class Calibrating:
    """The options of a calibration.

    Attributes:
        texts: text files and directories of them.
        tokens: most tokens to run through the model.
        length: tokens of a window.
        damping: of gptq and yaqa.
        save: a file that the importance is written to as well; None for none.
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
        """Return the options; None where there is no text.

        Raises:
            UsageError: a number is out of range.
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
        """Return the text as the model's tokens, and what the importance file records of it.

        Returns:
            int64 [sequences, length]; digest of the text, tokens and length.

        Raises:
            UsageError, InputError, MachineError: see `read_documents`, `open_tokenizer`,
                `sequences`.
        """
        from ..texts import digest_of, read_documents, sequences
        from .text import open_tokenizer

        documents = read_documents(self.texts)
        tokenizer = open_tokenizer(model)
        count = max(1, self.tokens // self.length)
        tokens = sequences(documents, tokenizer, self.length, count)
        return tokens, {
            "text": digest_of(documents), "tokens": int(tokens.size), "length": self.length,
        }  # fmt: skip


@dataclass(frozen=True)
class Calibrated:
    """The results of a calibration.

    Attributes:
        importance: the importance file, which is removed when `calibrated` ends.
        codes: the codes that gptq or yaqa chose; None for rtn.
    """

    importance: ImportanceFile
    codes: CodeSource | None


@contextmanager
def calibrated(
    asked: Calibrating, plan: Plan, output: Path, engine: Engine, device: str | None, resume: bool,
    listener: Listener,
) -> Iterator[Calibrated]:  # fmt: skip
    """Calibrate a plan's model and yield the results, which lie beside `output` meanwhile.

    On an error or a signal the blocks that are done stay, for a run with `resume`.

    Args:
        plan: made without importance; the weights that it quantizes are measured.
        engine: the one that will convert.
        device: "cpu" to run the model there; else it runs on a GPU where there is one.
        resume: go on where an earlier run stopped.

    Raises:
        UsageError: the source is no model that can be run.
        InputError, MachineError: see `Calibration`.
    """
    _require_model(plan)
    from ...checkpoint.atomic_file import AtomicFile
    from ...checkpoint.given_codes import calibrated as codes_of
    from ...checkpoint.importance_file import load

    if resume and (importance := _finished(asked, plan, output)) is not None:
        yield Calibrated(importance, None)
        return
    scratch = output.absolute().parent / f".{output.name}.calibration"
    names = [s.name for t in plan.tensors if t.state is not None for s in t.weight.sources]
    with _claimed(scratch, output, resume):
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
        codes = codes_of(calibration.codes_files()) if plan.config.feeds_back else None
        yield Calibrated(load(file), codes)
        shutil.rmtree(scratch)


@contextmanager
def _claimed(scratch: Path, output: Path, resume: bool) -> Iterator[None]:
    """Hold a calibration's directory for this run alone; without `resume` it is empty at first.

    Raises:
        UsageError, MachineError: see `_locked`.
    """
    fd = _locked(scratch, output)
    try:
        if not resume:
            for old in scratch.iterdir():
                old.unlink() if old.is_symlink() or old.is_file() else shutil.rmtree(old)
        yield
    finally:
        os.close(fd)


def _locked(directory: Path, output: Path) -> int:
    """Make a directory where there is none, and return it open and locked.

    Raises:
        UsageError: another run holds the lock, or something else lies there.
        MachineError: the file system has no locks.
    """
    from ...errors import MachineError, UsageError

    while True:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            continue  # another run has just ended and removed it
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTDIR, errno.ELOOP):
                raise
            raise UsageError(
                f"{directory}, where the calibration would lie, is no directory: remove it, or "
                "choose another output"
            ) from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(fd)
            if isinstance(error, BlockingIOError):
                raise UsageError(
                    f"another run is calibrating for {output}: wait for its end, or choose "
                    "another output"
                ) from error
            raise MachineError(
                f"{directory} cannot be locked ({error.strerror}): choose an output on another "
                "file system"
            ) from error
        if directory.exists() and os.path.samestat(directory.stat(), os.fstat(fd)):
            return fd
        os.close(fd)  # likewise


@contextmanager
def _kept(scratch: Path, notify: Notify) -> Iterator[None]:
    """On an error, tell the user of the blocks that are kept, or remove a scratch without any."""
    from .scratch import what_is_kept

    try:
        yield
    except BaseException:
        kept = what_is_kept(scratch)
        if kept:
            notify(f"{kept} and kept in {scratch}: --resume goes on there")
        else:
            shutil.rmtree(scratch, ignore_errors=True)
        raise


def _finished(asked: Calibrating, plan: Plan, output: Path) -> ImportanceFile | None:
    """Return the importance of a finished output that was calibrated in the same way, or None."""
    from ...checkpoint.discovery import IMPORTANCE
    from ...checkpoint.importance_file import load
    from ...convert.output_place import holds_output
    from ...errors import InputError
    from ..texts import digest_of, read_documents

    if not holds_output(output):
        return None
    try:
        recorded = load(output / IMPORTANCE)
    except InputError:
        return None
    expected = {"method": plan.config.method, "length": asked.length}
    if plan.config.feeds_back:
        expected["damping"] = asked.damping
    same_settings = all(recorded.about.get(name) == value for name, value in expected.items())
    tokens = recorded.about.get("tokens")
    enough = isinstance(tokens, int) and asked.length <= tokens <= asked.tokens
    same_text = recorded.about.get("text") == digest_of(read_documents(asked.texts))
    return recorded if same_settings and enough and same_text else None


def _require_model(plan: Plan) -> None:
    """Raise UsageError if the source is no model that calibration can run."""
    from ...errors import UsageError
    from ...planning.plan import is_renamed
    from ...planning.quantizers import is_leftover

    checkpoint = plan.checkpoint
    if checkpoint.is_file or not checkpoint.config:
        raise UsageError(
            f"{checkpoint.root} is no model that transformers can run: give a directory with "
            "config.json, or use --scale search, which needs no data"
        )
    sources = (source for t in plan.tensors for source in t.weight.sources)
    encoded = next((source.encoding for source in sources if source.encoding), None)
    if encoded is not None:
        raise UsageError(
            f"{checkpoint.name} is stored in {encoded.format}, which calibration does not run: use "
            "--scale search, or the checkpoint in 16 bit"
        )
    what = " and ".join(
        words
        for words, holds in (
            ("names that a wrapper has changed", any(is_renamed(t) for t in plan.tensors)),
            ("a leftover quantization_config", is_leftover(checkpoint)),
        )
        if holds
    )
    if what:
        raise UsageError(
            f"{checkpoint.name} has {what}: nf4 reads it, but transformers, which runs the model "
            "for a calibration, would read other weights. Use --scale search, which needs no data, "
            "or mend the source"
        )


def _run(calibration: Calibration, what: str, listener: Listener) -> None:
    """Run a pass as a stage of the listener."""
    with listener.stage(Stage("calibrating", calibration.nbytes, what)) as progress:
        calibration.progress = progress
        calibration.run()


def _pass(
    asked: Calibrating, model: Checkpoint, config: QuantConfig, names: Iterable[str],
    scratch: Path, engine: Engine, device: str | None, notify: Notify, fixed: Fixed | None,
) -> Calibration:  # fmt: skip
    """Return a pass over `model`, ready to run; `fixed` is None where it chooses codes."""
    from .passes import Calibration, Settings
    from .text import torch_device

    tokens, about = asked.windows(model.root)
    facts = {**about, "model": model.name, "method": config.method}
    if config.feeds_back:
        facts["damping"] = asked.damping
    settings = Settings(config.method, asked.damping)
    recipe = replace(config, keep=(), importance="")  # the rest decides about scales and codes
    return Calibration(
        model.root, tokens, scratch, list(names), recipe, engine, settings, facts,
        device=torch_device(device), notify=notify, fixed=fixed,
    )  # fmt: skip


def prove(
    texts: Sequence[Path], path: Path, source: Path, engine: Engine, device: str | None,
    report: Report, listener: Listener,
) -> None:  # fmt: skip
    """Calibrate again with this text, and report what differs from an output's record.

    Args:
        texts: files and directories.
        path, source: the output, and what it was made from.
        report: gets the findings.

    Args:
        device: as `--device` says it.

    Raises:
        UsageError: the output was not calibrated.
        InputError: the text, the output or the source cannot be read.
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
    facts = recorded.about
    digest = digest_of(read_documents(texts))
    if facts.get("text") != digest:
        report.add(
            "calibration",
            IMPORTANCE,
            f"{IMPORTANCE} was measured on another text: SHA-256 {facts.get('text')}, and this has "
            f"{digest}",
        )
        return
    asked = Calibrating(
        tuple(texts), _number(facts, "tokens"), _number(facts, "length"),
        float(_number(facts, "damping")) if "damping" in facts else DAMPING,
    )  # fmt: skip
    output, model = open_checkpoint(path), open_checkpoint(source)
    names = [
        source
        for name, record in manifest.tensors.items()
        if record.state is not None
        for source in ([part.tensor for part in record.parts] or [name])
    ]
    with ShardReaders(output.shards) as readers, TemporaryDirectory(prefix="nf4-") as scratch:
        fixed = matrices(load_weights(output, readers), readers, engine)
        again = _pass(
            asked, model, manifest.config, names, Path(scratch), engine, device,
            listener.note, fixed,
        )  # fmt: skip
        _run(again, model.name, listener)
        compare(recorded, again, report)


def _number(facts: Mapping[str, Any], name: str) -> Any:
    """Return a number that an importance file records of its calibration.

    Raises:
        InputError: it is missing, no number, or out of range.
    """
    from ...checkpoint.discovery import IMPORTANCE
    from ...errors import InputError

    value = facts.get(name)
    if type(value) not in (int, float) or not 0 < float(str(value)) < _MOST:
        raise InputError(
            f"{IMPORTANCE} says {name!r} is {value!r}, expected a number: it is damaged"
        )
    return value
