"""--engine cuda where something is missing: one message with the way out, by the real command.

Drivers are simulated by a libcuda.so.1 of a few lines, so that the real loading code runs.
"""

from __future__ import annotations

import itertools
import os
import subprocess

import pytest
from helpers import MACHINE, USAGE, nf4_process, nightly_but

from nf4cli import engines
from nf4cli.engines import cupy_device
from nf4cli.errors import MachineError

DRIVER = """
#include <stdlib.h>
static int value(const char* name) { return atoi(getenv(name)); }
int cuInit(unsigned flags) { return value("FAKE_INIT"); }
int cuDriverGetVersion(int* version) { *version = value("FAKE_VERSION"); return 0; }
int cuDeviceGetCount(int* count) { *count = value("FAKE_COUNT"); return 0; }
int cuGetErrorString(int status, const char** text) { *text = "no device is detected"; return 0; }
"""


@pytest.fixture(scope="module")
def with_driver(tmp_path_factory):
    """Run nf4 with a simulated driver."""
    directory = tmp_path_factory.mktemp("driver")
    (directory / "driver.c").write_text(DRIVER)
    subprocess.run(
        ["gcc", "-shared", "-fPIC", directory / "driver.c", "-o", directory / "libcuda.so.1"],
        check=True,
    )

    def run(*arguments: object, version: int = 13_020, gpus: int = 1, status: int = 0):
        environment = {
            **os.environ, "LD_LIBRARY_PATH": str(directory), "FAKE_VERSION": str(version),
            "FAKE_COUNT": str(gpus), "FAKE_INIT": str(status),
        }  # fmt: skip
        return nf4_process(*arguments, env=environment)

    return run


def refused(done, code: int, *words: str) -> None:
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stdout == ""
    for word in words:
        assert word in done.stderr, done.stderr


CASES = {
    "no GPU": ({"gpus": 0}, "no usable GPU", "CUDA_VISIBLE_DEVICES"),
    "no device": ({"status": 100}, "no device is detected", "nvidia-smi"),
    "very old driver": ({"version": 11_040}, "too old", "CUDA 11.4", "Update the driver"),
    "driver older than CuPy": ({"version": 12_040}, "CUDA 12.4", "cupy-cuda13x", "nf4cli[cuda12]"),
    "a GPU that cannot be opened": ({}, "cuda:0 cannot be used", "--engine cpu"),
}


COMMANDS = ("quantize", "verify", "dequantize")
EVERY_COMMIT = [*((case, "quantize") for case in CASES), *(("no GPU", c) for c in COMMANDS)]


@pytest.mark.parametrize(
    "case_and_command", nightly_but(EVERY_COMMIT, itertools.product(CASES, COMMANDS)), ids="-".join
)
def test_each_is_one_message(llama, llama_nf4, tmp_path, with_driver, case_and_command):
    case, command = case_and_command
    options, *words = CASES[case]
    arguments = {
        "quantize": ("quantize", llama, tmp_path / "out"),
        "verify": ("verify", llama_nf4, "--source", llama),
        "dequantize": ("dequantize", llama_nf4, tmp_path / "out"),
    }[command]
    refused(with_driver(*arguments, "--engine", "cuda", **options), MACHINE, *words)
    assert not (tmp_path / "out").exists()


def test_without_a_driver(llama, tmp_path):
    try:
        cupy_device.driver()
    except MachineError:
        done = nf4_process("quantize", llama, tmp_path / "out", "--engine", "cuda")
        refused(done, MACHINE, "no NVIDIA driver", "--engine cpu")
    else:
        pytest.skip("this machine has an NVIDIA driver")


@pytest.mark.parametrize("case", nightly_but(["no GPU", "no device"], CASES))
def test_auto_goes_on_with_the_cpu_and_says_why(llama, tmp_path, with_driver, case):
    options, *_ = CASES[case]
    done = with_driver("quantize", llama, tmp_path / "out", **options)
    assert done.returncode == 0, done.stderr
    assert "cpu (" in done.stdout
    no_gpu = case in ("no GPU", "no device")
    assert ("note: a GPU is here, but is not used" in done.stderr) == (not no_gpu)
    done = with_driver("quantize", llama, tmp_path / "quiet", "--quiet", **options)
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("device", "words"),
    [("cuda:7", ("cuda:7", "cuda:0 to cuda:1")), ("cuda:0,2", ("cuda:2",)),
     ("gpu", ("'gpu'", "cuda:0,1")), ("cuda:", ("'cuda:'",)), ("cuda:-1", ("'cuda:-1'",)),
     ("cuda:99999", ("'cuda:99999'",)), ("", ("an empty argument after '--device'",))],
)  # fmt: skip
def test_devices_that_do_not_exist(llama, tmp_path, with_driver, device, words):
    arguments = ("quantize", llama, tmp_path / "out", "--device", device)
    refused(with_driver(*arguments, gpus=2), USAGE, *words)


def test_a_gpu_for_the_engine_cpu(llama, tmp_path):
    done = nf4_process("quantize", llama, tmp_path / "out", "--engine", "cpu", "--device", "cuda")
    refused(done, USAGE, "not for the engine cpu", "--engine cuda")


@pytest.mark.parametrize(("version", "extra"), [(13_000, "cuda13"), (12_090, "cuda12")])
def test_cupy_is_not_installed(monkeypatch, version, extra):
    monkeypatch.setattr(cupy_device, "driver", lambda: (1, version))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MachineError, match=rf"needs CuPy .*pip install 'nf4cli\[{extra}\]'"):
        engines.load("cuda")


def test_cupy_is_broken(llama, tmp_path, with_driver, monkeypatch):
    package = tmp_path / "modules" / "cupy"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('libnothing.so is missing')")
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    done = with_driver("quantize", llama, tmp_path / "out", "--engine", "cuda")
    refused(done, MACHINE, "cannot be imported (libnothing.so is missing)", "nf4cli[cuda13]")
