#!/usr/bin/env python
"""Measure the conversion: correctness first, then wall time, memory and where the time goes.

    .venv/bin/python scripts/bench_convert.py --work /some/disk [--quick] [--json FILE]
    .venv/bin/python scripts/bench_convert.py --work /some/disk --against COMMIT

Makes a Llama-1B-shaped bf16 checkpoint of random weights (2.47 GB), converts it, verifies the
result against the source, and only then times: `nf4 quantize` and `cp -r` of the same directory in
turn, the page cache warm for both; the transformers + bitsandbytes flow once; the codec alone; an
8B-shaped checkpoint and one with a single 4 GB tensor for their memory; `nf4 --help`.  --quick
leaves out the last two checkpoints.  Prints a table for docs/measurements.md and writes JSON.
With --against, measures another commit beside this one instead (bench_against.py).

Peak memory is the kernel's ru_maxrss of each command, which starts from its parent's: this process
imports nothing large.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

BIN = Path(sys.executable).parent
NF4 = str(BIN / "nf4")

MAKE = """
import json, sys
import numpy as np
out, h, i, layers, vocab, kv, tied, single = sys.argv[1], *map(int, sys.argv[2:])
shapes = {}
if single:
    shapes["model.layers.0.mlp.up_proj.weight"] = (h, i)
else:
    shapes["model.embed_tokens.weight"] = (vocab, h)
    if not tied:
        shapes["lm_head.weight"] = (vocab, h)
    for n in range(layers):
        p = f"model.layers.{n}."
        for name, shape in {"self_attn.q_proj": (h, h), "self_attn.k_proj": (kv, h),
                            "self_attn.v_proj": (kv, h), "self_attn.o_proj": (h, h),
                            "mlp.gate_proj": (i, h), "mlp.up_proj": (i, h),
                            "mlp.down_proj": (h, i)}.items():
            shapes[p + name + ".weight"] = shape
        shapes[p + "input_layernorm.weight"] = shapes[p + "post_attention_layernorm.weight"] = (h,)
    shapes["model.norm.weight"] = (h,)
header, offset = {"__metadata__": {"format": "pt"}}, 0
for name in sorted(shapes):
    size = 2 * int(np.prod(shapes[name]))
    header[name] = {"dtype": "BF16", "shape": shapes[name], "data_offsets": [offset, offset + size]}
    offset += size
text = json.dumps(header).encode()
text += b" " * (-len(text) % 8)
rng = np.random.default_rng(0)
pool = (rng.standard_normal(1 << 24, np.float32) * 0.02).view(np.uint32)
pool = ((pool + 0x8000) >> 16).astype(np.uint16)
with open(out + "/model.safetensors", "wb") as file:
    file.write(len(text).to_bytes(8, "little") + text)
    left = offset // 2
    while left:
        count = min(left, 1 << 24)
        file.write(np.roll(pool, int(rng.integers(1 << 24)))[:count].tobytes())
        left -= count
config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": h,
          "intermediate_size": i, "num_hidden_layers": layers, "num_attention_heads": 32,
          "num_key_value_heads": 8, "head_dim": h // 32, "vocab_size": vocab,
          "tie_word_embeddings": bool(tied), "torch_dtype": "bfloat16", "rms_norm_eps": 1e-5,
          "rope_theta": 500000.0, "hidden_act": "silu", "max_position_embeddings": 2048,
          "bos_token_id": 1, "eos_token_id": 2}
json.dump(config, open(out + "/config.json", "w"))
"""

REAL_FLOW = """
import sys, torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
q = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4",
                       bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16)
m = AutoModelForCausalLM.from_pretrained(sys.argv[1], quantization_config=q, dtype=torch.bfloat16)
m.save_pretrained(sys.argv[2])
"""

CODEC = """
import json, sys, threading, time
import numpy as np
from nf4cli.engines.cpu import CpuEngine
engine, n, repeats = CpuEngine(), 1 << 23, 12
x = np.random.default_rng(0).standard_normal(n, np.float32)
src = ((x.view(np.uint32) + 0x8000) >> 16).astype(np.uint16).view(np.uint8)
def work(kind):
    data, out = src.copy(), np.empty(2 * n, np.uint8)
    packed, absmax = np.empty(n // 2, np.uint8), np.empty(n // 64, np.float32)
    engine.quantize(data, "BF16", 64, "nf4", packed, absmax)
    for _ in range(repeats):
        if kind == "quantize":
            engine.quantize(data, "BF16", 64, "nf4", packed, absmax)
        else:
            engine.dequantize(packed, n, 64, "nf4", absmax, "BF16", out)
result = {"engine": engine.name}
for kind in ("quantize", "dequantize"):
    for threads in (1, 2):
        best = 0
        for _ in range(5):
            pool = [threading.Thread(target=work, args=(kind,)) for _ in range(threads)]
            start = time.perf_counter()
            for t in pool: t.start()
            for t in pool: t.join()
            best = max(best, threads * repeats * n / (time.perf_counter() - start))
        result[f"{kind}_{threads}"] = round(best / 1e6)
print(json.dumps(result))
"""

BNB_CODEC = """
import time, torch
from bitsandbytes.functional import quantize_4bit
x = torch.randn(1 << 24).bfloat16()
quantize_4bit(x, quant_type="nf4")
start = time.perf_counter()
quantize_4bit(x, quant_type="nf4")
print(x.numel() / (time.perf_counter() - start) / 1e6)
"""

# What is left when nothing but the data's way is kept: read, encode, write; no digests, no double
# quantization, no kept tensors, no file format.  No conversion on this machine can be faster.
BARE = """
import itertools, os, sys, threading, time
import numpy as np
from nf4cli.engines.cpu import CpuEngine
engine, chunk = CpuEngine(), 16 << 20
source, out = os.open(sys.argv[1], os.O_RDONLY), os.open(sys.argv[2], os.O_RDWR | os.O_CREAT)
size = os.fstat(source).st_size // chunk * chunk
def work():
    data, packed = np.empty(chunk, np.uint8), np.empty(chunk // 4, np.uint8)
    absmax = np.empty(chunk // 128, np.float32)
    while (i := next(offsets, None)) is not None:
        os.preadv(source, [data], i)
        try: engine.quantize(data, "BF16", 64, "nf4", packed, absmax)
        except ValueError: pass
        os.pwrite(out, packed, i // 4)
times = []
for _ in range(5):
    offsets = iter(range(4096, size - chunk, chunk))
    start = time.perf_counter()
    pool = [threading.Thread(target=work) for _ in range(2)]
    for t in pool: t.start()
    for t in pool: t.join()
    times.append(time.perf_counter() - start)
print(sorted(times)[2])
"""

PROFILE = """
import json, sys, threading, time
from pathlib import Path
from nf4cli.checkpoint import digest, reader, writer
from nf4cli.convert import items
from nf4cli.engines.cpu import CpuEngine
from nf4cli.planning.resources import make_resources
from nf4cli.planning.make_plan import make_plan
from nf4cli.planning.model_plan import ModelPlan
from nf4cli.convert.write_model import Execution, write_model
from nf4cli.format.config import QuantConfig
from nf4cli.checkpoint.discovery import open_checkpoint
spent, lock = {}, threading.Lock()
def watch(owner, name, label):
    real = getattr(owner, name)
    def timed(*a):
        start = time.thread_time()
        try: return real(*a)
        finally:
            with lock: spent[label] = spent.get(label, 0.0) + time.thread_time() - start
    setattr(owner, name, timed)
watch(reader.ByteReader, "read_into", "read")
watch(digest.FileDigest, "update", "hash")
watch(digest.TensorDigests, "update", "hash")
watch(CpuEngine, "quantize", "encode")
watch(CpuEngine, "nested_quantize", "double quantization")
watch(CpuEngine, "sum", "double quantization")
watch(writer.ShardWriter, "write", "write")
watch(items.AbsmaxFile, "write", "double quantization")
start, cpu = time.perf_counter(), time.process_time()
plan = make_plan(open_checkpoint(Path(sys.argv[1])), QuantConfig())
engine = CpuEngine()
run = Execution(engine, make_resources(engine, 2, None, 2))
write_model(ModelPlan.of(plan), Path(sys.argv[2]), run)
cpu = time.process_time() - cpu
spent["the rest"] = cpu - sum(spent.values())
print(json.dumps({"wall": time.perf_counter() - start, "cpu": cpu, "spent": spent}))
"""


def run(*command: str) -> tuple[float, float, int]:
    """(wall s, CPU s, peak bytes) of a command that must succeed, its output thrown away."""
    os.sync()  # nobody pays for somebody else's writes
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    message = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - start
    if os.waitstatus_to_exitcode(status):
        sys.exit(f"{' '.join(command)} failed:\n{message.decode()}")
    return wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024


def script(code: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-I", "-c", code, *arguments], check=True, capture_output=True, text=True
    )
    return done.stdout.strip().rpartition("\n")[2]


def make(root: Path, *shape: int) -> Path:
    root.mkdir(parents=True)
    script(MAKE, str(root), *map(str, shape))
    return root


def warm(root: Path) -> int:
    """Read everything once, so that it is in the page cache; returns the bytes."""
    total = 0
    for path in root.glob("*.safetensors"):
        with path.open("rb", buffering=0) as file:
            while count := len(file.read(1 << 24)):
                total += count
    return total


def fresh(path: Path) -> str:
    shutil.rmtree(path, ignore_errors=True)
    return str(path)


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


class Bench:
    """The figures of one run, for JSON, and as rows (what, measured, asked) of a table."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self.out = work / "out"
        self.source = work / "llama-1b"
        self.figures: dict[str, object] = {"processor": processor(), "cores": os.cpu_count()}
        self.rows: list[tuple[str, str, str]] = []
        self.wall = 0.0

    def row(self, what: str, measured: str, asked: str = "") -> None:
        self.rows.append((what, measured, asked))

    def conversion(self, runs: int) -> None:
        """Verified once, then nf4 and cp -r in turn."""
        make(self.source, 2048, 8192, 16, 128256, 512, 1, 0)
        size = warm(self.source)
        run(NF4, "quantize", str(self.source), fresh(self.out))
        run(NF4, "verify", str(self.out), "--source", str(self.source))
        self.row("result against its source (`nf4 verify --source`)", "every byte equal")
        copy = self.work / "copy"
        pairs = []
        for _ in range(runs):
            ours = run(NF4, "quantize", str(self.source), fresh(self.out))
            pairs.append((ours, run("cp", "-r", str(self.source), fresh(copy))))
        shutil.rmtree(copy)
        bare = float(script(BARE, str(self.source / "model.safetensors"), str(self.work / "bare")))
        (self.work / "bare").unlink()
        walls, copies = [o[0] for o, _ in pairs], [c[0] for _, c in pairs]
        self.wall = statistics.median(walls)
        ratio = statistics.median(o / c for o, c in zip(walls, copies, strict=True))
        peak = max(o[2] for o, _ in pairs)
        self.figures |= {"source_bytes": size, "nf4_wall": walls, "cp_wall": copies,
                         "bare_loop_wall": bare,
            "ratio_median_of_pairs": ratio, "nf4_peak_bytes": peak}  # fmt: skip
        self.row(f"`nf4 quantize`, {size / 1e9:.2f} GB bf16, digests on", spread(walls))
        self.row("`cp -r` of the same directory", spread(copies))
        self.row("nf4 / cp, median of pairs", f"{ratio:.2f}", "at most 0.8")
        self.row("bare loop: read, encode, write, nothing else", f"{bare:.2f} s")
        self.row("peak memory", f"{peak / 1e6:.0f} MB", "at most 200 MB")

    def real_flow(self) -> None:
        real = self.work / "real"
        wall, _, peak = run(sys.executable, "-c", REAL_FLOW, str(self.source), fresh(real))
        shutil.rmtree(real)
        codec = float(script(BNB_CODEC))
        self.figures |= {"real_flow_wall": wall, "real_flow_peak_bytes": peak,
                         "bitsandbytes_codec": codec}  # fmt: skip
        self.row("transformers + bitsandbytes flow", f"{wall:.1f} s, {peak / 1e9:.1f} GB")
        self.row("real flow / nf4", f"{wall / self.wall:.0f}x", "at least 35x")
        self.row("bitsandbytes' CPU codec", f"{codec:.0f} M weights/s")

    def codec(self) -> None:
        codec = json.loads(script(CODEC))
        self.figures["codec"] = codec
        for kind in ("quantize", "dequantize"):
            one, two = codec[f"{kind}_1"], codec[f"{kind}_2"]
            self.row(
                f"codec alone, {kind}, bf16, {codec['engine']}",
                f"{one:,} M weights/s on one core, {two:,} on two",
                "at least 2,000 on two",
            )

    def other_commands(self) -> None:
        back = self.work / "back"
        for name, command in (
            ("dequantize", lambda: ("dequantize", str(self.out), fresh(back))),
            ("verify", lambda: ("verify", str(self.out))),
        ):
            runs = [run(NF4, *command()) for _ in range(3)]
            peak = max(r[2] for r in runs)
            self.figures |= {f"{name}_wall": [r[0] for r in runs], f"{name}_peak_bytes": peak}
            self.row(
                f"`nf4 {name}` of the result",
                f"{spread([r[0] for r in runs])}, {peak / 1e6:.0f} MB",
            )
        shutil.rmtree(back)

    def profile(self) -> None:
        profile = json.loads(script(PROFILE, str(self.source), fresh(self.out)))
        self.figures["profile"] = profile
        total = profile["cpu"]
        parts = sorted(profile["spent"].items(), key=lambda item: -item[1])
        shares = ", ".join(f"{name} {seconds / total:.0%}" for name, seconds in parts)
        self.row("CPU time of a conversion", f"{total:.2f} s: {shares}")
        shutil.rmtree(self.source)

    def large(self) -> None:
        for label, key, shape in (
            ("8B-shaped checkpoint, 16.1 GB", "8b", (4096, 14336, 32, 128256, 1024, 0, 0)),
            ("one tensor of 4.3 GB", "single", (32768, 65536, 1, 8, 8, 1, 1)),
        ):
            root = make(self.work / key, *shape)
            wall, _, peak = run(NF4, "quantize", str(root), fresh(self.out))
            self.figures |= {f"{key}_wall": wall, f"{key}_peak_bytes": peak}
            self.row(label, f"{peak / 1e6:.0f} MB, {wall:.1f} s", "peak within 10% of the first's")
            shutil.rmtree(root)

    def help(self) -> None:
        helps = [run(NF4, "--help")[1] for _ in range(5)]
        self.figures["help_cpu"] = helps
        self.row("`nf4 --help`, CPU time", f"{statistics.median(helps):.2f} s", "under 0.25 s")

    def table(self) -> str:
        rows = ["| what | measured | asked |", "|---|---|---|"]
        rows += ["| " + " | ".join(row) + " |" for row in self.rows]
        return f"{self.figures['processor']}, {self.figures['cores']} cores\n\n" + "\n".join(rows)


def spread(seconds: list[float]) -> str:
    middle, low, high = statistics.median(seconds), min(seconds), max(seconds)
    return f"{middle:.2f} s ({low:.2f} to {high:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="a directory on the disk to use")
    parser.add_argument("--runs", type=int, default=7, help="timed pairs of nf4 and cp -r")
    parser.add_argument("--quick", action="store_true", help="without the 8B and 4 GB checkpoints")
    parser.add_argument("--no-real-flow", action="store_true", help="without transformers' minute")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--against", metavar="COMMIT", help="a version to measure beside this one")
    options = parser.parse_args()
    work = options.work / "nf4-bench"
    shutil.rmtree(work, ignore_errors=True)
    if options.against:
        import bench_against  # noqa: PLC0415 - imports NumPy, which this process does not

        bench_against.compare(options.against, work, options.runs)
        shutil.rmtree(work)
        return
    bench = Bench(work)
    bench.conversion(options.runs)
    if not options.no_real_flow:
        bench.real_flow()
    bench.codec()
    bench.other_commands()
    bench.profile()
    if not options.quick:
        bench.large()
    bench.help()
    shutil.rmtree(work)
    print(bench.table())
    if options.json:
        options.json.write_text(json.dumps(bench.figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
