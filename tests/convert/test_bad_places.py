"""Bad outputs, options and moments: full disks, signals, too few files, missing engines."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import (
    INPUT,
    LLAMA,
    MACHINE,
    USAGE,
    full_tmpfs,
    llama_tensors,
    nf4,
    nf4_ok,
    refused,
    write_checkpoint_dir,
)


def test_output_exists(work):
    (work / "model-nf4").mkdir()
    (work / "model-nf4" / "precious").write_text("data")
    refused(USAGE, "quantize", "model", says=("model-nf4 exists",), cwd=work)
    (work / "file").write_text("data")
    refused(USAGE, "quantize", "model", "file", says=("file exists",), cwd=work)


def test_output_is_an_empty_directory(work):
    (work / "out").mkdir()
    nf4_ok("quantize", "model", "out", cwd=work)


@pytest.mark.parametrize("output", ["model", "model/nf4", "./model/../model"])
def test_source_is_output(work, output):
    refused(USAGE, "quantize", "model", output, says=("model",), cwd=work)
    nf4_ok("quantize", "model", cwd=work)
    refused(USAGE, "dequantize", "model-nf4", "model-nf4/x", says=("source",), cwd=work)


def test_source_through_a_link_is_output(work):
    (work / "link").symlink_to(work / "model")
    refused(USAGE, "quantize", "link", "model/out", says=("source",), cwd=work)


def limited(work: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run nf4 where statvfs tells of a nearly full disk."""
    code = (
        "import shutil, sys, collections\n"
        "shutil.disk_usage = lambda p: collections.namedtuple('u', 'total used free')(9, 9, 1000)\n"
        f"sys.argv = ['nf4', *{list(arguments)!r}]\n"
        "from nf4cli.cli import main; main()"
    )
    return subprocess.run(
        [sys.executable, "-I", "-c", code], capture_output=True, text=True, cwd=work, check=False
    )


def test_disk_too_small_for_the_plan(work):
    before = sorted(work.rglob("*"))
    done = limited(work, "quantize", "model")
    assert done.returncode == MACHINE
    assert "1,000 free" in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(work.rglob("*")) == before


def test_disk_that_is_really_full(work):
    mount, size = full_tmpfs("300k")
    disk = work / "disk"
    disk.mkdir()
    if subprocess.run(
        [mount, "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk], check=False
    ).returncode:
        pytest.skip("this machine does not let us mount a tmpfs")
    try:
        code = (
            "import shutil, sys, collections\n"
            "usage = collections.namedtuple('u', 'total used free')(9, 9, 1 << 50)\n"
            "shutil.disk_usage = lambda path: usage\n"
            "sys.argv = ['nf4', 'quantize', 'model', 'disk/out']\n"
            "from nf4cli.cli import main; main()"
        )
        big = {**llama_tensors(), "model.layers.0.big.weight": torch.randn(1000, 1000).bfloat16()}
        write_checkpoint_dir(work / "model", big, LLAMA)
        done = subprocess.run(
            [sys.executable, "-I", "-c", code],
            capture_output=True,
            text=True,
            cwd=work,
            check=False,
        )
        assert done.returncode == MACHINE
        assert "No space left" in done.stderr
        assert "Traceback" not in done.stderr
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", disk], check=True)


def test_unwritable_output(work):
    if os.geteuid() == 0:
        target = "/proc/nf4-out"  # root may write everywhere else
    else:
        (work / "locked").mkdir(mode=0o500)
        target = "locked/out"
    refused(MACHINE, "quantize", "model", target, says=("error:",), cwd=work)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--blocksize", "63"), "--blocksize 63"),
        (("--quant-type", "nf5"), "--quant-type nf5"),
        (("--quant-storage", "int8"), "--quant-storage int8"),
        (("--compute-dtype", "half"), "--compute-dtype half"),
        (("--dtype", "int4"), "--dtype int4"),
        (("--digest", "md5"), "--digest md5"),
        (("--max-shard-size", "big"), "'big' is not a size"),
        (("--max-shard-size", "10"), "below 1 MB"),
        (("--memory", "1MB"), "--memory 1,000,000 bytes is too little"),
        (("--workers", "0"), "--workers 0"),
        (("--memory", "9" * 400), "is not a size"),
        (("--engine", "abacus"), "no engine is called 'abacus'"),
        (("--skip-modules", "nope"), "'nope' matches no module"),
    ],
)
def test_bad_options(work, options, says):
    done = nf4("quantize", "model", *options, cwd=work)
    assert done.returncode in (USAGE, MACHINE)
    assert says in done.stderr
    assert not (work / "model-nf4").exists()


def test_storage_that_does_not_fit(work):
    write_checkpoint_dir(work / "odd", {"a.0.b.weight": torch.ones(3, 3)}, LLAMA)
    refused(
        USAGE, "quantize", "odd", "--quant-storage", "float32", says=("a.0.b.weight",), cwd=work
    )


def test_keys_that_clash(work):
    tensors = {"a.0.b.weight": torch.ones(4, 4), "a.0.b.weight.absmax": torch.ones(1)}
    write_checkpoint_dir(work / "clash", tensors, LLAMA)
    refused(INPUT, "quantize", "clash", says=("wanted by both",), cwd=work)


def test_a_source_that_shrinks_while_it_is_read(work):
    from nf4cli.checkpoint.reader import ByteReader
    from nf4cli.errors import InputError

    file = work / "model" / "model.safetensors"
    size = file.stat().st_size
    with ByteReader(file, size) as reader:
        os.truncate(file, size // 2)
        with pytest.raises(InputError, match="truncated by another process"):
            reader.read(size // 2 - 10, 20)
    with pytest.raises(InputError, match="changed while it was being read"):
        ByteReader(file, size)


def test_missing_engine_names_the_compiler(work, monkeypatch):
    from nf4cli.engines import cpu
    from nf4cli.errors import MachineError

    monkeypatch.setattr(cpu, "LIBRARY", work / "absent.so")
    cpu._library.cache_clear()
    with pytest.raises(MachineError, match=r"g\+\+"):
        cpu.CpuEngine()
    cpu._library.cache_clear()
