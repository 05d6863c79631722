"""Read and write a recipe: which modules of a model take how many bits, as a TOML file.

`nf4 plan` writes one, a person may edit it, and `nf4 quantize --recipe` runs it.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..checkpoint.types import Checkpoint
from ..checkpoint.untrusted import read_start
from ..errors import InputError
from ..format.config import BLOCKSIZES, ModuleFormat, QuantConfig

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

VERSION = 1
"""Version of the file. A reader refuses any other."""

_MOST_BYTES = 50_000_000  # a name of 100 bytes for each of 500,000 modules
_KEYS = {"recipe", "model", "estimate", "default", "format", "keep"}


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a recipe asks for.

    Attributes:
        blocksize, double_quant: of the modules that no list names.
        formats: of those that are 4-bit in another way.
        keep: patterns of those that stay in 16 bits.
        layout: see `layout_of`; "" where the file does not say what model it is for.
        model: the model's name; "" where the file does not say.
    """

    blocksize: int
    double_quant: bool
    formats: tuple[ModuleFormat, ...]
    keep: tuple[str, ...]
    layout: str = ""
    model: str = ""

    def require_model(self, checkpoint: Checkpoint, where: Path) -> None:
        """Raise InputError if the recipe was made for a model of other weights.

        Args:
            where: the recipe's file, for the message.
        """
        if self.layout and self.layout != layout_of(checkpoint):
            raise InputError(
                f"{where} was made for {self.model or 'another model'}, and the names and shapes "
                f"of {checkpoint.name}'s weights are others: make a recipe of it with nf4 plan. To "
                "try the lists all the same, take the line `layout` out"
            )


def layout_of(checkpoint: Checkpoint) -> str:
    """Return a digest of a model's names and shapes, 32 hexadecimal digits.

    Models that differ in their values or dtype alone, as a model and its fine-tune do, have the
    same.
    """
    digest = hashlib.sha256()
    for name, (_, tensor) in sorted(checkpoint.tensors.items()):
        digest.update(json.dumps([name, tensor.shape]).encode())
    return digest.hexdigest()[:32]


def with_recipe(config: QuantConfig, recipe: Recipe) -> QuantConfig:
    """Return a configuration with the formats and kept modules of a recipe."""
    return replace(
        config, blocksize=recipe.blocksize, double_quant=recipe.double_quant,
        formats=recipe.formats, keep=tuple(dict.fromkeys((*config.keep, *recipe.keep))),
    )  # fmt: skip


def load_recipe(path: Path) -> Recipe:
    """Read a recipe.

    Raises:
        InputError: the file is no recipe of this version.
        OSError: it cannot be read.
    """
    data, size, _ = read_start(path, _MOST_BYTES)
    if size > _MOST_BYTES:
        raise InputError(f"{path} has {size:,} bytes, and a recipe at most {_MOST_BYTES:,}")
    try:
        document = tomllib.loads(data.decode())
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise InputError(f"{path} is no TOML: {error}. nf4 plan writes a recipe") from error
    if "recipe" not in document:
        raise InputError(f"{path} has no line `recipe = {VERSION}`: it is no recipe of nf4 plan")
    if document["recipe"] != VERSION:
        raise InputError(
            f"{path} is a recipe of version {document['recipe']!r}, and this nf4 reads version "
            f"{VERSION}: make it again with nf4 plan"
        )
    try:
        return _recipe(document)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else error
        raise InputError(f"{path}: {what}; docs/plan.md shows what a recipe holds") from error


def _recipe(document: Mapping[str, Any]) -> Recipe:
    if unknown := sorted(document.keys() - _KEYS):
        raise ValueError(f"there is no {unknown[0]!r} in a recipe")
    blocksize, double_quant = _packing(document["default"], "default", set())
    formats = tuple(
        ModuleFormat(*_packing(each, "format", {"modules"}), _patterns(each["modules"], "format"))
        for each in document.get("format", [])
    )
    model = document.get("model", {})
    keep = document.get("keep", {})
    if keep.keys() - {"modules"}:
        raise ValueError("[keep] has more than `modules`")
    return Recipe(
        blocksize, double_quant, formats, _patterns(keep.get("modules", []), "keep"),
        _text(model.get("layout", "")), _text(model.get("name", "")),
    )  # fmt: skip


def _packing(table: Mapping[str, Any], name: str, more: set[str]) -> tuple[int, bool]:
    """Return (blocksize, double_quant) of a table.

    Args:
        more: keys that it may have beside these.
    """
    if unknown := sorted(table.keys() - {"blocksize", "double_quant", *more}):
        raise ValueError(f"[{name}] has no {unknown[0]!r}")
    blocksize, double_quant = table["blocksize"], table["double_quant"]
    if type(blocksize) is not int or blocksize not in BLOCKSIZES:
        raise ValueError(
            f"[{name}] blocksize {blocksize!r} is not one of {', '.join(map(str, BLOCKSIZES))}"
        )
    if type(double_quant) is not bool:
        raise TypeError(f"[{name}] double_quant {double_quant!r} is neither true nor false")
    return blocksize, double_quant


def _patterns(value: object, name: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(v, str) and v for v in value):
        raise TypeError(f"[{name}] modules is no list of names")
    return tuple(value)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"[model] has {value!r} where a text belongs")
    return value


_HEAD = """\
# Which modules of a model take how many bits. `nf4 plan` wrote this file; edit it as you like.
#   nf4 quantize SOURCE OUTPUT --recipe THIS_FILE
# A module that no list names has the format of [default]. Move a name from one list to another, or
# write a pattern as for --keep: "*.down_proj", "layers.0". A pattern that names no 4-bit module is
# an error. What nf4 keeps in any case (embeddings, heads, norms) stands in no list.
"""


def text_of(recipe: Recipe, estimate: Sequence[tuple[str, str | float | int]]) -> str:
    """Return a recipe's file, the same for the same recipe.

    Args:
        estimate: (key, value) of what the recipe is expected to give, for people to read.
    """
    return "".join(_pieces(recipe, estimate))


def _pieces(recipe: Recipe, estimate: Sequence[tuple[str, str | float | int]]) -> Iterator[str]:
    yield f"{_HEAD}recipe = {VERSION}\n\n[model]\n"
    yield f"name = {_quoted(recipe.model)}\n# Of the names and shapes of its weights.\n"
    yield f"layout = {_quoted(recipe.layout)}\n\n[estimate]\n"
    for key, value in estimate:
        yield f"{key} = {_quoted(value) if isinstance(value, str) else value}\n"
    yield "\n[default]\n" + _packing_lines(recipe.blocksize, recipe.double_quant)
    for each in recipe.formats:
        yield "\n[[format]]\n" + _packing_lines(each.blocksize, each.double_quant)
        yield _list(each.modules)
    yield "\n[keep]  # in 16 bits\n" + _list(recipe.keep)


def _packing_lines(blocksize: int, double_quant: bool) -> str:
    bits = bits_of(blocksize, double_quant)
    return (
        f"blocksize = {blocksize}  # {bits:.4g} bits a weight\n"
        f"double_quant = {'true' if double_quant else 'false'}\n"
    )


def bits_of(blocksize: int, double_quant: bool) -> float:
    """Return the bits of a weight in a large matrix: its code, and its part of the scales.

    A scale is a float32; a nested one has 8 bits, and 256 of them a float32.
    """
    return 4 + (8 + 32 / 256 if double_quant else 32) / blocksize


def _list(patterns: Sequence[str]) -> str:
    lines = "".join(f"  {_quoted(pattern)},\n" for pattern in sorted(patterns))
    return f"modules = [\n{lines}]\n" if patterns else "modules = []\n"


def _quoted(text: str) -> str:
    """Return a TOML string; of what JSON escapes, TOML reads all but the delete character."""
    return json.dumps(text, ensure_ascii=True).replace("\x7f", "\\u007f")
