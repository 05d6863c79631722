"""What `nf4 COMMAND --help` looks like: panels, one line for most options, no word cut off."""

from __future__ import annotations

import re

import pytest
from typer.core import TyperOption
from typer.main import get_command
from typer.testing import CliRunner

from nf4cli.cli import app

PANELS = {  # in the order in which they are shown
    "quantize": ["Arguments", "Options", "Format", "What stays in float", "Choosing scales",
                 "Merging", "Hub", "Running", "Output"],
    "verify": ["Arguments", "Options", "Running", "Output"],
    "eval": ["Arguments", "Options", "Running", "Cache", "Limits (exit code 1)", "Output"],
    "dequantize": ["Arguments", "Options", "Output", "Running"],
    "inspect": ["Arguments", "Options"],
    "plan": ["Arguments", "Options", "Measuring", "What stays in float", "Running", "Output"],
    "attest": ["Arguments", "Options"],
    "push": ["Arguments", "Options"],
    "write-text": ["Arguments", "Options"],
}  # fmt: skip


def shown(command: str, columns: int) -> list[str]:
    """The lines of a command's help on a terminal of this width, without colour."""
    environment = {"COLUMNS": str(columns), "TERM": "dumb", "NO_COLOR": "1"}
    done = CliRunner().invoke(app, [command, "--help"], env=environment)
    assert done.exit_code == 0
    return done.output.splitlines()


def lines_of_options(lines: list[str]) -> dict[str, int]:
    """How many lines each option takes."""
    counts: dict[str, int] = {}
    name = ""
    for line in lines:
        found = re.match(r"│ \*?\s*(--[\w-]+)", line)
        if found:
            name = found[1]
        elif not line.startswith("│"):
            name = ""
        if name:
            counts[name] = counts.get(name, 0) + 1
    return counts


@pytest.mark.parametrize("command", PANELS)
def test_options_stand_in_panels_where_they_are_many(command):
    titles = [m[1] for line in shown(command, 80) if (m := re.match(r"╭─ (.*?) ─", line))]
    assert titles == PANELS[command]


@pytest.mark.parametrize("command", PANELS)
@pytest.mark.parametrize("columns", [80, 100, 120])
def test_an_option_is_one_line_where_one_line_will_do(command, columns):
    lines = shown(command, columns)
    counts = lines_of_options(lines)
    longer = {name for name, count in counts.items() if count > 1}
    assert longer <= ({"--target", "--text"} if columns == 80 else set())
    assert max(counts.values()) <= 2
    assert not [line for line in lines if "…" in line or len(line.rstrip()) > columns]
    assert not [line for line in lines if "<bool>" in line]


@pytest.mark.parametrize("command", PANELS)
def test_every_option_is_shown(command):
    options = [p for p in get_command(app).commands[command].params if isinstance(p, TyperOption)]
    names = {option.opts[0] for option in options} | {"--help"}
    assert set(lines_of_options(shown(command, 80))) == names


@pytest.mark.parametrize("command", ["quantize", "verify", "eval", "dequantize", "inspect"])
def test_the_help_says_that_a_model_may_lie_on_the_hub(command):
    arguments = "\n".join(shown(command, 80)).split("╭─ Options")[0]
    assert "org/name" in arguments
