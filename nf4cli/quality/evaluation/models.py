"""Open the models to evaluate, one at a time."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...errors import InputError, MachineError, UsageError

DTYPES = ("auto", "float32", "float16", "bfloat16")


def libraries() -> tuple[Any, Any]:
    """Return (torch, transformers).

    Raises:
        MachineError: one of them is missing.
    """
    try:
        import torch
        import transformers
    except ImportError as error:
        raise MachineError(f"nf4 eval needs {error.name}: pip install 'nf4cli[eval]'") from error
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return torch, transformers


def kind_of(directory: Path) -> str:
    """Return "causal" for a language model, "encoder" for a model of embeddings.

    Raises:
        InputError: transformers cannot read the model's configuration.
        UsageError: the model has an encoder and a decoder.
    """
    _, transformers = libraries()
    if not (directory / "config.json").is_file():
        raise InputError(
            f"{directory} is no directory with a config.json: there is no model to run"
        )
    try:
        config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"transformers cannot read the configuration of {directory}: "
            f"{str(error).splitlines()[0]}"
        ) from error
    if getattr(config, "is_encoder_decoder", False):
        raise UsageError(
            f"{directory} is an encoder with a decoder; nf4 eval measures language models that "
            "continue a text, and encoders. Use a task's own score for it: docs/eval.md"
        )
    kind = getattr(transformers, (config.architectures or ["AutoModel"])[0], None)
    can = getattr(kind, "can_generate", None)
    return "causal" if can is not None and can() else "encoder"


def require_device(device: str) -> None:
    """Raise UsageError if torch cannot use a device on this machine."""
    torch, _ = libraries()
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(
            f"torch cannot use --device {device} ({str(error).splitlines()[0]}): leave it out, or "
            "say cpu"
        ) from error


@contextmanager
def opened(directory: Path, kind: str, dtype: str, device: str) -> Iterator[Any]:
    """Yield a model in inference mode, and free its memory at the end.

    Args:
        kind: "causal" or "encoder".
        dtype: one of DTYPES; "auto" is float32 on the CPU, else the model's own.
        device: a torch device.

    Raises:
        InputError: transformers cannot load the model, or weights of a language model are missing.
        UsageError: there is no such dtype.
        MachineError: the model does not fit into memory.
    """
    torch, transformers = libraries()
    if dtype not in DTYPES:
        raise UsageError(f"--dtype {dtype} is not one of {', '.join(DTYPES)}")
    if dtype == "auto":
        dtype = "float32" if device == "cpu" else "auto"
    loader = transformers.AutoModelForCausalLM if kind == "causal" else transformers.AutoModel
    try:
        model, info = loader.from_pretrained(
            directory, local_files_only=True, output_loading_info=True,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
        )  # fmt: skip
        model = model.to(device).eval()
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise MachineError(
            f"{directory} does not fit into memory in {dtype}: --dtype bfloat16 takes half"
        ) from error
    except (OSError, ValueError, RuntimeError, KeyError, AttributeError) as error:
        raise InputError(
            f"transformers cannot load {directory}: {str(error).splitlines()[0]}"
        ) from error
    missing = sorted(info["missing_keys"])
    if kind == "causal" and missing:
        raise InputError(
            f"{directory} lacks {len(missing):,} weights of its model, such as {missing[0]}: "
            "its figures would be chance"
        )
    try:
        with torch.inference_mode():
            yield model
    finally:
        del model
        gc.collect()
        if device != "cpu":
            torch.cuda.empty_cache()
