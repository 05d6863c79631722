#!/usr/bin/env python
"""Measure the driver's own work for a model of a trillion weights: no byte of a weight is read.

    .venv/bin/python scripts/cluster_driver.py --work /some/disk

The source has 998 sparse files of 1.93 TB in all, with 184,465 weights: headers, and holes.  Tasks
are cut, pickled and handed out as to a cluster; one that only the driver pays for answers them at
once, with as many bytes as a node would return.  The output is sparse too: its headers, tables and
quantization states are real, so that a verification reads what it would of a real one.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import pickle
import resource
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from nf4cli import engines
from nf4cli.checkpoint import bnb_format
from nf4cli.checkpoint.discovery import open_checkpoint
from nf4cli.checkpoint.types import FileDigests
from nf4cli.convert import write_model as writing
from nf4cli.convert.make_units import MakeFile
from nf4cli.convert.tasks import Crowd
from nf4cli.convert.units import Made
from nf4cli.convert.write_model import Execution, write_model
from nf4cli.format.codebook import codebook, nested_map
from nf4cli.format.config import QuantConfig
from nf4cli.output.manifest import Result, TensorError
from nf4cli.planning.families import consult
from nf4cli.planning.make_plan import make_plan
from nf4cli.planning.model_plan import ModelPlan
from nf4cli.planning.resources import Resources
from nf4cli.proof.comparison import Compared
from nf4cli.proof.on_nodes import CheckFile, FileChecked
from nf4cli.proof.verify import verify

LAYERS = 120  # a trillion weights
EXPERTS, HIDDEN, INTERMEDIATE, WEIGHTS_A_FILE = 512, 2048, 2560, 185
CONFIG = {
    "model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"],
    "hidden_size": HIDDEN, "intermediate_size": 18432, "moe_intermediate_size": INTERMEDIATE,
    "num_attention_heads": 64, "num_key_value_heads": 64,
    "n_routed_experts": EXPERTS, "n_shared_experts": 1, "num_experts_per_tok": 8,
    "first_k_dense_replace": 1, "vocab_size": 129280, "q_lora_rank": 1536, "kv_lora_rank": 512,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "topk_method": "noaux_tc",
    "n_group": 8, "topk_group": 4, "torch_dtype": "bfloat16", "tie_word_embeddings": False,
}  # fmt: skip
STAGES = ("plan", "quantize", "verify", "prove")


def shapes(layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the name and shape of every weight, in the order of a DeepSeek-V3."""
    yield "model.embed_tokens.weight", (129280, HIDDEN)
    for number in range(layers):
        layer = f"model.layers.{number}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{layer}{name}.weight", (HIDDEN,)
        for name, shape in (
            ("q_a_proj", (1536, HIDDEN)), ("q_a_layernorm", (1536,)), ("q_b_proj", (12288, 1536)),
            ("kv_a_proj_with_mqa", (576, HIDDEN)), ("kv_a_layernorm", (512,)),
            ("kv_b_proj", (16384, 512)), ("o_proj", (HIDDEN, 8192)),
        ):  # fmt: skip
            yield f"{layer}self_attn.{name}.weight", shape
        blocks = ["shared_experts", *(f"experts.{expert}" for expert in range(EXPERTS))]
        width = INTERMEDIATE
        if number == 0:
            blocks, width = [""], 18432
        else:
            yield f"{layer}mlp.gate.weight", (EXPERTS, HIDDEN)
            yield f"{layer}mlp.gate.e_score_correction_bias", (EXPERTS,)
        for block in blocks:
            prefix = f"{layer}mlp.{block}." if block else f"{layer}mlp."
            yield f"{prefix}gate_proj.weight", (width, HIDDEN)
            yield f"{prefix}up_proj.weight", (width, HIDDEN)
            yield f"{prefix}down_proj.weight", (HIDDEN, width)
    yield "model.norm.weight", (HIDDEN,)
    yield "lm_head.weight", (129280, HIDDEN)


def write_source(root: Path, layers: int) -> None:
    """Write the sparse checkpoint."""
    weights, share = list(shapes(layers)), WEIGHTS_A_FILE
    parts = [weights[first : first + share] for first in range(0, len(weights), share)]
    weight_map, total = {}, 0
    root.mkdir(parents=True)
    for number, part in enumerate(parts):
        name = f"model-{number + 1:05d}-of-{len(parts):05d}.safetensors"
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for key, shape in part:
            start, end = end, end + 2 * prod(shape)
            header[key] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
            weight_map[key] = name
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (root / name).open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + end)
        total += end
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (root / "model.safetensors.index.json").write_text(json.dumps(index))
    (root / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": layers}))


def digest_of(key: str) -> str:
    """Return a digest of the right length for bytes that nobody has."""
    return hashlib.blake2b(key.encode(), digest_size=16).hexdigest()


class Nobody:
    """The `Cluster` whose nodes do nothing, and whose answers are as large as real ones.

    Attributes:
        tasks: number of tasks.
        sent, returned: bytes of all of them, and of their answers.
    """

    def __init__(self) -> None:

        self.crowd = Crowd()
        self.tasks = self.sent = self.returned = 0

    def do(
        self, tasks: Sequence[Any], check: Any, take: Callable[[Any, Any], None], progress: Any,
        moved: Any = None,
    ) -> None:  # fmt: skip

        pickle.dumps(check)
        for task in tasks:
            sent = pickle.dumps(task)
            if isinstance(task, MakeFile):
                answer = made(task)
            elif isinstance(task, CheckFile):
                answer = checked(task)
            else:
                answer = compared(task)
            returned = pickle.dumps(answer)
            self.tasks += 1
            self.sent += len(sent)
            self.returned += len(returned)
            progress(task.name, task.nbytes)
            take(task, pickle.loads(returned))


def results_of(unit: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what a node would say of a unit's weights, and of the files that it digests."""

    results, sources = {}, {}
    for tensor in unit.plan.tensors:
        if tensor.name in unit.made:
            digests = {s.stored.name: digest_of(s.stored.name) for s in tensor.weight.sources}
            error = None
            if tensor.state is not None:
                error = TensorError(0.0912345678901, 0.01234567, tensor.numel // 64, 0, None)
            offset = 0.0123456789 if tensor.state else None
            results[tensor.name] = Result(offset, error, digests)
    for shard in unit.plan.checkpoint.shards:
        if shard.path.name in unit.digested:
            sources[shard.path.name] = FileDigests(
                digest_of(shard.path.name) * 2, {t.name: digest_of(t.name) for t in shard.tensors}
            )
    return results, sources


def made(task: Any) -> Any:
    """Write a sparse output file, and return what its node would."""

    unit = task.unit
    results, sources = results_of(unit)
    for layout in unit.plan.shards:
        with (task.place.directory / layout.filename).open("wb") as file:
            file.write(layout.header)
            file.truncate(layout.size)
            for tensor in unit.plan.tensors:
                if tensor.state is None or tensor.name not in unit.made:
                    continue
                state = replace(tensor.state, nested_offset=results[tensor.name].nested_offset)
                for suffix, data in (
                    (bnb_format.state_suffix(state.quant_type), bnb_format.encode_state(state)),
                    (bnb_format.QUANT_MAP, codebook(state.quant_type).decode.tobytes()),
                    (bnb_format.NESTED_QUANT_MAP, np.asarray(nested_map()).tobytes()),
                ):
                    file.seek(layout.tensors[tensor.name + suffix].start)
                    file.write(data)
    outputs = {
        key: digest_of(key)
        for tensor in unit.plan.tensors
        if tensor.name in unit.made
        for key in tensor.outputs
    }
    return Made(results, outputs, digest_of(unit.name) * 2, sources)


def checked(task: Any) -> Any:

    return FileChecked([], task.recorded.digest if task.recorded else "", {})


def compared(task: Any) -> Any:

    results, sources = results_of(task.unit)
    return Compared(results, sources, {}, {}, task.nbytes)


@contextmanager
def timed(what: str, nobody: Nobody) -> Iterator[None]:
    """Print what a stage took: seconds, the process's largest memory, and bytes of its tasks."""
    nobody.tasks = nobody.sent = nobody.returned = 0
    started, before = time.perf_counter(), time.process_time()
    yield
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    row = [what, f"{time.perf_counter() - started:.1f} s", f"{time.process_time() - before:.1f} s"]
    row += [f"{peak / 1e9:.2f} GB", f"{nobody.tasks:,}"]
    count = max(1, nobody.tasks)
    row += [f"{nobody.sent / count / 1e3:.0f} kB", f"{nobody.returned / count / 1e3:.0f} kB"]
    print(f"| {' | '.join(row)} |", flush=True)


def stage(name: str, work: Path, size: int) -> None:
    """Do one stage in this process."""

    source, output, nobody = work / "source", work / "output", Nobody()
    engine, limits = engines.load("cpu"), Resources(2, 8 << 20, 0)
    with timed(name, nobody):
        if name in ("plan", "quantize"):
            config = QuantConfig(target="vllm", max_shard_size=size)
            plan = make_plan(open_checkpoint(source), config, lambda m: consult(m, False, False))
        if name == "quantize":
            run = Execution(engine, limits, fsync=False, cluster=nobody)
            writing.check_output = lambda *_: None  # no disk here has room for what is not written
            write_model(ModelPlan.of(plan), output, run)
        if name in ("verify", "prove"):
            report = verify(
                output, source if name == "prove" else None, engine, limits, cluster=nobody
            )
            assert report.ok, report.findings[:3]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="a directory on the disk to use")
    parser.add_argument("--max-shard-size", type=int, default=500_000_000, help="bytes")
    parser.add_argument("--layers", type=int, default=LAYERS, help="120: a trillion weights")
    parser.add_argument("--stage", choices=STAGES, help="one stage, in this process")
    options = parser.parse_args()
    work = options.work / "trillion"
    if options.stage:
        stage(options.stage, work, options.max_shard_size)
        return
    shutil.rmtree(work, ignore_errors=True)
    write_source(work / "source", options.layers)
    print("| stage | time | processor | memory | tasks | sent, each | returned, each |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for name in STAGES:
        words = [sys.executable, __file__, "--work", str(options.work), "--stage", name]
        subprocess.run(
            [*words, "--max-shard-size", str(options.max_shard_size)], check=True, cwd=work
        )
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
