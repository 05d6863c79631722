"""Kernels -> a shared library that runs them on the CPU, with or without a sanitizer."""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from nf4cli.engines import nvrtc
from nf4cli.engines.launches import Launch, every_kernel

from . import ptx

HERE = Path(__file__).parent
ARCHS = ("75", "80", "86", "89", "90", "100", "120")
"""Every generation of GPU that is in use, Turing to Blackwell."""

_FLAGS = {
    "": ("-O1",),
    # the .cu would not notice overlaps of types; signed overflow and shifts it would
    "asan": ("-O1", "-g1", "-DEMU_ASAN", "-fsanitize=address,undefined",
             "-fno-sanitize-recover=undefined"),
    "tsan": ("-O1", "-g1", "-DEMU_TSAN", "-fsanitize=thread"),
}  # fmt: skip


class Kernels:
    """A library of kernels that run on the CPU; addresses are the process's own.

    Args:
        libraries: built by `build_ptx` or `build_shim`.
    """

    def __init__(self, *libraries: Path) -> None:
        self._loaded = [ctypes.CDLL(str(library)) for library in libraries]
        for library in self._loaded:
            library.emu_error.restype = ctypes.c_char_p

    def run(self, launch: Launch, first: int = 0) -> None:
        """Run one launch to its end, of its grid the blocks from `first` on.

        Raises:
            AssertionError: the kernel did what a GPU leaves undefined, or does not exist.
        """
        pointers = [ctypes.c_void_p(a.ctypes.data) for a in launch.arguments]
        arguments = (ctypes.c_void_p * len(pointers))(*pointers)
        for library in self._loaded:
            status = library.emu_launch(
                launch.kernel.encode(), first, launch.blocks - first, launch.threads, arguments
            )
            if status > 0:
                raise AssertionError(f"{launch.kernel}: {library.emu_error().decode()}")
            if status == 0:
                return
        raise AssertionError(f"{launch.kernel} is in none of the libraries")


def compile_ptx(arch: str, kernels: Sequence[str] = ()) -> tuple[str, dict[str, str]]:
    """(PTX for a generation of GPUs, {its name for a kernel: ours})."""
    code, names = nvrtc.compile_kernels(tuple(kernels or every_kernel()), f"compute_{arch}")
    return code.decode(), {lowered: kernel for kernel, lowered in names.items()}


def build_ptx(text: str, names: dict[str, str], sanitizer: str = "") -> Path:
    """The kernels `names` of PTX as NVRTC made it."""
    return _build(ptx.translate(text, names), sanitizer)


def build_shim(
    kernels: Sequence[str] = (), sanitizer: str = "", texts: dict[str, str] | None = None
) -> Path:
    """gpu_kernels.cu as g++ compiles it.

    Args:
        texts: other sources than the package's, by name.
    """
    sources = texts or nvrtc.sources()
    main, *headers = sources
    code = sources[main]
    for header in headers:
        include = f'#include "{header}"\n'
        assert include in code
        code = code.replace(include, sources[header])
    table = "".join(
        f'  if (!strcmp(name, "{kernel}"))\n'
        f"    return emu_call({kernel}, first, count, threads, arguments);\n"
        for kernel in kernels or every_kernel()
    )
    code = code.replace('extern "C" __global__', "__global__")
    return _build(f'#include "shim.h"\n{code}{ptx.LAUNCH.format(table=table)}', sanitizer)


def parallel(*builds) -> list:
    """Results of functions without arguments, two at a time: g++ is most of the suite's time."""
    with ThreadPoolExecutor(2) as pool:
        return [future.result() for future in [pool.submit(build) for build in builds]]


def _build(code: str, sanitizer: str) -> Path:
    """A shared library, built once for the same code and flags in this run of the tests."""
    runtime = HERE / "runtime.cpp"
    key = hashlib.sha256("\0".join([code, sanitizer, *_FLAGS[sanitizer]]).encode())
    for file in ("runtime.h", "runtime.cpp", "ptx.h", "shim.h"):
        key.update((HERE / file).read_bytes())
    directory = Path(tempfile.gettempdir()) / f"nf4-emulator-{os.getuid()}"
    directory.mkdir(mode=0o700, exist_ok=True)
    library = directory / f"{key.hexdigest()[:32]}.so"
    if library.exists():
        return library
    source = library.with_suffix(".cpp")
    source.write_text(code)
    # TSan must not see the switching of stacks, so the runtime goes without it.
    switched = [f for f in _FLAGS[sanitizer] if f != "-fsanitize=thread"]
    common = ["-std=c++20", "-fPIC", "-ffp-contract=off", "-fno-strict-aliasing", f"-I{HERE}"]
    objects = []
    for path, flags in ((source, _FLAGS[sanitizer]), (runtime, switched)):
        objects.append(f"{library}.{os.getpid()}.{path.stem}.o")
        subprocess.run(["g++", *common, *flags, "-w", "-c", path, "-o", objects[-1]], check=True)
    linked = f"{library}.{os.getpid()}"
    flags = [f for f in _FLAGS[sanitizer] if f.startswith("-fsanitize")]
    subprocess.run(["g++", "-shared", *flags, *objects, "-o", linked], check=True)
    Path(linked).replace(library)
    for path in objects:
        Path(path).unlink()
    return library
