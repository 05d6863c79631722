"""Find the packed experts of a checkpoint, as the stacks that transformers 5 holds them in.

They are stacks already (unsloth's layout), or matrices that follow one another in a stack (vLLM's,
and unsloth's for gpt-oss).  The codes of matrices are put together as they are: no weight changes.
Their scales cannot be, where they are double-quantized, and become float32.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from ..checkpoint.packed import PackedWeight
from ..errors import InputError
from ..planning.stacks import parts_of

_MATRIX = re.compile(r"((?:.*\.)?experts)\.([0-9]{1,6})\.(\w+)\.weight")
_OF_LIST = re.compile(r"((?:.*\.)?experts)\.(gate_up|down)_projs\.([0-9]{1,6})\.weight")


@dataclass(frozen=True, slots=True)
class Stack:
    """Packed experts of a layer that a model holds in one parameter.

    Attributes:
        key: name of the parameter, as the checkpoint calls its module.
        shape: [experts, rows, columns] of what the codes decode to.
        members: what it is made of, in order.
        patterns: names of the members of one expert below the module of the experts, `*` for the
            expert's number; () for a stack that is stored as one.
    """

    key: str
    shape: tuple[int, ...]
    members: tuple[PackedWeight, ...]
    patterns: tuple[str, ...] = ()


def stacks_of(
    weights: Mapping[str, PackedWeight], config: Mapping[str, Any], called: str
) -> dict[str, Stack]:
    """Return the stacks of a checkpoint, by key.

    Args:
        weights: the packed weights, by name.
        config: config.json.
        called: what messages call the checkpoint.

    Raises:
        InputError: matrices of a layer are missing, or do not fit together.
    """
    found, parts = {}, parts_of(config)
    lists: dict[tuple[str, str], dict[int, PackedWeight]] = {}
    matrices: dict[tuple[str, str], dict[tuple[int, str], PackedWeight]] = {}
    stack_of = {leaf: stack for stack, leaves in (parts or {}).items() for leaf in leaves}
    for name, weight in weights.items():
        if len(weight.state.shape) == 3 and not name.endswith(".weight"):
            found[name] = Stack(name, weight.state.shape, (weight,))
        elif match := _OF_LIST.fullmatch(name):
            lists.setdefault((match[1], match[2]), {})[int(match[3])] = weight
        elif (match := _MATRIX.fullmatch(name)) and match[3] in stack_of:
            key = match[1], stack_of[match[3]]
            matrices.setdefault(key, {})[int(match[2]), match[3]] = weight
    for (path, kind), of_list in lists.items():
        names = [f"{path}.{kind}_projs.{i}.weight" for i in range(len(of_list))]
        pattern = f"{kind}_projs.*.weight"
        found[f"{path}.{kind}_proj"] = _joined(
            f"{path}.{kind}_proj", names, weights, (pattern,), called
        )
    for (path, stack), of_stack in matrices.items():
        leaves = (parts or {})[stack]
        experts = -(-len(of_stack) // len(leaves))
        names = [f"{path}.{i}.{leaf}.weight" for i in range(experts) for leaf in leaves]
        patterns = tuple(f"*.{leaf}.weight" for leaf in leaves)
        found[f"{path}.{stack}"] = _joined(f"{path}.{stack}", names, weights, patterns, called)
    return found


def _joined(
    key: str, names: list[str], weights: Mapping[str, PackedWeight], patterns: tuple[str, ...],
    called: str,
) -> Stack:  # fmt: skip
    """Return the stack of some matrices.

    Args:
        names: of the matrices, in order.

    Raises:
        InputError: one is missing, or they do not fit together.
    """
    for name in names:
        if name not in weights:
            raise InputError(
                f"{called}: {name} is missing among the packed experts that make up {key}: files "
                "are missing, or it stays in 16 bits. Decode the model first: nf4 dequantize"
            )
    members = tuple(weights[name] for name in names)
    first = members[0].state
    rows, columns = first.shape if len(first.shape) == 2 else (0, 0)
    for member in members:
        state = member.state
        alike = (state.shape, state.blocksize, state.quant_type, state.dtype) == (
            (rows, columns), first.blocksize, first.quant_type, first.dtype
        )  # fmt: skip
        if not alike or prod(state.shape) % state.blocksize:
            raise InputError(
                f"{called}: {member.name} ({list(state.shape)}, {state.quant_type}, blocks of "
                f"{state.blocksize}) cannot be put together with the other experts of its layer: "
                "their blocks are of other kinds, or not full. Decode the model first: nf4 "
                "dequantize"
            )
    shape = (len(members) // len(patterns), rows * len(patterns), columns)
    return Stack(key, shape, members, patterns)
