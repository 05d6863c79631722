"""Open a 4-bit model: choose its class, and say what stock libraries cannot hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..checkpoint.discovery import open_checkpoint
from ..checkpoint.packed import PackedWeight, load_weights
from ..checkpoint.reader import ShardReaders
from ..checkpoint.types import Checkpoint
from ..errors import InputError, MachineError, Nf4Error, UsageError
from ..output.auto_class import auto_class
from ..planning.families import names_of
from ..planning.pipeline_plan import is_pipeline
from .experts import Stack, stacks_of

_OLDEST = (5, 17)
"""The oldest transformers that was seen to load packed experts: 5.17.0 and 5.23.0 were."""
_EXTRA = "pip install 'nf4cli[load]'"


def open_model(place: Path, called: str, class_name: str | None, options: Mapping[str, Any]) -> Any:
    """Open the model in a directory.

    Args:
        place: the directory.
        called: what messages call it.
        class_name: class of transformers or diffusers; None for the one that the files say.
        options: for the class's from_pretrained.

    Raises:
        UsageError: no library has such a class, or an option is one that nf4 gives itself.
        InputError: the files are damaged, or hold what no stock library holds.
        MachineError: a library is missing.
    """
    for name in ("quantization_config", "config", "state_dict"):
        if name in options:
            raise UsageError(f"{name} cannot be given: it follows from the files of {called}")
    if is_pipeline(place):
        kind = _class_of("diffusers", class_name or "DiffusionPipeline")
        return _loaded(kind.from_pretrained, place, called, options)
    checkpoint = open_checkpoint(place)
    with ShardReaders(checkpoint.shards) as readers:
        weights = load_weights(checkpoint, readers)
    if not checkpoint.config:
        raise InputError(f"{called} has no config.json, so nobody can tell which model it is of")
    if checkpoint.is_diffusers:
        name = class_name or str(checkpoint.config.get("_class_name"))
        kind = _class_of("diffusers", name)
        return _loaded(kind.from_pretrained, place, called, options)
    if (place / "modules.json").is_file() and class_name is None:
        kind = _class_of("sentence_transformers", "SentenceTransformer")
        return _loaded(kind, place, called, options)
    name = class_name or auto_class(checkpoint.config, checkpoint.tensors)
    stacks = stacks_of(weights, checkpoint.config, called)
    kind = _class_of("transformers", name)
    if stacks:
        return _with_stacks(checkpoint, kind, stacks, called, options)
    _refuse_experts(weights, checkpoint, called)
    return _savable(_loaded(kind.from_pretrained, place, called, options))


def _loaded(load: Callable[..., Any], place: Path, called: str, options: Mapping[str, Any]) -> Any:
    """Return what a library loads from a directory.

    Raises:
        InputError, MachineError: the library fails.
    """
    try:
        return load(str(place), **options)
    except Nf4Error:
        raise
    except ImportError as error:
        raise MachineError(f"{called} cannot be loaded: {error}. {_EXTRA}") from error
    except Exception as error:  # each library has its own
        kind = MachineError if "out of memory" in str(error).lower() else InputError
        raise kind(
            f"{called} cannot be loaded: {type(error).__name__}: {str(error)[:2000]}. nf4 verify "
            "tells whether its files are whole"
        ) from error


def _with_stacks(
    checkpoint: Checkpoint,
    kind: Any,
    stacks: Mapping[str, Stack],
    called: str,
    options: Mapping[str, Any],
) -> Any:
    """Return a model with packed stacks of experts, loaded by a class of transformers."""
    _library("bitsandbytes.nn.parametrize")
    version = _library("transformers").__version__
    if tuple(map(int, version.split(".")[:2])) < _OLDEST:
        raise MachineError(
            f"transformers {version} is too old to hold experts in 4 bit: it takes "
            f"{'.'.join(map(str, _OLDEST))} or newer, {_EXTRA}"
        )
    from transformers import AutoConfig

    from .packed_stacks import METHOD, loading

    section = checkpoint.config.get("quantization_config")
    if not isinstance(section, dict):
        raise InputError(f"config.json of {called} has no quantization_config: see nf4 verify")
    config = _loaded(AutoConfig.from_pretrained, checkpoint.root, called, {})
    # load_in_4bit would choose the stock quantizer.
    rest = {k: v for k, v in section.items() if k not in ("load_in_4bit", "load_in_8bit")}
    config.quantization_config = {**rest, "quant_method": METHOD}
    with loading(stacks, names_of(checkpoint.config)):
        given = {**options, "config": config}
        return _savable(_loaded(kind.from_pretrained, checkpoint.root, called, given))


def _savable(model: Any) -> Any:
    """Return a model of transformers that save_pretrained writes packed, as it is.

    By itself transformers would undo how the packed weights were read, and fail.
    """
    conversions = getattr(model, "_weight_conversions", None)
    if conversions:
        model._weight_conversions = [
            conversion
            for conversion in conversions
            if not any(hasattr(op, "hf_quantizer") for op in getattr(conversion, "operations", ()))
        ]
    return model


def _refuse_experts(
    weights: Mapping[str, PackedWeight], checkpoint: Checkpoint, called: str
) -> None:
    """Raise InputError if experts are packed as matrices, which transformers 5 does not hold."""
    if checkpoint.config.get("model_type") in ("llama4", "llama4_text"):
        return  # transformers has a class of matrices for it
    name = next((name for name in weights if "experts" in name.split(".")), None)
    if name is not None:
        raise InputError(
            f"{called} holds each expert as a packed matrix of its own ({name}), and nf4 does not "
            "know how transformers holds the experts of this family. Decode the model first: nf4 "
            "dequantize"
        )


def _class_of(library: str, name: str) -> Any:
    """Return a class of a library.

    Raises:
        UsageError: it has no such class.
        MachineError: it is not installed.
    """
    module = _library(library)
    found = getattr(module, name, None) if name.isidentifier() else None
    if not hasattr(found, "from_pretrained") and name != "SentenceTransformer":
        raise UsageError(f"{library} {module.__version__} has no class {name!r} that loads a model")
    return found


def _library(name: str) -> Any:
    """Import a library.

    Raises:
        MachineError: it, or something that it needs, is not installed.
    """
    from importlib import import_module

    try:
        return import_module(name)
    except ImportError as error:
        raise MachineError(
            f"loading needs {name.partition('.')[0]}, which cannot be imported ({error}): {_EXTRA}"
        ) from error
