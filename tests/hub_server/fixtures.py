"""A Hub with a model of 50 MB in 24 files, and how to run the command against it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from forking import nf4_command
from helpers import LLAMA, nf4_ok, write_checkpoint_dir

from . import Hub

SHARDS = 24
CONFIG = {
    **LLAMA, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "head_dim": 128
}  # fmt: skip
HEADERS = r"GET /files/.*"


def _tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(6)

    def new(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).mul(0.02).bfloat16()

    tensors = {"model.embed_tokens.weight": new(512, 512), "lm_head.weight": new(512, 512),
               "model.norm.weight": new(512)}  # fmt: skip
    for i in range(8):
        layer = f"model.layers.{i}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{layer}{name}.weight"] = new(512)
        for name, rows in (("q", 512), ("k", 256), ("v", 256), ("o", 512)):
            tensors[f"{layer}self_attn.{name}_proj.weight"] = new(rows, 512)
        for name, shape in (("gate", (1408, 512)), ("up", (1408, 512)), ("down", (512, 1408))):
            tensors[f"{layer}mlp.{name}_proj.weight"] = new(*shape)
    return tensors


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model, as a directory; its embedding comes first, so that files are of many sizes."""
    root = tmp_path_factory.mktemp("hub-source") / "model"
    write_checkpoint_dir(root, _tensors(), CONFIG, shards=SHARDS)
    (root / "tokenizer.json").write_text('{"version": "1.0"}')
    (root / "README.md").write_text("---\nlicense: apache-2.0\n---\n# a model\n")
    (root / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    (root / "pytorch_model.bin").write_bytes(b"a pickle, which is not fetched" * 100_000)
    return root


@pytest.fixture(scope="session")
def converted(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a local run makes of it, in files of 1 MB."""
    output = tmp_path_factory.mktemp("hub-output") / "model-nf4"
    nf4_ok("quantize", model, output, "--max-shard-size", "1MB", "--digest", "sha256")
    return output


@pytest.fixture
def hub(tmp_path: Path, model: Path) -> Iterator[Hub]:
    """A Hub that has the model as org/model."""
    with Hub(tmp_path / "hub") as server:
        server.add("org/model", model)
        yield server


class Runner:
    """Runs the real command against a Hub, in a directory of its own.

    Args:
        xet: with the Hub's newer store.

    Attributes:
        work: where it runs.
        home: HF_HOME.
    """

    def __init__(self, hub: Hub, work: Path, xet: bool = False) -> None:
        self.hub, self.work, self.home = hub, work / "work", work / "home"
        self._xet = xet
        self.work.mkdir()

    def start(
        self,
        *arguments: object,
        token: str | None = "hf_write",
        command: tuple[str | Path, ...] = (Path(sys.executable).with_name("nf4"),),
        **more: str,
    ) -> subprocess.Popen[str]:
        """Begin to run it, to stop it, say.

        Args:
            command: the words that run it.
            more: environment variables.
        """
        return subprocess.Popen(
            [*command, *map(str, arguments)],
            cwd=self.work, env={**self.hub.environment(self.home, token, self._xet), **more},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def wait_for_fault(self, process: subprocess.Popen[str]) -> None:
        """Until the command has met the Hub's fault, which it must not be stopped by."""
        while not self.hub.faults.seen:
            assert process.poll() is None, process.communicate()
            time.sleep(0.001)

    def __call__(self, *arguments: object, **more: Any) -> subprocess.CompletedProcess[str]:
        # Where they change what Python imports, a process has to import everything anew.
        if not any(name.startswith(("PYTHON", "LD_")) for name in more):
            more["command"] = nf4_command()
        process = self.start(*arguments, **more)
        out, err = process.communicate(timeout=300)
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)

    def ok(self, *arguments: object, **more: Any) -> str:
        done = self(*arguments, **more)
        assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def fails(self, code: int, *arguments: object, says: tuple[str, ...], **more: Any) -> str:
        done = self(*arguments, **more)
        assert done.returncode == code, f"{done.returncode}: {done.stdout}{done.stderr}"
        for words in says:
            assert words in done.stderr, done.stderr
        assert "Traceback" not in done.stderr
        return done.stderr


@pytest.fixture
def nf4_hub(hub: Hub, tmp_path: Path) -> Runner:
    """The real command against the Hub."""
    return Runner(hub, tmp_path)


class Watch:
    """Looks at a directory all the time: the most bytes that its files had together.

    Attributes:
        most: by their sizes, reserved room included.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._stop = threading.Event()
        self.most = self.looks = 0
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        """Look again and again, and count what is there in two looks after one another.

        A look takes its time: a file that moves, or goes while the next one comes, may be in one
        look although the two were never there together. Those in both looks were, in between.
        """
        before = sizes_in(self._root)
        while not self._stop.is_set():
            time.sleep(0.001)
            now = sizes_in(self._root)
            both = before.keys() & now.keys()
            self.most = max(self.most, sum(min(before[file], now[file]) for file in both))
            self.looks += 1
            before = now


def sizes_in(root: Path) -> dict[tuple[str, int], int]:
    """Bytes of all files under a directory, by path and inode."""
    sizes = {}
    for directory, _, names in os.walk(root):
        for name in names:
            path = os.path.join(directory, name)
            try:
                found = os.lstat(path)
            except FileNotFoundError:
                continue
            sizes[path, found.st_ino] = found.st_size
    return sizes


def bytes_in(root: Path) -> int:
    """Sizes of all files under a directory."""
    return sum(sizes_in(root).values())
