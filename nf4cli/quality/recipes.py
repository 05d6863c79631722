"""Choose a format for each module of a model within a budget: what `nf4 plan` writes down."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..checkpoint import bnb_format
from ..checkpoint.bnb_format import QuantState
from ..convert.listener import Stage
from ..convert.measure_errors import WeightError, measured_bytes, weight_errors
from ..errors import UsageError
from ..format.codebook import NESTED_BLOCKSIZE
from ..format.config import QuantConfig
from ..format.dtypes import ITEMSIZE, SAFETENSORS_NAME
from ..planning import skip_list, vllm_rules
from ..planning.allocation import Allocation, Option, allocate
from ..planning.families import names_of
from ..planning.formats import formats_like
from ..planning.plan import Plan, TensorPlan
from ..planning.recipe_file import Recipe, bits_of, layout_of, text_of, with_recipe
from ..planning.resources import unit_of
from ..planning.selection import module_path
from ..planning.vllm_rules import require_loadable
from ..units import format_size
from .expected_losses import ExpectedLosses, Packing

if TYPE_CHECKING:
    from ..checkpoint.types import Checkpoint
    from ..convert.listener import Listener
    from ..engines.protocol import Engine
    from ..planning.resources import Resources
    from .calibration.run import Calibrating
    from .sensitivity import Checked, Rounding, Sensitivity

PACKINGS = tuple((blocksize, nested) for blocksize in (32, 64, 128) for nested in (True, False))
"""The 4-bit formats to choose from."""
REFERENCE = 64
"""The blocksize whose estimates are checked by rounding some modules alone."""
_TRIES = 50
_STUDENT = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
    2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056,
    2.052, 2.048, 2.045, 2.042, 1.96,
)  # fmt: skip
"""Standard errors of a 95% interval of a mean, by degrees of freedom from 1; the last for more."""


@dataclass(frozen=True)
class Budget:
    """What may be spent: one of three bounds.

    Attributes:
        bits: most bits of a weight in the linear layers, with their scales.
        max_size: most bytes of all output shards.
        max_kl: most KL divergence a token, as estimated on a text.

    Raises:
        UsageError: not exactly one is given, or it is no positive number.
    """

    bits: float | None = None
    max_size: int | None = None
    max_kl: float | None = None

    def __post_init__(self) -> None:
        bounds = {"--bits": self.bits, "--max-size": self.max_size, "--max-kl": self.max_kl}
        given = {option: value for option, value in bounds.items() if value is not None}
        if len(given) != 1:
            raise UsageError(
                f"say one budget, --bits, --max-size or --max-kl: {len(given)} are given"
            )
        ((option, value),) = given.items()
        if not 0 < value < float("inf"):
            raise UsageError(f"{option} {value} is no positive number")


@dataclass(frozen=True)
class Subject:
    """The model that a recipe is made for, and what measures it.

    Attributes:
        path: its directory or file.
        checkpoint: the same, opened.
        config: the recipe to go by for everything but formats.
        plan_of: makes the plan of a recipe.
        calibrating: text to measure modules with; None to go by the error of the weights.
        engine: rounds.
        resources: of a run, given the number of tensors and the elements encoded together.
        device: a device of the engine, as a user names it; None for its default.
        listener: told of stages, progress and notes.
    """

    path: Path
    checkpoint: Checkpoint
    config: QuantConfig
    plan_of: Callable[[QuantConfig], Plan]
    calibrating: Calibrating | None
    engine: Engine
    resources: Callable[[int, int], Resources]
    device: str | None
    listener: Listener


@dataclass(frozen=True)
class Module:
    """A module, or several that a loader wants alike, in the chosen format.

    Attributes:
        paths: of its modules.
        elements: of its weights.
        packing: (blocksize, double_quant), None for 16 bits.
        nbytes: in the output.
        loss: that is expected of it.
    """

    paths: tuple[str, ...]
    elements: int
    packing: Packing | None
    nbytes: int
    loss: float


@dataclass(frozen=True)
class Allocated:
    """A recipe and what it is expected to give.

    Attributes:
        recipe: what `nf4 quantize --recipe` runs.
        plan: of the output that it makes.
        modules: in the order of the model.
        bits: bits of a weight in the linear layers.
        loss: expected: KL divergence a token with a text, else the sum of relative squared errors
            times sizes, a share of all weights.
        bound: no choice within the budget is expected to lose less.
        uniform: the best choice of one format for all modules within the budget; None for none.
        uniform_loss: that is expected of it.
        saved: interval of 95% of the loss saved against it, as a share; None without a text, or
            with a single window of it.
        check: of the estimate; None without a text.
        method: "text" or "weights".
    """

    recipe: Recipe
    plan: Plan
    modules: Sequence[Module]
    bits: float
    loss: float
    bound: float
    uniform: Packing | None
    uniform_loss: float | None
    saved: tuple[float, float] | None
    check: Checked | None
    method: str

    @property
    def config(self) -> QuantConfig:
        """The recipe as `nf4cli.quantize` takes it."""
        return self.plan.config

    @property
    def text(self) -> str:
        """The recipe's file."""
        words = {
            "text": "KL divergence a token on the calibration text, to second order",
            "weights": "squared error of weights in units of their squares",
        }
        estimate: list[tuple[str, str | float | int]] = [
            ("bits", float(f"{self.bits:.6g}")),
            ("shard_bytes", self.plan.shard_bytes),
            ("loss", float(f"{self.loss:.6g}")),
            ("loss_is", words[self.method]),
        ]
        if self.uniform is not None and self.uniform_loss is not None:
            estimate += [
                ("uniform_bits", bits_of(*self.uniform)),
                ("uniform_loss", float(f"{self.uniform_loss:.6g}")),
            ]
        return text_of(self.recipe, estimate)


@dataclass(frozen=True)
class _Unit:
    """Modules that have to be alike, and what is known of them."""

    paths: tuple[str, ...]
    tensors: tuple[TensorPlan, ...]

    @property
    def elements(self) -> int:
        return sum(tensor.numel for tensor in self.tensors)


_Found = tuple[Recipe, Plan, list[Module], Allocation]


class Choosing:
    """The choice for one model, which is measured once for all budgets."""

    def __init__(self, subject: Subject) -> None:
        self._subject, self._checkpoint = subject, subject.checkpoint
        self._plan = subject.plan_of(subject.config)
        require_loadable(self._plan)
        self._never_kept: set[str] = set()
        self._by_most: dict[int, list[dict[Packing | None, float]]] = {}

    @cached_property
    def _units(self) -> list[_Unit]:
        """Return what has a format of its own, in the order of the model."""
        by_module: dict[str, list[TensorPlan]] = {}
        for tensor in self._plan.tensors:
            if tensor.state is not None:
                by_module.setdefault(module_path(tensor.name), []).append(tensor)
        units, done = [], set[str]()
        for path in by_module:
            if path in done:
                continue
            together = [path]
            if self._subject.config.target == "vllm":
                together = sorted({path, *vllm_rules.partners(path, by_module)})
            done.update(together)
            tensors = tuple(t for each in together for t in by_module[each])
            units.append(_Unit(tuple(together), tensors))
        return units

    # -- what each choice costs ---------------------------------------------------------------

    @cached_property
    def _sizes(self) -> list[dict[Packing | None, int]]:
        """Return the bytes of each unit in every format that it may have; None is 16 bits."""
        return [
            {packing: self._nbytes(unit, packing) for packing in self._formats_of(unit)}
            for unit in self._units
        ]

    def _losses(self, most: int) -> list[dict[Packing | None, float]]:
        """Return the loss that is expected of each unit in every format that it may have.

        Args:
            most: the blocksize that most units have.
        """
        if most not in self._by_most:
            self._by_most[most] = [
                {packing: self._loss(unit, packing, most) for packing in sizes}
                for unit, sizes in zip(self._units, self._sizes, strict=True)
            ]
        return self._by_most[most]

    def _formats_of(self, unit: _Unit) -> list[Packing | None]:
        """Return the formats that a unit may have."""
        experts = any(vllm_rules.is_expert(tensor) for tensor in unit.tensors)
        keeps = not (self._subject.config.target == "vllm" and experts)
        together = (
            NESTED_BLOCKSIZE if self._subject.config.scale == "search" else 1
        )  # see stacks.py
        whole = [
            (blocksize, nested)
            for blocksize, nested in PACKINGS
            if not any(
                part.numel % (blocksize * (together if nested else 1))
                for tensor in unit.tensors
                for part in tensor.weight.parts
            )
        ]
        return [*whole, *([None] if keeps else [])]

    def _nbytes(self, unit: _Unit, packing: Packing | None) -> int:
        """Return the bytes of a unit's weights in a format, exactly."""
        if packing is None:
            return unit.elements * ITEMSIZE[SAFETENSORS_NAME[self._plan.config.dtype]]
        total = 0
        for tensor in unit.tensors:
            assert tensor.state is not None
            state: QuantState = replace(tensor.state, blocksize=packing[0], nested=packing[1])
            outputs = bnb_format.expected_tensors(
                tensor.name, state, self._plan.config.quant_storage
            )
            total += sum(ITEMSIZE[dtype] * prod(shape) for dtype, shape in outputs.values())
        return total

    @cached_property
    def _errors(self) -> Mapping[Packing, Mapping[str, WeightError]]:
        """The error of each weight in each format."""
        subject, plan = self._subject, self._plan
        total = measured_bytes(plan, PACKINGS)
        resources = subject.resources(
            len(plan.tensors), max(unit_of(replace(plan.config, blocksize=b)) for b, _ in PACKINGS)
        )
        stage = Stage("measuring", total, f"the rounding errors of {self._checkpoint.name}")
        with subject.listener.stage(stage) as progress:
            return {
                packing: weight_errors(plan, packing, subject.engine, resources, progress)
                for packing in PACKINGS
            }

    @cached_property
    def _measured(self) -> tuple[Sensitivity, Checked] | None:
        """Return what a text says of each weight, None without one."""
        calibrating = self._subject.calibrating
        if calibrating is None:
            return None
        from .calibration.text import torch_device
        from .evaluation.cache import default_directory
        from .evaluation.decoded import decoded
        from .sensitivity import measure, steps

        subject, path = self._subject, self._subject.path
        tokens, _ = calibrating.windows(path)
        names = [t.name for unit in self._units for t in unit.tensors]
        nbytes = self._plan.source_bytes
        roundings = {blocksize: self._rounding(blocksize) for blocksize, _ in PACKINGS}
        stage = Stage(
            "measuring",
            nbytes * steps(len(tokens), len(roundings), len(names)),
            f"{self._checkpoint.name} with a text",
        )
        place = default_directory()
        place.mkdir(parents=True, exist_ok=True)
        with (
            decoded(path, place, subject.engine, subject.resources(0, 0)) as ordinary,
            subject.listener.stage(stage) as progress,
        ):
            return measure(
                ordinary, names, tokens, roundings, REFERENCE, "auto",
                torch_device(subject.device), lambda name, count: progress(name, nbytes * count),
            )  # fmt: skip

    def _rounding(self, blocksize: int) -> Rounding:
        """Return what rounds a matrix with a blocksize, and scales as `_measured_nested` says."""
        from .rounded_weights import RoundedWeights

        config = replace(
            self._subject.config, blocksize=blocksize, double_quant=self._measured_nested
        )
        return RoundedWeights(self._subject.engine, config).decoded

    @property
    def _measured_nested(self) -> bool:
        """Say whether the roundings that a text measures have nested scales.

        A search picks among the scales that nested ones can be, so its codes are others there.
        Double quantization of absmax leaves the codes as they are.
        """
        return self._subject.config.scale == "search"

    @cached_property
    def _expected(self) -> ExpectedLosses | None:
        """Return what a text says that each weight loses, None without one."""
        if self._measured is None:
            return None
        return ExpectedLosses(self._measured[0], self._errors, self._measured_nested)

    def _loss(self, unit: _Unit, packing: Packing | None, most: int) -> float:
        """Return the loss that is expected of a unit in a format."""
        if packing is None:
            return 0.0
        if self._expected is None:
            errors = self._errors[packing]
            return sum(errors[t.name].relative * t.numel / self._elements for t in unit.tensors)
        return sum(self._expected.of(t.name, packing, most) for t in unit.tensors)

    @cached_property
    def _elements(self) -> int:
        return sum(unit.elements for unit in self._units)

    # -- the choice ---------------------------------------------------------------------------

    def within(self, budget: Budget) -> Allocated:
        """Return the choice, after checking that the output which it makes keeps the budget.

        Raises:
            UsageError: the budget is below what is possible, or bounds what only a text shows.
        """
        if budget.bits is not None:
            found = self._within_bits(budget.bits)
        elif budget.max_size is not None:
            found = self._within_size(budget.max_size)
        else:
            assert budget.max_kl is not None
            found = self._within_kl(budget.max_kl)
        recipe, plan, modules, allocation = found
        nbytes = sum(module.nbytes for module in modules)
        uniform = self._best_uniform(nbytes)
        loss = sum(module.loss for module in modules)
        return Allocated(
            recipe, plan, modules, 8 * nbytes / self._elements, loss, min(loss, allocation.bound),
            uniform, None if uniform is None else self._uniform_loss(uniform),
            self._saved(modules, uniform), self._measured[1] if self._measured else None,
            "text" if self._measured else "weights",
        )  # fmt: skip

    def _within_bits(self, bits: float) -> _Found:
        budget = int(bits * self._elements / 8)
        self._require(budget, f"--bits {bits:g}")
        return self._spend(budget)

    def _within_size(self, size: int) -> _Found:
        others = self._plan.shard_bytes - sum(
            tensor.nbytes_out for unit in self._units for tensor in unit.tensors
        )
        self._require(size - others, f"--max-size {size:,} bytes", others)
        budget = size - others
        for _ in range(_TRIES):
            done = self._spend(budget)
            if (above := done[1].shard_bytes - size) <= 0:
                return done
            budget -= above  # headers that name more tensors
        raise AssertionError(f"no budget near {size:,} bytes was kept")

    def _require(self, budget: int, option: str, others: int = 0) -> None:
        """Raise UsageError if the smallest formats are above a budget.

        Args:
            others: bytes of what is no 4-bit weight, where the budget is the whole output's.
        """
        least = sum(min(sizes.values()) for sizes in self._sizes)
        if budget >= least:
            return
        bits = np.ceil(8 * least / self._elements * 1000) / 1000
        message = f"{option} is below what is possible: the least is --bits {bits:g}"
        if others:
            whole = least + others
            message += f", or --max-size {format_size(whole)} ({whole:,} bytes)"
        raise UsageError(message)

    def _within_kl(self, most: float) -> _Found:
        """Return the smallest choice whose expected loss is at most the bound."""
        if self._subject.calibrating is None:
            raise UsageError("--max-kl needs --calibration, the text to measure with")
        low = sum(min(sizes.values()) for sizes in self._sizes)
        high = sum(max(sizes.values()) for sizes in self._sizes)
        if self._allocate(high).loss > most:
            raise UsageError(f"--max-kl {most:g} is below what is possible")
        while high - low > max(1, low // 10_000):
            middle = (low + high) // 2
            low, high = (low, middle) if self._allocate(middle).loss <= most else (middle, high)
        return self._spend(high)

    def _open(self, number: int) -> list[Packing | None]:
        """Return the formats that a unit may still have: not 16 bits, where a skip list could not
        leave it alone."""
        tangled = not self._never_kept.isdisjoint(self._units[number].paths)
        return [p for p in self._sizes[number] if p is not None or not tangled]

    def _most(self, budget: int) -> int:
        """Return the blocksize of the best format for all within as many bytes, or the largest."""
        uniform = self._best_uniform(budget)
        return uniform[0] if uniform else max(blocksize for blocksize, _ in PACKINGS)

    def _allocate(self, budget: int) -> Allocation:
        return allocate(
            [
                [Option(sizes[p], losses[p]) for p in self._open(number)]
                for number, (sizes, losses) in enumerate(
                    zip(self._sizes, self._losses(self._most(budget)), strict=True)
                )
            ],
            budget,
        )

    def _spend(self, budget: int) -> _Found:
        """Return the best choice whose skip list leaves the other modules packed."""
        names = names_of(self._checkpoint.config)
        losses = self._losses(self._most(budget))
        while True:
            allocation = self._allocate(budget)
            modules = []
            for number, unit in enumerate(self._units):
                packing = self._open(number)[allocation.chosen[number]]
                nbytes, loss = self._sizes[number][packing], losses[number][packing]
                modules.append(Module(unit.paths, unit.elements, packing, nbytes, loss))
            kept = {path for m in modules if m.packing is None for path in m.paths}
            packed = [path for m in modules if m.packing is not None for path in m.paths]
            tangled = {p for p in kept if any(skip_list.entangled(p, packed, names))}
            if not tangled:
                recipe = self._recipe(modules)
                plan = self._subject.plan_of(with_recipe(self._subject.config, recipe))
                return recipe, plan, modules, allocation
            self._never_kept |= tangled

    def _recipe(self, modules: Sequence[Module]) -> Recipe:
        packings = {path: m.packing for m in modules if m.packing for path in m.paths}
        if not packings:
            raise UsageError(
                "the budget is enough for all modules in 16 bits: no recipe is needed. A smaller "
                "one makes some of them 4-bit"
            )
        (blocksize, nested), formats = formats_like(packings)
        keep = tuple(sorted(path for m in modules if m.packing is None for path in m.paths))
        return Recipe(
            blocksize, nested, formats, keep, layout_of(self._checkpoint), self._checkpoint.name
        )

    def _best_uniform(self, nbytes: int) -> Packing | None:
        """Return the one format for all that loses least within as many bytes; None for none."""
        fitting = [
            packing
            for packing in PACKINGS
            if all(packing in sizes for sizes in self._sizes)
            and sum(sizes[packing] for sizes in self._sizes) <= nbytes
        ]
        return min(fitting, key=self._uniform_loss, default=None)

    def _uniform_loss(self, packing: Packing) -> float:
        return sum(losses[packing] for losses in self._losses(packing[0]))

    def _saved(
        self, modules: Sequence[Module], uniform: Packing | None
    ) -> tuple[float, float] | None:
        """Return the interval of the share of loss saved against a uniform choice.

        The same windows measure all modules, so it is the interval of the windows' differences.
        """
        expected = self._expected
        if expected is None or uniform is None or expected.windows < 2:
            return None
        count, most = expected.windows, uniform[0]
        saved, before = np.zeros(count), np.zeros(count)
        for unit, module in zip(self._units, modules, strict=True):
            for tensor in unit.tensors:
                first = expected.samples(tensor.name, uniform, most)
                before += first
                saved += first
                if module.packing is not None:
                    saved -= expected.samples(tensor.name, module.packing, most)
        sure = _STUDENT[min(count - 1, len(_STUDENT)) - 1]
        error = sure * float(saved.std(ddof=1)) / count**0.5
        whole = float(before.mean()) or 1.0
        return (float(saved.mean()) - error) / whole, (float(saved.mean()) + error) / whole
