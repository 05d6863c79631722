"""Golden vectors: what bitsandbytes 0.50.2 gave, kept in the repository.

They hold the engines to bitsandbytes where bitsandbytes is not installed, and would show if a
later bitsandbytes changed.  `pytest --update-goldens tests/engines/test_goldens.py` writes them
anew."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import TORCH_DTYPES, bnb_nested, bnb_quantize, raw

from nf4cli.format.codebook import codebook

FILE = Path(__file__).parent.parent / "goldens" / "codec.json"
MAGIC, VERSION = "nf4-codec-goldens", 1


def inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(20_26)
    normal = torch.randn(130, generator=generator)
    middle = torch.from_numpy(codebook("nf4").midpoints.copy())
    one = torch.ones(1)
    cases = {
        "zeros": torch.zeros(70),
        "negative zeros": -torch.zeros(64),
        "odd count": normal[:65],
        "single": normal[:1],
        "subnormal": normal * 1e-40,
        "near the largest": normal / normal.abs().max() * 3.3e38,
        "midpoints": torch.cat([middle, one]),
        "one ulp above": torch.cat([torch.nextafter(middle, one), one]),
        "one ulp below": torch.cat([torch.nextafter(middle, -one), one]),
        "all the same": torch.full((64,), -0.37),
    }
    f32 = {f"F32 {name}": x for name, x in cases.items()}
    half = {f"F16 {k}": cases[k].half() for k in ("zeros", "odd count", "midpoints", "subnormal")}
    bf16 = {
        f"BF16 {k}": cases[k].bfloat16() for k in ("zeros", "odd count", "midpoints", "subnormal")
    }
    return f32 | half | bf16


def make() -> dict[str, object]:
    import bitsandbytes

    vectors = []
    for name, x in inputs().items():
        for quant_type in ("nf4", "fp4"):
            for blocksize in (32, 64):
                packed, absmax = bnb_quantize(x, blocksize, quant_type)
                offset = float(np.float32(absmax.astype(np.float64).sum() / absmax.size))
                codes, nested = bnb_nested(absmax, offset)
                vectors.append({
                    "name": name, "quant_type": quant_type, "blocksize": blocksize,
                    "n": x.numel(), "input": raw(x).tobytes().hex(),
                    "packed": packed.tobytes().hex(), "absmax": absmax.tobytes().hex(),
                    "offset": offset.hex(), "nested_codes": codes.tobytes().hex(),
                    "nested_absmax": nested.tobytes().hex(),
                })  # fmt: skip
    return {
        "magic": MAGIC, "version": VERSION,
        "made_by": f"bitsandbytes {bitsandbytes.__version__}, backends/default/ops.py, "
        f"torch {torch.__version__.split('+')[0]}, CPU",
        "vectors": vectors,
    }  # fmt: skip


@pytest.fixture(scope="module")
def goldens(request):
    if request.config.getoption("--update-goldens"):
        FILE.write_text(json.dumps(make(), indent=0) + "\n")
    document = json.loads(FILE.read_text())
    assert (document["magic"], document["version"]) == (MAGIC, VERSION)
    assert len(document["vectors"]) == 4 * len(inputs())
    return document["vectors"]


def test_engines_give_the_golden_bytes(engine, goldens):
    for vector in goldens:
        dtype = vector["name"].split()[0]
        assert dtype in TORCH_DTYPES
        source = np.frombuffer(bytes.fromhex(vector["input"]), np.uint8).copy()
        n, blocksize = vector["n"], vector["blocksize"]
        packed = np.empty((n + 1) // 2, np.uint8)
        absmax = np.empty(-(-n // blocksize), np.float32)
        engine.quantize(source, dtype, blocksize, vector["quant_type"], packed, absmax)
        what = f"{vector['name']} {vector['quant_type']} {blocksize}"
        assert packed.tobytes().hex() == vector["packed"], what
        assert absmax.tobytes().hex() == vector["absmax"], what
        offset = float(np.float32(engine.sum(absmax, 0.0) / absmax.size))
        assert offset.hex() == vector["offset"], what
        codes, nested = (
            np.empty(absmax.size, np.uint8),
            np.empty(-(-absmax.size // 256), np.float32),
        )
        engine.nested_quantize(absmax, offset, codes, nested)
        assert codes.tobytes().hex() == vector["nested_codes"], what
        assert nested.tobytes().hex() == vector["nested_absmax"], what
