#!/usr/bin/env python
"""Check the CUDA engine on a machine that has a GPU, then measure it.

    .venv/bin/pip install '.[cuda13]'              # or cuda12, for a driver older than 580
    .venv/bin/python scripts/gpu_check.py [--device cuda:0] [--json FILE]

First correctness: every kind of work on random and on hard values, the CUDA engine against the CPU
engine and, where torch is installed, the torch engine (on the GPU, too), byte for byte; and against
bitsandbytes' own CUDA kernels, where those are installed, whose approximate arithmetic makes a few
codes differ: they are counted.  Then speed: each kernel by the GPU's clock, as a share of what
copying within its memory reaches, and whole conversions of a checkpoint of random weights.  Prints
a table for docs/measurements.md; exits with 1 when bytes differ.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nf4cli import engines
from nf4cli.api.machine import processors
from nf4cli.checkpoint.discovery import open_checkpoint
from nf4cli.convert.write_model import Execution, write_model
from nf4cli.engines import launches
from nf4cli.engines.cpu import CpuEngine
from nf4cli.engines.cuda import CudaEngine
from nf4cli.engines.protocol import (
    GRANULE,
    STATS,
    ChosenScales,
    Codes,
    Importance,
    NestedAbsmax,
)
from nf4cli.errors import Nf4Error
from nf4cli.format import codebook
from nf4cli.format.config import QuantConfig
from nf4cli.format.dtypes import ITEMSIZE
from nf4cli.planning.make_plan import make_plan
from nf4cli.planning.model_plan import ModelPlan
from nf4cli.planning.resources import make_resources

CPU = CpuEngine()
_COLUMNS = 4096  # of the matrix that a weighted search is timed on


# -- correctness ----------------------------------------------------------------------------------


def hard_values(dtype: str, n: int) -> np.ndarray:
    """Bytes of n finite elements of every magnitude there is, with runs of zeros of both signs."""
    random = np.random.default_rng(n)
    exponent = random.uniform(-44, 38, n // 97 + 1).repeat(97)[:n]
    values = np.clip(random.standard_normal(n) * 10.0**exponent, -3.39e38, 3.39e38)
    values[n // 5 : n // 4], values[n // 4 : n // 3] = 0.0, -0.0
    out = np.empty(n * ITEMSIZE[dtype], np.uint8)
    if dtype == "F16":
        values = np.clip(values, -65_000, 65_000)
    CPU.cast(values.astype(np.float32).view(np.uint8), "F32", out, dtype)
    return out


Buffer = Callable[[int], np.ndarray]
Work = Callable[[Any, Buffer], tuple[np.ndarray, ...]]
"""What an engine makes of some input, in buffers of this kind."""


def works(largest: int) -> Iterator[tuple[str, Work]]:
    """(what it is, what an engine makes of it)."""
    sizes = [n for n in (1, 63, 65, 8193, GRANULE + 4097) if n < largest] + [largest]
    for dtype in ("F32", "F16", "BF16"):
        for n in sizes:
            src = hard_values(dtype, n)
            for quant_type in codebook.QUANT_TYPES:
                for blocksize in codebook.BLOCKSIZES:
                    name = f"quantize {dtype} to {quant_type}, blocksize {blocksize}, n {n}"
                    yield name, quantizing(src, dtype, blocksize, quant_type, n)
            for nested in (False, True):
                for blocksize, quant_type in ((64, "nf4"), (32, "fp4"), (4096, "nf4")):
                    name = f"dequantize {quant_type} to {dtype}, blocksize {blocksize}, n {n}"
                    yield name, dequantizing(dtype, n, blocksize, quant_type, nested)
        for blocksize, quant_type in ((64, "nf4"), (32, "fp4"), (4096, "nf4")):
            for double, weighted in itertools.product((True, False), repeat=2):
                name = (
                    f"search {dtype} to {quant_type}, blocksize {blocksize}, n {n}, "
                    f"nested {double}, importance {weighted}"
                )
                yield name, searching(src, dtype, blocksize, quant_type, double, weighted)
    for n in (1, 256, 5000):
        yield f"double quantization of {n}", nesting(n)
    rows, columns = 256, 512
    random = np.random.default_rng(1)
    bits = random.integers(0, 127, rows * columns, np.uint8)
    scale = random.uniform(0, 0.1, 2 * 4).astype(np.float32)
    float8 = Codes(0, columns, scale, (128, 128))
    for dtype in ("F32", "F16", "BF16"):
        yield f"float8 by {dtype}", quantizing(bits, dtype, 64, "nf4", bits.size, float8)


def quantizing(
    src: np.ndarray, dtype: str, blocksize: int, quant_type: str, n: int,
    float8: Codes | None = None,
) -> Work:  # fmt: skip
    def work(engine: Any, new: Buffer) -> tuple[np.ndarray, ...]:
        packed, absmax = new((n + 1) // 2), np.empty(-(-n // blocksize), np.float32)
        source = new(src.nbytes)
        source[:] = src
        stats = engine.quantize(source, dtype, blocksize, quant_type, packed, absmax, float8)
        return packed, absmax, stats

    return work


def searching(
    src: np.ndarray, dtype: str, blocksize: int, quant_type: str, double: bool, weighted: bool
) -> Work:
    steps = codebook.ladder(double, weighted)
    columns = np.random.default_rng(0).exponential(size=1000).astype(np.float32)
    importance = Importance(columns, 999) if weighted else None
    n = src.nbytes // ITEMSIZE[dtype]

    def work(engine: Any, new: Buffer) -> tuple[np.ndarray, ...]:
        packed, index = new((n + 1) // 2), np.empty(-(-n // blocksize), np.uint8)
        scales = ChosenScales(index, np.empty(-(-index.size // steps.run), np.float32))
        source = new(src.nbytes)
        source[:] = src
        stats = engine.search(
            source, dtype, blocksize, quant_type, steps, importance, packed, scales
        )
        return packed, index, scales.unit, stats

    return work


def dequantizing(dtype: str, n: int, blocksize: int, quant_type: str, nested: bool) -> Work:
    random = np.random.default_rng(n)
    packed, blocks = random.integers(0, 256, (n + 1) // 2, np.uint8), -(-n // blocksize)
    absmax: Any = random.uniform(-1, 1, blocks).astype(np.float32)
    if nested:
        codes = random.integers(0, 256, blocks + 5, np.uint8)
        units = random.uniform(0, 1, -(-codes.size // 256)).astype(np.float32)
        absmax = NestedAbsmax(codes, 5, 256, codebook.nested_map(), units, 0.125)

    def work(engine: Any, new: Buffer) -> tuple[np.ndarray, ...]:
        out, source = new(n * ITEMSIZE[dtype]), new(packed.nbytes)
        source[:] = packed
        engine.dequantize(source, n, blocksize, quant_type, absmax, dtype, out)
        return (out,)

    return work


def nesting(n: int) -> Work:
    absmax = np.random.default_rng(n).uniform(0, 1, n).astype(np.float32)

    def work(engine: Any, new: Buffer) -> tuple[np.ndarray, ...]:
        codes, units = np.empty(n, np.uint8), np.empty(-(-n // 256), np.float32)
        engine.nested_quantize(absmax, 0.5, codes, units)
        return codes, units

    return work


def pageable(nbytes: int) -> np.ndarray:
    return np.empty(nbytes, np.uint8)


def compare(engine: CudaEngine, largest: int) -> tuple[dict[str, int], list[str]]:
    """({engine: checks on one GPU}, what differs)."""
    others: dict[str, Any] = {CPU.name: CPU}
    for where in ("cpu", "cuda"):
        try:
            torch_engine = engines.load("torch", where)
            others[torch_engine.name] = torch_engine
        except Nf4Error as error:
            print(f"torch's engine on {where} is not compared: {error}", file=sys.stderr)
    done, wrong = dict.fromkeys(others, 0), []
    for what, work in works(largest):
        found = {"pinned": work(engine, engine.buffer), "pageable": work(engine, pageable)}
        for name, other in others.items():
            expected = work(other, pageable)
            for kind, outputs in found.items():
                done[name] += 1
                if not all(
                    np.array_equal(a.view(np.uint8), b.view(np.uint8))
                    for a, b in zip(outputs, expected, strict=True)
                ):
                    wrong.append(f"{what}, {kind}: not what {name} gives")
    return done, wrong


def against_bitsandbytes(n: int) -> str:
    """Say how many of bitsandbytes' own CUDA codes differ from ours, in a sentence."""
    try:
        import torch
        from bitsandbytes import functional
    except ImportError as error:
        return f"not compared ({error})"
    if not torch.cuda.is_available():
        return "not compared (torch has no CUDA here)"
    x = torch.randn(n, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    packed, state = functional.quantize_4bit(x.cuda(), blocksize=64, quant_type="nf4")
    ours, absmax, _ = quantizing(x.view(torch.uint8).numpy(), "BF16", 64, "nf4", n)(CPU, pageable)
    theirs = packed.reshape(-1).cpu().numpy()
    codes = np.count_nonzero(theirs >> 4 != ours >> 4) + np.count_nonzero(theirs & 15 != ours & 15)
    scales = np.count_nonzero(state.absmax.cpu().numpy() != absmax)
    return f"{codes:,} of {n:,} codes and {scales:,} of {absmax.size:,} scales differ"


# -- speed ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Measured:
    """One kernel at one size.

    Attributes:
        seconds: median.
        nbytes: of device memory that it reads and writes.
        n: weights.
    """

    what: str
    seconds: float
    nbytes: int
    n: int


class Bench:
    """Device memory for n weights, a stream, and what times kernels on it.

    Attributes:
        at: array -> its device address.
        tables: name -> the device address of a table.
    """

    def __init__(self, device: Any, n: int, repeats: int) -> None:
        self.n, self._repeats = n, repeats
        self._stream = device.stream()
        sizes = {
            "src": 4 * n, "packed": n // 2, "absmax": n // 16, "sums": n // 8, "worst": n // 16,
            "stats": 8 * STATS * -(-n // GRANULE), "codes": n // 64, "nested": n // 4096 + 256,
            "index": n // 64, "scale": n // 16, "outlier": n // 64,
        }  # fmt: skip
        tables = {
            "book": launches.book("nf4"),
            "midpoints": codebook.nested_midpoints(),
            "map": codebook.nested_map(),
            "ladder": launches.ladder(codebook.ladder(True, False)),
            "weighted ladder": launches.ladder(codebook.ladder(True, True)),
            "importance": np.random.default_rng(1).exponential(size=_COLUMNS).astype(np.float32),
        }
        sizes |= {name: table.nbytes for name, table in tables.items()}
        self._memory = {name: device.allocate(size) for name, size in sizes.items()}
        self.at = {name: block.address for name, block in self._memory.items()}
        for name, table in tables.items():
            staged = device.host_buffer(table.nbytes)
            staged[:] = np.frombuffer(table.tobytes(), np.uint8)
            self._stream.upload(self.at[name], staged)
            self._stream.synchronize()
        self._fill = device.host_buffer(min(4 * n, 1 << 24))

    def fill(self, values: Callable[[int], np.ndarray]) -> None:
        """Put bf16 into the source again and again; values: makes the bytes of so many of them."""
        size = self._fill.size
        self._fill[:] = values(size // 2)
        for start in range(0, 4 * self.n, size):
            part = self._fill[: min(size, 4 * self.n - start)]
            self._stream.upload(self.at["src"] + start, part)
        self._stream.synchronize()

    def copying(self) -> None:
        half = 2 * self.n
        self._stream.copy(self.at["src"], self.at["src"] + half, half)

    def seconds(self, work: Callable[[], None]) -> float:
        """Time one `work`; the GPU has a copy to do while the host asks for several."""

        def several() -> None:
            for _ in range(self._repeats):
                work()

        self._stream.seconds(several, self.copying)  # compiles, and wakes the GPU
        times = [self._stream.seconds(several, self.copying) for _ in range(self._repeats)]
        return statistics.median(times) / self._repeats

    def measure(self, what: str, calls: Iterator[launches.Launch], nbytes: int) -> Measured:
        """Time launches; nbytes: that they read and write."""
        listed = list(calls)

        def work() -> None:
            for call in listed:
                self._stream.launch(call.kernel, call.blocks, call.threads, call.arguments)

        return Measured(what, self.seconds(work), nbytes, self.n)


def kernels(device: Any, n: int, repeats: int) -> tuple[float, list[Measured]]:
    """(bytes/s of a copy within device memory, read and written counted, the kernels)."""
    bench = Bench(device, n, repeats)
    bench.fill(lambda count: hard_values("BF16", count))
    at, sums = bench.at, 2 * (n // 8 + n // 16)
    copy = 2 * 2 * n / bench.seconds(bench.copying)
    scales = launches.Scales(
        codes=at["codes"], nested_map=at["map"], nested_absmax=at["nested"], offset=0.5,
        nested_blocksize=256,
    )  # fmt: skip
    results = launches.Quantized(at["packed"], at["absmax"], at["sums"], at["worst"], at["stats"])
    measured = []
    for dtype, size in (("BF16", 2), ("F32", 4)):
        work = launches.quantize(n, dtype, 64, "nf4", at["book"], at["src"], results)
        nbytes = n * size + n // 2 + n // 16 + sums
        measured.append(bench.measure(f"quantize {dtype}, error sums", work, nbytes))
        work = launches.dequantize(n, dtype, 64, at["book"], at["packed"], scales, at["src"])
        nbytes = n * size + n // 2 + n // 64
        measured.append(bench.measure(f"dequantize {dtype}, nested", work, nbytes))
    work = launches.nested_quantize(
        n // 64, 0.5, at["midpoints"], at["absmax"], at["codes"], at["nested"]
    )
    measured.append(bench.measure("double quantization (fits a cache)", work, n // 64 * 5))
    return copy, measured + searches(bench)


def ordinary_values(n: int) -> np.ndarray:
    """Bytes of n bf16 elements, normally distributed."""
    values = np.random.default_rng(2).standard_normal(n, np.float32)
    return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)


def searches(bench: Bench) -> list[Measured]:
    """The search for scales, on ordinary values: how many are tried depends on them."""
    bench.fill(ordinary_values)
    at, n = bench.at, bench.n
    chosen = launches.Searched(
        at["packed"], at["index"], at["nested"], at["absmax"], at["scale"], at["outlier"],
        at["sums"], at["worst"], at["stats"],
    )  # fmt: skip
    importance = launches.Weights(at["importance"], _COLUMNS)
    nbytes = 2 * 2 * n + n // 2 + 2 * (n // 16 + n // 64) + 2 * (n // 8 + n // 16)
    measured = []
    for what, ladder, weights in (
        ("scales chosen, nested", "ladder", None),
        ("the same with importance", "weighted ladder", importance),
    ):
        tables = launches.Tables(at["book"], at[ladder], codebook.NESTED_BLOCKSIZE)
        work = launches.search(n, "BF16", 64, "nf4", tables, at["src"], chosen, weights)
        measured.append(bench.measure(f"{what}, BF16, error sums", work, nbytes))
    return measured


def conversions(
    engine: CudaEngine, megabytes: int, repeats: int, config: QuantConfig
) -> tuple[str, bool]:
    """(whole conversions in a sentence, whether both engines wrote the same files)."""
    with tempfile.TemporaryDirectory() as work:
        root = Path(work) / "model"
        root.mkdir()
        layers, rows = max(1, megabytes // 32), 4096 if megabytes >= 32 else 256
        make_checkpoint(root, layers, rows, 4096)
        checkpoint = open_checkpoint(root)
        seconds: dict[str, list[float]] = {}
        files: dict[str, dict[str, bytes]] = {}
        for turn in range(repeats):
            for name, chosen in (("cuda", engine), ("cpu", CPU)):
                plan = make_plan(checkpoint, config)
                output = Path(work) / f"{name}{turn}"
                start = time.perf_counter()
                limits = make_resources(chosen, None, None, processors())
                write_model(ModelPlan.of(plan), output, Execution(chosen, limits))
                seconds.setdefault(name, []).append(time.perf_counter() - start)
                files[name] = {p.name: p.read_bytes() for p in output.glob("*.safetensors")}
        nbytes = plan.source_bytes
        rates = ", ".join(
            f"{name} {nbytes / statistics.median(s) / 1e9:.2f} GB/s" for name, s in seconds.items()
        )
        return f"{nbytes / 1e9:.2f} GB of bf16: {rates}", files["cuda"] == files["cpu"]


def make_checkpoint(root: Path, layers: int, rows: int, columns: int) -> None:
    """A Llama's up_proj matrices of random weights."""
    shape, size = [rows, columns], 2 * rows * columns
    header = {
        f"model.layers.{i}.mlp.up_proj.weight": {
            "dtype": "BF16", "shape": shape, "data_offsets": [i * size, (i + 1) * size],
        }
        for i in range(layers)
    }  # fmt: skip
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    values = np.random.default_rng(0).standard_normal(rows * columns).astype(np.float32)
    with (root / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for layer in range(layers):
            file.write((np.roll(values, layer).view(np.uint32) >> 16).astype(np.uint16).tobytes())
    config = {"model_type": "llama", "hidden_size": columns, "num_hidden_layers": layers,
              "torch_dtype": "bfloat16", "vocab_size": 32_000}  # fmt: skip
    (root / "config.json").write_text(json.dumps(config))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--json", type=Path, help="write the figures as JSON, too")
    parser.add_argument("--check-elements", type=int, default=3 * GRANULE + 777)
    parser.add_argument(
        "--elements", type=int, default=1 << 28, help="weights a kernel is timed on"
    )
    parser.add_argument("--megabytes", type=int, default=4096, help="of the checkpoint")
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args(arguments)
    try:
        engine = engines.load("cuda", options.device, lambda text: print(text, file=sys.stderr))
    except Nf4Error as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    assert isinstance(engine, CudaEngine)
    device = engine.devices[0]
    done, wrong = compare(engine, options.check_elements)
    for other in engine.devices[1:]:
        wrong += compare(CudaEngine(devices=[other]), options.check_elements)[1]
    for line in wrong:
        print(f"WRONG  {line}")
    differing = against_bitsandbytes(options.check_elements)
    copy, measured = kernels(device, options.elements, options.repeats)
    turns = min(3, options.repeats)
    whole, same = conversions(engine, options.megabytes, turns, QuantConfig())
    searched, same_search = conversions(
        engine, options.megabytes // 4, turns, QuantConfig(scale="search")
    )
    same = same and same_search
    rows = [("engine", engine.name)]
    rows += [(f"byte-equal with {n}", f"{c - len([w for w in wrong if n in w]):,} of {c:,} checks")
             for n, c in done.items()]  # fmt: skip
    rows += [("bitsandbytes' CUDA kernels, ordinary values", differing),
             ("copy within device memory", f"{copy / 1e9:,.1f} GB/s read and written")]  # fmt: skip
    rows += [
        (
            f"{m.what}, {m.n:,} weights",
            f"{m.n / m.seconds / 1e9:,.3f} G weights/s, {m.nbytes / m.seconds / 1e9:,.1f} GB/s, "
            f"{m.nbytes / m.seconds / copy:.0%} of the copy",
        )
        for m in measured
    ]
    rows += [("nf4 quantize, digests on", whole), ("the same, --scale search", searched),
             ("files of both engines", "equal" if same else "DIFFERENT")]  # fmt: skip
    print("| what | measured |\n|---|---|")
    for what, figure in rows:
        print(f"| {what} | {figure} |")
    if options.json:
        document = {
            "engine": engine.name, "checks": done, "wrong": wrong, "bitsandbytes": differing,
            "copy_bytes_per_second": copy, "conversion": whole, "search": searched,
            "files_equal": same,
            "kernels": [{"what": m.what, "seconds": m.seconds, "bytes": m.nbytes, "weights": m.n}
                        for m in measured],
        }  # fmt: skip
        options.json.write_text(json.dumps(document, indent=2) + "\n")
    return 1 if wrong or not same else 0


if __name__ == "__main__":
    sys.exit(main())
