"""Options that several commands share, and how sizes are written in them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from ..errors import UsageError
from . import completion, panels

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12,
          "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}  # fmt: skip

EngineOption = Annotated[
    str,
    typer.Option(
        "--engine",
        metavar="NAME",
        show_default=False,
        help="auto (default), cpu, cuda, torch",
        rich_help_panel=panels.RUNNING,
        autocompletion=completion.engines,
    ),
]

DeviceOption = Annotated[
    str | None,
    typer.Option(
        "--device",
        metavar="NAME",
        show_default=False,
        help="GPUs: cuda, cuda:1 or cuda:0,1",
        rich_help_panel=panels.RUNNING,
    ),
]

TorchDtypeOption = Annotated[
    str,
    typer.Option(
        "--dtype",
        metavar="NAME",
        help="What models compute in",
        rich_help_panel=panels.RUNNING,
        autocompletion=completion.dtypes,
    ),
]

TorchDeviceOption = Annotated[
    str | None,
    typer.Option(
        "--device",
        metavar="NAME",
        show_default=False,
        help="cpu or cuda. Default: a GPU if any",
        rich_help_panel=panels.RUNNING,
    ),
]

WorkersOption = Annotated[
    int | None,
    typer.Option(
        "--workers",
        metavar="N",
        help="Threads (default one a processor)",
        rich_help_panel=panels.RUNNING,
    ),
]

MemoryOption = Annotated[
    str | None,
    typer.Option(
        "--memory",
        metavar="SIZE",
        help="Memory to use at most, like 2GB",
        rich_help_panel=panels.RUNNING,
    ),
]

RayOption = Annotated[
    str | None,
    typer.Option(
        "--ray",
        metavar="ADDRESS",
        show_default=False,
        help="Ray cluster: host:port, auto or local",
        rich_help_panel=panels.RUNNING,
    ),
]

JsonOption = Annotated[
    bool,
    typer.Option("--json", help="Print one JSON document instead", rich_help_panel=panels.OUTPUT),
]

HtmlOption = Annotated[
    Path | None,
    typer.Option(
        "--html",
        metavar="FILE",
        show_default=False,
        help="Also write a page with charts there",
        rich_help_panel=panels.OUTPUT,
    ),
]

ShardSizeOption = Annotated[
    str,
    typer.Option(
        "--max-shard-size",
        metavar="SIZE",
        help="Largest output file",
        rich_help_panel=panels.OUTPUT,
    ),
]

FsyncOption = Annotated[
    bool,
    typer.Option(
        "--fsync/--no-fsync",
        show_default=False,
        help="Sync files to the disk (default)",
        rich_help_panel=panels.RUNNING,
    ),
]

QuietOption = Annotated[
    bool,
    typer.Option("--quiet", "-q", help="Print nothing but errors", rich_help_panel=panels.OUTPUT),
]

VerboseOption = Annotated[
    bool,
    typer.Option(
        "--verbose",
        "-v",
        help="Print a line per weight and file, and times",
        rich_help_panel=panels.OUTPUT,
    ),
]


def parse_size(text: str, option: str) -> int:
    """Return the bytes of "5GB" (decimal, as the Hub counts), "512MiB" or a plain number.

    Args:
        option: named in the message.

    Raises:
        UsageError: the text is no size.
    """
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,9})?)\s*([KMGT]?I?)B?\s*", text.upper())
    if match is None or match[2] == "I":
        raise UsageError(f"{option} {text!r} is not a size: write 5GB, 512MiB or bytes")
    return int(float(match[1]) * _UNITS[match[2]])


SourceArgument = Annotated[
    Path,
    typer.Argument(
        help="A directory, a .safetensors file, or org/name or org/name@revision on the Hub",
        show_default=False,
        autocompletion=completion.sources,
    ),
]
