"""Measure another commit beside this one: codec, start-up, whole commands; called by
bench_convert.py --against.

Every comparison is of correct results: the codecs' outputs are the same to the byte, and so are
the files that both versions write; `verify --source` of this version finds them good.
"""

from __future__ import annotations

import filecmp
import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import bench_codec
import bench_startup
import numpy as np
from bench_convert import fresh, make, processor, run, warm
from built_commit import built, command, library

EXPERTS, HIDDEN, WIDTH = 16, 5120, 8192
"""Of a layer of Llama 4 Scout."""
Sample = tuple[float, float, int]
"""Seconds, CPU seconds and peak bytes of a command."""


@dataclass
class Row:
    """A command that each version runs in turn.

    Attributes:
        title: what it does.
        words: its arguments, given a folder of the version's own.
        samples: by version.
    """

    title: str
    words: Callable[[Path], list[str]]
    samples: dict[str, list[Sample]] = field(default_factory=dict)

    def text(self, old: str, new: str) -> str:
        """Return the row of the table."""
        columns = [self.title]
        for which in (0, 1):
            before, after = ([s[which] for s in self.samples[v]] for v in (old, new))
            ratios = [b / a for a, b in zip(before, after, strict=True)]
            columns += [f"{statistics.median(before):.2f} s", f"{statistics.median(after):.2f} s"]
            columns.append(spread(ratios))
        columns += [f"{max(s[2] for s in self.samples[v]) / 1e6:.0f} MB" for v in (old, new)]
        return "| " + " | ".join(columns) + " |"


def spread(ratios: list[float]) -> str:
    """Return the median of ratios, and the lowest and highest."""
    return f"**{statistics.median(ratios):.2f}** ({min(ratios):.2f} to {max(ratios):.2f})"


def make_experts(root: Path) -> None:
    """Write a layer of Llama 4 Scout's experts, stored transposed, of random bf16 weights."""
    root.mkdir(parents=True)
    path = "language_model.model.layers.0.feed_forward.experts."
    shapes = {
        path + "down_proj": (EXPERTS, WIDTH, HIDDEN),
        path + "gate_up_proj": (EXPERTS, HIDDEN, 2 * WIDTH),
    }
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    rng = np.random.default_rng(0)
    pool = (rng.standard_normal(1 << 24, np.float32) * np.float32(0.02)).view(np.uint32)
    bits = ((pool + 0x8000) >> 16).astype(np.uint16)
    with (root / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        while offset:
            count = min(offset // 2, bits.size)
            file.write(np.roll(bits, int(rng.integers(bits.size)))[:count].tobytes())
            offset -= 2 * count
    inner = {"model_type": "llama4_text", "hidden_size": HIDDEN, "intermediate_size": WIDTH,
             "num_local_experts": EXPERTS, "num_hidden_layers": 1}  # fmt: skip
    config = {"architectures": ["Llama4ForConditionalGeneration"], "model_type": "llama4",
              "text_config": inner}  # fmt: skip
    (root / "config.json").write_text(json.dumps(config))


def require_same(versions: dict[str, Path], source: Path) -> None:
    """Raise SystemExit unless all versions write the same weights, and they are the source's."""
    outputs = [package / "out" for package in versions.values()]
    for package, output in zip(versions.values(), outputs, strict=True):
        run(*command(package), "quantize", str(source), fresh(output), "--quiet")
    first, *others = [output / "model.safetensors" for output in outputs]
    if not all(filecmp.cmp(first, other, shallow=False) for other in others):
        raise SystemExit(f"{source.name}: the versions write different bytes")
    *_, this = versions.values()
    run(*command(this), "verify", str(outputs[0]), "--source", str(source))


def commands(source: Path) -> list[Row]:
    """Return what is timed over the output of a source."""
    out, back = (lambda at: str(at / "out")), (lambda at: fresh(at / "back"))
    name = str(source)
    return [
        Row("`nf4 quantize`", lambda at: ["quantize", name, fresh(at / "out"), "--quiet"]),
        Row("`nf4 verify`", lambda at: ["verify", out(at)]),
        Row("`nf4 verify --source`", lambda at: ["verify", out(at), "--source", name]),
        Row("`nf4 dequantize`", lambda at: ["dequantize", out(at), back(at), "--quiet"]),
    ]


def whole_commands(versions: dict[str, Path], source: Path, runs: int) -> None:
    """Print a table of commands, and how `quantize` compares with `cp -r`."""
    size = warm(source)
    require_same(versions, source)
    rows, copies = commands(source), []
    for _ in range(runs):
        copies.append(run("cp", "-r", str(source), fresh(source.parent / "copy"))[0])
        for row in rows:
            for name, package in versions.items():
                row.samples.setdefault(name, []).append(run(*command(package), *row.words(package)))
    shutil.rmtree(source.parent / "copy")
    old, new = versions
    print(f"\n{source.name}, {size / 1e9:.2f} GB: the versions write the same bytes, proved\n")
    print(f"| command | {old} | {new} | new / old | CPU: {old} | {new} | new / old | peak: {old} "
          f"| {new} |\n|---|---|---|---|---|---|---|---|---|")  # fmt: skip
    for row in rows:
        print(row.text(old, new))
    walls = [sample[0] for sample in rows[0].samples[new]]
    ratios = [wall / copy for wall, copy in zip(walls, copies, strict=True)]
    print(
        f"\n`cp -r` of the source: {statistics.median(copies):.2f} s ({min(copies):.2f} to "
        f"{max(copies):.2f}); `nf4 quantize` / `cp -r`: {spread(ratios)}; `nf4 quantize` takes in "
        f"{size / 1e9 / statistics.median(walls):.2f} GB/s",
        flush=True,
    )


def compare(commit: str, work: Path, runs: int) -> None:
    """Print every ratio of this working tree to a commit.

    Args:
        work: a folder to make; it takes 15 GB.
        runs: of each command, in turn.
    """
    work.mkdir(parents=True)
    versions = {commit: built(commit, work / "old"), "now": built(None, work / "new")}
    print(processor(), flush=True)
    for source, count in (("llama-1b", runs), ("llama-4-scout-experts", max(1, runs // 2))):
        in_process_of_its_own("make", str(work / source))
        in_process_of_its_own("measure", str(work / source), commit, str(count))
        shutil.rmtree(work / source)
    print("\nCommands that answer at once\n", flush=True)
    bench_startup.table(dict(reversed(versions.items())), work, 10)
    old, new = map(library, versions.values())
    bench_codec.table(f"{commit} -> now", old, new, 15)
    if compiler := shutil.which("clang++") or shutil.which("clang++-14"):
        second = built(None, work / "second", compiler)
        bench_codec.table(f"default compiler -> {compiler}", new, library(second), 15)


def in_process_of_its_own(*words: str) -> None:
    """Call `main` there: what a process has held counts as the peak memory of its commands."""
    subprocess.run([sys.executable, __file__, *words], check=True)


def main() -> None:
    """Make a source, or measure commands over it with versions that were built beside it."""
    step, place, *rest = sys.argv[1:]
    source = Path(place)
    if step == "measure":
        commit, runs = rest
        versions = {commit: source.parent / "old", "now": source.parent / "new"}
        whole_commands(versions, source, int(runs))
    elif source.name == "llama-1b":
        make(source, 2048, 8192, 16, 128256, 512, 1, 0)
    else:
        make_experts(source)


if __name__ == "__main__":
    main()
