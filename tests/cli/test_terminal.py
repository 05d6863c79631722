"""What a user sees of a run: on terminals of all widths, in logs, and when it is over."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from dataclasses import replace
from fcntl import ioctl
from pathlib import Path

import pyte
import pytest
from helpers import (
    LLAMA,
    llama_tensors,
    nf4,
    nf4_ok,
    nf4_process,
    nightly_but,
    write_checkpoint_dir,
)
from hub_server import Fault
from rich.cells import cell_len
from small_pipelines import BLOCK

from nf4cli.cli.show.meter import Flow, Meter, Reading
from nf4cli.cli.show.progress import bar_lines, count, log_line, of, shorten
from nf4cli.convert.transfers import Transfers
from nf4cli.units import format_duration

NF4 = Path(sys.executable).with_name("nf4")
NAME = "model.language_model.layers.17.mlp.experts.down_proj.weight"
NAMES = (NAME, "一" * 90, "\x1b[31m.layers.3.\N{GRINNING FACE}" + "x" * 80, "", "w")
LOCAL = Reading(Flow(1_200_000_000, 2_500_000_000, 1.31e9), 655e6, 12, 3, 0, NAME, 96_000_000,
                812_000_000_000)  # fmt: skip
HUB = Reading(
    Flow(999_900_000_000, 1_999_900_000_000, 999.9e6), 499e6, 40_000, 3, 0, NAME, 999_900_000, None,
    Flow(999_900_000_000, 1_999_900_000_000, 999.9e6), Flow(999_900_000, 999_900_000_000, 999.9e6),
    999_900_000_000, 999_900_000_000,
)  # fmt: skip


class Terminal:
    """A command in a terminal of its own, and what its screen shows."""

    def __init__(self, columns, rows, *words, cwd, **environment):
        self.screen = pyte.Screen(columns, rows)
        self._stream = pyte.ByteStream(self.screen)
        self.bytes = b""
        self._own, theirs = pty.openpty()
        ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self._before = termios.tcgetattr(theirs)
        base = {
            k: v for k, v in os.environ.items() if not k.startswith(("HF_", "NO_COLOR", "FORCE_"))
        }
        base |= {"TERM": "xterm-256color", "LANG": "C.UTF-8"}
        self.process = subprocess.Popen(
            [NF4, *map(str, words)], stdin=theirs, stdout=theirs, stderr=theirs, cwd=cwd,
            env={**base, **environment}, start_new_session=True,
        )  # fmt: skip
        self._theirs = theirs

    def read(self, seconds):
        """Feed the screen for so long."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            if not select.select([self._own], [], [], min(0.05, left))[0]:
                if self.process.poll() is not None:
                    return
                continue
            data = os.read(self._own, 1 << 16)
            self.bytes += data
            self._stream.feed(data)

    def until(self, pattern, limit=30):
        """Read until the screen shows it."""
        end = time.monotonic() + limit
        while not re.search(pattern, self.text) and time.monotonic() < end:
            assert self.process.poll() is None, f"never saw {pattern}:\n{self.text}"
            self.read(0.05)
        assert re.search(pattern, self.text), f"do not see {pattern}:\n{self.text}"

    def end(self, limit=60):
        """Read to the end; returns the exit code."""
        end = time.monotonic() + limit
        while self.process.poll() is None and time.monotonic() < end:
            self.read(0.2)
        self.read(0.2)
        code = self.process.wait(1)
        assert not self.screen.cursor.hidden
        assert termios.tcgetattr(self._theirs) == self._before
        os.close(self._own)
        os.close(self._theirs)
        return code

    @property
    def text(self):
        return "\n".join(line.rstrip() for line in self.screen.display).strip("\n")


@pytest.fixture
def work(tmp_path):
    write_checkpoint_dir(tmp_path / "model", llama_tensors(), LLAMA)
    return tmp_path


# -- lines ------------------------------------------------------------------------------------


@pytest.mark.parametrize("reading", [LOCAL, HUB], ids=["local", "hub"])
def test_a_bar_is_narrower_than_its_terminal(reading):
    for name in NAMES:
        for still in (0, 12_345):
            seen = replace(reading, current=name, still=still)
            for width in (*range(1, 40), *range(40, 260, 7)):
                lines = list(bar_lines("looking for NaN", seen, width, ascii_only=False))
                assert len(lines) <= 3
                for line in lines:
                    assert line.cell_len <= max(1, width - 1)
                    assert "\x1b" not in line.plain


def test_80_columns_show_what_matters_and_200_all():
    narrow = "\n".join(line.plain for line in bar_lines("quantizing", LOCAL, 80, False))
    for fact in ("48%", "1.2 of 2.5 GB", "12 s left", "1.3 GB/s", "━", "17.", "down_proj",
                 "655M weights/s"):  # fmt: skip
        assert fact in narrow
    (wide,) = (line.plain for line in bar_lines("quantizing", LOCAL, 200, False))
    for fact in ("48%", "1.2 of 2.5 GB", "12 s left", "1.3 GB/s", "655M weights/s",
                 "memory 96.0 MB", "812.0 GB free", "17", "experts.down_proj"):  # fmt: skip
        assert fact in wide
    rows = [line.plain for line in bar_lines("quantizing", HUB, 100, False)]
    assert "down 999.9 GB of 2.00 TB" in rows[-1]
    assert "disk 999.9 of 999.9 GB" in rows[-1]
    (*_, row) = (line.plain for line in bar_lines("quantizing", HUB, 80, False))
    assert "disk 999.9 of 999.9 GB" in row, "amounts come before speeds"
    assert "MB/s" not in row


def test_an_ascii_bar_is_ascii():
    assert all(line.plain.isascii() for line in bar_lines("quantizing", LOCAL, 80, True))


def test_a_logs_lines_have_less_than_150_characters():
    for reading in (LOCAL, HUB):
        for name in NAMES:
            for still in (0, 12_345):
                line = log_line("looking for NaN", replace(reading, current=name, still=still))
                assert len(line) < 150
                assert ("nothing moved for 12345 s" in line) == bool(still)
    assert "17" in log_line("quantizing", LOCAL)
    assert "down 999.9 GB of 2.00 TB 999.9 MB/s" in log_line("quantizing", HUB)


@pytest.mark.parametrize(
    ("cells", "short"),
    [
        (60, NAME),
        (50, "language_model.layers.17.mlp.experts.down_proj"),
        (32, "layers.17.mlp.experts.down_proj"),
        (25, "17.mlp.experts.down_proj"),
        (17, "17...ts.down_proj"),
        (14, "17...down_proj"),
        (5, "_proj"),
    ],
)
def test_names_keep_the_layers_number_and_the_module(cells, short):
    found = shorten(NAME, cells)
    assert len(found) <= cells
    assert found == short
    assert cell_len(shorten("一" * 40, cells)) <= cells


def test_numbers():
    assert [format_duration(s) for s in (0.44, 8.4, 89, 192, 5500, 100_000)] == [
        "0.4 s", "8 s", "89 s", "3:12 min", "1:31 h", "27:46 h"
    ]  # fmt: skip
    assert [count(n) for n in (7, 999.7, 12_345, 655e6, 1.24e9, 671e9)] == [
        "7", "1.0k", "12k", "655M", "1.2B", "671B"
    ]  # fmt: skip
    assert of(1_200_000_000, 2_500_000_000) == "1.2 of 2.5 GB"
    assert of(900_000, 2_500_000_000) == "900.0 kB of 2.5 GB"


# -- the meter --------------------------------------------------------------------------------


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_a_speed_is_that_of_the_last_half_minute():
    clock = Clock()
    meter = Meter(1000, weights=500, clock=clock)
    for second in range(1, 101):
        clock.now = second
        meter.add("w", 1 if second <= 50 else 10)
        reading = meter.read()
    assert reading.work == Flow(550, 1000, pytest.approx(10, rel=0.05))
    assert reading.weights == pytest.approx(5, rel=0.05)
    assert reading.left == pytest.approx(45, rel=0.05)
    clock.now = 200
    assert meter.read().still == 100
    assert meter.read().left is None
    assert (meter.read().share, meter.read().current) == (0.55, "w")


def test_what_an_earlier_run_did_is_no_speed():
    clock = Clock()
    meter = Meter(1000, clock=clock)
    clock.now = 1
    meter.skip(800)
    meter.add("w", 800)
    clock.now = 3
    meter.add("w", 20)
    assert meter.read().work == Flow(820, 1000, pytest.approx(10))


def test_the_slowest_way_decides():
    clock, moved = Clock(), Transfers(to_download=1000, to_upload=300)
    meter = Meter(1000, transfers=moved, clock=clock)
    for clock.now in range(1, 11):
        moved.add_downloaded(10)
        meter.add("w", 8)
        reading = meter.read()
    assert reading.left == pytest.approx(90, rel=0.05)  # nothing is uploaded yet
    for clock.now in range(11, 21):
        moved.add_downloaded(90)
        moved.add_uploaded(1)
        meter.add("w", 80)
        reading = meter.read()
    assert (reading.download.left, reading.upload.left) == (0, pytest.approx(290 * 2, rel=0.05))
    assert reading.left == reading.upload.left


# -- a real terminal --------------------------------------------------------------------------


@pytest.mark.parametrize("columns", nightly_but([80], [80, 200]))
def test_a_run_on_a_terminal(nf4_hub, hub, columns):
    hub.rate = 6e6
    terminal = Terminal(
        columns, 24, "quantize", "org/model", "--disk", "60MB", "--push-to", "me/it",
        "--max-shard-size", "1MB", cwd=nf4_hub.work, **hub.environment(nf4_hub.home),
    )  # fmt: skip
    terminal.until(r"quantizing ━.* \d+%  [\d.]+( MB)? of 48.3 MB")
    terminal.until(r"down [\d.]+( MB)? of 48.3 MB [\d.]+ MB/s  up .* of ")
    terminal.until(r"down .* of 48.3 MB .*  up .* of .*  disk [\d.]+( MB)? of 60.0 MB")
    assert terminal.end() == 0
    assert "━" not in terminal.text, "the bar is gone"
    lines = terminal.text.splitlines()
    assert len(lines) < 24
    assert lines[0] == "org/model -> me/it"
    assert re.search(r"^moved   .* fetched, .* uploaded, disk at most .* of 60.0 MB$",
                     terminal.text, re.M)  # fmt: skip
    assert lines[-2:] == [
        "next    nf4 verify me/it --source org/model --disk 60MB",
        'load    AutoModelForCausalLM.from_pretrained("me/it")',
    ]
    assert str(nf4_hub.work) not in terminal.text


def test_ctrl_c_leaves_the_terminal_as_it_was(nf4_hub, hub):
    hub.rate = 5e5
    terminal = Terminal(80, 24, "quantize", "org/model", "out", cwd=nf4_hub.work,
                        **hub.environment(nf4_hub.home))  # fmt: skip
    terminal.until(r"quantizing ━*─")
    terminal.process.send_signal(signal.SIGINT)
    assert terminal.end() == 130
    assert "─" not in terminal.text
    assert "error: interrupted" in terminal.text


def test_a_dumb_terminal_gets_lines(work):
    terminal = Terminal(80, 40, "quantize", "model", cwd=work, TERM="dumb")
    assert terminal.end() == 0
    assert b"\x1b" not in terminal.bytes
    assert "quantizing model -> model-nf4, 279.2 kB" in terminal.text


@pytest.mark.parametrize("environment", [{"NO_COLOR": "1"}, {"LC_ALL": "C"}])
def test_fewer_colours_and_characters(nf4_hub, hub, environment):
    hub.rate = 15e6
    terminal = Terminal(80, 24, "quantize", "org/model", "out", cwd=nf4_hub.work,
                        **hub.environment(nf4_hub.home), **environment)  # fmt: skip
    terminal.until("quantizing [━─#.]")
    assert terminal.end() == 0
    if "NO_COLOR" in environment:
        assert not re.search(rb"\x1b\[(\d+;)*(3|4|9)\d[;m]", terminal.bytes)
    else:
        assert terminal.bytes.isascii()


# -- logs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("colour", [{}, {"FORCE_COLOR": "1"}])
def test_a_log_has_lines_and_no_bar(nf4_hub, hub, colour):
    hub.rate = 10e6
    done = nf4_hub("quantize", "org/model", "out", NF4_HEARTBEAT="0.3", **colour)
    assert done.returncode == 0
    assert not re.search(r"\x1b\[\??\d*[ABCDHJKhl]|\r", done.stderr + done.stdout)
    if not colour:
        assert "\x1b" not in done.stderr + done.stdout
    lines = done.stderr.splitlines()
    assert lines[0] == "reading what org/model has"
    assert "quantizing org/model -> out, 48.3 MB" in lines
    assert re.fullmatch(r"quantizing done: 48.3 MB in [\d.]+ s(, [\d.]+ MB/s)?", lines[-1])
    beats = [line for line in lines if re.match(r"quantizing \d+%, ", line)]
    assert len(beats) >= 3
    assert any(re.search(r"down [\d.]+( MB)? of 48.3 MB [\d.]+ MB/s", line) for line in beats)
    assert all(len(line) < 150 for line in lines)


def test_a_heartbeat_when_nothing_moves(nf4_hub, hub):
    hub.faults.add(Fault(r"GET /files/", times=99, after=24, stall=30))
    process = nf4_hub.start("quantize", "org/model", "out", "--json", NF4_HEARTBEAT="0.5")
    seen = ""
    for line in process.stderr:
        seen += line
        if re.search(r"quantizing 0%.*, nothing moved for \d+ s, .*memory", line):
            break
    process.send_signal(signal.SIGTERM)
    begun = time.monotonic()
    out, err = process.communicate(timeout=20)
    assert time.monotonic() - begun < 8
    assert process.returncode == 130
    assert "nothing moved for" in seen, seen + err
    assert '"error"' in out


def test_a_heartbeat_before_there_is_a_plan(nf4_hub, hub):
    hub.faults.add(Fault(r"GET /files/", stall=1.2))
    done = nf4_hub("quantize", "org/model", "--plan", NF4_HEARTBEAT="0.5")
    assert done.returncode == 0
    assert re.search(r"^reading what org/model has, [\d.]+ s so far$", done.stderr, re.M)


def test_the_heartbeat_can_be_left_out_and_has_to_be_a_number(work):
    done = nf4_process("quantize", "model", cwd=work, env={**os.environ, "NF4_HEARTBEAT": "0"})
    assert done.stderr.count("\n") == 2
    for wrong in ("often", "-1", "nan", "inf"):
        environment = {**os.environ, "NF4_HEARTBEAT": wrong}
        done = nf4_process("quantize", "model", "no", cwd=work, env=environment)
        assert done.returncode == 2
        assert f"NF4_HEARTBEAT={wrong!r}" in done.stderr


def test_quiet_and_verbose(work):
    done = nf4("quantize", "model", "quiet", "-q", cwd=work)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    done = nf4("quantize", "model", "both", "-q", "-v", cwd=work)
    assert done.returncode == 2
    done = nf4("quantize", "model", "out", "-v", cwd=work)
    assert done.returncode == 0
    told = re.findall(r"^(?:4-bit|kept ) .* error (0\.\d+|-) .*B  (\S+)$", done.stderr, re.M)
    assert sorted(name for _, name in told) == sorted(llama_tensors())
    packed = {name for error, name in told if error != "-"}
    assert len(packed) == 14
    files = re.findall(r"^file   (\S+), .*, is complete$", done.stderr, re.M)
    assert sorted(files) == sorted(p.name for p in (work / "out").glob("*.safetensors"))
    assert "a linear layer" in done.stderr
    assert re.search(r"^engine .* workers, chunks of .*, memory at most ", done.stderr, re.M)
    assert re.search(r"^times  [\d.]+ s to plan, [\d.]+ s to convert", done.stderr, re.M)


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams(work, closed):
    line = f"'{NF4}' quantize model out -v {closed}"
    done = subprocess.run(["bash", "-c", line], cwd=work, capture_output=True, text=True,
                          check=False)  # fmt: skip
    assert done.returncode == 0
    assert "Traceback" not in done.stderr
    nf4_ok("verify", "out", "--source", "model", cwd=work)


def test_nobody_reads_the_messages(work):
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([NF4, "quantize", "model", "out", "-v"], cwd=work, stderr=writer,
                          stdout=subprocess.PIPE, text=True, check=False)  # fmt: skip
    os.close(writer)
    assert done.returncode == 0
    assert "next    nf4 verify out" in done.stdout


# -- the summary ------------------------------------------------------------------------------


def test_the_summary_says_what_was_there_already(work):
    nf4_ok("quantize", "model", "out", cwd=work)
    again = nf4_ok("quantize", "model", "out", "--resume", cwd=work)
    assert "all of it was there already" in again
    assert "B/s" not in again


def test_a_summary_fits_a_screen(tmp_path):
    name = "a-model-with-quite-a-long-name-as-they-have-them"
    write_checkpoint_dir(tmp_path / name, llama_tensors(), LLAMA, shards=3)
    terminal = Terminal(80, 24, "quantize", name, "out", "--keep", "model.layers.0.*", cwd=tmp_path)
    assert terminal.end() == 0
    lines = terminal.text.splitlines()
    assert lines[0] == f"{name} -> out"
    assert lines[-1] == 'load    AutoModelForCausalLM.from_pretrained("out")'
    assert "kept by --keep" in terminal.text
    assert len(re.findall(r"^        0\.\d{4}  model\.layers", terminal.text, re.M)) == 3


def test_a_pipelines_summary_fits_a_screen(pipe, tmp_path):
    terminal = Terminal(80, 24, "quantize", pipe.name, "out", cwd=tmp_path)
    assert terminal.end() == 0
    lines = terminal.text.splitlines()
    assert "pipe -> out" in lines
    assert lines[-1] == (
        'load    DiffusionPipeline.from_pretrained("out", torch_dtype=torch.bfloat16)'
    )
    assert re.search(r"^component +bits +before +after +error$", terminal.text, re.M)
    for part in ("transformer", "text_encoder"):
        assert re.search(
            rf"^{part} +[\d.]+ +[\d.]+ kB +[\d.]+ kB +0\.\d{{4}}$", terminal.text, re.M
        )
    assert re.search(rf"0\.\d+  transformer/{re.escape(BLOCK)}$", terminal.text, re.M)
