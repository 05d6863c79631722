"""Fixtures: the engines present, and a small Llama checkpoint."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest
from ci.context import build_wheel, copy_context
from emulator import build
from emulator.device import EmulatedDevice
from emulator.kernels import every_kernel, sample_of_kernels
from emulator.real import DeviceKernels, RecordingDevice, open_gpu
from helpers import LLAMA, llama_tensors, nf4, nf4_ok, nf4_process, write_checkpoint_dir
from hub_server.fixtures import converted, hub, model, nf4_hub  # noqa: F401 - fixtures
from real_models import minilm, smollm  # noqa: F401 - fixtures
from small_pipelines import pipe, pipeline  # noqa: F401 - fixtures

from nf4cli.engines import cuda, cupy_device
from nf4cli.engines.cpu import CpuEngine, available
from nf4cli.engines.cuda import CudaEngine
from nf4cli.engines.torch import TorchEngine

# A Python that has loaded readline hands these on, as pytest-xdist's parent does to its workers:
# a terminal of 200 columns would be taken for one of 80.
for _name in ("COLUMNS", "LINES"):
    os.environ.pop(_name, None)

REAL_ENGINES = {**{f"cpu-{isa}": lambda isa=isa: CpuEngine(isa) for isa in available()},
           "torch": TorchEngine}  # fmt: skip
ENGINES = (*REAL_ENGINES, pytest.param("cuda", marks=pytest.mark.gpu))
"""The CUDA engine runs over an emulated device, or over the GPU that is here, with --real-gpu."""

EMULATION = "about the emulated GPU itself, and --real-gpu was given"
WITHOUT_A_GPU = {
    "test_cuda_machine_code": "takes the kernels' machine code apart, which no GPU runs",
    "test_cuda_missing": "simulates drivers that are missing, broken or old",
    "test_cuda_mutations": "seeds bugs that the emulated GPU's checks must find",
}
"""Modules that --real-gpu skips, and why."""

LONGEST = (
    "test_model_architectures",
    "test_quality",
    "test_ray",
    "test_ray_hosts",
    "test_gpu_day",
    "test_hub_quantize",
    "test_hub_push",
    "test_hub_faults",
    "test_faults",
    "test_ray_hub",
    "test_vllm",
    "test_calibration",
    "test_github_action",
    "test_cuda_mutations",
    "test_cuda_kernels",
    "test_pipeline_loaders",
    "test_by_digests",
    "test_cuda_machine_code",
    "test_container",
    "test_signed_scales",
    "test_eval",
    "test_loaders",
    "test_unsloth",
    "test_load",
    "test_stopping",
    "test_scale_search",
)
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
    parser.addoption(
        "--real-gpu", action="store_true",
        help="run the tests of the CUDA engine on this machine's GPU (scripts/gpu_day does)",
    )  # fmt: skip


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "kernels" in metafunc.fixturenames:
        emulated = ["shim", pytest.param("ptx", marks=pytest.mark.long)]
        ways = ["real"] if metafunc.config.getoption("--real-gpu") else emulated
        metafunc.parametrize("kernels", ways, indirect=True, scope="session")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the long tests to scripts/nightly, and the emulator's own to machines without a GPU.

    Files that take long come first, so that the processes which share them (scripts/test) end
    together.
    """
    if not config.getoption("--long"):
        long = [item for item in items if item.get_closest_marker("long")]
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if item not in long]
    if config.getoption("--real-gpu"):
        for item in items:
            if reason := WITHOUT_A_GPU.get(item.path.stem):
                item.add_marker(pytest.mark.skip(reason=f"{reason}, and --real-gpu was given"))
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
def real_gpu(request: pytest.FixtureRequest):
    """The GPU of this machine where --real-gpu asks for it, None where GPUs are emulated."""
    return open_gpu() if request.config.getoption("--real-gpu") else None


@pytest.fixture(scope="session")
def shim_library(real_gpu) -> Path:
    """Every GPU kernel for the CPU, the .cu as g++ has it."""
    if real_gpu is not None:
        pytest.skip(EMULATION)
    return build.build_shim()


@pytest.fixture(scope="session")
def emulated_shim(shim_library) -> build.Kernels:
    return build.Kernels(shim_library)


@pytest.fixture(scope="session")
def emulated_ptx(request: pytest.FixtureRequest, real_gpu) -> build.Kernels:
    """GPU kernels for the CPU, NVRTC's PTX for sm_80: with --long every one, else a sample."""
    if real_gpu is not None:
        pytest.skip(EMULATION)
    long = request.config.getoption("--long")
    text, names = build.compile_ptx("80", every_kernel() if long else sample_of_kernels())
    parts = [dict(list(names.items())[i::2]) for i in range(2)]
    libraries = build.parallel(*(lambda part=part: build.build_ptx(text, part) for part in parts))
    return build.Kernels(*libraries)


@pytest.fixture(scope="session")
def emulated_kernels(request: pytest.FixtureRequest) -> build.Kernels:
    """Every kernel, to run the engine over: as g++ has them; with --long as NVRTC has them."""
    long = request.config.getoption("--long")
    return request.getfixturevalue("emulated_ptx" if long else "emulated_shim")


@pytest.fixture(scope="session")
def kernels(request: pytest.FixtureRequest, real_gpu):
    """The kernels, by themselves: emulated in both ways, or those of the GPU."""
    if real_gpu is not None:
        return DeviceKernels(real_gpu)
    return request.getfixturevalue(f"emulated_{request.param}")


@pytest.fixture(scope="session")
def new_device(request: pytest.FixtureRequest, real_gpu):
    """Make a GPU of so much memory: emulated, the .cu as g++ has it, or the one that is here."""
    if real_gpu is not None:
        return lambda memory=1 << 30, name="GPU": RecordingDevice(real_gpu, memory, name)
    shim = request.getfixturevalue("emulated_shim")
    return lambda memory=1 << 30, name="GPU": EmulatedDevice(shim, memory, name)


@pytest.fixture(scope="session")
def gpu_arch(real_gpu) -> str:
    """The compute capability of the tests' GPUs: "80"."""
    return EmulatedDevice.arch if real_gpu is None else real_gpu.arch


@pytest.fixture
def gpu_nf4(request: pytest.FixtureRequest, real_gpu, tmp_path):
    """Run nf4 with emulated GPUs, or with the one that is here.

    Returns what it printed, and last on stderr what the GPUs did.
    """

    def device(memory: int, name: str):
        if real_gpu is not None:
            return RecordingDevice(real_gpu, memory, name)
        return EmulatedDevice(request.getfixturevalue("emulated_kernels"), memory, name)

    def run(
        *arguments: object,
        gpus: int = 1,
        memory: int = 1 << 30,
        code: int = 0,
        cwd: Path | None = None,
    ):
        devices = [device(memory, f"GPU {i}") for i in range(gpus)]
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(cupy_device, "driver", lambda: (gpus, 13_000))
            patched.setattr(
                cuda, "open_devices", lambda indices: [devices[i] for i in indices or range(gpus)]
            )
            done = nf4(*arguments, cwd=cwd or tmp_path)
        counts = {device.name: len(device.launched) for device in devices if device.launched}
        done.stderr += f"launched: {counts}\n"
        assert done.returncode == code, done.stdout + done.stderr
        return done

    return run


@pytest.fixture(scope="session")
def cuda_engine(request: pytest.FixtureRequest, real_gpu) -> CudaEngine:
    if real_gpu is not None:
        return CudaEngine(devices=[real_gpu])
    return CudaEngine(devices=[EmulatedDevice(request.getfixturevalue("emulated_kernels"))])


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
    """nf4, built from no more than what goes into a container: by scripts/test, or here."""
    if made := [*Path(sys.prefix, "wheel").glob("nf4cli-*.whl")]:
        return made[0]
    place = tmp_path_factory.mktemp("wheel")
    return build_wheel(copy_context(place / "context"), place)


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A working directory with a small Llama in `model`."""
    write_checkpoint_dir(tmp_path / "model", llama_tensors(), LLAMA)
    return tmp_path
