"""Read and change a model's config.json: its dtype and quantization, the sizes that it states."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from ..checkpoint.bnb_format import QUANTIZATION_KEYS
from ..checkpoint.types import Checkpoint
from ..errors import InputError
from ..format.dtypes import FLOAT64, SAFETENSORS_NAME, TORCH_NAME

_LAYER = re.compile(
    r"(?:(?:model|transformer|language_model|language_model\.model|model\.language_model)\.)?"
    r"(?:layers|h)\.(\d+)\.(.+)"
)
"""Name of a tensor in a numbered layer of a decoder; the first group is the layer's index, the
second the rest of the name."""
_HIDDEN_SIZES = ("hidden_size", "n_embd", "d_model", "dim")
_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "num_layers")
_EXTRA_LAYERS = re.compile(r"nextn|mtp")  # keys that announce layers beyond the count


def dtype_of(checkpoint: Checkpoint, requested: str, left: Collection[str] = ()) -> str:
    """Return the safetensors dtype that every kept floating-point tensor gets.

    Loaders build the model in one dtype, and transformers 5 fails on a mixture.  It is the
    requested one, else that of config.json, else the one that most of the source's bytes have.

    Args:
        requested: as torch spells it, or "auto".
        left: tensors that are no weights, such as scales.
    """
    if requested != "auto":
        return SAFETENSORS_NAME[requested]
    declared = declared_dtype(checkpoint.config)
    if declared is not None:
        return declared
    nbytes: Counter[str] = Counter()
    for name, (_, tensor) in checkpoint.tensors.items():
        if tensor.dtype in TORCH_NAME and name not in left:
            nbytes[tensor.dtype] += tensor.nbytes
    all_float64 = any(tensor.dtype == FLOAT64 for _, tensor in checkpoint.tensors.values())
    default = "F32" if all_float64 else "BF16"
    return max(nbytes, key=lambda dtype: (nbytes[dtype], dtype), default=default)


def dtype_notes(checkpoint: Checkpoint, dtype: str) -> list[str]:
    """Return notes about a config.json whose dtype contradicts itself or every tensor.

    Args:
        dtype: the one that was taken, as torch spells it.
    """
    config = checkpoint.config
    said = [
        f"{k} {config[k]!r}" for k in ("dtype", "torch_dtype") if isinstance(config.get(k), str)
    ]
    notes = []
    if len({str(config[entry.split(" ")[0]]).removeprefix("torch.") for entry in said}) > 1:
        notes.append(
            f"config.json says both {' and '.join(said)}: the kept tensors are in {dtype}, and the "
            "output's config.json says so under both keys"
        )
    stored = {tensor.dtype for _, tensor in checkpoint.tensors.values()} & TORCH_NAME.keys()
    if said and declared_dtype(config) == SAFETENSORS_NAME[dtype] and len(stored) == 1:
        only = TORCH_NAME[next(iter(stored))]
        if only != dtype:
            notes.append(
                f"config.json says {said[0]}, but the tensors are in {only}: those that stay in "
                f"full precision are cast to {dtype}, as a loader does it; --dtype {only} keeps "
                "them"
            )
    return notes


def declared_dtype(config: Mapping[str, Any]) -> str | None:
    """Return the safetensors dtype that config.json states, None if it states none that nf4 writes.

    Of two keys `dtype` counts, as for transformers 5.
    """
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        declared = part.get("dtype") or part.get("torch_dtype")
        if isinstance(declared, str) and declared.removeprefix("torch.") in SAFETENSORS_NAME:
            return SAFETENSORS_NAME[declared.removeprefix("torch.")]
    return None


def set_dtype(config: dict[str, Any], dtype: str) -> None:
    """Make config.json name `dtype`, under the key that it has (versions of transformers differ).

    The config of a diffusers component has no such key, and gets none.

    Args:
        config: changed in place.
        dtype: as torch spells it.
    """
    keys = [key for key in ("dtype", "torch_dtype") if key in config]
    if not keys and "_class_name" not in config:
        keys = ["torch_dtype"]
    config |= dict.fromkeys(keys, dtype)


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy without quantization_config, in sub-configs as well."""
    return {
        key: without_quantization(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in QUANTIZATION_KEYS
    }


def check_headers(checkpoint: Checkpoint) -> None:
    """Raise InputError if the tensors have another hidden size, or another number of layers, than
    config.json states.
    """
    text = checkpoint.config.get("text_config")
    config = text if isinstance(text, dict) else checkpoint.config
    layers: set[int] = set()
    norms: dict[int, str] = {}
    for name, (_, tensor) in checkpoint.tensors.items():
        match = _LAYER.fullmatch(name)
        if match is None:
            continue
        layers.add(int(match[1]))
        if match[2] == "input_layernorm.weight" and len(tensor.shape) == 1:
            norms[tensor.shape[0]] = name
    _check_hidden_size(checkpoint, config, norms)
    key, count = _first_integer(config, _LAYER_COUNTS)
    if not layers or not count:
        return
    layer_total = max(layers) + 1
    extra = any(_EXTRA_LAYERS.search(k) for k, _ in config_items(checkpoint.config))
    if layer_total < count or (layer_total > count and not extra):
        raise InputError(
            f"{checkpoint.root}: config.json says {key} {count}, but the tensors have "
            f"{layer_total} layers: config.json is of another model, or shards are missing. "
            "Download both again"
        )


def _check_hidden_size(
    checkpoint: Checkpoint, config: Mapping[str, Any], norms: Mapping[int, str]
) -> None:
    """Raise InputError if no layer has the hidden size that config.json states.

    Some families have single layers of another size.  If all are, it is another model.

    Args:
        norms: elements of an input norm -> the name of one that has as many.
    """
    key, size = _first_integer(config, _HIDDEN_SIZES)
    if size and norms and size not in norms:
        elements, name = next(iter(norms.items()))
        raise InputError(
            f"{checkpoint.root}: config.json says {key} {size}, but {name} has {elements} "
            "elements: config.json is of another model. Download both again"
        )


def _first_integer(config: Mapping[str, Any], keys: tuple[str, ...]) -> tuple[str, int]:
    """Return the first key with an integer, and this integer; ("", 0) where no key has one."""
    return next(((k, config[k]) for k in keys if type(config.get(k)) is int), ("", 0))


def config_items(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield every (key, value) of a config.json and of its sub-configs."""
    for key, value in config.items():
        yield key, value
        if isinstance(value, dict):
            yield from config_items(value)
