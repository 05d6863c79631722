"""nf4 inspect, of a diffusers pipeline."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from . import common, views

if TYPE_CHECKING:
    from ..records import Checkpoint


def inspect(
    path: Path,
    called: str,
    tensor: str | None,
    json: bool,
    show_tensor: Callable[[Checkpoint, str, bool], None],
) -> None:
    """nf4 inspect: every component with weights that can be read, or one tensor of one of them.

    Args:
        called: what a user reads of `path`.

    Raises:
        UsageError: the tensor's name does not begin with a component's.
    """
    from ..diffusion import components_of
    from ..errors import InputError, UsageError
    from ..inspection import overview
    from ..source import open_checkpoint

    components = components_of(path)
    if tensor is not None:
        name, _, rest = tensor.replace("/", ".", 1).partition(".")
        if name not in components or not rest:
            raise UsageError(
                f"{tensor!r} names no component of {path}: write COMPONENT.TENSOR, where COMPONENT "
                f"is one of {', '.join(components)}"
            )
        show_tensor(open_checkpoint(path / name), rest, json)
        return
    seen = {}
    for name in components:
        try:
            seen[name] = overview(open_checkpoint(path / name))
        except InputError:
            if components[name].converts:
                raise
    if json:
        common.print_json("inspect", {
            "name": path.resolve().name,
            "components": {name: asdict(part) for name, part in seen.items()},
        })  # fmt: skip
        return
    console = common.out_console()
    for name, part in seen.items():
        views.print_overview(console, part, f"{called}/{name}")
