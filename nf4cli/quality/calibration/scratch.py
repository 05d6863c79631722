"""Keep what a calibration has found on the disk, so that a run can go on where one stopped."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...checkpoint.file_io import allocate, sync
from ...checkpoint.given_codes import PACKED

if TYPE_CHECKING:
    from ...engines.protocol import F32, U8

_IMPORTANCE = "importance:"


@dataclass(eq=False)
class BlockResult:
    """The results of one block, by weight.

    Attributes:
        importance: float32 [columns].
        packed: the codes, uint8 [(elements + 1) // 2], where error feedback chose them.
        losses: see `Calibration`.
    """

    importance: dict[str, F32] = field(default_factory=dict)
    packed: dict[str, U8] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)


class Scratch:
    """A calibration's directory.

    Args:
        directory: is made where there is none.
        key: a digest of all that decides about the results. What lies there under another key
            counts as nothing.

    Attributes:
        directory: as given.
    """

    def __init__(self, directory: Path, key: str) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory, self._key = directory, key

    # -- the states of all windows ----------------------------------------------------------------

    def hidden(self, number: int, create: tuple[int, ...] | None = None) -> Any:
        """Open the inputs of a block: float32 [windows, length, hidden], a file mapped to memory.

        Args:
            create: shape of a new file; None to read the one that is there.

        Raises:
            OSError: the disk is full or fails.
        """
        return _mapped(self.directory / f"hidden-{number % 2}.npy", create)

    def unrounded(self, create: tuple[int, ...] | None = None) -> Any:
        """Open the inputs of all blocks in the unrounded model, and the last one's outputs.

        float32 [blocks + 1, windows, length, hidden]; see `hidden`.
        """
        return _mapped(self.directory / "unrounded.npy", create)

    def gradient(self, create: tuple[int, ...]) -> Any:
        """Make a file for the gradients by a block's outputs; see `hidden`."""
        return _mapped(self.directory / "gradient.npy", create)

    # -- results ----------------------------------------------------------------------------------

    def block_file(self, number: int) -> Path:
        """Return the file that holds a block's results."""
        return self.directory / f"block-{number:05}.safetensors"

    def gradients_file(self, number: int) -> Path:
        """Return the file that holds a block's gradients (gradients.py)."""
        return self.directory / f"gradients-{number:05}.safetensors"

    @property
    def has_gradients(self) -> bool:
        """Tell whether the gradients of all blocks are there."""
        return bool(self._state().get("gradients"))

    def keep_gradients(self) -> None:
        """Count the gradients of all blocks as measured."""
        self._write_state(self._state() | {"gradients": True})

    def keep_block(self, number: int, result: BlockResult) -> None:
        """Store the results of a block, then count it as done."""
        from safetensors.numpy import save_file

        tensors: dict[str, Any] = {f"{_IMPORTANCE}{n}": v for n, v in result.importance.items()}
        tensors |= {f"{PACKED}{name}": codes for name, codes in result.packed.items()}
        save_file(tensors, self.block_file(number), {"losses": json.dumps(result.losses)})
        sync(self.block_file(number))
        self._write_state(self._state() | {"done": number + 1})

    def kept_blocks(self) -> list[BlockResult]:
        """Return the results of the blocks that are done, without their codes."""
        from safetensors import safe_open

        found = []
        for number in range(int(self._state().get("done", 0))):
            result = BlockResult()
            with safe_open(self.block_file(number), "numpy") as file:
                for key in file.keys():  # noqa: SIM118 - no mapping
                    if key.startswith(_IMPORTANCE):
                        result.importance[key.removeprefix(_IMPORTANCE)] = file.get_tensor(key)
                result.losses = json.loads((file.metadata() or {})["losses"])
            found.append(result)
        return found

    def _state(self) -> dict[str, Any]:
        state = _read_state(self.directory)
        return state if state.get("key") == self._key else {}

    def _write_state(self, state: dict[str, Any]) -> None:
        path = self.directory / "state.json"
        fresh = path.with_suffix(".new")
        fresh.write_text(json.dumps(state | {"key": self._key}))
        fresh.replace(path)


def what_is_kept(directory: Path) -> str:
    """Return in words what an unfinished calibration has kept in its directory, "" for nothing."""
    state = _read_state(directory)
    if done := int(state.get("done", 0)):
        return f"{done:,} blocks are calibrated"
    return "the gradients of all blocks are measured" if state.get("gradients") else ""


def _read_state(directory: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = json.loads((directory / "state.json").read_text())
    except (OSError, ValueError):
        return {}
    return state


def _mapped(path: Path, create: tuple[int, ...] | None) -> Any:
    """Open an array of float32 in a file.

    Args:
        create: shape of a new file, whose blocks are reserved: a write to memory that finds no room
            on the disk would end the process. None to read the file that is there.
    """
    if create is None:
        return np.lib.format.open_memmap(path, "r")
    array = np.lib.format.open_memmap(path, "w+", np.float32, create)
    with path.open("r+b") as file:
        allocate(file.fileno(), path.stat().st_size)
    return array
