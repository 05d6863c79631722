"""Have a model write text to be calibrated on: the work of `nf4cli.write_text`."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from ..checkpoint.atomic_file import AtomicFile
from ..checkpoint.discovery import open_checkpoint
from ..convert.listener import Stage
from ..errors import UsageError
from ..quality import writing
from ..quality.calibration.text import open_tokenizer, torch_device
from ..quality.evaluation.models import libraries, require_device
from . import sources
from .machine import Machine


@dataclass(frozen=True)
class Writing:
    """What to write, and how.

    Attributes:
        model: a language model, here or on the Hub.
        file: a .jsonl file to write.
        tokens: at least as many.
        seed: of the random numbers.
        dtype: what the model computes in.
        device: a torch device, None for a GPU where there is one.
        machine: its listener is told of the progress.

    Raises:
        UsageError: the file is not named .jsonl, or there are no tokens to write.
    """

    model: Path
    file: Path
    tokens: int = writing.TOKENS
    seed: int = 0
    dtype: str = "auto"
    device: str | None = None
    machine: Machine = field(default_factory=Machine)

    def __post_init__(self) -> None:
        if self.file.suffix != ".jsonl":
            raise UsageError(f"{self.file} is not named .jsonl, which --calibration reads as lines")
        if self.tokens < 1:
            raise UsageError(f"--tokens {self.tokens:,} is below 1")
        if not 0 <= self.seed < 2**63:
            raise UsageError(f"--seed {self.seed} is not from 0 to 2^63 - 1")


@dataclass(frozen=True)
class Written:
    """The result.

    Attributes:
        file: where the text lies.
        documents: lines of it.
        called: what a user reads of the model.
    """

    file: Path
    documents: int
    called: str


def write(asked: Writing) -> Written:
    """Write a model's own text, one document a line.

    Raises:
        UsageError, InputError, MachineError: the model cannot write.
        OSError: the file cannot be written.
    """
    libraries()
    listener = asked.machine.listener
    model = sources.local(asked.model, listener)
    device = asked.device or torch_device(None)
    require_device(device)
    tokenizer = open_tokenizer(model)
    nbytes = sum(shard.size for shard in open_checkpoint(model).shards)
    called = sources.shown(asked.model, model)
    with AtomicFile(asked.file, "the text") as file:
        with listener.stage(Stage("writing text", nbytes * asked.tokens, called)) as progress:
            texts = writing.documents(
                model, tokenizer, asked.tokens, asked.seed, asked.dtype, device,
                lambda count: progress(called, nbytes * count),
            )  # fmt: skip
        lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
        file.write("".join(lines).encode("utf-8", "surrogatepass"))
    return Written(asked.file, len(texts), called)
