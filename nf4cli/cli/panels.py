"""Group a command's options into panels in its --help."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand, TyperOption

FORMAT = "Format"
KEPT = "What stays in float"
SCALES = "Choosing scales"
HUB = "Hub"
LIMITS = "Limits (exit code 1)"
CACHE = "Cache"
RUNNING = "Running"
OUTPUT = "Output"

_FEW = 10


class Command(TyperCommand):
    """A command with options in panels where they are many, in one list where they are few.

    Options without a panel are the everyday ones: typer shows them first, under "Options".
    """

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        options = [param for param in self.params if isinstance(param, TyperOption)]
        for option in options:
            _hide_type_of_flag(option)
            if len(options) <= _FEW:
                option.rich_help_panel = None

    def get_help_option(self, ctx: Any) -> TyperOption | None:
        """Return --help, or None where the command has none."""
        option = super().get_help_option(ctx)
        if option is not None:
            _hide_type_of_flag(option)
            option.help = "Show this message and exit"
        return option


def _hide_type_of_flag(option: TyperOption) -> None:
    """Show no type where the option takes no value, instead of typer's `<bool>`."""
    if option.is_flag:
        option.metavar = ""
