"""Runs that are stopped at a weight, for what --resume makes of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import carry_out

from nf4cli import engines
from nf4cli.checkpoint.discovery import open_checkpoint
from nf4cli.errors import InterruptedRunError, UnfinishedRunError
from nf4cli.format.config import QuantConfig
from nf4cli.planning.make_plan import make_plan
from nf4cli.planning.resources import make_resources

MIDDLE = "model.layers.1.mlp.gate_proj.weight"


def stop(source: Path, output: Path, at: str = MIDDLE, resume: bool = False) -> None:
    """A run that is interrupted when it comes to the weight `at`."""

    def interrupt(what: str, _: int) -> None:
        if what == at:
            raise InterruptedRunError("interrupted")

    plan, engine = make_plan(open_checkpoint(source), QuantConfig()), engines.load("cpu")
    with pytest.raises(UnfinishedRunError, match="--resume"):
        carry_out(
            plan, output, engine, make_resources(engine, 1, None, 1), resume=resume,
            progress=interrupt,
        )  # fmt: skip
