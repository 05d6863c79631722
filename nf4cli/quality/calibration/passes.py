"""Calibration text through a model, block by block: what comes of it is kept after every block.

Each block is run once to see what its linear layers are given, its weights are rounded, and it is
run again with the rounded ones, so that the next block sees what it will be given in the end.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...callbacks import Notify, Progress, no_notice, no_progress
from ...checkpoint.file_io import sync
from ...checkpoint.given_codes import PACKED
from ...checkpoint.importance_file import save
from ...engines.protocol import Engine
from ...format.codebook import codebook
from ...format.config import QuantConfig
from .experts import ExpertWatcher
from .gptq import Feedback, feed_back, relative_loss
from .moments import Moments, Watcher
from .rounding import pack, round_matrix
from .walk import Walk

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ...engines.protocol import F32, U8

UPSTREAM = ("quantized", "full")


@dataclass(frozen=True, slots=True)
class Settings:
    """What decides about the result.

    Attributes:
        method: "rtn" or "gptq".
        upstream: whether a block is given what the "quantized" or the "full" ones before it make.
        feedback: for gptq.
    """

    method: str = "rtn"
    upstream: str = "quantized"
    feedback: Feedback = field(default_factory=Feedback)


def blocks_done(scratch: Path) -> int:
    """How many blocks a pass has kept there."""
    return int(_state(scratch).get("done", 0))


def _state(scratch: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads((scratch / "state.json").read_text())
    except (OSError, ValueError):
        return {}
    return found


def stored_blocks(blocks: Sequence[str], names: Collection[str]) -> list[str]:
    """What the blocks are called in the checkpoint, whose names may lack or have a prefix."""
    found = []
    for block in blocks:
        parts = block.split(".")
        shorter = [".".join(parts[i:]) for i in range(len(parts) - 1)]
        known = (s for s in shorter if any(n.startswith(f"{s}.") for n in names))
        found.append(next(known, block))
    return found


Fixed = Callable[[str], "F32 | None"]
"""The decoded matrix of a weight that is there already, to be measured instead of made."""


class Calibration:
    """One pass over a model.

    Args:
        directory: the checkpoint.
        tokens: int64 [sequences, length].
        scratch: a directory for what is kept between blocks.
        names: weights that will be quantized.
        config: of the conversion.
        settings: of the pass.
        about: what the importance file shall say of itself.
        device: a torch device.
        fixed: see `Fixed`; None to choose codes.

    Attributes:
        losses: by weight, the mean square of what its layer puts out wrongly, in units of what it
            puts out; for rtn as if its inputs were independent.
        importance: by weight.
        progress: told of bytes, see `nbytes`.

    Raises:
        MachineError, UsageError, InputError: see `Walk`.
    """

    def __init__(
        self, directory: Path, tokens: NDArray[np.int64], scratch: Path, names: Collection[str],
        config: QuantConfig, engine: Engine, settings: Settings, about: Mapping[str, Any],
        device: str = "cpu", notify: Notify = no_notice, fixed: Fixed | None = None,
    ) -> None:  # fmt: skip
        self._tokens, self._scratch, self._names = tokens, scratch, frozenset(names)
        self._config, self._engine, self._settings = config, engine, settings
        self._about = dict(about)
        self._notify, self._fixed = notify, fixed
        self.progress: Progress = no_progress
        self.losses: dict[str, float] = {}
        self.importance: dict[str, F32] = {}
        self._key = self._key_of(directory)
        scratch.mkdir(parents=True, exist_ok=True)
        self._walk = Walk(directory, scratch / "offload", device)
        self._stored = stored_blocks(self._walk.blocks, self._names)

    @property
    def nbytes(self) -> int:
        """Of all blocks' weights in float32: what the progress counts."""
        return sum(map(self._walk.nbytes, range(len(self._walk.blocks))))

    def run(self) -> None:
        """All blocks, from where an earlier call with the same arguments got to."""
        done = self._resume()
        self._walk.record(self._tokens[0])
        if not done:
            self._begin()
        for number in range(done):
            self.progress(self._walk.blocks[number], self._walk.nbytes(number))
        for number in range(done, len(self._walk.blocks)):
            self._block(number)

    def save(self, path: Path) -> None:
        """Write the importance file."""
        about = {**self._about, "losses": {k: float(f"{v:.6g}") for k, v in self.losses.items()}}
        save(path, self.importance, about)

    def codes_files(self) -> list[Path]:
        """Where the packed codes are that gptq chose: safetensors files, by weight."""
        return [self._file(number) for number in range(len(self._walk.blocks))]

    def _key_of(self, directory: Path) -> str:
        """Of everything that decides about the result."""
        files = [
            [p.name, p.stat().st_size, p.stat().st_mtime_ns]
            for p in sorted(directory.glob("*.safetensors"))
        ]
        said = [
            files, self._config.as_dict(), asdict(self._settings), sorted(self._names),
            self._about, hashlib.sha256(self._tokens.tobytes()).hexdigest(), self._fixed is None,
        ]  # fmt: skip
        return hashlib.sha256(json.dumps(said).encode()).hexdigest()

    # -- what is kept between blocks ----------------------------------------------------------

    def _file(self, number: int) -> Path:
        return self._scratch / f"block-{number:05}.safetensors"

    def _hidden(self, number: int, create: tuple[int, ...] | None = None) -> Any:
        """What enters a block: float32 [sequences, length, hidden], on the disk."""
        path = self._scratch / f"hidden-{number % 2}.npy"
        if create is None:
            return np.lib.format.open_memmap(path, "r")
        return np.lib.format.open_memmap(path, "w+", np.float32, create)

    def _begin(self) -> None:
        hidden = None
        for start, states in self._walk.first_inputs(self._tokens):
            if hidden is None:
                hidden = self._hidden(0, (len(self._tokens), *states.shape[1:]))
            hidden[start : start + len(states)] = states

    def _resume(self) -> int:
        """Blocks that are done."""
        from safetensors import safe_open

        found = _state(self._scratch)
        if found.get("key") != self._key:
            return 0
        for number in range(found["done"]):
            with safe_open(self._file(number), "numpy") as file:
                for key in file.keys():  # noqa: SIM118 - no mapping
                    kind, _, name = key.partition(":")
                    if kind == "importance":
                        self.importance[name] = file.get_tensor(key)
                self.losses |= json.loads((file.metadata() or {})["losses"])
        self._notify(f"continuing an earlier calibration: {found['done']:,} blocks are done")
        return int(found["done"])

    def _keep(
        self,
        number: int,
        importance: dict[str, F32],
        packed: dict[str, U8],
        losses: dict[str, float],
    ) -> None:
        from safetensors.numpy import save_file

        tensors: dict[str, Any] = {f"importance:{name}": v for name, v in importance.items()}
        tensors |= {f"{PACKED}{name}": codes for name, codes in packed.items()}
        save_file(tensors, self._file(number), {"losses": json.dumps(losses)})
        sync(self._file(number))
        state = self._scratch / "state.json"
        fresh = state.with_suffix(".new")
        fresh.write_text(json.dumps({"key": self._key, "done": number + 1}))
        fresh.replace(state)
        self.importance |= importance
        self.losses |= losses

    # -- one block ----------------------------------------------------------------------------

    def _block(self, number: int) -> None:
        hidden = self._hidden(number)
        after = self._hidden(number + 1, hidden.shape)
        importance: dict[str, F32] = {}
        packed: dict[str, U8] = {}
        losses: dict[str, float] = {}
        with self._walk.block(number) as block:
            inside = [n for n in self._names if n.startswith(f"{self._stored[number]}.")]
            experts = ExpertWatcher(block, inside)
            linears = {
                name: module
                for name, module in self._walk.linears(number).items()
                if name in self._names
            }
            twice = self._settings.upstream == "quantized"
            watcher = Watcher(linears, full=self._settings.method == "gptq")
            with watcher.watching(), experts.watching():
                self._run(number, hidden, after, 0.5 if twice else 1.0)
            for moments in watcher.moments:
                for name in moments.names:
                    importance[name] = moments.importance
                    losses[name] = self._round(name, linears[name], moments, packed)
            importance |= experts.importance(self._notify)
            if twice:
                self._run(number, hidden, after, 0.5)
        after.flush()
        self._keep(number, importance, packed, losses)

    def _run(self, number: int, hidden: Any, after: Any, share: float) -> None:
        """All sequences through a block, which is `share` of the work on it."""
        nbytes, done = int(share * self._walk.nbytes(number)), 0
        for i, states in enumerate(hidden):
            after[i] = self._walk.run(number, states)
            upto = nbytes * (i + 1) // len(hidden)
            self.progress(self._walk.blocks[number], upto - done)
            done = upto

    def _round(self, name: str, module: Any, moments: Moments, packed: dict[str, U8]) -> float:
        """Give a layer the weights that it will have; returns what that costs."""
        import torch

        conv = not isinstance(module, torch.nn.Linear)
        weight = module.weight.T.contiguous() if conv else module.weight
        there = self._fixed(name) if self._fixed else None
        if there is not None:
            decoded = torch.from_numpy(there).to(weight.device)
        else:
            decoded = self._choose(name, weight, moments, packed)
        loss = relative_loss(weight, decoded, moments.second)
        module.weight.copy_(decoded.T if conv else decoded)
        return loss

    def _choose(self, name: str, weight: Any, moments: Moments, packed: dict[str, U8]) -> Any:
        import torch

        book = codebook(self._config.quant_type)
        values, midpoints = (
            torch.from_numpy(t).to(weight.device) for t in (book.values, book.midpoints)
        )
        rounded = round_matrix(weight.cpu().numpy(), moments.importance, self._engine, self._config)
        scale = torch.from_numpy(rounded.scale).to(weight.device)
        ranks = torch.from_numpy(rounded.ranks).to(weight.device)
        if self._settings.method == "gptq":
            ranks = feed_back(
                weight, moments.second, scale, values, midpoints, self._settings.feedback,
                lambda said: self._notify(f"{name}: {said}"),
            )  # fmt: skip
            packed[name] = pack(ranks.cpu().numpy(), self._config.quant_type)
        return values[ranks.long()] * scale
