"""Runs that were stopped, and what --resume makes of them.  scripts/faults.py stops them harder."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    INPUT,
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
from nf4cli.checkpoint.digest import OrderedDigest, ShardDigest
from nf4cli.checkpoint.discovery import open_checkpoint
from nf4cli.convert import journal
from nf4cli.convert.listener import NOBODY
from nf4cli.convert.output_place import workspace_of
from nf4cli.convert.resume import Standing
from nf4cli.convert.shard_files import ShardFiles
from nf4cli.errors import InterruptedRunError
from nf4cli.format.config import QuantConfig
from nf4cli.output.manifest import Result
from nf4cli.planning.make_plan import make_plan
from nf4cli.planning.resources import make_resources

INTERRUPTED = 130


@pytest.fixture
def stopped(work: Path) -> Path:
    """A directory with `model`, and with a run to `out` that was stopped on its way."""
    stop(work / "model", work / "out")
    assert not (work / "out").exists()
    return work


def test_it_is_continued_to_the_same_bytes(stopped):
    nf4_ok("quantize", "model", "other", cwd=stopped)
    done = nf4("quantize", "model", "out", "--resume", cwd=stopped)
    assert done.returncode == 0, done.stderr
    assert "continuing an earlier run: " in done.stderr
    assert " of 21 weights are there, checked by their digests" in done.stderr
    assert same_files(stopped / "other", stopped / "out")
    assert not workspace_of(stopped / "out").exists()


def test_finished_work_is_not_done_again(stopped, monkeypatch):
    with workspace_of(stopped / "out").joinpath("journal").open("rb") as file:
        before = journal.read(file.fileno()).parts[""].weights
    asked = []
    plan, engine = make_plan(open_checkpoint(stopped / "model"), QuantConfig()), engines.load("cpu")
    quantize = engine.quantize
    monkeypatch.setattr(engine, "quantize", lambda *a: (asked.append(1), quantize(*a))[1])
    carry_out(
        plan, stopped / "out", engine, make_resources(engine, 2, None, 2), resume=True
    )  # fmt: skip
    assert before
    assert len(asked) == sum(t.action == "quantize" and t.name not in before for t in plan.tensors)


def test_without_resume_it_is_refused_and_kept(stopped):
    refused(
        USAGE, "quantize", "model", "out", cwd=stopped,
        says=("an unfinished run of nf4 quantize lies in", " weights done", "--resume", "rm -r "),
    )  # fmt: skip
    nf4_ok("quantize", "model", "out", "--resume", cwd=stopped)


def test_resume_without_anything_to_resume_is_a_run(work):
    nf4_ok("quantize", "model", "a", cwd=work)
    nf4_ok("quantize", "model", "b", "--resume", cwd=work)
    assert same_files(work / "a", work / "b")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--blocksize", "128"), "recipe.blocksize was 64, is 128"),
        (("--quant-type", "fp4"), "recipe.quant_type was 'nf4', is 'fp4'"),
        (("--keep", "lm_head", "--keep", "q_proj"), "recipe.keep was [], is ['lm_head', 'q_proj']"),
        (("--digest", "sha256"), "digest was 'blake3', is 'sha256'"),
        (("--max-shard-size", "1MB"), "recipe.max_shard_size was 5000000000, is 1000000"),
    ],
)
def test_another_recipe_is_refused_with_the_difference(stopped, options, words):
    refused(USAGE, "quantize", "model", "out", "--resume", *options, says=(words,), cwd=stopped)


def edit_header(output: Path, change) -> None:
    path = workspace_of(output) / "journal"
    first, rest = path.read_bytes().split(b"\n", 1)
    header = json.loads(first.partition(b" ")[2])
    change(header)
    path.write_bytes(journal._line(header) + rest)


def test_another_version_or_format_is_refused_with_the_difference(stopped):
    edit_header(stopped / "out", lambda h: h.update(tool="0.0.1", nf4_journal=7))
    refused(
        USAGE, "quantize", "model", "out", "--resume", cwd=stopped,
        says=("tool was '0.0.1', is ", "nf4_journal was 7, is 1"),
    )  # fmt: skip


def grow(model: Path) -> None:
    tensors = llama_tensors()
    tensors["model.layers.1.extra.weight"] = torch.ones(64, 64).bfloat16()
    write_checkpoint_dir(model, tensors, LLAMA)


def change_a_weight(model: Path) -> None:
    file = model / "model.safetensors"
    times = file.stat()
    tensors = llama_tensors()
    tensors["model.embed_tokens.weight"][3, 4] = 0.5
    write_checkpoint_dir(model, tensors, LLAMA)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def change_the_config(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "rope_theta": 7}))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (grow, "source.files.model.safetensors was"),
        (change_a_weight, "the source changed since the run began: model.embed_tokens.weight in"),
        (change_the_config, "the plan (names, shapes or kinds of tensors, or config.json)"),
    ],
)
def test_another_source_is_refused_with_the_difference(stopped, change, words):
    change(stopped / "model")
    refused(USAGE, "quantize", "model", "out", "--resume", says=(words,), cwd=stopped)


def test_a_source_that_only_moved_is_the_same(stopped):
    nf4_ok("quantize", "model", "other", cwd=stopped)
    shutil.copytree(stopped / "model", stopped / "elsewhere" / "model")
    nf4_ok("quantize", "elsewhere/model", "out", "--resume", cwd=stopped)
    assert same_files(stopped / "other", stopped / "out")


def test_a_source_with_old_times_is_not_read_again(work, monkeypatch):
    time.sleep(2.1)  # until then a change might not show in its times
    stop(work / "model", work / "out")
    from nf4cli.convert import resume

    def never(*_: object) -> None:
        raise AssertionError("the source is read again")

    real = resume.digest_shard
    monkeypatch.setattr(
        resume, "digest_shard",
        lambda shard, *a: never() if "model" in str(shard.path.parent.name) else real(shard, *a),
    )  # fmt: skip
    plan, engine = make_plan(open_checkpoint(work / "model"), QuantConfig()), engines.load("cpu")
    limits = make_resources(engine, 1, None, 1)
    carry_out(plan, work / "out", engine, limits, resume=True)
    nf4_ok("verify", "out", "--source", "model", cwd=work)


def test_side_files_are_those_of_now(stopped):
    files = workspace_of(stopped / "out") / "files"
    (files / "stale.json").write_text("{}")
    (files / "stale").mkdir()
    (files / "stale" / "model-00009-of-00009.safetensors").write_bytes(b"old")
    (stopped / "model" / "tokenizer.json").write_text('{"new": 1}')
    nf4_ok("quantize", "model", "out", "--resume", cwd=stopped)
    assert (stopped / "out" / "tokenizer.json").read_text() == '{"new": 1}'
    assert not list((stopped / "out").glob("stale*"))
    nf4_ok("verify", "out", "--source", "model", cwd=stopped)


@pytest.mark.parametrize("name", ["model.safetensors", "nothing"])
def test_lost_and_damaged_work_is_done_again(stopped, name):
    nf4_ok("quantize", "model", "other", cwd=stopped)
    file = workspace_of(stopped / "out") / "files" / "model.safetensors"
    if name == "nothing":
        file.unlink()
    else:
        data = bytearray(file.read_bytes())
        data[len(data) // 3] ^= 16
        file.write_bytes(data)
    done = nf4("quantize", "model", "out", "--resume", cwd=stopped)
    assert done.returncode == 0, done.stderr
    assert "more did not reach the disk" in done.stderr
    assert same_files(stopped / "other", stopped / "out")


def test_lines_that_are_torn_or_damaged_cost_their_work_only(stopped):
    path = workspace_of(stopped / "out") / "journal"
    nf4_ok("quantize", "model", "whole", cwd=stopped)
    whole = path.read_bytes()
    assert whole.count(b'"weight":"model.embed') == 1
    path.write_bytes(whole.replace(b'"weight":"model.embed', b'"weight":"model.Embed')[:-30])
    stop(stopped / "model", stopped / "out", resume=True)  # it writes behind the torn line
    done = nf4("quantize", "model", "out", "--resume", cwd=stopped)
    assert done.returncode == 0, done.stderr
    assert "continuing an earlier run" in done.stderr
    assert same_files(stopped / "whole", stopped / "out")


def test_a_journal_without_its_first_line_is_of_nothing(stopped):
    path = workspace_of(stopped / "out") / "journal"
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"nf4_journal", b"nf4_Journal"))
    refused(
        USAGE, "quantize", "model", "out", "--resume", cwd=stopped,
        says=("its journal is damaged", "rm -r "),
    )  # fmt: skip


def test_bad_input_leaves_nothing_to_continue(work):
    tensors = llama_tensors()
    tensors["model.layers.1.mlp.down_proj.weight"][3, 4] = float("nan")
    write_checkpoint_dir(work / "model", tensors, LLAMA)
    refused(INPUT, "quantize", "model", "out", says=("NaN",), cwd=work)


def test_somebody_elses_workspace_is_not_used(work):
    (work / "elsewhere").mkdir()
    workspace_of(work / "out").symlink_to(work / "elsewhere")
    refused(USAGE, "quantize", "model", "out", says=("a link or somebody else's",), cwd=work)
    assert not list((work / "elsewhere").iterdir())


def test_the_longest_name_of_an_output(work):
    name = "n" * 255
    stop(work / "model", work / name)
    nf4_ok("quantize", "model", name, "--resume", cwd=work)
    nf4_ok("verify", name, cwd=work)


def test_what_a_disk_without_fsync_gives_is_the_same(work):
    nf4_ok("quantize", "model", "a", "--no-fsync", cwd=work)
    nf4_ok("quantize", "model", "b", cwd=work)
    assert same_files(work / "a", work / "b")


SLOW = (  # the real command over an engine that takes its time
    "import sys, time\n"
    "from nf4cli.engines.cpu import CpuEngine\n"
    "real = CpuEngine.quantize\n"
    "CpuEngine.quantize = lambda *a: (time.sleep(0.2), real(*a))[1]\n"
    "sys.argv = ['nf4', 'quantize', 'model', 'out', *sys.argv[1:]]\n"
    "from nf4cli.cli import main; main()"
)


def slow_run(work: Path, until: str) -> subprocess.Popen[str]:
    """A run that takes 3 seconds, at the moment when a line of its journal contains `until`."""
    process = subprocess.Popen(
        [sys.executable, "-I", "-c", SLOW, "--workers", "1"],
        cwd=work, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    path = workspace_of(work / "out") / "journal"
    while not (path.exists() and until in path.read_text()):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_within_a_second_and_says_how_to_go_on(work, number):
    process = slow_run(work, '"weight":')
    pressed = time.monotonic()
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert time.monotonic() - pressed < 1
    assert process.returncode == INTERRUPTED, stderr
    assert "interrupted" in stderr
    assert "weights are done and kept in" in stderr
    assert "continue with the same command and --resume" in stderr
    nf4_ok("quantize", "model", "other", cwd=work)
    nf4_ok("quantize", "model", "out", "--resume", cwd=work)
    assert same_files(work / "other", work / "out")


def test_a_signal_before_anything_is_done_leaves_nothing(work):
    before = sorted(work.rglob("*"))
    process = slow_run(work, "nf4_journal")
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == INTERRUPTED, stderr
    if "--resume" not in stderr:
        assert "nothing was left behind" in stderr
        assert sorted(work.rglob("*")) == before


def test_a_second_run_is_refused_until_the_first_is_dead(work):
    process = slow_run(work, '"weight":')
    refused(
        USAGE, "quantize", "model", "out", "--resume", says=("another run is writing",), cwd=work
    )
    process.kill()
    process.communicate()
    nf4_ok("quantize", "model", "out", "--resume", cwd=work)
    nf4_ok("verify", "out", "--source", "model", cwd=work)


class Unused:
    """A journal that nothing is written to."""

    def weight(self, *_: object) -> None: ...


def test_no_file_is_handed_on_once_a_run_is_aborted(tmp_path):
    """Threads that wait for their turn in a file's digest are released, and its bytes are lost."""
    write_checkpoint_dir(tmp_path / "model", llama_tensors(), LLAMA)
    plan = make_plan(open_checkpoint(tmp_path / "model"), QuantConfig())
    (tmp_path / "files").mkdir()
    handed_on: list[str] = []
    files = ShardFiles(
        plan, tmp_path / "files", "sha256", Unused(), "", Standing(),
        lambda name, *_: handed_on.append(name), NOBODY,
    )  # fmt: skip
    written = [t for t in plan.tensors if t.outputs]
    layout = plan.shards[0]
    order = sorted(written, key=lambda t: layout.tensors[t.name].start)
    for number, tensor in enumerate(order):
        if number == len(order) - 1:
            files.abort()
        for key in tensor.outputs:
            files.write(key, 0, np.zeros(layout.tensors[key].nbytes, np.uint8))
        if number < len(order) - 1:
            files.finish(tensor, Result(None, None, {}))
    with pytest.raises(InterruptedRunError):
        files.finish(order[-1], Result(None, None, {}))
    files.close()
    assert handed_on == []


def test_an_aborted_digest_never_says_that_it_is_at_the_end():
    """Whatever a thread that was released does next: its file's digest lacks bytes."""
    seen = []
    turns = OrderedDigest(ShardDigest([], "sha256"))
    abort_file = turns._file.abort

    def abort_and_look() -> None:
        abort_file()
        seen.append(turns.update(0, b"abc"))

    turns._file.abort = abort_and_look
    turns.abort()
    assert seen == [0]
