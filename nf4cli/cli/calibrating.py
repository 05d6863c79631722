"""--calibration: the pass over the model before a conversion, and again to prove one."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .progress import ProgressDisplay

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ..calibration.passes import Calibration, Fixed
    from ..codes import CodeSource
    from ..engines import Engine, Notify
    from ..importance import ImportanceFile
    from ..planned import Plan
    from ..records import QuantConfig
    from .request import Request

TOKENS, LENGTH, DAMPING = 32_768, 512, 0.05
"""By default; docs/quality.md has what they were measured to give."""
_SHORTEST, _MOST_DAMPING = 8, 100


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
        texts: list[Path] | None, tokens: int, length: int, damping: float, save: Path | None
    ) -> Calibrating | None:
        """None where there is no text.

        Raises:
            UsageError: numbers that make no calibration.
        """
        from ..errors import UsageError

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
        from ..calibration.text import open_tokenizer
        from ..texts import digest_of, read_documents, sequences

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
    asked: Calibrating, plan: Plan, output: Path, request: Request
) -> Iterator[Calibrated]:
    """Calibrate a plan's model; what was measured stays beside `output` until the end.

    Args:
        plan: without importance; its weights to quantize are those that are measured.

    Raises:
        UsageError: there is no model to run.
    """
    _require_model(plan)
    from ..atomic_file import AtomicFile
    from ..codes import calibrated as codes_of
    from ..importance import load

    scratch = output.absolute().parent / f".{output.name}.calibration"
    if scratch.exists() and not request.resume:
        shutil.rmtree(scratch)
    calibration = _pass(asked, plan, scratch, request.engine, request.device, request.notify, None)
    _run(calibration, plan, request.shows)
    file = scratch / "importance.dat"
    calibration.save(file)
    if asked.save is not None:
        with AtomicFile(asked.save, "--save-importance") as copy:
            copy.write(file.read_bytes())
    codes = codes_of(calibration.codes_files()) if plan.config.method == "gptq" else None
    yield Calibrated(load(file), codes)
    shutil.rmtree(scratch)


def _require_model(plan: Plan) -> None:
    from ..errors import UsageError

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


def _run(calibration: Calibration, plan: Plan, shows: bool) -> None:
    what = plan.checkpoint.name
    with ProgressDisplay(calibration.nbytes, "calibrating", shows, what=what) as display:
        calibration.progress = display
        calibration.run()


def _pass(
    asked: Calibrating, plan: Plan, scratch: Path, engine: Engine, device: str | None,
    notify: Notify, fixed: Fixed | None,
) -> Calibration:  # fmt: skip
    from ..calibration.gptq import Feedback
    from ..calibration.passes import Calibration, Settings
    from ..calibration.text import torch_device

    model, method = plan.checkpoint.root, plan.config.method
    tokens, about = asked.windows(model)
    settings = Settings(method, feedback=Feedback(asked.damping))
    said = {**about, "model": plan.checkpoint.name, "method": method}
    if method == "gptq":
        said["damping"] = asked.damping
    names = [t.name for t in plan.tensors if t.state is not None]
    return Calibration(
        model, tokens, scratch, names, recipe_of(plan.config), engine, settings, said,
        device=torch_device(device), notify=notify, fixed=fixed,
    )  # fmt: skip


def recipe_of(config: QuantConfig) -> QuantConfig:
    """What of a recipe decides about scales and codes."""
    return replace(config, keep=(), importance="")


def again(
    asked: Calibrating, plan: Plan, about: Mapping[str, Any], scratch: Path, engine: Engine,
    notify: Notify, shows: bool, fixed: Fixed,
) -> Calibration:  # fmt: skip
    """Measure an output that is there: the same text through the source's model, its blocks rounded
    to what the output holds.

    Args:
        about: what the output's importance file says of its own calibration.
        fixed: the output's decoded matrices.
    """
    same = replace(asked, tokens=int(about["tokens"]), length=int(about["length"]))
    found = _pass(same, plan, scratch, engine, None, notify, fixed)
    _run(found, plan, shows)
    return found
