"""cupy_device.py and nvrtc.py without a GPU: the real compiler, a stand-in for CuPy's driver."""

from __future__ import annotations

import ast
import os
import stat
from pathlib import Path

import cupy
import numpy as np
import pytest
from emulator import exercise
from emulator.fake_cupy import FakeCupy

from nf4cli.engines import cupy_device, nvrtc
from nf4cli.engines.cuda import CudaEngine
from nf4cli.engines.cupy_device import CupyDevice
from nf4cli.engines.device import DeviceMemoryError
from nf4cli.errors import MachineError

pytestmark = pytest.mark.gpu

KERNEL = "quantize<2, 2, 1, false, false>"


@pytest.fixture
def kernel_cache(tmp_path, monkeypatch) -> Path:
    """An empty cache of compiled kernels."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "nf4" / "kernels"


@pytest.fixture(scope="module")
def lowered() -> dict[str, str]:
    """Names in a cubin -> kernels."""
    kernels = (KERNEL, KERNEL.replace("false>", "true>"), "fold_errors", "nested_quantize<false>")
    return {low: kernel for kernel, low in nvrtc.compile_kernels(kernels, "sm_80")[1].items()}


@pytest.fixture
def fake(emulated_shim, lowered) -> FakeCupy:
    return FakeCupy(emulated_shim, lowered)


def test_the_engine_over_cupy_gives_the_cpus_bytes(fake, kernel_cache):
    """Everything but the driver: real machine code is made and cached, what it does is emulated."""
    device = CupyDevice(fake, 0)
    engine = CudaEngine(devices=[device])
    assert engine.name == "cuda (Fake GPU, sm_80)"
    src = exercise.values("BF16", 100_001, 1)
    packed, absmax = engine.buffer(50_001), np.empty(1563, np.float32)
    stats = engine.quantize(src, "BF16", 64, "nf4", packed, absmax)
    exercise.same("fake", (packed, absmax, stats), exercise.on_cpu(src, "BF16", 64, "nf4"))
    assert len(fake.loaded) == 3  # whole blocks, the tail, the error sums
    for path in fake.loaded:
        assert Path(path).read_bytes()[:4] == b"\x7fELF"
        assert Path(path).parent == kernel_cache
    engine.quantize(src, "BF16", 64, "nf4", packed, absmax)
    assert len(fake.loaded) == 3
    stream, memory = device.stream(), device.allocate(4096)

    def copy() -> None:
        stream.copy(memory.address, memory.address + 2048, 2048)

    assert stream.seconds(copy, ahead=copy) > 0
    assert fake.device == 0


def test_names_that_are_used_are_cupys():
    """Whatever cupy_device.py takes from the module exists in it."""
    for node in ast.walk(ast.parse(Path(cupy_device.__file__).read_text())):
        if not isinstance(node, ast.Attribute):
            continue
        path, owner = [], node
        while isinstance(owner, ast.Attribute):
            path.append(owner.attr)
            owner = owner.value
        root = owner.id if isinstance(owner, ast.Name) else ""
        path.reverse()
        if root == "self" and path[0] == "_cupy":
            path = path[1:]
        elif root == "self" and path[0] == "_runtime":
            path = ["cuda", "runtime", *path[1:]]
        elif root != "cupy":
            continue
        found = cupy
        for name in path:
            if callable(found) and not isinstance(found, type):
                break  # an attribute of what a call returns
            found = getattr(found, name)


def test_cupy_itself_gets_as_far_as_the_driver(kernel_cache, real_gpu):
    """The real RawModule takes our file, and fails only where it needs a GPU, if there is none."""
    path, name = nvrtc.cubin(KERNEL, "90" if real_gpu is None else real_gpu.arch)
    module = cupy.RawModule(path=str(path))
    if real_gpu is not None:
        assert module.get_function(name).num_regs > 0
    else:
        with pytest.raises(cupy.cuda.runtime.CUDARuntimeError, match=r"InsufficientDriver"):
            module.get_function(name)
    pinned = bytearray(64)  # what alloc_pinned_memory returns has the buffer protocol, too
    assert np.frombuffer(pinned, np.uint8, 32).flags.writeable


def test_a_kernel_is_compiled_once(kernel_cache, monkeypatch):
    path, name = nvrtc.cubin(KERNEL, "90")
    assert stat.S_IMODE(kernel_cache.stat().st_mode) == 0o700
    monkeypatch.setattr(nvrtc, "compile_kernels", lambda *_: pytest.fail("compiled again"))
    assert nvrtc.cubin(KERNEL, "90") == (path, name)


@pytest.mark.parametrize("what", ["arch", "kernel", "source", "options", "compiler"])
def test_the_cache_is_keyed_by_all_that_matters(kernel_cache, monkeypatch, what):
    first, _ = nvrtc.cubin(KERNEL, "90")
    kernel, arch = KERNEL, "90"
    if what == "arch":
        arch = "80"
    elif what == "kernel":
        kernel = "fold_errors"
    elif what == "source":
        changed = {name: text + "\n" for name, text in nvrtc.sources().items()}
        monkeypatch.setattr(nvrtc, "sources", lambda: changed)
    elif what == "options":
        monkeypatch.setattr(nvrtc, "OPTIONS", (*nvrtc.OPTIONS, "-lineinfo"))
    else:

        class Newer:
            def __getattr__(self, name):
                return (99, 0).__class__ if name == "x" else getattr(real, name)

            def getVersion(self):  # noqa: N802 - NVRTC's name
                return (99, 0)

        real = nvrtc.compiler()
        monkeypatch.setattr(nvrtc, "compiler", Newer)
    assert nvrtc.cubin(kernel, arch)[0] != first


def test_a_damaged_cache_is_made_anew(kernel_cache):
    path, _ = nvrtc.cubin(KERNEL, "90")
    good = path.read_bytes()
    for damage in (good[:1000], b"", good[:500] + b"\0" + good[501:]):
        path.write_bytes(damage)
        assert nvrtc.cubin(KERNEL, "90")[0].read_bytes() == good
    path.with_suffix(".name").write_text("nonsense")
    assert nvrtc.cubin(KERNEL, "90")[0].read_bytes() == good


def test_a_full_disk_for_the_cache(kernel_cache, monkeypatch):
    write = nvrtc._write

    def full(path, content):
        if kernel_cache in path.parents:
            raise OSError(28, "No space left on device")
        write(path, content)

    monkeypatch.setattr(nvrtc, "_write", full)
    path, _ = nvrtc.cubin("fold_errors", "90")
    assert path.is_file()
    assert kernel_cache not in path.parents


def test_without_a_place_for_a_cache(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    path, _ = nvrtc.cubin("fold_errors", "90")
    assert path.is_file()
    assert os.path.commonpath([path, tmp_path]) != str(tmp_path)


# -- what can be wrong ----------------------------------------------------------------------------


def test_device_memory_runs_out(fake):
    device = CupyDevice(fake, 0)
    with pytest.raises(DeviceMemoryError):
        device.allocate(1 << 40)


def test_pinned_memory_runs_out(fake):
    fake.fail["PinnedMemory"] = cupy.cuda.runtime.CUDARuntimeError(2)
    with pytest.raises(MachineError, match=r"no 1,000 bytes of pinned memory.*ulimit -l"):
        CupyDevice(fake, 0).host_buffer(1000)


def test_a_gpu_that_cannot_be_opened(fake):
    fake.fail["free"] = cupy.cuda.runtime.CUDARuntimeError(46)
    with pytest.raises(MachineError, match=r"cuda:0 cannot be used.*nvidia-smi"):
        CupyDevice(fake, 0)


@pytest.mark.parametrize("call", ["synchronize", "memcpyAsync"])
def test_a_gpu_that_fails_in_mid_run(fake, kernel_cache, call):
    engine = CudaEngine(devices=[CupyDevice(fake, 0)])
    fake.fail[call] = cupy.cuda.runtime.CUDARuntimeError(700)
    with pytest.raises(MachineError, match=r"the GPU failed .*nvidia-smi"):
        engine.nested_quantize(np.ones(256, np.float32), 0.0, np.empty(256, np.uint8),
                               np.empty(1, np.float32))  # fmt: skip


@pytest.mark.parametrize("status", [209, 222, 2])
def test_a_driver_that_does_not_load_the_code(fake, kernel_cache, status):
    class RefusedError(cupy.cuda.driver.CUDADriverError):
        def __init__(self) -> None:  # CuPy's own asks the driver for the text
            RuntimeError.__init__(self, "CUDA_ERROR_UNSUPPORTED_PTX_VERSION")
            self.status = status

    fake.fail["RawModule"] = RefusedError()
    if status == 2:  # out of memory: nothing is wrong with the code
        with pytest.raises(MachineError, match=r"the GPU failed"):
            CupyDevice(fake, 0).kernel("fold_errors")
        return
    with pytest.raises(MachineError, match=r"driver does not load .*NVRTC 13.*sm_80.*update"):
        CupyDevice(fake, 0).kernel("fold_errors")


@pytest.mark.parametrize("target", ["sm_50", "sm_999"])
def test_a_gpu_that_the_compiler_does_not_know(target):
    with pytest.raises(MachineError, match=rf"does not know.*{target}.*upgrade.*cuda12") as caught:
        nvrtc.compile_kernels((KERNEL,), target)
    assert "\n" not in str(caught.value)


def test_code_that_does_not_compile():
    texts = {**nvrtc.sources(), "gpu_kernels.cu": "nonsense;"}
    with pytest.raises(
        MachineError, match=r"(?s)could not compile.*is a bug.*--engine cpu"
    ) as caught:
        nvrtc.compile_kernels(("k",), "sm_90", texts)
    assert "gpu_kernels.cu(1): error" in str(caught.value)


def test_a_header_that_is_not_found():
    main = nvrtc.sources()["gpu_kernels.cu"]
    with pytest.raises(MachineError, match=r"(?s)could not compile.*gpu_load.cuh"):
        nvrtc.compile_kernels((KERNEL,), "sm_90", {"gpu_kernels.cu": main})


def test_an_installation_without_the_sources(monkeypatch):
    monkeypatch.setattr(nvrtc, "SOURCES", ("gpu_kernels.cu", "not_there.h"))
    nvrtc.sources.cache_clear()
    with pytest.raises(MachineError, match=r"not_there.h is missing.*Reinstall nf4cli"):
        nvrtc.sources()
    nvrtc.sources.cache_clear()


def test_a_compiler_that_is_not_there(monkeypatch):
    def lost():
        raise RuntimeError('Failure finding "libnvrtc.so.13"\n  many more lines')

    monkeypatch.setattr("cupy.cuda.nvrtc.getVersion", lost)
    with pytest.raises(MachineError, match=r"libnvrtc.*pip install nvidia-cuda-nvrtc$") as caught:
        nvrtc.compiler()
    assert "\n" not in str(caught.value)
    monkeypatch.setattr("cupy.cuda.runtime.runtimeGetVersion", lambda: 12090)
    with pytest.raises(MachineError, match=r"pip install nvidia-cuda-nvrtc-cu12$"):
        nvrtc.compiler()
