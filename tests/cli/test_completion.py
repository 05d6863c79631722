"""Shell completion, in the shells themselves: a terminal, a word, the Tab key."""

from __future__ import annotations

import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nf4cli import engines
from nf4cli.checkpoint import digest
from nf4cli.format import codebook, config, dtypes

BIN = Path(sys.executable).parent
CACHED = "HuggingFaceTB/SmolLM2-135M"
START = {
    "bash": (["bash", "--norc", "--noprofile", "-i"], "nf4 --show-completion > nf4; source ./nf4"),
    "zsh": (
        ["zsh", "-f", "-i"],
        "autoload -Uz compinit; compinit -u; nf4 --show-completion > nf4; source ./nf4",
    ),
}
COMPLETED = [  # what is typed before Tab, and what then stands there
    ("nf4 dequ", "nf4 dequantize "),
    ("nf4 quantize --tar", "nf4 quantize --target "),
    ("nf4 quantize model --engine tor", "nf4 quantize model --engine torch "),
    ("nf4 quantize mod", "nf4 quantize model-here/"),
    ("nf4 quantize Hugg", f"nf4 quantize {CACHED} "),
    ("nf4 verify model-here/con", "nf4 verify model-here/config.json "),
]
VALUES = {
    "quantize --quant-type": codebook.QUANT_TYPES,
    "quantize --blocksize": tuple(map(str, codebook.BLOCKSIZES)),
    "quantize --on-nonfinite": config.ON_NONFINITE,
    "quantize --dtype": ("auto", *dtypes.SAFETENSORS_NAME),
    "quantize --compute-dtype": ("auto", *dtypes.SAFETENSORS_NAME),
    "quantize --quant-storage": tuple(dtypes.STORAGE_NAME),
    "quantize --target": config.TARGETS,
    "quantize --digest": ("auto", *digest.ALGORITHMS),
    "quantize --engine": engines.NAMES,
    "verify --engine": engines.NAMES,
    "dequantize --dtype": ("auto", *dtypes.SAFETENSORS_NAME),
}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A directory with a model, and a cache of the Hub with two, one of them no model's name."""
    (tmp_path / "work" / "model-here").mkdir(parents=True)
    (tmp_path / "work" / "model-here" / "config.json").write_text("{}")
    for name in (CACHED.replace("/", "--"), "x--$(touch attacked)", "gpt2"):
        (tmp_path / "hub" / f"models--{name}").mkdir(parents=True)
    return tmp_path / "work"


def environment(place: Path) -> dict[str, str]:
    return {
        "PATH": f"{BIN}:{os.environ['PATH']}", "HOME": str(place.parent), "TERM": "dumb",
        "PS1": "% ", "HF_HUB_CACHE": str(place.parent / "hub"), "LC_ALL": "C.UTF-8",
    }  # fmt: skip


HEAVY = {"numpy", "safetensors", "blake3", "huggingface_hub", "torch"}
REQUEST = (  # what the installed script does, and then a look at what it took
    "import sys\n"
    "from nf4cli.cli import app\n"
    "try: app(prog_name='nf4')\n"
    "except SystemExit: pass\n"
    "print(*sys.modules, file=sys.stderr)\n"
)


def offered(words: str, place: Path) -> list[str]:
    """What bash would be told about the last of these words, which may be empty.

    Somebody waits for it: no numerical library, no client of the Hub (0.16 s on two cores).
    """
    request = {"_NF4_COMPLETE": "complete_bash", "COMP_WORDS": words,
               "COMP_CWORD": str(len(words.split(" ")) - 1)}  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-I", "-c", REQUEST], cwd=place, env=environment(place) | request,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert not HEAVY & set(done.stderr.split()), words
    return done.stdout.split()


class Terminal:
    """A shell in a terminal of its own."""

    def __init__(self, shell: list[str], place: Path) -> None:
        self._pid, self._fd = pty.fork()
        if self._pid == 0:
            os.chdir(place)
            os.execvpe(shell[0], shell, environment(place))

    def __call__(self, keys: str, until: str) -> str:
        """Everything shown after these keys, as soon as `until` is in it, at most 20 s later."""
        os.write(self._fd, keys.encode())
        seen, deadline = "", time.monotonic() + 20
        while until not in seen and time.monotonic() < deadline:
            if select.select([self._fd], [], [], 0.1)[0]:
                seen += os.read(self._fd, 4096).decode(errors="replace")
                seen = re.sub(r"\x1b\[[?0-9;]*[A-Za-z]|\r|\x07", "", seen)
        return seen

    def close(self) -> None:
        os.kill(self._pid, signal.SIGKILL)
        os.close(self._fd)
        os.waitpid(self._pid, 0)


def require(shell: str) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")


@pytest.mark.parametrize("shell", START)
def test_the_tab_key(shell, place):
    require(shell)
    command, setup = START[shell]
    terminal = Terminal(command, place)
    try:
        assert "ready-1" in terminal(f"{setup}; echo ready-$((0 + 1))\n", "ready-1")
        for typed, completed in COMPLETED:
            shown = terminal(f"\x15{typed}\t", completed)
            assert completed in shown, f"{typed!r}: {shown!r}"
    finally:
        terminal.close()


def test_fish(place):
    require("fish")
    for typed, completed in COMPLETED:
        done = subprocess.run(
            ["fish", "--no-config", "-c", "nf4 --show-completion | source; "
             "complete -C $argv[1]", typed],
            cwd=place, env=environment(place), capture_output=True, text=True, check=True,
        )  # fmt: skip
        words = [line.split("\t")[0] for line in done.stdout.splitlines()]
        assert words == [completed.split()[-1]], typed


@pytest.mark.parametrize("option", VALUES)
def test_the_values_of_options(option, place):
    assert tuple(offered(f"nf4 {option} ", place)) == VALUES[option]


def test_models_of_the_hub(place):
    assert offered("nf4 quantize g", place) == ["gpt2"]
    assert offered("nf4 quantize x", place) == []  # a name from the disk that is no model's
    assert offered("nf4 quantize ", place) == []  # files are here: the shell has them
    (place / "g").touch()
    assert offered("nf4 quantize g", place) == []
