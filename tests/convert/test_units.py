"""Units of a conversion: made in any order, twice, or after a stop, they give one run's bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from elsewhere import RESOURCES, Elsewhere
from float8_models import CASES, float8_model
from helpers import LLAMA, carry_out, same_files, write_checkpoint_dir

from nf4cli.checkpoint.discovery import open_checkpoint
from nf4cli.convert.conversion import Tools
from nf4cli.convert.make_units import MakeFile, Place
from nf4cli.convert.resume import Standing
from nf4cli.convert.transfers import Transfers
from nf4cli.convert.units import cut
from nf4cli.convert.write_model import Execution, write_model
from nf4cli.engines.cpu import CpuEngine
from nf4cli.errors import InputError
from nf4cli.format.config import QuantConfig
from nf4cli.planning.make_plan import make_plan
from nf4cli.planning.model_plan import ModelPlan


def source_of(root: Path, shards: int) -> Path:
    """A checkpoint of ten weights, of 190 kB in 4 bit each."""
    weights = {
        f"model.layers.{i}.mlp.up_proj.weight": torch.randn(512, 720).bfloat16() for i in range(10)
    }
    weights["model.norm.weight"] = torch.ones(720).bfloat16()
    return write_checkpoint_dir(root, weights, {**LLAMA, "num_hidden_layers": 10}, shards)


def plan_of(source: Path, **recipe: object):
    return make_plan(open_checkpoint(source), QuantConfig(max_shard_size=1_000_000, **recipe))


def write(plan, output: Path, elsewhere: Elsewhere, resume: bool = False) -> None:
    run = Execution(CpuEngine(), RESOURCES, resume=resume, cluster=elsewhere)
    write_model(ModelPlan.of(plan), output, run)


@pytest.mark.parametrize("shards", [1, 3, 5, 11])
@pytest.mark.parametrize("recipe", [{}, {"scale": "search"}, {"double_quant": False}])
def test_they_give_the_bytes_of_one_run(tmp_path, shards, recipe):
    """One source file for several shards, several for one, and some that lack a weight."""
    plan = plan_of(source_of(tmp_path / "src", shards), **recipe)
    carry_out(plan, tmp_path / "one", CpuEngine(), RESOURCES)
    for seed in range(3):
        elsewhere = Elsewhere(seed)
        write(plan, tmp_path / str(seed), elsewhere)
        assert elsewhere.sent < 3_000 * len(plan.tensors)
        assert elsewhere.returned < 3_000 * len(plan.tensors)
        assert same_files(tmp_path / "one", tmp_path / str(seed))


def test_stored_codes_whose_factors_lie_in_other_files(tmp_path):
    float8_model(tmp_path / "src", *CASES["deepseek"])
    plan = make_plan(open_checkpoint(tmp_path / "src"), QuantConfig(max_shard_size=1_000_000))
    carry_out(plan, tmp_path / "one", CpuEngine(), RESOURCES)
    write(plan, tmp_path / "units", Elsewhere(1))
    assert same_files(tmp_path / "one", tmp_path / "units")


@pytest.fixture
def stopped(tmp_path):
    """A run into `out` that was stopped after two units: its plan, and what made those; `one` is
    the output of a run that was not."""
    plan = plan_of(source_of(tmp_path / "src", 5))
    carry_out(plan, tmp_path / "one", CpuEngine(), RESOURCES)
    first = Elsewhere(1, stop_after=2)
    with pytest.raises(Exception, match="continue with the same command and --resume"):
        write(plan, tmp_path / "out", first)
    return plan, first


def test_what_is_finished_is_not_made_again(tmp_path, stopped):
    plan, first = stopped
    second = Elsewhere(2)
    write(plan, tmp_path / "out", second, resume=True)
    assert len(first.made) == 2
    assert not {*first.made} & {*second.made}
    assert same_files(tmp_path / "one", tmp_path / "out")


def test_a_shard_that_was_damaged_meanwhile_is_made_again(tmp_path, stopped):
    plan, first = stopped
    (damaged,) = tmp_path.glob(f".out.partial/**/{first.made[0]}")
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(data)
    second = Elsewhere(2)
    write(plan, tmp_path / "out", second, resume=True)
    assert first.made[0] in second.made
    assert first.made[1] not in second.made
    assert same_files(tmp_path / "one", tmp_path / "out")


def test_a_try_that_was_left_behind_can_make_nothing(tmp_path):
    """It comes back after another run has begun: it has no place to write, or to rename from."""
    plan = plan_of(source_of(tmp_path / "src", 5))
    places: list[Place] = []
    with pytest.raises(Exception, match="--resume"):
        write(plan, tmp_path / "out", Elsewhere(1, 1, lambda task: places.append(task.place)))
    late = MakeFile(cut(plan, Standing())[-1], places[0])

    def come_back(_: MakeFile) -> None:
        with pytest.raises(FileNotFoundError):
            late.do(Tools(CpuEngine(), RESOURCES), Transfers())

    write(plan, tmp_path / "out", Elsewhere(2, spoil=come_back), resume=True)
    assert not list(tmp_path.rglob(".tries"))


def test_a_source_that_changes_between_units_is_noticed(tmp_path):
    """One unit has digested the file; another reads its weights after the change."""
    source = source_of(tmp_path / "src", 1)
    file = source / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1

    class Between(Elsewhere):
        def do(self, tasks, *others):
            super().do(tasks[:1], *others)
            file.write_bytes(data)
            super().do(tasks[1:], *others)

    with pytest.raises(Exception, match="changed while it was being read"):
        write(plan_of(source), tmp_path / "out", Between())
    assert not (tmp_path / "out").exists()


def test_a_nan_is_refused_in_its_own_words(tmp_path):
    weight = torch.full((256, 720), torch.nan).bfloat16()
    source = write_checkpoint_dir(tmp_path / "src", {"a.b.weight": weight}, LLAMA)
    with pytest.raises(InputError, match="is NaN"):
        write(make_plan(open_checkpoint(source), QuantConfig()), tmp_path / "out", Elsewhere())
    assert not (tmp_path / "out").exists()
