"""Turn what the files store into the weights that a model holds.

Most tensors are a weight as they lie.  But codes come with their scales (encodings.py), and Llama 4
stores all experts of a layer in two 3-D tensors, while every loader of quantized models expects a
matrix for each expert.  A float64 tensor becomes one of the model's dtype.  And a wrapper around
the model (torch.compile, DDP, PEFT) may have put its own parts into the names (tensor_names.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from ..checkpoint.types import Checkpoint, Region, Shard, TensorInfo, View, Weight
from ..errors import InputError
from ..format.dtypes import FLOAT64, TORCH_NAME
from . import tensor_names
from .encoded_weight import EncodedWeight, Found

_LLAMA4 = ("llama4", "llama4_text")
_FUSED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
_EXPERT = re.compile(
    r"((?:.*\.)?feed_forward\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight"
)
LISTED_FAMILIES = ("gpt_oss",)
"""Families whose experts unsloth holds in lists of linear layers of its own names."""
FUSED_LIST = re.compile(r"((?:.*\.)?experts)\.(gate_up|down)_proj(_bias)?")
"""Name of what becomes such a list: [experts, in, out], or [experts, out]."""
ROUTER = (".router.", ".router.linear.")
"""What the router of such a family is called in the source, and by unsloth."""
_LISTED = re.compile(r"((?:.*\.)?experts)\.(gate_up|down)_projs\.([0-9]{1,6})\.(weight|bias)")
_SOURCE_OF = {part: leaf for leaf, parts in _FUSED.items() for part in parts}


@dataclass(frozen=True, slots=True)
class Contents:
    """What a source holds.

    Attributes:
        weights: in the order of their stored tensors.
        left: stored tensors that no weight is written for -> the reason.
    """

    weights: tuple[Weight, ...]
    left: dict[str, str]

    def as_checkpoint(self, checkpoint: Checkpoint) -> Checkpoint:
        """Return the source as if it stored these weights: the selection looks at that."""
        tensors = {
            w.name: (w.shard, TensorInfo(w.name, w.dtype, w.shape, w.stored.start))
            for w in self.weights
        }
        return replace(checkpoint, tensors=tensors)


def contents(checkpoint: Checkpoint, found: Found, model_dtype: str) -> Contents:
    """Return every weight of a source.

    Args:
        found: its weights that are stored as codes.
        model_dtype: safetensors dtype that codes are decoded to, and float64 tensors rounded to
            ("BF16").

    Raises:
        InputError: two tensors have the same name without what a wrapper added.
    """
    names = tensor_names.names_in_model(checkpoint)
    weights: list[Weight] = []
    for shard in checkpoint.shards:
        for tensor in shard.tensors:
            if tensor.name in found.left:
                continue
            name, encoded = names.get(tensor.name, tensor.name), found.weights.get(tensor.name)
            changed = encoded is not None or tensor.dtype == FLOAT64
            dtype = model_dtype if changed else tensor.dtype
            if _is_fused(checkpoint.config, tensor, encoded):
                weights += _experts(shard, tensor, name, dtype, encoded)
            elif encoded is not None:
                name, encoding = encoded.name(name), encoded.encoding
                weights.append(Weight(name, dtype, encoded.shape, shard, tensor, None, encoding))
            else:
                weights.append(Weight(name, dtype, tensor.shape, shard, tensor))
    return Contents(tuple(weights), found.left)


def _is_fused(config: Any, tensor: TensorInfo, encoded: EncodedWeight | None) -> bool:
    """Return whether a tensor holds all experts of a Llama 4 layer, [experts, in, out]:
    `...feed_forward.experts.gate_up_proj`, or down_proj."""
    path, _, leaf = tensor.name.rpartition(".")
    return (
        config.get("model_type") in _LLAMA4
        and path.endswith("feed_forward.experts")
        and leaf in _FUSED
        and len(tensor.shape) == 3
        and tensor.shape[2] % len(_FUSED[leaf]) == 0
        and (tensor.dtype in (*TORCH_NAME, FLOAT64) or _is_plain(encoded))
        and tensor.numel > 0
    )


def _is_plain(encoded: EncodedWeight | None) -> bool:
    """Return whether a weight's codes lie as its elements do, one in a byte (float8)."""
    if encoded is None:
        return False
    encoding = encoded.encoding
    return encoding.bits == 8 and not encoding.transposed and encoding.columns == encoded.shape[-1]


def _experts(
    shard: Shard, tensor: TensorInfo, name: str, dtype: str, encoded: EncodedWeight | None
) -> Iterator[Weight]:
    """Yield the matrices [out, in] of each expert in a fused tensor [experts, in, out].

    Args:
        name, dtype: of the tensor in the model.
        encoded: how it decodes, None where it holds values.
    """
    path, _, leaf = name.rpartition(".")
    experts, rows, width = tensor.shape
    columns = width // len(_FUSED[leaf])
    for expert in range(experts):
        for part, module in enumerate(_FUSED[leaf]):
            view = View(expert * rows * width + part * columns, rows, columns, width)
            yield Weight(
                f"{path}.{expert}.{module}.weight", dtype, (columns, rows), shard, tensor, view,
                encoded.encoding if encoded else None,
            )  # fmt: skip


def regions(
    config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], where: str
) -> dict[str, Region]:
    """Return the place of each expert's matrix in the fused tensor that the source had.

    This is the way back of `_experts`: matrices [out, in], transposed, become [experts, in, out].

    Args:
        config: of the 4-bit checkpoint.
        shapes: name -> shape of each of its weights that may be an expert's matrix.
        where: the checkpoint, for messages.

    Raises:
        InputError: matrices of a layer are missing, or are of different shapes.
    """
    if config.get("model_type") in LISTED_FAMILIES:
        return _regions_of_lists(shapes, where)
    if config.get("model_type") not in _LLAMA4:
        return {}
    fused: dict[str, dict[tuple[int, str], str]] = {}
    for name in shapes:
        if match := _EXPERT.fullmatch(name):
            key = f"{match[1]}.{_SOURCE_OF[match[3]]}"
            fused.setdefault(key, {})[int(match[2]), match[3]] = name
    text = config.get("text_config")
    stated = (text if isinstance(text, dict) else config).get("num_local_experts")
    found: dict[str, Region] = {}
    for key, names in fused.items():
        experts = 1 + max(expert for expert, _ in names)
        if type(stated) is int and stated > 0:
            experts = max(stated, experts)
        found |= dict(_regions_of(key, names, shapes, experts, where))
    return found


def _regions_of(
    key: str,
    names: Mapping[tuple[int, str], str],
    shapes: Mapping[str, tuple[int, ...]],
    experts: int,
    where: str,
) -> Iterator[tuple[str, Region]]:
    """Yield (name, place) of each matrix of one fused tensor.

    Args:
        key: of the fused tensor.
        names: (expert, part) -> name of the matrix.
        shapes: by name.
        experts: how many the layer has.
    """
    parts = _FUSED[key.rpartition(".")[2]]
    path = key.rpartition(".")[0]
    shape = shapes[next(iter(names.values()))]
    for expert in range(experts):
        for number, part in enumerate(parts):
            name = names.get((expert, part))
            if name is None:
                raise InputError(
                    f"{where}: {path}.{expert}.{part}.weight is missing, one of the {experts} "
                    f"experts that {key} is made of: files are missing, or config.json is of "
                    "another model. Download both again"
                )
            if shapes[name] != shape or len(shape) != 2:
                raise InputError(
                    f"{where}: {name} has shape {list(shapes[name])}, other experts of its layer "
                    f"have {list(shape)}: they make no {key}. Download the checkpoint again"
                )
            columns, rows = shape
            width = columns * len(parts)
            yield (
                name,
                Region(
                    key, (experts, rows, width), (expert * rows) * width + number * columns, width
                ),
            )


def _regions_of_lists(shapes: Mapping[str, tuple[int, ...]], where: str) -> dict[str, Region]:
    """Return the place of each entry of unsloth's lists of experts in the source's tensor.

    Raises:
        InputError: entries of a list are missing, or are of different shapes.
    """
    lists: dict[str, dict[int, str]] = {}
    for name in shapes:
        if match := _LISTED.fullmatch(name):
            key = f"{match[1]}.{match[2]}_proj" + ("_bias" if match[4] == "bias" else "")
            lists.setdefault(key, {})[int(match[3])] = name
    found: dict[str, Region] = {}
    for key, names in lists.items():
        shape = shapes[next(iter(names.values()))]
        for expert, name in names.items():
            if shapes[name] != shape or expert >= len(names):
                raise InputError(
                    f"{where}: the experts that {key} is made of are not all there, or of several "
                    f"shapes ({name} is {list(shapes[name])}). Download the checkpoint again"
                )
            stored = shape[::-1]
            width = stored[-1]
            start = expert * prod(shape)
            found[name] = Region(key, (len(names), *stored), start, width)
    return found
