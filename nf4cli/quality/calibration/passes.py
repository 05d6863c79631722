"""Calibrate a model: run text through it block by block, and keep the results after every block.

All windows go through a block side by side, and stand before each linear layer. Its inputs are
measured, its weights are rounded, and the windows go on through the rounded layer. So every layer
is measured with the inputs that it will have in the output.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...callbacks import Notify, Progress, no_notice, no_progress
from ...checkpoint.importance_file import save
from ...engines.protocol import Engine
from ...errors import InputError, NonFiniteError
from ...format.codebook import codebook
from ...format.config import QuantConfig
from ...planning.formats import formats_of
from ...planning.selection import module_path
from . import gradients
from .defaults import DAMPING
from .experts import ExpertWatcher
from .gptq import corrected, feed_back, relative_loss
from .gradients import LayerGradients
from .moments import Moments
from .rounding import pack, round_matrix, search_threads
from .scratch import BlockResult, Scratch
from .side_by_side import Run, Stops
from .walk import Walk

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ...engines.protocol import F32, U8


@dataclass(frozen=True, slots=True)
class Settings:
    """How codes are chosen.

    Attributes:
        method: "rtn" (round to the nearest), "gptq", or "yaqa".
        damping: of gptq and yaqa.
    """

    method: str = "rtn"
    damping: float = DAMPING


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


_CORRECTED = 0.25
"""Share of the way to what the unrounded model's outputs ask for; docs/quality.md has others."""

Fixed = Callable[[str], "F32 | None"]
"""Gives the decoded matrix of a weight that an output already has; None for one without.

float32 [rows, columns]. Such a weight is measured, and no codes are chosen for it.
"""


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
        self._tokens, self._names = tokens, frozenset(names)
        self._config, self._engine, self._settings = config, engine, settings
        self._recipe_of = formats_of(config)
        self._about = dict(about)
        self._notify, self._fixed = notify, fixed
        self.progress: Progress = no_progress
        self.losses: dict[str, float] = {}
        self.importance: dict[str, F32] = {}
        self._scratch = Scratch(scratch, self._key_of(directory))
        self._walk = Walk(directory, scratch / "offload", device)
        self._stored = stored_blocks(self._walk.blocks, self._names)

    @property
    def nbytes(self) -> int:
        """Bytes of all blocks' weights in float32, times the passes: what the progress counts."""
        passes = 5 if self._settings.method == "yaqa" else 1
        return passes * sum(map(self._walk.nbytes, range(len(self._walk.blocks))))

    def run(self) -> None:
        """Run all blocks, from where an earlier run with the same arguments stopped.

        Raises:
            UsageError, InputError: see `Walk.record` and `Walk.run`.
        """
        kept = self._scratch.kept_blocks()
        for block in kept:
            self.importance |= block.importance
            self.losses |= block.losses
        if kept:
            self._notify(f"continuing an earlier calibration: {len(kept):,} blocks are done")
        self._walk.record(self._tokens[0])
        if not kept and not self._scratch.has_gradients:
            self._begin()
        if self._settings.method == "yaqa":
            self._measure_gradients()
        for number in range(len(kept)):
            self.progress(self._walk.blocks[number], self._walk.nbytes(number))
        for number in range(len(kept), len(self._walk.blocks)):
            self._block(number)

    def save(self, path: Path) -> None:
        """Write the importance file to `path`."""
        about = {**self._about, "losses": {k: float(f"{v:.6g}") for k, v in self.losses.items()}}
        save(path, self.importance, about)

    def codes_files(self) -> list[Path]:
        """Return the safetensors files that hold the packed codes that gptq chose."""
        return [self._scratch.block_file(number) for number in range(len(self._walk.blocks))]

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

    def _begin(self) -> None:
        """Compute and store the inputs of the first block."""
        hidden = None
        for start, states in self._walk.first_inputs(self._tokens):
            if hidden is None:
                hidden = self._scratch.hidden(0, (len(self._tokens), *states.shape[1:]))
            hidden[start : start + len(states)] = states

    def _measure_gradients(self) -> None:
        """Measure all blocks' gradients, unless an earlier run has kept them."""
        blocks = self._walk.blocks

        def passed(number: int) -> None:
            self.progress(blocks[number], self._walk.nbytes(number))

        if self._scratch.has_gradients:
            for number in 4 * list(range(len(blocks))):
                passed(number)
            return
        first = self._scratch.hidden(0)
        states = self._scratch.unrounded((len(blocks) + 1, *first.shape))
        states[0] = first
        gradient = self._scratch.gradient(first.shape)
        gradients.measure(self._walk, states, gradient, self._scratch.gradients_file, passed)
        states.flush()
        self._scratch.keep_gradients()

    # -- one block ----------------------------------------------------------------------------

    def _block(self, number: int) -> None:
        """Measure and round a block's layers one after another, and store the block's outputs."""
        hidden = self._scratch.hidden(number)
        after = self._scratch.hidden(number + 1, hidden.shape)
        with self._walk.block(number) as block:
            inside = [n for n in self._names if n.startswith(f"{self._stored[number]}.")]
            experts = ExpertWatcher(block, inside)
            linears = {
                name: module
                for name, module in self._walk.linears(number).items()
                if name in self._names
            }
            count = len(hidden)
            runs = [Run(i, partial(self._window, number, i, hidden, after)) for i in range(count)]
            known: Mapping[str, LayerGradients] = {}
            unrounded: list[Run] = []
            if self._settings.method == "yaqa":
                known = gradients.load(self._scratch.gradients_file(number))
            if known and self._fixed is None:
                states = self._scratch.unrounded()[number]
                unrounded = [
                    Run(i, partial(self._walk.run, number, states[i]), beside=True)
                    for i in range(count)
                ]
            with experts.watching():
                done = self._layers(linears, runs, unrounded, known)
            done.importance |= experts.importance(self._notify)
        after.flush()
        self._scratch.keep_block(number, done)
        self.importance |= done.importance
        self.losses |= done.losses

    def _window(self, number: int, i: int, hidden: Any, after: Any) -> None:
        """Run one window through a block."""
        after[i] = self._walk.run(number, hidden[i])
        nbytes, count = self._walk.nbytes(number), len(hidden)
        self.progress(self._walk.blocks[number], nbytes * (i + 1) // count - nbytes * i // count)

    def _layers(
        self, linears: Mapping[str, Any], runs: Sequence[Run], unrounded: Sequence[Run],
        known: Mapping[str, LayerGradients],
    ) -> BlockResult:  # fmt: skip
        """Measure and round layers while all runs stand before them, until the runs end.

        Args:
            unrounded: runs with the unrounded model's inputs, which pass a layer before it is
                rounded; or none.
            known: gradients by weight.
        """
        import torch

        done, stops = BlockResult(), Stops(linears)
        everyone = [*runs, *unrounded]
        last: dict[int, Moments] = {}  # by window: the sums that its last input is in
        with torch.no_grad(), stops.watching(everyone):
            for run in everyone:
                run.go_on()
            while (name := stops.next_layer(everyone)) is not None:
                here = [run for run in runs if run.layer == name]
                beside = {run.window: run for run in unrounded if run.layer == name}
                layer = known.get(name)
                moments = _shared(here, last) or self._moments(here, beside, layer)
                last |= {run.window: moments for run in here}
                for run in beside.values():
                    run.go_on()
                if here:  # a router may send unrounded runs alone through a layer
                    done.importance[name] = moments.importance
                    module = linears[name]
                    done.losses[name] = self._round(name, module, moments, layer, done.packed)
                for run in here:
                    run.go_on()
        return done

    def _moments(
        self, runs: Sequence[Run], unrounded: Mapping[int, Run], layer: LayerGradients | None
    ) -> Moments:
        """Add up what a layer is about to be given in all runs.

        Args:
            unrounded: by window, the same in the unrounded model.
            layer: the layer's gradients; None to count all tokens alike.
        """
        sums = Moments(full=self._settings.method != "rtn")
        for run in runs:
            rows = run.rows()
            weights = None if layer is None else layer.weights[run.window].to(rows.device)
            other = unrounded[run.window].rows() if run.window in unrounded else None
            # A router may send other tokens of the window here than in the unrounded model.
            sums.add(
                rows,
                weights if weights is not None and len(weights) == len(rows) else None,
                other if other is not None and other.shape == rows.shape else None,
            )
        return sums

    def _round(
        self, name: str, module: Any, moments: Moments, layer: LayerGradients | None,
        packed: dict[str, U8],
    ) -> float:  # fmt: skip
        """Give a layer its rounded weights, and return their relative loss.

        Args:
            layer: its gradients, for yaqa.
            packed: gets the codes, where they are chosen by feedback.
        """
        import torch

        conv = not isinstance(module, torch.nn.Linear)
        weight = module.weight.T.contiguous() if conv else module.weight
        fixed = self._fixed(name) if self._fixed else None
        if fixed is not None:
            decoded = torch.from_numpy(fixed).to(weight.device)
        else:
            decoded = self._choose(name, weight, moments, layer, packed)
        loss = relative_loss(weight, decoded, moments.second)
        module.weight.copy_(decoded.T if conv else decoded)
        return loss

    def _choose(
        self, name: str, weight: Any, moments: Moments, layer: LayerGradients | None,
        packed: dict[str, U8],
    ) -> Any:  # fmt: skip
        """Return a matrix as its chosen codes decode: float32 tensor [rows, columns].

        Raises:
            InputError: a weight is not finite.
        """
        import torch

        values = torch.from_numpy(codebook(self._config.quant_type).values).to(weight.device)
        recipe = self._recipe_of(module_path(name))
        engine = self._engine
        try:
            rounded = round_matrix(
                weight.cpu().numpy(), moments.importance, engine, recipe, search_threads(engine)
            )
        except NonFiniteError as error:
            raise InputError(
                f"{name} has a NaN or an infinity, so that the model cannot be run: mend the source"
                ", or use --scale search --on-nonfinite keep, which needs no text"
            ) from error
        scale = torch.from_numpy(rounded.scale).to(weight.device)
        ranks = torch.from_numpy(rounded.ranks).to(weight.device)
        if self._settings.method != "rtn":
            damping, second = self._settings.damping, moments.second
            wanted, outputs = weight, None
            if moments.drift is not None:
                wanted = corrected(weight, second, moments.drift, damping, _CORRECTED)
            if layer is not None:
                outputs = [part.to(weight.device) for part in layer.outputs]
            ranks = feed_back(
                wanted, second, scale, self._config.quant_type, damping,
                lambda sentence: self._notify(f"{name}: {sentence}"), outputs,
            )  # fmt: skip
            packed[name] = pack(ranks.cpu().numpy(), self._config.quant_type)
        return values[ranks.long()] * scale


def _shared(runs: Sequence[Run], last: Mapping[int, Moments]) -> Moments | None:
    """Return the sums of the layer before, where all runs stand here with the same input again.

    Args:
        last: by window, the sums that its last input is in.
    """
    sums = {id(last.get(run.window)) for run in runs}
    if len(sums) != 1 or not all(run.shared for run in runs):
        return None
    return last.get(runs[0].window)
