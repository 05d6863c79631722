"""The format module against bitsandbytes itself, and its refusals."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from bitsandbytes.functional import QuantState as TheirState
from bitsandbytes.functional import quantize_4bit
from bitsandbytes.utils import unpack_tensor_to_dict
from hypothesis import given
from hypothesis import strategies as st

from nf4cli.checkpoint import bnb_format
from nf4cli.checkpoint.bnb_format import QuantState
from nf4cli.errors import InputError


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_state_is_what_bitsandbytes_writes(quant_type, nested, dtype):
    weight = torch.randn(96, 40).to(dtype)
    _, theirs = quantize_4bit(weight, quant_type=quant_type, compress_statistics=nested)
    packed = theirs.as_dict(packed=True)
    key = "quant_state.bitsandbytes__" + quant_type
    blob = packed[key].numpy().tobytes()
    state = bnb_format.decode_state(blob, "blob")
    assert bnb_format.encode_state(state).rstrip() == blob
    expected = bnb_format.expected_tensors("w", state, "uint8")
    assert {f"w.{k}" for k in packed} | {"w"} == expected.keys()
    for name, tensor in packed.items():
        if name != key:
            assert expected[f"w.{name}"][1] == tuple(tensor.shape)


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_a_state_has_one_size_whatever_its_offset(offset):
    state = QuantState("nf4", 64, "bfloat16", (128, 64), True, 256, offset)
    blob = bnb_format.encode_state(state)
    assert len(blob) == bnb_format.state_size(state)
    assert bnb_format.decode_state(blob, "blob") == state


def test_bitsandbytes_reads_a_padded_state():
    state = QuantState("nf4", 64, "bfloat16", (128, 64), True, 256, 0.5)
    blob = bnb_format.encode_state(state)
    assert blob.endswith(b"  ")
    fields = unpack_tensor_to_dict(torch.from_numpy(np.frombuffer(blob, np.uint8).copy()))
    theirs = TheirState.from_dict(
        {
            **fields,
            "absmax": torch.zeros(128, dtype=torch.uint8),
            "quant_map": torch.zeros(16),
            "nested_absmax": torch.zeros(1),
            "nested_quant_map": torch.zeros(256),
        },
        torch.device("cpu"),
    )
    assert theirs.blocksize == 64
    assert theirs.offset == 0.5
    assert tuple(theirs.shape) == (128, 64)


GOOD = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [8, 8],
        "nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.5}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"quant_type": "nf5"}, "quant_type"),
        ({"blocksize": 63}, "blocksize"),
        ({"blocksize": True}, "blocksize"),
        ({"blocksize": "64"}, "blocksize"),
        ({"dtype": "float64"}, "dtype"),
        ({"shape": [8, -8]}, "shape"),
        ({"shape": None}, "shape"),
        ({"shape": [8, 8.0]}, "shape"),
        ({"nested_blocksize": 0}, "nested_blocksize"),
        ({"nested_offset": float("nan")}, "nested_offset"),
        ({"nested_offset": "0"}, "nested_offset"),
    ],
)
def test_an_impossible_state_is_refused_by_name(change, named):
    with pytest.raises(InputError, match=rf"here: {named} is .* expected"):
        bnb_format.decode_state(json.dumps(GOOD | change).encode(), "here")


@pytest.mark.parametrize("blob", [b"", b"{", b"\xff\xfe", b"[1]", b"[" * 100_000])
def test_a_state_that_is_no_json_object_is_refused(blob):
    with pytest.raises(InputError, match="here"):
        bnb_format.decode_state(blob, "here")
