"""The tables are bitsandbytes' own, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from bitsandbytes.functional import create_dynamic_map, get_4bit_type

from nf4cli.format.codebook import QUANT_TYPES, codebook, nested_map, nested_midpoints


def bits(values: np.ndarray) -> list[int]:
    return np.ascontiguousarray(values, np.float32).view(np.uint32).tolist()


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_decode_table_is_bitsandbytes(quant_type):
    assert bits(codebook(quant_type).decode) == bits(
        get_4bit_type(quant_type, device="cpu").numpy()
    )


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_midpoints_and_order_are_bitsandbytes(quant_type):
    table = get_4bit_type(quant_type, device="cpu")
    order = torch.argsort(table)
    book = codebook(quant_type)
    assert book.codes.tolist() == order.tolist()
    assert bits(book.midpoints) == bits(((table[order[:-1]] + table[order[1:]]) / 2).numpy())


def test_nested_map_is_bitsandbytes():
    # torch's linspace rounds otherwise on a machine without AVX2; the published map is this one.
    assert torch.backends.cpu.get_cpu_capability() != "DEFAULT"
    assert bits(nested_map()) == bits(create_dynamic_map().numpy())
    assert (np.diff(nested_map()) > 0).all()
    assert (np.diff(nested_midpoints()) > 0).all()
