"""What scripts/faults.py breaks: a checkpoint, a run that nothing happened to, what must hold."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from forking import nf4_command  # noqa: E402 - lies beside the tests

NF4 = Path(sys.executable).with_name("nf4")
SEVERAL_FILES = ("--max-shard-size", "6MB")
QUANTIZE = (NF4, "quantize", *SEVERAL_FILES)
MACHINE, INTERRUPTED, USAGE, INPUT = 4, 130, 2, 3
THERE = re.compile(r"continuing an earlier run: ([\d,]+) of ([\d,]+) weights")


class BrokenError(Exception):
    """Something that must hold does not."""


def require(holds: object, what: str) -> None:
    if not holds:
        raise BrokenError(what)


@dataclass
class Bench:
    """Where it happens.

    Attributes:
        place: an empty directory of ours.
        source, reference: a checkpoint, and its output by a run that nothing happened to.
        seconds: that such a run takes at least.
        preload: the faulty I/O library.
        calls: writes, syncs, renames and removals that such a run makes.
    """

    place: Path
    source: Path
    reference: Path
    seconds: float
    preload: Path
    random: random.Random
    calls: int = 0
    resumed: int = 0

    @property
    def output(self) -> Path:
        return self.place / "out"

    @property
    def workspace(self) -> Path:
        return self.place / ".out.partial"

    def start(
        self,
        *options: str,
        fault: str = "",
        command: tuple[str | Path, ...] = (NF4,),
        **kwargs: object,
    ) -> subprocess.Popen[str]:
        """Begin a run; command: the words that run nf4."""
        environment = dict(os.environ)
        if fault:
            environment |= {"LD_PRELOAD": str(self.preload), "NF4_FAULT": fault}
        workers = str(self.random.choice((1, 2, 3)))
        words = ["quantize", *SEVERAL_FILES, self.source, self.output, "--workers", workers]
        return subprocess.Popen(
            [*command, *words, *options], env=environment, text=True, stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE, **kwargs,  # type: ignore[call-overload]
        )  # fmt: skip

    def run(self, *options: str, fault: str = "") -> tuple[int, str]:
        """Run to the end: (exit code, what it said).

        A run with a fault is a process of its own, with the faulty library in it from its start;
        another one is forked from a Python that has imported what it needs.
        """
        process = self.start(*options, fault=fault, command=(NF4,) if fault else nf4_command())
        _, stderr = process.communicate(timeout=300)
        require("Traceback" not in stderr, f"a traceback: {stderr[-2000:]}")
        return process.returncode, stderr

    def check_half(self) -> None:
        """The output is absent, or whole."""
        if self.output.exists():
            self.require_same()

    def require_same(self) -> None:
        require(
            contents(self.output) == contents(self.reference),
            "the output is not that of a run that nothing happened to",
        )

    def finish(self) -> None:
        """Continue what is there, compare, clean up."""
        done = self.done()
        code, stderr = self.run("--resume")
        require(code == 0, f"--resume ended with {code}: {stderr}")
        self.require_same()
        require(not self.workspace.exists(), "a workspace was left behind")
        if done:
            found = THERE.search(stderr)
            there = int(found[1].replace(",", "")) if found else 0
            whole = "is complete already" in stderr
            require(there == done or whole, f"{done} weights were done, {there} were kept")
            self.resumed += done
        self.clean()

    def done(self) -> int:
        """Weights that the journal says are finished."""
        journal = self.workspace / "journal"
        lines = journal.read_bytes().split(b"\n")[1:-1] if journal.exists() else []
        return len({json.loads(line[17:])["weight"] for line in lines if b'"weight":' in line})

    def clean(self) -> None:
        shutil.rmtree(self.output, ignore_errors=True)
        shutil.rmtree(self.workspace, ignore_errors=True)


def contents(root: Path) -> dict[str, bytes]:
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file()
    }


def make_source(place: Path, megabytes: int, shards: int = 4) -> Path:
    """Write a Llama of about `megabytes` in float16, in some shards, as `place`/model."""
    generator = np.random.default_rng(0)
    hidden, layers = 512, max(2, megabytes * 10**6 // 2 // (512 * 512 * 9))
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden,
        "intermediate_size": 2 * hidden, "num_hidden_layers": layers, "vocab_size": 1000,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64,
        "tie_word_embeddings": False, "torch_dtype": "float16",
    }  # fmt: skip
    shapes = {"model.embed_tokens": (1000, hidden), "lm_head": (1000, hidden)}
    for layer in range(layers):
        shapes |= {
            f"model.layers.{layer}.{name}": (rows * hidden, columns * hidden)
            for name, rows, columns in (
                ("self_attn.q_proj", 1, 1), ("self_attn.o_proj", 1, 1), ("mlp.gate_proj", 2, 1),
                ("mlp.up_proj", 2, 1), ("mlp.down_proj", 1, 2),
            )
        }  # fmt: skip
    source = place / "model"
    source.mkdir()
    names, weight_map = list(shapes), {}
    for i in range(shards):
        part = {
            f"{name}.weight": (generator.standard_normal(shapes[name], np.float32) / 20).astype(
                "f2"
            )
            for name in names[i * len(names) // shards : (i + 1) * len(names) // shards]
        }
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        save_file(part, source / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    (source / "config.json").write_text(json.dumps(config))
    (source / "tokenizer.json").write_text("{}")
    return source


def count_calls(bench: Bench) -> int:
    """See `Bench.calls`."""
    read, write = os.pipe()
    environment = {"LD_PRELOAD": str(bench.preload), "NF4_FAULT": "any count 1 out",
                   "NF4_COUNT_FD": str(write)}  # fmt: skip
    subprocess.run(
        [*QUANTIZE, "-q", bench.source, bench.output],
        env={**os.environ, **environment}, pass_fds=(write,), check=True,
    )  # fmt: skip
    os.close(write)  # so that nothing is waited for where nothing was written
    calls = int(os.read(read, 100))
    os.close(read)
    bench.clean()
    return calls


def make_bench(place: Path, megabytes: int, seed: int) -> Bench:
    preload = place / "faulty_io.so"
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    require(compiler, "no C compiler (Debian, Ubuntu: apt-get install gcc)")
    subprocess.run(
        [str(compiler), "-O1", "-shared", "-fPIC", "-o", preload,
         ROOT / "tests/faults/faulty_io.c", "-ldl", "-lpthread"], check=True,
    )  # fmt: skip
    source = make_source(place, megabytes)
    time.sleep(2.1)  # files just written are read again on resume; older ones need not be
    bench = Bench(place, source, place / "reference", 1e9, preload, random.Random(seed))
    for _ in range(3):
        shutil.rmtree(bench.reference, ignore_errors=True)
        started = time.monotonic()
        subprocess.run([*QUANTIZE, "-q", source, bench.reference], check=True)
        bench.seconds = min(bench.seconds, time.monotonic() - started)
    bench.calls = count_calls(bench)
    return bench
