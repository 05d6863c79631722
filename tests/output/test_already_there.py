"""--resume where an output is there already, and places that cannot become one."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time

import pytest
import torch
from helpers import (
    LLAMA,
    USAGE,
    carry_out,
    llama_tensors,
    nf4,
    nf4_ok,
    refused,
    same_files,
    write_checkpoint_dir,
)
from stopped_runs import stop

from nf4cli import engines
from nf4cli.checkpoint.discovery import open_checkpoint
from nf4cli.convert import journal, workspace
from nf4cli.convert.output_place import workspace_of
from nf4cli.errors import InterruptedRunError, UnfinishedRunError
from nf4cli.format.config import QuantConfig
from nf4cli.planning.make_plan import make_plan
from nf4cli.planning.resources import make_resources


@pytest.fixture
def finished(work):
    (work / "model" / "tokenizer.json").write_text("{}")
    nf4_ok("quantize", "model", "out", cwd=work)
    return work


def test_a_finished_output_is_enough(finished):
    (finished / "out" / "README.md").write_text("edited, as a card may be")
    done = nf4("quantize", "model", "out", "--resume", cwd=finished)
    assert done.returncode == 0, done.stderr
    assert "out is complete already" in done.stderr.replace("\n", " ")
    assert not workspace_of(finished / "out").exists()


def change_weight(root) -> None:
    tensors = llama_tensors()
    tensors["model.embed_tokens.weight"][3, 4] = 0.5
    write_checkpoint_dir(root / "model", tensors, LLAMA)


def change_config(root) -> None:
    path = root / "model" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rope_theta": 7}))


def flip(root) -> None:
    file = root / "out" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("options", "change", "words"),
    [
        (("--blocksize", "128"), lambda r: None, "its blocksize is 64, not 128"),
        (("--digest", "sha256"), lambda r: None, "its digest is 'blake3', not 'sha256'"),
        ((), change_weight, "is not the file that it was made of"),
        ((), change_config, "rope_theta"),
        ((), lambda r: (r / "model" / "tokenizer.json").write_text("[]"), "tokenizer.json"),
        ((), lambda r: (r / "model" / "generation_config.json").write_text("{}"), "generation_"),
        ((), flip, "is not what was written"),
        ((), lambda r: (r / "out" / "config.json").unlink(), "config.json"),
        ((), lambda r: (r / "out" / "extra.safetensors").write_bytes(b""), "extra.safetensors"),
        ((), lambda r: (r / "out" / "nf4_manifest.json").write_text("{"), "not valid JSON"),
    ],
)
def test_another_output_is_not(finished, options, change, words):
    change(finished)
    refused(
        USAGE, "quantize", "model", "out", "--resume", *options, cwd=finished,
        says=("exists, and is not what this would write", words),
    )  # fmt: skip


def test_a_finished_output_needs_no_room(finished):
    code = (
        "import shutil, sys, collections\n"
        "shutil.disk_usage = lambda p: collections.namedtuple('u', 'total used free')(9, 9, 10)\n"
        "sys.argv = ['nf4', 'quantize', 'model', 'out', '--resume']\n"
        "from nf4cli.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=finished, check=False)
    assert done.returncode == 0


def test_a_mount_point_is_refused_before_the_work(work):
    if os.geteuid() != 0 or not shutil.which("mount"):
        pytest.skip("only root may mount a file system to try this on")
    (work / "out").mkdir()
    command = ["mount", "-t", "tmpfs", "tmpfs", work / "out"]
    if subprocess.run(command, check=False).returncode:
        pytest.skip("this machine does not let us mount a tmpfs")
    try:
        refused(USAGE, "quantize", "model", "out", says=("is a mount point",), cwd=work)
    finally:
        subprocess.run(["umount", work / "out"], check=True)


def test_a_disk_that_failed_once_is_not_believed_later(work, monkeypatch):
    failed = []

    def sync(path) -> None:
        if not failed:
            failed.append(path)
            time.sleep(0.3)
            raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr(journal, "sync", sync)
    monkeypatch.setattr(journal, "SYNC_EVERY", 0.0)
    plan, engine = make_plan(open_checkpoint(work / "model"), QuantConfig()), engines.load("cpu")
    with pytest.raises((OSError, UnfinishedRunError)):
        carry_out(plan, work / "out", engine, make_resources(engine, 1, None, 1))
    assert failed
    assert not (work / "out").exists()


def test_a_tensor_without_elements_does_not_hold_a_run_up(work):
    tensors = llama_tensors() | {"model.embed_a.weight": torch.empty(0, 64).bfloat16()}
    write_checkpoint_dir(work / "model", tensors, LLAMA)
    nf4_ok("quantize", "model", "other", cwd=work)
    time.sleep(2.1)  # a younger source is digested before the run goes on
    stop(work / "model", work / "out", "model.layers.1.mlp.up_proj.weight")
    nf4_ok("quantize", "model", "out", "--resume", cwd=work)
    assert same_files(work / "other", work / "out")


def test_the_message_is_one_line_and_its_command_can_be_pasted(work):
    name = "my out; x"
    stop(work / "model", work / name)
    refused(
        USAGE, "quantize", "model", name, "--blocksize", "128", "--resume", cwd=work,
        says=("recipe.blocksize was 64, is 128",),
    )  # fmt: skip
    done = nf4("quantize", "model", name, cwd=work)
    assert "\\n" not in done.stderr
    command = shlex.split(done.stderr[done.stderr.index("rm -r ") :])
    subprocess.run(command, check=True)
    assert not workspace_of(work / name).exists()


def test_a_workspace_is_no_part_of_a_model(work):
    stop(work / "model" / "model.safetensors", work / "model" / "out")
    nf4_ok("quantize", "model", "o2", cwd=work)
    assert not list((work / "o2").glob(".*"))


@pytest.mark.parametrize("kind", ["file", "journal directory", "journal fifo"])
def test_a_workspace_that_is_none(work, kind):
    place = workspace_of(work / "out")
    if kind == "file":
        place.write_text("mine")
    else:
        place.mkdir()
        journal_place = place / "journal"
        os.mkfifo(journal_place) if kind.endswith("fifo") else journal_place.mkdir()
    words = "is no directory" if kind == "file" else "is not a journal of nf4"
    refused(USAGE, "quantize", "model", "out", says=(words, "remove"), cwd=work)


def test_dequantize_does_not_touch_an_unfinished_run(finished):
    stop(finished / "model", finished / "other")
    refused(
        USAGE, "dequantize", "out", "other", cwd=finished,
        says=("an unfinished run of nf4 quantize", "finish it first"),
    )  # fmt: skip


@pytest.mark.parametrize("moment", ["while the journal is written", "after the rename"])
def test_ctrl_c_when_only_the_disk_is_waited_for(work, monkeypatch, moment):
    pressed = []

    def press() -> None:
        if not pressed:
            pressed.append(1)
            raise InterruptedRunError("interrupted")

    if moment == "after the rename":
        real_sync = workspace.sync
        monkeypatch.setattr(
            workspace, "sync", lambda path: press() if path == work else real_sync(path)
        )
    else:
        close = journal.Journal.close
        monkeypatch.setattr(journal.Journal, "close", lambda self: (close(self), press()))
    plan, engine = make_plan(open_checkpoint(work / "model"), QuantConfig()), engines.load("cpu")
    limits = make_resources(engine, 1, None, 1)
    if moment == "after the rename":  # it is there: nothing is left to do or to continue
        carry_out(plan, work / "out", engine, limits)
    else:
        with pytest.raises(UnfinishedRunError, match="21 of 21 weights are done"):
            carry_out(plan, work / "out", engine, limits)
        carry_out(plan, work / "out", engine, limits, resume=True)
    assert pressed
    assert not workspace_of(work / "out").exists()
    nf4_ok("verify", "out", "--source", "model", cwd=work)
