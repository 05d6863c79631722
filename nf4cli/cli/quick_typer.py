"""Spare typer the libraries that nf4 has no use for: they cost more than a refusal or a help text.

typer converts each value with pydantic, and loads rich's Markdown and tracebacks with its help.
Here plain values are converted as pydantic converts them; all others, and every message, stay
typer's. A version of typer that works otherwise is left alone.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, get_args, get_origin

import typer

_DIGITS = 15  # of a number that is read here

_UNUSED = {"rich.markdown": "Markdown", "rich.traceback": "Traceback"}
"""What typer.rich_utils imports and nf4 never shows, by module."""


def converting_quickly(params: list[Any]) -> list[Any]:
    """Let options and arguments of typer convert plain values without pydantic; return them."""
    for param in params:
        slow = getattr(param, "get_runtime_param", None)
        described = getattr(param, "type_descriptor", None)
        if slow is not None and described is not None and "get_runtime_param" not in vars(param):
            param.get_runtime_param = partial(_Conversion, described, slow)
    return params


class _Conversion:
    """The conversion of one parameter, called as typer's own is.

    Args:
        described: typer's description of the parameter's type.
        slow: returns typer's conversion.
    """

    def __init__(self, described: Any, slow: Callable[[], Any]) -> None:
        self._described, self._slow = described, slow

    def coerce(self, value: Any, param: Any, ctx: Any) -> Any:
        """Return a parameter's value.

        Raises:
            BadParameter: typer's, for a value that is none.
        """
        several = param.multiple or param.nargs == -1
        if value is None:
            return () if several else None
        info, kind = self._described.parameter_info, self._described.annotation
        if get_origin(kind) is list and isinstance(value, (list, tuple)):
            found = [_plain(item, get_args(kind)[0], info) for item in value]
            if None not in found:
                return found
        elif not several and (one := _plain(value, kind, info)) is not None:
            return one
        return self._slow().coerce(value, param=param, ctx=ctx)


def _plain(value: Any, kind: Any, info: Any) -> Any:
    """Return a value of a type, or None where typer has to look at it."""
    if info.parser is not None or info.allow_dash or info.resolve_path or info.path_type:
        return None
    if kind is str and type(value) is str:
        return value
    if kind is Path and type(value) is str and not (info.exists or info.writable):
        # typer refuses a path that is there and cannot be read.
        usual = info.file_okay and info.dir_okay
        return Path(value) if usual and (os.access(value, os.R_OK) or _is_nowhere(value)) else None
    if kind in (int, float):
        _refuse_words(value, kind)
        number = _number(value, kind)
        lowest, largest = info.min, info.max
        if number is None or info.clamp or (lowest is not None and number < lowest):
            return None
        return number if largest is None or number <= largest else None
    return None


def _refuse_words(value: Any, kind: type) -> None:
    """Raise BadParameter for a text that is certainly no number; typer decides on all others."""
    words = type(value) is str and not any(character.isdigit() for character in value)
    if words and value.strip().lstrip("+-").lower() not in ("nan", "inf", "infinity"):
        raise typer.BadParameter(f"{value!r} is no {'whole ' * (kind is int)}number")


def _is_nowhere(path: str) -> bool:
    try:
        Path(path).stat()
    except OSError:
        return True
    return False


def _number(value: Any, kind: type) -> Any:
    """Return a number of a type, given as that or as plain digits; else None."""
    if type(value) is kind:
        return value
    if type(value) is not str or not value.isascii() or len(value) > _DIGITS:
        return None
    whole, _, rest = value.partition(".")
    if kind is int:
        return int(value) if value.isdecimal() else None
    return float(value) if whole.isdecimal() and (rest or "0").isdecimal() else None


def load_display() -> None:
    """Load what typer shows help and errors with, less Markdown and tracebacks.

    Their place is taken, in typer alone, by a name that loads them at its first use.
    """
    if "typer.rich_utils" in sys.modules:
        return
    absent = [name for name in _UNUSED if name not in sys.modules]
    for name in absent:
        sys.modules[name] = _stand_in(name, _UNUSED[name])
    try:
        importlib.import_module("typer.rich_utils")
    finally:
        for name in absent:
            del sys.modules[name]


def _stand_in(module: str, name: str) -> ModuleType:
    """Return a module with one class, whose instances are those of the real one."""

    class Later:
        def __new__(cls, *arguments: Any, **keywords: Any) -> Any:
            return getattr(importlib.import_module(module), name)(*arguments, **keywords)

        @classmethod
        def from_exception(cls, *arguments: Any, **keywords: Any) -> Any:
            real = getattr(importlib.import_module(module), name)
            return real.from_exception(*arguments, **keywords)

    stand_in = ModuleType(module)
    setattr(stand_in, name, Later)
    return stand_in


@contextmanager
def errors_shown_quickly() -> Iterator[None]:
    """Load what shows a mistake in the command line, if the block raises one."""
    try:
        yield
    except Exception as error:
        if hasattr(error, "format_message"):  # typer's class has no public name in every version
            load_display()
        raise
