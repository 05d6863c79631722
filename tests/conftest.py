"""Fixtures: the engines present, and a small Llama checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import LLAMA, llama_tensors, nf4_ok, write_checkpoint_dir

from nf4cli.engines.cpu import CpuEngine, available
from nf4cli.engines.torch import TorchEngine

ENGINES = {**{f"cpu-{isa}": lambda isa=isa: CpuEngine(isa) for isa in available()},
           "torch": TorchEngine}  # fmt: skip


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-goldens", action="store_true", help="write tests/goldens anew from bitsandbytes"
    )


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest):
    """Each engine that this machine runs."""
    return ENGINES[request.param]()


@pytest.fixture(scope="session")
def all_engines():
    """All of them at once."""
    return {name: make() for name, make in ENGINES.items()}


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small bf16 Llama, never changed by a test."""
    root = tmp_path_factory.mktemp("source") / "llama"
    write_checkpoint_dir(root, llama_tensors(), LLAMA)
    (root / "tokenizer.json").write_text("{}")
    return root


@pytest.fixture(scope="session")
def llama_nf4(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, quantized by the real command; never changed by a test."""
    output = tmp_path_factory.mktemp("output") / "llama-nf4"
    nf4_ok("quantize", llama, output)
    return output


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A working directory with a small Llama in `model`."""
    write_checkpoint_dir(tmp_path / "model", llama_tensors(), LLAMA)
    return tmp_path
