"""Choose a format for each module within a budget: the work of `nf4cli.allocate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..checkpoint.discovery import with_copies
from ..errors import UsageError
from ..format.config import QuantConfig
from ..planning.families import consult
from ..planning.make_plan import make_plan
from ..planning.options import check_options
from ..planning.pipeline_plan import is_pipeline
from ..quality.recipes import Allocated, Budget, Choosing, Subject
from . import sources
from .machine import Machine

if TYPE_CHECKING:
    from ..checkpoint.types import Checkpoint
    from ..planning.answer import Answer
    from ..planning.plan import Plan
    from ..quality.calibration.run import Calibrating

__all__ = ["Allocated", "Budget", "allocated", "choosing"]


def allocated(
    source: Path, budget: Budget, config: QuantConfig, calibrating: Calibrating | None,
    machine: Machine, exact: bool = False, trust_remote_code: bool = False,
) -> Allocated:  # fmt: skip
    """Choose a format for each module within a budget.

    Args:
        source: a path, or a model on the Hub.
        config: the recipe to go by for everything but formats.
        calibrating: text to measure modules with; None to go by the error of the weights.
        machine: measures.
        exact, trust_remote_code: see `Request`.

    Raises:
        UsageError: the budget is below what is possible, or options do not go together.
        InputError, MachineError: the model cannot be converted, or measured.
    """
    check_options(config)
    sources.require_there(source)
    listener = machine.listener
    with sources.found(source, True, listener, None, sources.Files((), False)) as outline:
        found = sources.whole(outline, "nf4 plan", False, listener)
        if is_pipeline(found.path):
            raise UsageError(
                f"{found.name} is a pipeline: make a recipe of one component's directory"
            )
        chosen = choosing(found, config, calibrating, machine, exact, trust_remote_code)
        return chosen.within(budget)


def choosing(
    source: sources.Source, config: QuantConfig, calibrating: Calibrating | None,
    machine: Machine, exact: bool = False, trust_remote_code: bool = False,
) -> Choosing:  # fmt: skip
    """Return what measures a model once, and chooses within any budget.  See `allocated`."""
    checkpoint = with_copies(source.open(), ())

    def oracle(model: Checkpoint) -> Answer | None:
        return consult(model, exact, trust_remote_code)

    def plan_of(recipe: QuantConfig) -> Plan:
        return make_plan(checkpoint, recipe, oracle)

    return Choosing(
        Subject(
            source.path, checkpoint, config, plan_of, calibrating, machine.engine,
            machine.resources, machine.device, machine.listener,
        )
    )  # fmt: skip
