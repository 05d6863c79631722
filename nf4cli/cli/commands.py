"""The commands by name, each imported and made when it is asked for.

Of one command typer reads some forty options, and imports what they are shown with; --version and
a command beside it need none of that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any

import typer
from typer.main import get_command

from .panels import Command

_FUNCTIONS = {
    "quantize": "quantize", "plan": "plan", "verify": "verify", "dequantize": "dequantize",
    "inspect": "inspect", "diff": "diff", "attest": "attest", "push": "push", "eval": "eval_",
    "write-text": "write_text",
}  # fmt: skip
"""The function of each command, in the module with the command's name; in the order of --help."""


class Commands(Mapping[str, Any]):
    """The commands of typer by name."""

    def __init__(self) -> None:
        self._made: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._made:
            function = _FUNCTIONS[name]
            module = import_module(f"{__package__}.{name.replace('-', '_')}")
            alone = typer.Typer(add_completion=False)
            alone.command(name, cls=Command)(getattr(module, function))
            self._made[name] = get_command(alone)
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(_FUNCTIONS)

    def __len__(self) -> int:
        return len(_FUNCTIONS)
