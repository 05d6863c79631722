"""Describe a weight that a source stores as codes, and what its description is made from."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from ..checkpoint.types import Checkpoint, Encoding, Placed
from ..errors import InputError

WHERE_TO_GO = "start from the original full-precision checkpoint"


@dataclass(frozen=True, slots=True)
class EncodedWeight:
    """A weight that a stored tensor of codes stands for.

    Attributes:
        stored: name of the tensor of codes.
        suffix: what its name ends in, which the name of the weight has not.
        ending: what the name of the weight has instead.
        shape: of the weight.
        encoding: how it decodes.
    """

    stored: str
    suffix: str
    ending: str
    shape: tuple[int, ...]
    encoding: Encoding

    def name(self, stored: str) -> str:
        """Return the name of the weight, given that of the codes (without a wrapper's parts)."""
        return stored.removesuffix(self.suffix) + self.ending


@dataclass(slots=True)
class Found:
    """The encoded weights of a source.

    Attributes:
        weights: by the name of the stored tensor of codes.
        left: tensors that nothing is written for -> the reason.
    """

    weights: dict[str, EncodedWeight] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def add(self, weight: EncodedWeight) -> None:
        """Take a weight, whose companions are left out as tensors of their own."""
        self.weights[weight.stored] = weight
        reason = f"part of a weight in {weight.encoding.format}, which is decoded"
        if weight.encoding.format == FLOAT8:
            reason = "the scales of a float8 weight, which are multiplied in"
        self.left |= {tensor.name: reason for _, tensor in weight.encoding.companions}

    def knows(self, name: str) -> bool:
        """Return whether a tensor is part of a weight that was found."""
        return name in self.weights or name in self.left


FLOAT8 = "float8"
"""The format's name, see `Encoding`."""


def companion(
    checkpoint: Checkpoint, owner: str, name: str, dtypes: Collection[str] | None = None
) -> Placed:
    """Return the tensor that belongs to a tensor of codes.

    Args:
        owner: the tensor of codes.
        name: of the companion.
        dtypes: those that it may have, None for any.

    Raises:
        InputError: it is missing, or has another dtype.
    """
    placed = checkpoint.tensors.get(name)
    shard, tensor = checkpoint.tensors[owner]
    if placed is None:
        raise InputError(
            f"{owner} in {shard.path} is {tensor.dtype} but there is no {name}: it is incomplete. "
            "Download it again"
        )
    if dtypes is not None and placed[1].dtype not in dtypes:
        raise InputError(
            f"{name} in {placed[0].path} is {placed[1].dtype}, expected "
            f"{'one of ' if len(dtypes) > 1 else ''}{', '.join(dtypes)}: {WHERE_TO_GO}"
        )
    return placed


def require_shape(placed: Placed, owner: str, expected: Iterable[tuple[int, ...]]) -> None:
    """Raise InputError if a companion has none of the shapes that fit its tensor of codes.

    Args:
        owner: the tensor of codes with its shape, for messages.
    """
    shard, tensor = placed
    shapes = list(dict.fromkeys(expected))
    if tensor.shape not in shapes:
        fitting = " or ".join(str(list(shape)) for shape in shapes)
        raise InputError(
            f"{tensor.name} in {shard.path} has shape {list(tensor.shape)}, which does not fit "
            f"{owner}: expected {fitting}. Download both again"
        )


def refuse_orphans(checkpoint: Checkpoint, found: Found, suffixes: Mapping[str, str]) -> None:
    """Raise InputError if a companion has no codes beside it.

    Args:
        suffixes: ending of a companion's name -> the tensor of codes, in words.
    """
    for name in checkpoint.tensors:
        suffix = next((s for s in suffixes if name.endswith(s)), None)
        if suffix is not None and not found.knows(name):
            raise InputError(
                f"{name} in {checkpoint.root} has no {suffixes[suffix]} beside it: the checkpoint "
                "is incomplete. Download it again"
            )
