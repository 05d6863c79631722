"""Group a command's options into panels in its --help."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand, TyperGroup, TyperOption

from . import quick_typer

FORMAT = "Format"
KEPT = "What stays in float"
SCALES = "Choosing scales"
MEASURING = "Measuring"
MERGING = "Merging"
HUB = "Hub"
LIMITS = "Limits (exit code 1)"
CACHE = "Cache"
RUNNING = "Running"
OUTPUT = "Output"

_FEW = 9


class _Quick:
    """What the commands and their group have in common: typer without what nf4 never shows."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the options and arguments, --help among them."""
        return quick_typer.converting_quickly(super().get_params(ctx))  # type: ignore[misc]

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help text."""
        quick_typer.load_display()
        super().format_help(ctx, formatter)  # type: ignore[misc]


class Command(_Quick, TyperCommand):
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


class Group(_Quick, TyperGroup):
    """The commands, with no library loaded that none of them needs."""

    def make_context(self, *arguments: Any, **keywords: Any) -> Any:
        """Read the words before the command; a mistake in them is shown by typer."""
        with quick_typer.errors_shown_quickly():
            return super().make_context(*arguments, **keywords)

    def invoke(self, ctx: Any) -> Any:
        """Read the words of the command and run it; a mistake in them is shown by typer."""
        with quick_typer.errors_shown_quickly():
            return super().invoke(ctx)


def _hide_type_of_flag(option: TyperOption) -> None:
    """Show no type where the option takes no value, instead of typer's `<bool>`."""
    if option.is_flag:
        option.metavar = ""
