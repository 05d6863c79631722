#!/usr/bin/env python
"""Show nf4 in real terminals, and put what was seen there into docs/terminal.md.

    .venv/bin/python scripts/captures.py --work /some/disk [--only NAME ...] [--print]

Needs tmux and 6 GB.  Each scene runs the real command in a tmux of so many columns and rows, and
captures the screen in mid-run, at the end, or both.  In docs/terminal.md a block that follows
`<!-- NAME -->` is replaced; pictures go to docs/terminal-*.svg.  --print only shows the screens.
The model is of Llama-1B's shape with random weights; the Hub is the tests' own, on a slow link.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path

from bench_convert import NF4, make
from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "terminal.md"
sys.path.insert(0, str(ROOT / "tests"))


@dataclass(frozen=True)
class Scene:
    """Attributes:
    name: of its block; the capture at the end is NAME-end.
    command: as a user types it.
    moment: seconds after which the screen is captured, None for the end only.
    environment: set in front of it.
    key: pressed then.
    rate: of the Hub: bytes a second and body.
    stall: the Hub sends no byte of a weight file.
    picture: the screen becomes an SVG as well.
    end: whether the screen at the end is captured.
    """

    name: str
    command: str
    columns: int = 80
    rows: int = 24
    moment: float | None = None
    environment: dict[str, str] = field(default_factory=dict)
    key: str = ""
    rate: float | None = None
    stall: bool = False
    picture: bool = False
    end: bool = True


HUB = "nf4 quantize org/llama-1b --disk 1200MB --max-shard-size 100MB --push-to me/llama-1b-nf4"
SCENES = (
    Scene("plan", "nf4 quantize llama-1b --plan"),
    Scene("quantize-80", "nf4 quantize llama-1b", moment=1.8, picture=True),
    Scene("quantize-200", "nf4 quantize llama-1b", 200, 50, moment=1.8, end=False),
    Scene("quantize-40", "nf4 quantize llama-1b", 40, 24, moment=1.8, end=False),
    Scene("verify", "nf4 verify kept --source llama-1b", moment=2.5),
    Scene("dequantize", "nf4 dequantize kept restored", moment=1.5),
    Scene("hub-plan", "nf4 quantize org/llama-1b --plan"),
    Scene("hub-80", HUB, moment=7, rate=1e8, picture=True),
    Scene("hub-200", HUB, 200, 50, moment=7, rate=1e8, end=False),
    Scene("log", "nf4 quantize llama-1b 2>&1 | cat", 160, 30, environment={"NF4_HEARTBEAT": "1"}),
    Scene("stalled", "nf4 quantize org/llama-1b 2>&1 | cat", 160, moment=13, stall=True, key="C-c",
          environment={"NF4_HEARTBEAT": "4"}, end=False),
    Scene("ascii", "nf4 quantize llama-1b", moment=1.8, end=False,
          environment={"LC_ALL": "C", "NO_COLOR": "1"}),
    Scene("dumb", "nf4 quantize llama-1b", environment={"TERM": "dumb", "NF4_HEARTBEAT": "1"}),
    Scene("interrupted", "nf4 quantize llama-1b", moment=1.5, key="C-c"),
    Scene("verbose", "nf4 quantize llama-1b -v", 100, 30, moment=2.5, end=False),
)  # fmt: skip


class Terminal:
    """A tmux of our own, with a shell in it."""

    def __init__(self, columns: int, rows: int, work: Path, environment: dict[str, str]) -> None:
        self._socket = f"nf4-captures-{time.monotonic_ns()}"
        shell = ["env", *(f"{k}={v}" for k, v in environment.items()), "PS1=$ ",
                 "bash", "--norc", "--noprofile"]  # fmt: skip
        self._tmux("-f", "/dev/null", "-u", "new-session", "-d", "-s", "nf4", "-x", str(columns),
                   "-y", str(rows), "-c", str(work), *shell)  # fmt: skip
        self.settle()

    def _tmux(self, *words: str) -> str:
        command = ["tmux", "-L", self._socket, *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    def type(self, text: str) -> None:
        self._tmux("send-keys", "-t", "nf4", "-l", text)
        self._tmux("send-keys", "-t", "nf4", "Enter")

    def press(self, key: str) -> None:
        self._tmux("send-keys", "-t", "nf4", key)

    def screen(self, colours: bool = False) -> str:
        text = self._tmux("capture-pane", "-p", *(["-e"] if colours else []), "-t", "nf4")
        lines = [line.rstrip() for line in text.splitlines()]
        return "\n".join(lines).strip("\n")

    def settle(self, limit: float = 180) -> None:
        """Wait for the shell's prompt."""
        end = time.monotonic() + limit
        while not re.search(r"(^|\n)\$$", self.screen()):
            if time.monotonic() > end:
                sys.exit(f"no end after {limit} s:\n{self.screen()}")
            time.sleep(0.05)

    def sane(self) -> bool:
        """Whether the cursor is shown and the shell echoes."""
        return self._tmux("display", "-p", "-t", "nf4", "#{cursor_flag}").strip() == "1"

    def close(self) -> None:
        self._tmux("kill-server")


@contextmanager
def playing(scene: Scene, work: Path, environment: dict[str, str]) -> Iterator[Terminal]:
    for name in ("llama-1b-nf4", ".llama-1b-nf4.partial", "restored", "home"):
        shutil.rmtree(work / name, ignore_errors=True)
    locale = {"LANG": "C.UTF-8", "PATH": f"{Path(NF4).parent}:/usr/bin:/bin"}
    terminal = Terminal(scene.columns, scene.rows, work, {**locale, **environment})
    try:
        yield terminal
    finally:
        terminal.close()


def play(scene: Scene, work: Path, environment: dict[str, str]) -> dict[str, str]:
    """The screens of a scene by name."""
    screens = {}
    with playing(scene, work, environment) as terminal:
        front = "".join(f"{k}={v} " for k, v in scene.environment.items())
        terminal.type(f"clear; {front}{scene.command}")
        if scene.moment is not None:
            time.sleep(scene.moment)
            screens[scene.name] = terminal.screen()
            if scene.picture:
                picture(scene, terminal.screen(colours=True))
            if scene.key:
                terminal.press(scene.key)
        if scene.end:
            terminal.settle()
            end = scene.name if scene.moment is None else f"{scene.name}-end"
            screens[end] = terminal.screen().removesuffix("\n$")
            if not terminal.sane():
                sys.exit(f"{scene.name} left the terminal without a cursor")
    return screens


def picture(scene: Scene, screen: str) -> None:
    console = Console(record=True, width=scene.columns, file=StringIO(), color_system="truecolor")
    console.print(Text.from_ansi(screen))
    console.save_svg(str(ROOT / "docs" / f"terminal-{scene.name}.svg"), title="nf4")


def into_page(screens: dict[str, str]) -> None:
    text = PAGE.read_text()
    for name, screen in screens.items():
        pattern = rf"(<!-- {re.escape(name)} -->\n\n```text\n).*?(\n```\n)"
        text = re.sub(pattern, lambda m, s=screen: m[1] + s + m[2], text, flags=re.S)
    PAGE.write_text(text)


def prepare(work: Path) -> None:
    """The model, in one file; converted, kept; and in nine files for the Hub."""
    from helpers import write_checkpoint_dir
    from safetensors.torch import load_file

    if not (work / "llama-1b").exists():
        make(work / "llama-1b", 2048, 8192, 16, 128256, 512, 1, 0)
    if not (work / "kept").exists():
        subprocess.run([NF4, "quantize", "-q", "llama-1b", "kept"], cwd=work, check=True)
    sharded = work / "hub-models" / "org" / "llama-1b"
    if not sharded.exists():
        tensors = load_file(work / "llama-1b" / "model.safetensors")
        config = json.loads((work / "llama-1b" / "config.json").read_text())
        write_checkpoint_dir(sharded, tensors, config, shards=9)


def main() -> None:
    from hub_server import Fault, Hub

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--print", action="store_true")
    arguments = parser.parse_args()
    work = arguments.work.resolve()
    work.mkdir(exist_ok=True)
    prepare(work)
    for scene in SCENES:
        if arguments.only and scene.name not in arguments.only:
            continue
        shutil.rmtree(work / "hub", ignore_errors=True)
        with Hub(work / "hub") as hub:
            hub.add("org/llama-1b", work / "hub-models" / "org" / "llama-1b")
            hub.rate = scene.rate
            if scene.stall:  # the headers come
                hub.faults.add(Fault(r"GET /files/", times=99, after=9, stall=60))
            needed = ("HF_ENDPOINT", "HF_HOME", "HF_TOKEN", "HF_HUB_DISABLE_XET")
            environment = hub.environment(work / "home")
            screens = play(scene, work, {k: v for k, v in environment.items() if k in needed})
        if arguments.print:
            for name, screen in screens.items():
                print(f"--- {name}\n{screen}")
        else:
            into_page({n: s.replace(str(work), "/models") for n, s in screens.items()})


if __name__ == "__main__":
    main()
