"""Check the place of an output: it is free, outside of the source, and its disk has room."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
from contextlib import suppress
from pathlib import Path

from ..checkpoint.discovery import MANIFEST, PIPELINE_RECORD
from ..checkpoint.untrusted import is_regular
from ..errors import MachineError, UsageError
from ..planning.model_plan import ModelPlan
from ..planning.resources import RECORD_BYTES, bytes_beside_shards

_LONGEST_NAME = 255  # bytes


def check_output(
    model: ModelPlan, output: Path, workers: int, resume: bool = False, need: int | None = None
) -> None:
    """Refuse an output that exists, overlaps the source, or does not fit on the disk.

    Args:
        workers: threads, each of which needs room for temporary files.
        resume: the run may continue an unfinished one, or accept an output that exists.
        need: bytes of the disk; None for a whole output.

    Raises:
        UsageError: it exists, or it is the source or inside it.
        MachineError: not enough free space.
    """
    require_place(model.root, output, model.is_file, resume)
    if not (resume and holds_output(output)):
        require_disk(output, disk_bytes(model, workers) if need is None else need)


def holds_output(output: Path) -> bool:
    """Return whether nf4 wrote an output there, and no run of another one was begun."""
    begun = (workspace_of(output) / "files").exists()
    return not begun and any(is_regular(output / name) for name in (MANIFEST, PIPELINE_RECORD))


def require_place(root: Path, output: Path, is_file: bool, resume: bool) -> None:
    """Refuse a place as `refuse_place` does, but leave it to the run's workspace with `resume`."""
    if not resume:
        refuse_place(root, output, is_file)


def workspace_of(output: Path) -> Path:
    """Return the directory beside an output that a run works in."""
    output = output.absolute()
    name = f".{output.name}.partial"
    if len(os.fsencode(name)) > _LONGEST_NAME:
        name = f".{hashlib.sha256(os.fsencode(output.name)).hexdigest()}.partial"
    return output.parent / name


def refuse_place(root: Path, output: Path, is_file: bool = False) -> None:
    """Raise UsageError unless `output` is absent or an empty directory, outside of the source.

    Args:
        root: the source, or the directory of a source that is one file.
        is_file: whether the source is one file.
    """
    try:
        source, target = root.resolve(), output.resolve()
    except (OSError, RuntimeError) as error:
        raise UsageError(f"{output} is a loop of symbolic links: choose another output") from error
    inside = source in target.parents and not is_file
    if target == source or inside:
        raise UsageError(
            f"the output {output} is the source directory or lies inside it: give another place, "
            f"such as {source.parent / (source.name + '-out')}"
        )
    if os.path.ismount(output):
        raise UsageError(
            f"{output} is a mount point, and an output takes its place in one rename: give a "
            f"directory inside it, such as {output / source.name}-nf4"
        )
    empty = output.is_dir() and not output.is_symlink() and not any(output.iterdir())
    if os.path.lexists(output) and not empty:
        raise UsageError(f"{output} exists: remove it first, or choose another output")


def require_disk(output: Path, need: int) -> None:
    """Raise MachineError if the disk for `output` has fewer than `need` bytes free.

    What an unfinished run of the same output holds counts as free.
    """
    free = room_for(output)
    if free < need:
        raise MachineError(
            f"the output needs {need:,} bytes and {_parent_of(output)} has {free:,} free: "
            "free some space or choose another disk"
        )


def room_for(output: Path) -> int:
    """Return the free bytes of the disk for `output`, with those that an unfinished run holds."""
    return shutil.disk_usage(_parent_of(output)).free + _bytes_in(workspace_of(output))


def _parent_of(output: Path) -> Path:
    """Return the closest directory above `output` that exists."""
    parent = output.absolute().parent
    while not parent.exists():
        parent = parent.parent
    return parent


def _bytes_in(directory: Path) -> int:
    """Return the bytes that the files of a directory take on the disk; 0 for a link to one."""
    if directory.is_symlink():
        return 0
    total = 0
    for file in directory.rglob("*"):
        with suppress(OSError):  # another run may be removing it
            status = file.lstat()
            total += 512 * status.st_blocks if stat.S_ISREG(status.st_mode) else 0
    return total


def disk_bytes(model: ModelPlan, workers: int) -> int:
    """Return the bytes that a run needs on the output's disk, everything included."""
    return sum(model.file_sizes.values()) + base_bytes(model, workers)


def base_bytes(model: ModelPlan, workers: int) -> int:
    """Return those bytes without the output's weight files: what lies there all the time."""
    parts = sum(bytes_beside_shards(plan, workers) for plan in model.parts.values())
    if not model.is_pipeline:
        return parts
    small = model.copies.nbytes - sum(model.copies.weight_files.values())
    return parts + small + RECORD_BYTES * (len(model.copies.files) + 10)
