"""Stack the experts of a layer as their class in transformers 5 holds them: in 3-D parameters.

A checkpoint has a matrix for each expert.  transformers 5 stacks them while loading: gate and up of
expert 0, then of expert 1, and so on, are `gate_up_proj` [experts, 2 * width, hidden].  A packed
stack is what bitsandbytes' own parametrization and unsloth read (--target unsloth).  It is one
weight with one quantization state, made of many stored tensors, which are read wherever they lie.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from ..checkpoint.types import Checkpoint, Encoding, View, Weight
from ..errors import InputError, UsageError
from ..format.codebook import BLOCKSIZES, NESTED_BLOCKSIZE
from ..format.config import QuantConfig
from .model_config import config_items
from .plan import TensorPlan
from .weights import FUSED_LIST, LISTED_FAMILIES, ROUTER, Contents

Parts = Mapping[str, tuple[str, ...]]
"""Name of a stack -> last name parts of the matrices of one expert in it, in order."""

_GATED: Parts = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
_NUMBERED: Parts = {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}

FAMILIES: Mapping[str, Parts] = {
    family: parts
    for families, parts in (
        (
            "afmoe axk1 bailing_hybrid cohere2_moe deepseek_v2 deepseek_v3 deepseek_v32 dots1 "
            "ernie4_5_moe exaone_moe flex_olmo glm4_moe glm4_moe_lite glm4v_moe glm_moe_dsa "
            "hunyuan_v1_moe hy_v3 jamba laguna longcat_flash mellum mimo_v2_flash olmoe "
            "qwen2_moe qwen3_5_moe_text qwen3_moe qwen3_next qwen3_omni_moe_thinker solar_open",
            _GATED,
        ),
        ("lfm2_moe minimax minimax_m2 mixtral phimoe", _NUMBERED),
    )
    for family in families.split()
}
"""Family -> the stacks that its class in transformers 5 has, and stacks itself from a checkpoint's
matrices.  tests/planning/test_stacks.py compares it with transformers' own table."""

_IS_ROUTER = re.compile(r"\.router\.(weight|bias)$")
_EXPERT = re.compile(r"((?:.*\.)?experts)\.([0-9]{1,6})\.(\w+)\.weight")
_OF_AN_EXPERT = re.compile(r"((?:.*\.)?experts)\.[0-9]+\.")


def parts_of(config: Mapping[str, Any]) -> Parts | None:
    """Return the stacks of a config's family, or of the one in its sub-configs that has some."""
    types = (v for k, v in config_items(config) if k == "model_type" and isinstance(v, str))
    found = [FAMILIES[family] for family in types if family in FAMILIES]
    return found[0] if found and all(parts == found[0] for parts in found) else None


def as_unsloth_holds(
    content: Contents, checkpoint: Checkpoint
) -> tuple[Contents, frozenset[str], str]:
    """Return (a source's weights as unsloth holds them, names of the stacks among them, the
    expert_layout).

    Raises:
        InputError: see `stacked`.
    """
    if checkpoint.config.get("model_type") in LISTED_FAMILIES:
        listed = _listed(content)
        return listed, frozenset(), "lists" if listed != content else ""
    content, stacks = stacked(content, checkpoint)
    return content, stacks, "stacks" if stacks else ""


def _listed(content: Contents) -> Contents:
    """Return the weights of gpt-oss with a linear layer, and its bias, for each expert."""
    weights: list[Weight] = []
    for weight in content.weights:
        match = FUSED_LIST.fullmatch(weight.name)
        is_whole = weight.view is None and weight.numel > 0 and _is_listable(weight.encoding)
        if match and is_whole and len(weight.shape) == (2 if match[3] else 3):
            weights += _list_of(weight, f"{match[1]}.{match[2]}_projs", bool(match[3]))
        else:
            name = weight.name.replace(*ROUTER) if _IS_ROUTER.search(weight.name) else weight.name
            weights.append(replace(weight, name=name))
    return replace(content, weights=tuple(weights))


def _is_listable(encoding: Encoding | None) -> bool:
    """Return whether experts are stored as floats, or as matrices of codes [out, in] (MXFP4)."""
    return encoding is None or (encoding.transposed and encoding.layout == "rows")


def _list_of(weight: Weight, path: str, is_bias: bool) -> Iterator[Weight]:
    """Yield the matrices [out, in] of the experts in a tensor [experts, in, out], or their biases
    in one of [experts, out].

    Args:
        path: of the list of layers.
    """
    experts, *rest = weight.shape
    rows, width = (1, *rest) if is_bias else rest
    for expert in range(experts):
        if (stored := weight.encoding) is not None:  # the layer's matrix is the one that is stored
            yield replace(
                weight,
                name=f"{path}.{expert}.weight",
                shape=(width, rows),
                encoding=replace(stored, matrices=1, transposed=False, skip=expert),
            )
            continue
        view = View(expert * rows * width, rows, width, width)
        leaf, shape = ("bias", (width,)) if is_bias else ("weight", (width, rows))
        yield replace(weight, name=f"{path}.{expert}.{leaf}", shape=shape, view=view)


def stacked(content: Contents, checkpoint: Checkpoint) -> tuple[Contents, frozenset[str]]:
    """Return a source's weights with the experts of each layer stacked.

    Experts that a source stores as stacks already are weights of one stored tensor, and stay that.

    Returns:
        (the weights, the names of the stacks among them).

    Raises:
        InputError: matrices of a layer are missing, or are of different shapes or dtypes.
    """
    parts = parts_of(checkpoint.config)
    if parts is None:
        return content, frozenset()
    matrices: dict[str, dict[str, Weight]] = {}
    odd = set()
    for weight in content.weights:
        match = _EXPERT.fullmatch(weight.name)
        if match and len(weight.shape) == 2 and match[3] in chain(*parts.values()):
            matrices.setdefault(match[1], {})[weight.name] = weight
        elif other := _OF_AN_EXPERT.match(weight.name):
            odd.add(other[1])  # of a class that this package does not know: it has biases, say
    stacks: dict[str, Weight] = {}  # by the name of each of their matrices
    for path, of_layer in matrices.items():
        if path not in odd:
            for stack in _stacks(path, of_layer, parts, str(checkpoint.root)):
                stacks |= dict.fromkeys((part.name for part in stack.parts), stack)
    written: dict[str, Weight] = {}
    for weight in content.weights:
        kept = stacks.get(weight.name, weight)
        written.setdefault(kept.name, kept)
    names = {stack.name for stack in stacks.values()}
    as_they_are = {w.name for w in written.values() if _is_stored_stack(w, parts)}
    return replace(content, weights=tuple(written.values())), frozenset(names | as_they_are)


def _is_stored_stack(weight: Weight, parts: Parts) -> bool:
    path, _, leaf = weight.name.rpartition(".")
    return leaf in parts and path.rpartition(".")[2] == "experts" and len(weight.shape) == 3


def _stacks(
    path: str, matrices: Mapping[str, Weight], parts: Parts, where: str
) -> Iterator[Weight]:
    """Yield the stacks of one layer.

    Args:
        path: of the module that holds the experts.
        matrices: by name.
        where: the checkpoint, for messages.
    """
    experts = 1 + max(int(name[len(path) + 1 :].partition(".")[0]) for name in matrices)
    for stack, leaves in parts.items():
        named = (f"{path}.{i}.{leaf}.weight" for i in range(experts) for leaf in leaves)
        members = []
        for name in named:  # not all of them: a name may say that there are a million experts
            if name not in matrices:
                raise InputError(
                    f"{where}: {name} is missing, one of the matrices that {path}.{stack} is made "
                    "of: files are missing. Download them again"
                )
            members.append(matrices[name])
        first = members[0]
        for member in members:
            if (member.shape, member.dtype, member.stored.dtype) != (
                first.shape, first.dtype, first.stored.dtype
            ):  # fmt: skip
                raise InputError(
                    f"{where}: {member.name} is {member.stored.dtype} {list(member.shape)} and "
                    f"{first.name} is {first.stored.dtype} {list(first.shape)}: --target unsloth "
                    f"makes one {path}.{stack} of both. Save the source in one dtype, or convert "
                    "with --target transformers"
                )
        rows, columns = first.shape
        shape = (experts, rows * len(leaves), columns)
        yield Weight(
            f"{path}.{stack}", first.dtype, shape, first.shard, first.stored, parts=tuple(members)
        )


def taken_apart(content: Contents, names: Collection[str], checkpoint: Checkpoint) -> Contents:
    """Return a source's weights with some stacks as the matrices that they are made of.

    They are in the order of their stored tensors again: files are written in that order.
    """
    weights = [
        source
        for weight in content.weights
        for source in (weight.sources if weight.name in names else (weight,))
    ]
    weights.sort(key=reading_order(checkpoint))
    return replace(content, weights=tuple(weights))


def reading_order(checkpoint: Checkpoint) -> Callable[[Weight], tuple[int, int]]:
    """Return a sort key: the place in the source of the first of a weight's stored tensors."""
    order = {shard.path: i for i, shard in enumerate(checkpoint.shards)}
    return lambda weight: min((order[s.shard.path], s.stored.start) for s in weight.sources)


_EXPERTS = "--target transformers, which keeps experts in 16 bits"


@dataclass(frozen=True, slots=True)
class _Unit:
    """How many weights are encoded together, and in words what the number comes from."""

    size: int
    words: str


def _unit_of(config: QuantConfig, blocksize: int, nested: bool) -> _Unit:
    if config.scale == "search" and nested:
        unit = NESTED_BLOCKSIZE * blocksize
        return _Unit(unit, f"{unit:,}, {NESTED_BLOCKSIZE} blocks of {blocksize}, whose scales are")
    return _Unit(blocksize, f"the blocksize {blocksize}, whose scale is")


def require_whole_blocks(tensors: Collection[TensorPlan], config: QuantConfig) -> None:
    """Raise UsageError if a block of a packed stack would lie in two stored tensors.

    Each of these is read and encoded by itself, wherever it lies.
    """
    sizes = {
        (t.weight.parts[0].numel, t.state.blocksize, t.state.nested): t
        for t in tensors
        if t.weight.parts and t.state
    }
    for (size, blocksize, nested), tensor in sizes.items():
        unit = _unit_of(config, blocksize, nested)
        if size % unit.size == 0:
            continue
        fitting = [
            b
            for b in BLOCKSIZES
            if not any(s % _unit_of(config, b, nested).size for s, *_ in sizes)
        ]
        smaller = [f"--blocksize {' or '.join(map(str, fitting))}"] if fitting else []
        raise UsageError(
            f"{tensor.weight.parts[0].name} has {size:,} weights, no multiple of {unit.words} "
            f"chosen for all at once: {tensor.name}, which --target unsloth makes of it, would "
            f"have blocks with weights of two experts. Take {' or '.join([*smaller, _EXPERTS])}"
        )
