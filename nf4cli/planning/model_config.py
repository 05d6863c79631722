"""config.json of a model: what its dtype is, what a loader needs changed, what cannot be true."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from ..checkpoint.bnb_format import QUANTIZATION_KEYS
from ..checkpoint.types import Checkpoint
from ..errors import InputError, UsageError
from ..format.dtypes import SAFETENSORS_NAME, TORCH_NAME

_LAYER = re.compile(
    r"(?:(?:model|transformer|language_model|language_model\.model|model\.language_model)\.)?"
    r"(?:layers|h)\.(\d+)\.(.+)"
)
"""A tensor of a decoder's numbered layer, and its index."""
_HIDDEN_SIZES = ("hidden_size", "n_embd", "d_model", "dim")
_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "num_layers")
_EXTRA_LAYERS = re.compile(r"nextn|mtp")  # keys that announce layers beyond the count

_VLLM_FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
}
"""Modules that vLLM loads as one."""


def dtype_of(checkpoint: Checkpoint, asked: str) -> str:
    """The safetensors dtype that every kept floating tensor gets.

    Loaders build the model in one dtype, and transformers 5 fails on a mixture: it is the one
    asked for, else the config's, else the one that most of the source's bytes have.

    Args:
        asked: as torch spells it, or "auto".
    """
    if asked != "auto":
        return SAFETENSORS_NAME[asked]
    text = checkpoint.config.get("text_config")
    for config in (checkpoint.config, text if isinstance(text, dict) else {}):
        declared = config.get("dtype") or config.get("torch_dtype")
        if isinstance(declared, str) and declared.removeprefix("torch.") in SAFETENSORS_NAME:
            return SAFETENSORS_NAME[declared.removeprefix("torch.")]
    nbytes: Counter[str] = Counter()
    for _, tensor in checkpoint.tensors.values():
        if tensor.dtype in TORCH_NAME:
            nbytes[tensor.dtype] += tensor.nbytes
    return max(nbytes, key=lambda dtype: (nbytes[dtype], dtype), default="BF16")


def set_dtype(config: dict[str, Any], dtype: str) -> None:
    """Make config.json name `dtype`, under the keys it has (versions of transformers differ).

    A component of diffusers has none, and is none the better for one that it does not know.
    """
    keys = [key for key in ("dtype", "torch_dtype") if key in config]
    if not keys and "_class_name" not in config:
        keys = ["torch_dtype"]
    config |= dict.fromkeys(keys, dtype)


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """A copy without any quantization_config, in sub-configs either."""
    return {
        key: without_quantization(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in QUANTIZATION_KEYS
    }


def vllm_partners(module: str, packed: Collection[str]) -> list[str]:
    """The packed modules that vLLM loads as one with `module`."""
    layer, experts, _ = module.partition(".experts.")
    if experts:
        return [other for other in packed if other.startswith(f"{layer}.experts.")]
    parent, _, leaf = module.rpartition(".")
    parts = [part for parts in _VLLM_FUSED.values() if leaf in parts for part in parts]
    return [f"{parent}.{part}" for part in parts if f"{parent}.{part}" in packed]


def vllm_fused_modules(kept: Collection[str], packed: Collection[str]) -> list[str]:
    """What vLLM calls the fused forms of kept modules: its skip list speaks of those.

    Raises:
        UsageError: one part of a fused module is kept and another is packed.
    """
    whole, here = set(kept), set(packed)
    experts = {module.partition(".experts.")[0] for module in here if ".experts." in module}
    fused = []
    for module in sorted(whole):
        if ".experts." in module and module.partition(".experts.")[0] in experts:
            raise UsageError(
                f"--target vllm: {module} stays in full precision and other experts of its layer "
                "do not, but vLLM loads them as one: keep them all, or none"
            )
        parent, _, leaf = module.rpartition(".")
        for name, parts in _VLLM_FUSED.items():
            if leaf not in parts or "experts" in parent.split("."):
                continue
            other = next((f"{parent}.{part}" for part in parts if f"{parent}.{part}" in here), None)
            if other is not None:
                raise UsageError(
                    f"--target vllm: {module} stays in full precision and {other} does not, but "
                    f"vLLM loads both as one {name}: keep both, or none"
                )
            fused.append(f"{parent}.{name}")
    return list(dict.fromkeys(fused))


def check_headers(checkpoint: Checkpoint) -> None:
    """Compare the sizes that config.json states with the tensors.

    Raises:
        InputError: the hidden size or the number of layers is another one.
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
    key, count = _first(config, _LAYER_COUNTS)
    if not layers or not count:
        return
    found = max(layers) + 1
    extra = any(_EXTRA_LAYERS.search(k) for k, _ in config_items(checkpoint.config))
    if found < count or (found > count and not extra):
        raise InputError(
            f"{checkpoint.root}: config.json says {key} {count}, but the tensors have {found} "
            "layers: config.json is of another model, or shards are missing. Download both again"
        )


def _check_hidden_size(
    checkpoint: Checkpoint, config: Mapping[str, Any], norms: Mapping[int, str]
) -> None:
    """One layer of another size is a family's own affair; all of them are another model's."""
    key, size = _first(config, _HIDDEN_SIZES)
    if size and norms and size not in norms:
        found, name = next(iter(norms.items()))
        raise InputError(
            f"{checkpoint.root}: config.json says {key} {size}, but {name} has {found} elements: "
            "config.json is of another model. Download both again"
        )


def _first(config: Mapping[str, Any], keys: tuple[str, ...]) -> tuple[str, int]:
    return next(((k, config[k]) for k in keys if type(config.get(k)) is int), ("", 0))


def config_items(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every (key, value) of a config.json, those of its sub-configs included."""
    for key, value in config.items():
        yield key, value
        if isinstance(value, dict):
            yield from config_items(value)
