"""scripts/gpu_check.py over an emulated device, at a small size, so that it cannot rot."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from nf4cli.engines import cuda, cupy_device, launches
from nf4cli.errors import MachineError

pytestmark = pytest.mark.gpu

SCRIPT = Path(__file__).parent.parent / "scripts" / "gpu_check.py"
SMALL = ("--check-elements", "8193", "--elements", "65536", "--megabytes", "4", "--repeats", "1")


@pytest.fixture
def gpu_check():
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_check"] = module
    spec.loader.exec_module(module)
    return module


def test_it_runs_and_finds_nothing_wrong(gpu_check, new_device, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(cuda, "open_devices", lambda indices: [new_device()])
    assert gpu_check.main([*SMALL, "--json", str(tmp_path / "out.json")]) == 0
    table = capsys.readouterr().out
    for words in ("GPU", "torch (cpu)", "copy within device memory", "quantize BF16",
                  "dequantize F32, nested", "double quantization", "scales chosen, nested",
                  "the same with importance", "| the same, --scale search |",
                  "| files of both engines | equal |"):  # fmt: skip
        assert words in table
    document = json.loads((tmp_path / "out.json").read_text())
    assert document["wrong"] == []
    assert document["files_equal"]
    assert min(document["checks"].values()) > 100


def test_it_notices_wrong_bytes(gpu_check, new_device, monkeypatch, capsys):
    right = launches.book

    def wrong(quant_type: str) -> np.ndarray:
        table = np.frombuffer(right(quant_type).tobytes(), launches._BOOK).copy()
        table["entries"]["code"][0, 3] = 4
        return table.view(np.uint8)

    monkeypatch.setattr(launches, "book", wrong)
    monkeypatch.setattr(cuda, "open_devices", lambda indices: [new_device()])
    assert gpu_check.main([*SMALL]) == 1
    out = capsys.readouterr().out
    assert "WRONG  quantize BF16 to nf4" in out
    assert "| files of both engines | DIFFERENT |" in out


def test_without_a_gpu_it_says_what_is_missing(gpu_check, capsys):
    try:
        cupy_device.driver()
    except MachineError:
        assert gpu_check.main([]) == 4
        assert "no NVIDIA driver" in capsys.readouterr().err
    else:
        pytest.skip("this machine has an NVIDIA driver")
