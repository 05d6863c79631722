"""Compile cuda/gpu_kernels.cu for one GPU with NVRTC, NVIDIA's run-time compiler; cache the result.

CuPy could compile the source itself (RawModule), but adds -ftz=true to the options: the inverse of
an absmax near 3e38 is then zero, and the codes of its block are wrong.  So NVRTC is called here
with our own options, and RawModule only loads the machine code.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import os
import shutil
import tempfile
import threading
from functools import cache
from pathlib import Path
from typing import Any

from ..errors import MachineError

SOURCES = ("gpu_kernels.cu", "gpu_scales.cuh", "gpu_search.cuh", "gpu_load.cuh", "codec.h")
OPTIONS = (
    "-std=c++17",
    "-fmad=false", "-ftz=false", "-prec-div=true",  # each float operation is rounded by itself
)  # fmt: skip


def compiler() -> Any:
    """Return CuPy's binding of NVRTC, a module.

    Raises:
        MachineError: NVRTC is not installed or cannot be loaded.
    """
    from cupy.cuda import nvrtc

    try:
        nvrtc.getVersion()
    except Exception as error:  # the binding raises different exceptions when it fails to load
        reason = str(error).splitlines()[0]
        raise MachineError(
            f"the CUDA engine compiles its kernels with NVRTC, which cannot be loaded ({reason}): "
            f"pip install {package('nvidia-cuda-nvrtc')}"
        ) from error
    return nvrtc


def package(name: str) -> str:
    """Return the name of an NVIDIA package for the CUDA version that CuPy was built for."""
    from cupy.cuda import runtime

    major = runtime.runtimeGetVersion() // 1000
    return name if major >= 13 else f"{name}-cu{major}"


@cache
def sources() -> dict[str, str]:
    """Return file name -> text of the kernels and their headers, the kernels first.

    Raises:
        MachineError: a file is missing or unreadable.
    """
    directory = Path(__file__).parent
    texts = {}
    for name in SOURCES:
        try:
            texts[name] = (directory / name).read_text("utf-8")
        except OSError as error:
            raise MachineError(
                f"{directory / name} is missing or unreadable ({error.strerror}): the package is "
                "incomplete. Reinstall nf4cli"
            ) from error
    return texts


def compile_kernels(
    kernels: tuple[str, ...], target: str, texts: dict[str, str] | None = None
) -> tuple[bytes, dict[str, str]]:
    """Compile kernels for a target.

    Args:
        kernels: their names in C++.
        target: "sm_90" for machine code, "compute_90" for PTX.
        texts: sources to compile instead of the package's, as `sources` returns them.

    Returns:
        (machine code or PTX, kernel -> its mangled name in the code).

    Raises:
        MachineError: NVRTC is missing, does not know the target, or rejects the source.
    """
    nvrtc = compiler()
    texts = texts or sources()
    main, *headers = texts
    program = nvrtc.createProgram(
        texts[main], main, tuple(texts[h].encode() for h in headers),
        tuple(h.encode() for h in headers),
    )  # fmt: skip
    try:
        for kernel in kernels:
            nvrtc.addNameExpression(program, kernel)
        try:
            nvrtc.compileProgram(program, (*OPTIONS, f"-arch={target}"))
        except nvrtc.NVRTCError as error:
            raise MachineError(_refusal(nvrtc, program, target, error)) from error
        names = {k: _text(nvrtc.getLoweredName(program, k)) for k in kernels}
        if target.startswith("compute"):
            ptx = nvrtc.getPTX(program)
            return (ptx if isinstance(ptx, bytes) else ptx.encode()), names
        return nvrtc.getCUBIN(program) + b"\0", names  # the binding drops the last byte
    finally:
        nvrtc.destroyProgram(program)


def _refusal(nvrtc: Any, program: Any, target: str, error: Exception) -> str:
    """Return the message for a compilation that failed."""
    version = ".".join(map(str, nvrtc.getVersion()))
    log = _text(nvrtc.getProgramLog(program)).strip()
    if "invalid value for --gpu-architecture" in log or "INVALID_OPTION" in str(error):
        return (
            f"NVRTC {version} does not know this GPU's architecture, {target}: for a newer GPU, "
            f"pip install --upgrade {package('nvidia-cuda-nvrtc')}; for one older than sm_75, "
            "pip install 'nf4cli[cuda12]' in place of cuda13; or use --engine cpu"
        )
    return (
        f"NVRTC {version} could not compile {SOURCES[0]} for {target}: {log or error}. "
        "This is a bug: please report it with these lines; --engine cpu gives the same bytes"
    )


def _text(value: str | bytes) -> str:
    return value if isinstance(value, str) else value.decode()


def cubin(kernel: str, arch: str) -> tuple[Path, str]:
    """Return a file with the machine code of a kernel, compiled at most once.

    The key of the cache is a digest of kernel, source, options, architecture and compiler version;
    the digest of each file is checked as well.  If the user's cache directory cannot be written,
    the file lies in a temporary directory.

    Args:
        kernel: its name in C++.
        arch: compute capability of the GPU, without its point ("90").

    Returns:
        (path of the file, mangled name of the kernel in it).

    Raises:
        MachineError: see `compile_kernels`.
        OSError: the temporary directory cannot be written either.
    """
    version = compiler().getVersion()
    key = hashlib.sha256()
    for part in (kernel, arch, *OPTIONS, *map(str, version), *sources().values()):
        key.update(part.encode() + b"\0")
    with _LOCK:
        try:
            return _cached(_home(), key.hexdigest(), kernel, arch)
        except (OSError, RuntimeError):  # read-only, full, or there is no home directory
            return _cached(_temporary(), key.hexdigest(), kernel, arch)


_LOCK = threading.Lock()  # one compilation at a time, since each takes about 100 MB


def _cached(directory: Path, key: str, kernel: str, arch: str) -> tuple[Path, str]:
    """Return what `cubin` returns, from a cache directory; compile the kernel if it is not there.

    Raises:
        OSError: the directory cannot be written.
    """
    path, name = directory / f"{key}.cubin", directory / f"{key}.name"
    with contextlib.suppress(OSError, ValueError):
        digest, lowered = name.read_text("utf-8").split()
        if hashlib.sha256(path.read_bytes()).hexdigest() == digest:
            return path, lowered
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    code, lowered_names = compile_kernels((kernel,), f"sm_{arch}")
    _write(path, code)
    _write(name, f"{hashlib.sha256(code).hexdigest()} {lowered_names[kernel]}".encode())
    return path, lowered_names[kernel]


def _home() -> Path:
    """Return $XDG_CACHE_HOME/nf4/kernels; raise RuntimeError if there is no home directory."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "nf4" / "kernels"


@cache
def _temporary() -> Path:
    """Make a directory that is removed when the process ends."""
    directory = tempfile.mkdtemp(prefix="nf4-kernels-")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return Path(directory)


def _write(path: Path, content: bytes) -> None:
    """Write a file completely or not at all, even if another process writes the same one."""
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        try:
            file.write(content)
            file.flush()
            os.replace(file.name, path)  # noqa: PTH105 - file.name is a str
        except OSError:
            os.unlink(file.name)  # noqa: PTH108
            raise
