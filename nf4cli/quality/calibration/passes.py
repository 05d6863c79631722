"""Calibrate a model: run text through it block by block, and keep the results after every block.

All windows go through a block side by side, and stand before each linear layer. Its inputs are
measured, its weights are rounded, and the windows go on through the rounded layer. So every layer
is measured with the inputs that it will have in the output.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
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
from ...planning.formats import formats_of
from ...planning.selection import module_path
from .experts import ExpertWatcher
from .gptq import DAMPING, feed_back, relative_loss
from .moments import Moments
from .rounding import pack, round_matrix
from .side_by_side import Run, Stops
from .walk import Walk

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ...engines.protocol import F32, U8


@dataclass(frozen=True, slots=True)
class Settings:
    """How codes are chosen.

    Attributes:
        method: "rtn" (round to the nearest) or "gptq".
        damping: of gptq.
    """

    method: str = "rtn"
    damping: float = DAMPING


def blocks_done(scratch: Path) -> int:
    """Return how many blocks an unfinished pass has kept in its directory."""
    return int(_state(scratch).get("done", 0))


def _state(scratch: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = json.loads((scratch / "state.json").read_text())
    except (OSError, ValueError):
        return {}
    return state


def stored_blocks(blocks: Sequence[str], names: Collection[str]) -> list[str]:
    """Return the names of the blocks in the checkpoint, which may lack a prefix that the model has.

    Args:
        blocks: names in the model.
        names: of weights in the checkpoint.
    """
    stored = []
    for block in blocks:
        parts = block.split(".")
        suffixes = [".".join(parts[i:]) for i in range(len(parts) - 1)]
        matching = (s for s in suffixes if any(n.startswith(f"{s}.") for n in names))
        stored.append(next(matching, block))
    return stored


Fixed = Callable[[str], "F32 | None"]
"""Gives the decoded matrix of a weight that an output already has; None for one without.

float32 [rows, columns]. Such a weight is measured, and no codes are chosen for it.
"""


@dataclass(eq=False)
class _Block:
    """The results of one block, by weight; see `Calibration`.

    Attributes:
        packed: the codes, uint8 [(elements + 1) // 2], where they were chosen by feedback.
    """

    importance: dict[str, F32] = field(default_factory=dict)
    packed: dict[str, U8] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)


class Calibration:
    """One pass over a model.

    Args:
        directory: the checkpoint.
        tokens: int64 [sequences, length].
        scratch: a directory for the results between blocks.
        names: weights that will be quantized.
        config: recipe of the conversion.
        engine: the one that will convert.
        settings: how codes are chosen.
        about: facts of this calibration that its importance file records.
        device: a torch device.
        notify: told what a user should know.
        fixed: weights that are only measured, see `Fixed`; None to choose codes for all.

    Attributes:
        losses: by weight, the mean square error of its layer's outputs in units of their mean
            square; for rtn as if the inputs were independent of each other.
        importance: float32 [columns] by weight.
        progress: told the bytes of work done, `nbytes` in all.

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
        self._recipe_of = formats_of(config)
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
        """Bytes of all blocks' weights in float32, which is what the progress counts."""
        return sum(map(self._walk.nbytes, range(len(self._walk.blocks))))

    def run(self) -> None:
        """Run all blocks, from where an earlier run with the same arguments stopped.

        Raises:
            UsageError, InputError: see `Walk.record` and `Walk.run`.
        """
        done = self._resume()
        self._walk.record(self._tokens[0])
        if not done:
            self._begin()
        for number in range(done):
            self.progress(self._walk.blocks[number], self._walk.nbytes(number))
        for number in range(done, len(self._walk.blocks)):
            self._block(number)

    def save(self, path: Path) -> None:
        """Write the importance file to `path`."""
        about = {**self._about, "losses": {k: float(f"{v:.6g}") for k, v in self.losses.items()}}
        save(path, self.importance, about)

    def codes_files(self) -> list[Path]:
        """Return the safetensors files that hold the packed codes that gptq chose."""
        return [self._file(number) for number in range(len(self._walk.blocks))]

    def _key_of(self, directory: Path) -> str:
        """Return a digest of everything that decides about the result."""
        files = [
            [p.name, p.stat().st_size, p.stat().st_mtime_ns]
            for p in sorted(directory.glob("*.safetensors"))
        ]
        inputs = [
            files, self._config.as_dict(), asdict(self._settings), sorted(self._names),
            self._about, hashlib.sha256(self._tokens.tobytes()).hexdigest(), self._fixed is None,
        ]  # fmt: skip
        return hashlib.sha256(json.dumps(inputs).encode()).hexdigest()

    # -- the state between blocks -------------------------------------------------------------

    def _file(self, number: int) -> Path:
        return self._scratch / f"block-{number:05}.safetensors"

    def _hidden(self, number: int, create: tuple[int, ...] | None = None) -> Any:
        """Open the inputs of a block: float32 [sequences, length, hidden], a file mapped to memory.

        Args:
            create: shape of a new file; None to read the one that is there.
        """
        path = self._scratch / f"hidden-{number % 2}.npy"
        if create is None:
            return np.lib.format.open_memmap(path, "r")
        return np.lib.format.open_memmap(path, "w+", np.float32, create)

    def _begin(self) -> None:
        """Compute and store the inputs of the first block."""
        hidden = None
        for start, states in self._walk.first_inputs(self._tokens):
            if hidden is None:
                hidden = self._hidden(0, (len(self._tokens), *states.shape[1:]))
            hidden[start : start + len(states)] = states

    def _resume(self) -> int:
        """Load the results of the blocks that are done, and return their number."""
        from safetensors import safe_open

        state = _state(self._scratch)
        if state.get("key") != self._key:
            return 0
        for number in range(state["done"]):
            with safe_open(self._file(number), "numpy") as file:
                for key in file.keys():  # noqa: SIM118 - no mapping
                    kind, _, name = key.partition(":")
                    if kind == "importance":
                        self.importance[name] = file.get_tensor(key)
                self.losses |= json.loads((file.metadata() or {})["losses"])
        self._notify(f"continuing an earlier calibration: {state['done']:,} blocks are done")
        return int(state["done"])

    def _keep(self, number: int, done: _Block) -> None:
        """Store the results of a block, then count it as done."""
        from safetensors.numpy import save_file

        tensors: dict[str, Any] = {f"importance:{name}": v for name, v in done.importance.items()}
        tensors |= {f"{PACKED}{name}": codes for name, codes in done.packed.items()}
        save_file(tensors, self._file(number), {"losses": json.dumps(done.losses)})
        sync(self._file(number))
        state = self._scratch / "state.json"
        fresh = state.with_suffix(".new")
        fresh.write_text(json.dumps({"key": self._key, "done": number + 1}))
        fresh.replace(state)
        self.importance |= done.importance
        self.losses |= done.losses

    # -- one block ----------------------------------------------------------------------------

    def _block(self, number: int) -> None:
        """Measure and round a block's layers one after another, and store the block's outputs."""
        hidden = self._hidden(number)
        after = self._hidden(number + 1, hidden.shape)
        with self._walk.block(number) as block:
            inside = [n for n in self._names if n.startswith(f"{self._stored[number]}.")]
            experts = ExpertWatcher(block, inside)
            linears = {
                name: module
                for name, module in self._walk.linears(number).items()
                if name in self._names
            }
            runs = [
                Run(partial(self._window, number, i, hidden, after)) for i in range(len(hidden))
            ]
            with experts.watching():
                done = self._layers(linears, runs)
            done.importance |= experts.importance(self._notify)
        after.flush()
        self._keep(number, done)

    def _window(self, number: int, i: int, hidden: Any, after: Any) -> None:
        """Run one window through a block."""
        after[i] = self._walk.run(number, hidden[i])
        nbytes, count = self._walk.nbytes(number), len(hidden)
        self.progress(
            self._walk.blocks[number], nbytes * (i + 1) // count - nbytes * i // count
        )

    def _layers(self, linears: Mapping[str, Any], runs: Sequence[Run]) -> _Block:
        """Measure and round layers while all runs stand before them, until the runs end."""
        import torch

        done, stops = _Block(), Stops(linears)
        moments: dict[int, Moments] = {}  # by run: the sums that its last input is in
        with torch.no_grad(), stops.watching(runs):
            for run in runs:
                run.go_on()
            while (name := stops.next_layer(runs)) is not None:
                here = [run for run in runs if run.layer == name]
                sums = {id(moments.get(id(run))): moments.get(id(run)) for run in here}
                shared = next(iter(sums.values())) if len(sums) == 1 else None
                if shared is None or not all(run.shared for run in here):
                    shared = Moments(full=self._settings.method != "rtn")
                    for run in here:
                        shared.add(run.states.reshape(-1, run.states.shape[-1]).float())
                moments |= {id(run): shared for run in here}
                done.importance[name] = shared.importance
                done.losses[name] = self._round(name, linears[name], shared, done.packed)
                for run in here:
                    run.go_on()
        return done

    def _round(self, name: str, module: Any, moments: Moments, packed: dict[str, U8]) -> float:
        """Give a layer its rounded weights, and return their relative loss.

        Args:
            packed: gets the codes, where gptq chooses them.
        """
        import torch

        conv = not isinstance(module, torch.nn.Linear)
        weight = module.weight.T.contiguous() if conv else module.weight
        fixed = self._fixed(name) if self._fixed else None
        if fixed is not None:
            decoded = torch.from_numpy(fixed).to(weight.device)
        else:
            decoded = self._choose(name, weight, moments, packed)
        loss = relative_loss(weight, decoded, moments.second)
        module.weight.copy_(decoded.T if conv else decoded)
        return loss

    def _choose(self, name: str, weight: Any, moments: Moments, packed: dict[str, U8]) -> Any:
        """Return a matrix as its chosen codes decode: float32 tensor [rows, columns]."""
        import torch

        values = torch.from_numpy(codebook(self._config.quant_type).values).to(weight.device)
        recipe = self._recipe_of(module_path(name))
        rounded = round_matrix(weight.cpu().numpy(), moments.importance, self._engine, recipe)
        scale = torch.from_numpy(rounded.scale).to(weight.device)
        ranks = torch.from_numpy(rounded.ranks).to(weight.device)
        if self._settings.method == "gptq":
            ranks = feed_back(
                weight, moments.second, scale, self._config.quant_type, self._settings.damping,
                lambda sentence: self._notify(f"{name}: {sentence}"),
            )  # fmt: skip
            packed[name] = pack(ranks.cpu().numpy(), self._config.quant_type)
        return values[ranks.long()] * scale
