"""Kernels -> a shared library that runs them on the CPU, with or without a sanitizer."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from nf4cli.engines import nvrtc
from nf4cli.engines.launches import Launch

from . import ptx
from .kernels import every_kernel

HERE = Path(__file__).parent
CACHE = HERE.parent.parent / "build" / "emulator"
"""Compiled libraries, named by what they were made of; git ignores the folder."""

ARCHS = ("75", "80", "86", "89", "90", "100", "120")
"""Every generation of GPU that is in use, Turing to Blackwell."""

_COMMON = ("-std=c++20", "-fPIC", "-ffp-contract=off", "-fno-strict-aliasing", f"-I{HERE}")
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

    def address(self, array: np.ndarray) -> int:
        """Return where the kernels find an array: where it lies."""
        return array.ctypes.data

    def finish(self) -> None:
        """Wait until all that was launched is done: `run` does so already."""

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


def parallel(*builds: Callable[[], Any]) -> list[Any]:
    """Return the results of functions without arguments, run two at a time: they wait for g++."""
    with ThreadPoolExecutor(2) as pool:
        return [future.result() for future in [pool.submit(build) for build in builds]]


def _build(code: str, sanitizer: str) -> Path:
    """Return the shared library of `code`, compiled unless an earlier run left it in CACHE."""
    flags = [*_COMMON, *_FLAGS[sanitizer]]
    library = CACHE / f"{_key([code, *flags], 'runtime.h', 'runtime.cpp', 'ptx.h', 'shim.h')}.so"
    with _made_once(library) as path:
        if path is not None:
            source = path.with_suffix(".cpp")
            source.write_text(code)
            try:
                _compile([*flags, "-shared", source, _runtime(sanitizer)], path)
            finally:
                source.unlink()
    return library


def _runtime(sanitizer: str) -> Path:
    """Return the object file of runtime.cpp, which all libraries with a sanitizer share."""
    # TSan must not see the switching of stacks, so the runtime goes without it.
    flags = [*_COMMON, *(f for f in _FLAGS[sanitizer] if f != "-fsanitize=thread")]
    made = CACHE / f"{_key(flags, 'runtime.h', 'runtime.cpp')}.o"
    with _made_once(made) as path:
        if path is not None:
            _compile([*flags, "-c", HERE / "runtime.cpp"], path)
    return made


@contextmanager
def _made_once(result: Path) -> Iterator[Path | None]:
    """Yield where to make a file of the cache, or None where it lies there already.

    One thread of one process makes it, others wait for that; it appears whole or not at all.
    """
    CACHE.mkdir(parents=True, exist_ok=True)
    with result.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if result.exists():
            yield None
            return
        unfinished = result.with_name(f"{result.stem}.{os.getpid()}{result.suffix}")
        try:
            yield unfinished
            unfinished.replace(result)
        finally:
            unfinished.unlink(missing_ok=True)


def _compile(arguments: list[Any], result: Path) -> None:
    """Run g++, which must succeed."""
    subprocess.run(["g++", "-w", *arguments, "-o", result], check=True)


def _key(parts: list[str], *files: str) -> str:
    """Return a name for what is made of these strings and of these files beside this one."""
    digest = hashlib.sha256("\0".join(parts).encode())
    for file in files:
        digest.update((HERE / file).read_bytes())
    return digest.hexdigest()[:32]
