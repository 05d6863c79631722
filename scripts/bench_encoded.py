#!/usr/bin/env python
"""Measure sources that are quantized already beside the same shapes in bf16.

    .venv/bin/python scripts/bench_encoded.py --work /some/disk [--runs 7] [--json FILE]

Makes ten experts in the shape of Kimi K2's (bf16, INT4, float8) and half a layer of gpt-oss-20b
(bf16, MXFP4) of random codes, converts each, verifies it against its source, and only then times
the conversions in turn, the page cache warm.  Prints a table for docs/measurements.md.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from bench_convert import NF4, fresh, processor, run, spread, warm

KIMI = (7168, 2048)
"""hidden_size and moe_intermediate_size of Kimi K2."""
EXPERTS = 10
GPT_OSS, GPT_OSS_EXPERTS = 2880, 16
"""hidden_size and intermediate_size of gpt-oss-20b, and half of its experts."""
POOL = np.random.default_rng(0)
Tensors = dict[str, tuple[str, np.ndarray]]


def bf16(*shape: int) -> tuple[str, np.ndarray]:
    """Return normal values."""
    values = POOL.standard_normal(shape, np.float32) * np.float32(0.02)
    return "BF16", ((values.view(np.uint32) + 0x8000) >> 16).astype(np.uint16)


def codes(dtype: str, *shape: int, low: int = 0, high: int = 256) -> tuple[str, np.ndarray]:
    """Return random bytes; shape: in elements of the dtype."""
    width = {"I32": 4}.get(dtype, 1)
    values = POOL.integers(low, high, (*shape[:-1], shape[-1] * width), np.uint8)
    return dtype, values.view(np.int32) if width == 4 else values


def float8(*shape: int) -> tuple[str, np.ndarray]:
    """Return random bytes of e4m3 that are no NaN."""
    dtype, values = codes("F8_E4M3", *shape)
    return dtype, np.where(values & 0x7F == 0x7F, values ^ 1, values)


def floats(dtype: str, *shape: int) -> tuple[str, np.ndarray]:
    """Return scales."""
    values = POOL.uniform(0.01, 0.1, shape).astype(np.float32)
    return (
        (dtype, values) if dtype == "F32" else (dtype, (values.view(np.uint32) >> 16).astype("u2"))
    )


def kimi(form: str) -> tuple[Tensors, dict[str, object]]:
    """Return (tensors, quantization_config) of the experts in a form: bf16, int4 or float8."""
    hidden, middle = KIMI
    tensors: Tensors = {}
    for number in range(EXPERTS):
        for name, (rows, columns) in {
            "gate_proj": (middle, hidden), "up_proj": (middle, hidden),
            "down_proj": (hidden, middle),
        }.items():  # fmt: skip
            path = f"model.layers.{number}.mlp.{name}.weight"
            if form == "bf16":
                tensors[path] = bf16(rows, columns)
            elif form == "float8":
                tensors[path] = float8(rows, columns)
                tensors[f"{path}_scale_inv"] = floats("F32", rows // 128, columns // 128)
            else:
                tensors[f"{path}_packed"] = codes("I32", rows, columns // 8)
                tensors[f"{path}_scale"] = floats("BF16", rows, columns // 32)
                tensors[f"{path}_shape"] = "I64", np.array([rows, columns], np.int64)
    scheme = {
        "num_bits": 4,
        "type": "int",
        "strategy": "group",
        "group_size": 32,
        "symmetric": True,
    }
    config: dict[str, dict[str, object]] = {
        "bf16": {},
        "float8": {"quant_method": "fp8", "weight_block_size": [128, 128]},
        "int4": {
            "quant_method": "compressed-tensors", "format": "pack-quantized",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": scheme}},
        },
    }  # fmt: skip
    return tensors, config[form]


def gpt_oss(form: str) -> tuple[Tensors, dict[str, object]]:
    """Return (tensors, quantization_config) of half a layer in a form: bf16 or mxfp4."""
    heads = {"q_proj": (4096, GPT_OSS), "k_proj": (512, GPT_OSS), "v_proj": (512, GPT_OSS)}
    tensors: Tensors = {
        f"model.layers.0.self_attn.{name}.weight": bf16(*shape)
        for name, shape in (heads | {"o_proj": (GPT_OSS, 4096)}).items()
    }
    path = "model.layers.0.mlp.experts"
    for name, rows in (("gate_up_proj", 2 * GPT_OSS), ("down_proj", GPT_OSS)):
        if form == "bf16":
            tensors[f"{path}.{name}"] = bf16(GPT_OSS_EXPERTS, GPT_OSS, rows)
        else:
            shape = GPT_OSS_EXPERTS, rows, GPT_OSS // 32
            tensors[f"{path}.{name}_blocks"] = codes("U8", *shape, 16)
            tensors[f"{path}.{name}_scales"] = codes("U8", *shape, low=110, high=140)
        tensors[f"{path}.{name}_bias"] = bf16(GPT_OSS_EXPERTS, rows)
    return tensors, {} if form == "bf16" else {"quant_method": "mxfp4"}


def write(root: Path, kind: str, form: str) -> None:
    """Write a checkpoint of a kind, "kimi" or "gpt-oss", in a form."""
    if kind == "kimi":
        tensors, quantization = kimi(form)
        config: dict[str, object] = {"model_type": "llama"}
    else:
        tensors, quantization = gpt_oss(form)
        config = {
            "model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"],
            "hidden_size": GPT_OSS, "num_local_experts": GPT_OSS_EXPERTS,
        }  # fmt: skip
    config |= {"torch_dtype": "bfloat16", "vocab_size": 100}
    if quantization:
        config["quantization_config"] = quantization
    root.mkdir(parents=True)
    header: dict[str, object] = {}
    offset = 0
    for name, (dtype, values) in tensors.items():
        place = [offset, offset + values.nbytes]
        header[name] = {"dtype": dtype, "shape": values.shape, "data_offsets": place}
        offset = place[1]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (root / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, values in tensors.values():
            file.write(values.tobytes())
    (root / "config.json").write_text(json.dumps(config))


def make(work: Path, kind: str, form: str) -> Path:
    """Write a checkpoint in a process of its own: commands' peak memory begins with this one's."""
    root = work / f"{kind}-{form}"
    if not root.exists():
        subprocess.run([sys.executable, __file__, "--make", root, kind, form], check=True)
    return root


@dataclass
class Case:
    """A source and a way to convert it, with what its runs took.

    Attributes:
        runs: (wall s, CPU s, peak bytes) of each.
        size: bytes of its weights' files.
    """

    title: str
    source: Path
    options: tuple[str, ...] = ()
    runs: list[tuple[float, float, int]] = field(default_factory=list)
    size: int = 0

    def convert(self, out: Path) -> None:
        """Convert once."""
        self.runs.append(run(NF4, "quantize", str(self.source), fresh(out), *self.options))

    def row(self) -> str:
        """Return a row of the table."""
        walls, cpus, peaks = zip(*self.runs, strict=True)
        return (
            f"| {self.title} | {self.size / 1e6:,.0f} MB | {spread(list(walls))} | "
            f"{spread(list(cpus))} | {max(peaks) / 1e6:.0f} MB |"
        )


def cases(work: Path) -> Iterator[Case]:
    """Make the sources."""
    for form, title in (
        ("bf16", "ten experts of Kimi K2 (2048 x 7168), bf16, to NF4"),
        ("int4", "the same in INT4, groups of 32"),
        ("float8", "the same in float8, blocks of 128 x 128"),
    ):
        yield Case(title, make(work, "kimi", form))
    for form, title, options in (
        ("bf16", "16 experts of gpt-oss-20b, bf16; copied", ()),
        ("mxfp4", "the same in MXFP4; decoded to bf16", ()),
        ("bf16", "the same from bf16, to NF4 (`--target unsloth`)", ("--target", "unsloth")),
        ("mxfp4", "the same from MXFP4, to NF4", ("--target", "unsloth")),
    ):
        yield Case(title, make(work, "gpt-oss", form), options)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, help="a directory on the disk to use")
    parser.add_argument("--runs", type=int, default=7, help="timed runs of each source")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--make", nargs=3, help=argparse.SUPPRESS)  # FOLDER KIND FORM
    options = parser.parse_args()
    if options.make:
        write(Path(options.make[0]), *options.make[1:])
        return
    if options.work is None:
        parser.error("--work is missing")
    work = options.work / "nf4-bench-encoded"
    shutil.rmtree(work, ignore_errors=True)
    found = list(cases(work))
    for case in found:
        case.convert(work / "out")
        run(NF4, "verify", str(work / "out"), "--source", str(case.source))
        case.runs.clear()
        case.size = warm(case.source)
    for _ in range(options.runs):
        for case in found:
            case.convert(work / "out")
    shutil.rmtree(work)
    print(f"{processor()}; every output proved from its source first\n")
    print("| source | bytes | time | CPU time | peak memory |\n|---|---|---|---|---|")
    print("\n".join(case.row() for case in found))
    if options.json:
        medians = {
            case.title: [statistics.median(values) for values in zip(*case.runs, strict=True)]
            for case in found
        }
        options.json.write_text(json.dumps(medians, indent=1) + "\n")


if __name__ == "__main__":
    main()
