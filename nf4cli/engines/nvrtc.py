"""cuda/gpu_kernels.cu -> machine code for one GPU, by NVIDIA's run-time compiler, cached on disk.

CuPy's own way (RawModule of source) appends -ftz=true to every compilation, which costs a block
near 3e38 all its codes.  So the compiler is called with our options, and RawModule loads what it
made.
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

SOURCES = ("gpu_kernels.cu", "gpu_search.cuh", "gpu_load.cuh", "codec.h")
OPTIONS = (
    "-std=c++17",
    "-fmad=false", "-ftz=false", "-prec-div=true",  # every float operation rounds on its own
)  # fmt: skip


def compiler() -> Any:
    """CuPy's binding of NVRTC.

    Raises:
        MachineError: NVRTC is not installed or cannot be loaded.
    """
    from cupy.cuda import nvrtc

    try:
        nvrtc.getVersion()
    except Exception as error:  # the binding's loader raises what it likes
        reason = str(error).splitlines()[0]
        raise MachineError(
            f"the CUDA engine compiles its kernels with NVRTC, which cannot be loaded ({reason}): "
            f"pip install {package('nvidia-cuda-nvrtc')}"
        ) from error
    return nvrtc


def package(name: str) -> str:
    """What an NVIDIA package is called for the CUDA that CuPy was built for."""
    from cupy.cuda import runtime

    major = runtime.runtimeGetVersion() // 1000
    return name if major >= 13 else f"{name}-cu{major}"


@cache
def sources() -> dict[str, str]:
    """Name -> text of the kernels and what they include.

    Raises:
        MachineError: one is missing.
    """
    here = Path(__file__).parent
    found = {}
    for name in SOURCES:
        try:
            found[name] = (here / name).read_text("utf-8")
        except OSError as error:
            raise MachineError(
                f"{here / name} is missing or unreadable ({error.strerror}): the package is "
                "incomplete. Reinstall nf4cli"
            ) from error
    return found


def compile_kernels(
    kernels: tuple[str, ...], target: str, texts: dict[str, str] | None = None
) -> tuple[bytes, dict[str, str]]:
    """(machine code or PTX, {kernel: its name in there}).

    Args:
        kernels: as C++ names them.
        target: "sm_90" for machine code, "compute_90" for PTX.
        texts: sources other than the package's.

    Raises:
        MachineError: NVRTC is missing, does not know the target, or refuses the source.
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
    """(file with machine code for a GPU of compute capability `arch`, the kernel's name in it).

    Compiled at most once: the cache is keyed by source, options, architecture and compiler, and
    every file by its own digest.  Where there is no place for a cache it lies in a temporary one.

    Raises:
        MachineError: see `compile_kernels`.
    """
    version = compiler().getVersion()
    key = hashlib.sha256()
    for part in (kernel, arch, *OPTIONS, *map(str, version), *sources().values()):
        key.update(part.encode() + b"\0")
    with _LOCK:
        try:
            return _cached(_home(), key.hexdigest(), kernel, arch)
        except (OSError, RuntimeError):  # read-only, full, or no home at all
            return _cached(_temporary(), key.hexdigest(), kernel, arch)


_LOCK = threading.Lock()  # one compilation at a time: each takes a hundred MB


def _cached(directory: Path, key: str, kernel: str, arch: str) -> tuple[Path, str]:
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
    """$XDG_CACHE_HOME/nf4/kernels; raises RuntimeError where there is no home."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "nf4" / "kernels"


@cache
def _temporary() -> Path:
    """A directory that goes with the process."""
    directory = tempfile.mkdtemp(prefix="nf4-kernels-")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return Path(directory)


def _write(path: Path, content: bytes) -> None:
    """All of it or nothing, whoever else writes the same."""
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        try:
            file.write(content)
            file.flush()
            os.replace(file.name, path)  # noqa: PTH105 - what Path.replace does, said plainly
        except OSError:
            os.unlink(file.name)  # noqa: PTH108
            raise
