"""Open a model's own tokenizer, and choose the device that torch computes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...errors import InputError, MachineError


def open_tokenizer(model: Path) -> Any:
    """Return the tokenizer that lies beside a model.

    Raises:
        MachineError: transformers is missing.
        InputError: there is none that transformers can read.
    """
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise MachineError(
            "text needs transformers: pip install 'nf4cli[calibrate]'. --scale search and "
            "--importance FILE need neither torch nor text"
        ) from error
    try:
        return AutoTokenizer.from_pretrained(model, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{model} has no tokenizer that transformers can read ({str(error).splitlines()[0]}): "
            "text cannot be turned into tokens. Put the model's tokenizer files beside it"
        ) from error


def torch_device(asked: str | None) -> str:
    """Return where torch computes: a GPU where there is one, unless the CPU was asked for.

    Args:
        asked: as `--device` says it; of several GPUs ("cuda:1,2") the first one computes.
    """
    import torch

    if asked == "cpu" or not torch.cuda.is_available():
        return "cpu"
    return asked.split(",")[0] if asked is not None and asked.startswith("cuda:") else "cuda"
