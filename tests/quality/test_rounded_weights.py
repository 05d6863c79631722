"""Weights that nf4 plan rounds for a text: equal to what a conversion writes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import nf4cli
from nf4cli.engines.cpu import CpuEngine
from nf4cli.errors import InputError
from nf4cli.format.config import QuantConfig
from nf4cli.quality.rounded_weights import RoundedWeights

NAME = "layers.0.mlp.up_proj.weight"


class Counting(CpuEngine):
    """The CPU engine; it counts its searches."""

    searches = 0

    def search(self, *arguments):
        self.searches += 1
        return super().search(*arguments)


def converted(weight, config, place):
    """What nf4 quantize and nf4 dequantize make of a weight: float32 [rows, columns]."""
    save_file({NAME: torch.from_numpy(weight)}, place / "model.safetensors")
    nf4cli.quantize(place / "model.safetensors", place / "out", config)
    nf4cli.dequantize(place / "out", place / "back", dtype="float32")
    (file,) = (place / "back").glob("*.safetensors")
    return load_file(file)[NAME].numpy()


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("blocksize", [32, 64, 128])
@pytest.mark.parametrize(("scale", "nested"), [("absmax", False), ("search", True)])
def test_they_are_those_of_a_conversion(tmp_path, scale, nested, blocksize, quant_type):
    weight = np.random.default_rng(5).standard_normal((192, 256)).astype(np.float32)
    weight[:, 7] *= 9
    config = QuantConfig(
        quant_type=quant_type, scale=scale, double_quant=nested, blocksize=blocksize
    )
    found = RoundedWeights(CpuEngine(), config).decoded(NAME, weight)
    np.testing.assert_array_equal(found, converted(weight, config, tmp_path))


def test_a_weight_is_searched_once():
    weight = np.random.default_rng(6).standard_normal((64, 128)).astype(np.float32)
    engine = Counting()
    weights = RoundedWeights(engine, QuantConfig(scale="search"))
    first = weights.decoded(NAME, weight)
    count = engine.searches
    assert count
    np.testing.assert_array_equal(weights.decoded(NAME, weight), first)
    assert engine.searches == count
    weights.decoded("layers.1.mlp.up_proj.weight", weight)
    assert engine.searches == 2 * count


@pytest.mark.parametrize("scale", ["absmax", "search"])
def test_one_that_is_not_finite_is_named(scale):
    weight = np.ones((32, 64), np.float32)
    weight[3, 4] = np.nan
    with pytest.raises(InputError, match=f"{NAME} has a NaN or an infinity"):
        RoundedWeights(CpuEngine(), QuantConfig(scale=scale)).decoded(NAME, weight)
