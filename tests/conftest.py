"""Fixtures: the engines present, and a small Llama checkpoint."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from ci.context import build_wheel, copy_context
from emulator import build
from emulator.device import EmulatedDevice
from helpers import LLAMA, llama_tensors, nf4_ok, nf4_process, write_checkpoint_dir
from hub_server.fixtures import converted, hub, model, nf4_hub  # noqa: F401 - fixtures
from real_models import minilm, smollm  # noqa: F401 - fixtures
from small_pipelines import pipe, pipeline  # noqa: F401 - fixtures

from nf4cli.engines.cpu import CpuEngine, available
from nf4cli.engines.cuda import CudaEngine
from nf4cli.engines.torch import TorchEngine

# A Python that has loaded readline hands these on, as pytest-xdist's parent does to its workers:
# a terminal of 200 columns would be taken for one of 80.
for _name in ("COLUMNS", "LINES"):
    os.environ.pop(_name, None)

REAL_ENGINES = {**{f"cpu-{isa}": lambda isa=isa: CpuEngine(isa) for isa in available()},
           "torch": TorchEngine}  # fmt: skip
ENGINES = (*REAL_ENGINES, "cuda")
"""The CUDA engine runs over an emulated device: NVRTC's PTX for sm_80, on the CPU."""

LONGEST = ("test_model_architectures", "test_hub_faults", "test_hub_quantize", "test_hub_push")
"""Files of tests that take the most time, the longest first."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-goldens", action="store_true", help="write tests/goldens anew from bitsandbytes"
    )
    parser.addoption(
        "--long", action="store_true", help="also the tests marked as long, as scripts/nightly does"
    )
    parser.addoption(
        "--update-verify-page", action="store_true", help="write the table of docs/verify.md anew"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the long tests to scripts/nightly; put files first that take long, so that the
    processes which share the files (scripts/test) end together."""
    if not config.getoption("--long"):
        long = [item for item in items if item.get_closest_marker("long")]
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if item not in long]
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


@pytest.fixture(autouse=True)
def broken_pipes_stay_errors():
    """The command lets a closed pipe end it once it shows a result. A test that calls a part of it
    in this process would leave that behind, and a server of a later test, whose client went away,
    would end pytest without a word."""
    before = signal.getsignal(signal.SIGPIPE)
    yield
    signal.signal(signal.SIGPIPE, before)


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest):
    """Each engine."""
    if request.param == "cuda":
        return request.getfixturevalue("cuda_engine")
    return REAL_ENGINES[request.param]()


@pytest.fixture(scope="session")
def all_engines(cuda_engine):
    """All of them at once."""
    return {name: make() for name, make in REAL_ENGINES.items()} | {"cuda": cuda_engine}


@pytest.fixture(scope="session")
def emulated_libraries() -> list[Path]:
    """Every GPU kernel for the CPU: NVRTC's PTX for sm_80 in two parts, the .cu as g++ has it."""
    text, names = build.compile_ptx("80")
    parts = [dict(list(names.items())[i::2]) for i in range(2)]
    return build.parallel(
        *(lambda part=part: build.build_ptx(text, part) for part in parts), build.build_shim
    )


@pytest.fixture(scope="session")
def emulated_ptx(emulated_libraries) -> build.Kernels:
    return build.Kernels(*emulated_libraries[:2])


@pytest.fixture(scope="session")
def emulated_shim(emulated_libraries) -> build.Kernels:
    return build.Kernels(emulated_libraries[2])


@pytest.fixture
def gpu_nf4(emulated_libraries):
    """Run nf4 with emulated GPUs; returns the finished process."""
    here = Path(__file__).parent

    def run(
        *arguments: object,
        gpus: int = 1,
        memory: int = 1 << 30,
        code: int = 0,
        cwd: Path | None = None,
    ):
        libraries = ":".join(map(str, emulated_libraries[:2]))
        done = subprocess.run(
            [sys.executable, "-m", "emulator.cli", libraries, str(gpus), str(memory),
             *map(str, arguments)],
            cwd=cwd or here, env={**os.environ, "PYTHONPATH": str(here)},
            capture_output=True, text=True, check=False, timeout=300,
        )  # fmt: skip
        assert done.returncode == code, done.stdout + done.stderr
        return done

    return run


@pytest.fixture(scope="session")
def cuda_engine(emulated_ptx) -> CudaEngine:
    return CudaEngine(devices=[EmulatedDevice(emulated_ptx)])


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small bf16 Llama, never changed by a test."""
    root = tmp_path_factory.mktemp("source") / "llama"
    write_checkpoint_dir(root, llama_tensors(), LLAMA)
    (root / "tokenizer.json").write_text("{}")
    return root


@pytest.fixture(scope="session")
def llama_nf4(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, quantized by the installed command; never changed by a test."""
    output = tmp_path_factory.mktemp("output") / "llama-nf4"
    nf4_ok("quantize", llama, output, run=nf4_process)
    return output


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """nf4, built from no more than what goes into a container."""
    place = tmp_path_factory.mktemp("wheel")
    return build_wheel(copy_context(place / "context"), place)


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A working directory with a small Llama in `model`."""
    write_checkpoint_dir(tmp_path / "model", llama_tensors(), LLAMA)
    return tmp_path
