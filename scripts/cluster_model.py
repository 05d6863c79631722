#!/usr/bin/env python
"""Say how long a model takes on a cluster, from parts that are measured here, and what binds.

    .venv/bin/python scripts/cluster_model.py --work /some/disk
    .venv/bin/python scripts/cluster_model.py --work /some/disk \\
        --nodes 8 --cores 32 --shared 5GB --node 3GB

--shared and --node are bytes a second of the storage, and of a node's link.  Measured: what one
core takes for a GB of bf16 source (read, digest, encode, write), what a command takes for a model
of nothing on a cluster, and what Ray takes for a task.  The driver's figures are those of
scripts/cluster_driver.py, given by --driver.  The model is

    command + plan + the longest of { waves of files on all slots, the shared storage,
                                      a node's link, the driver's work a file }

It is checked against runs here, on one to four nodes of one core each, of a conversion and of one
that searches for scales, which is work of the processor alone.  This machine has few cores, and
more nodes than that share them.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from bench_convert import NF4, fresh, warm
from ray.cluster_utils import Cluster

from nf4cli import engines
from nf4cli.checkpoint.discovery import open_checkpoint
from nf4cli.cli.options import parse_size
from nf4cli.cluster.ray_node import Settings
from nf4cli.cluster.ray_tasks import RayCluster
from nf4cli.convert.conversion import Tools
from nf4cli.convert.make_units import MakeFile, place_for_units
from nf4cli.convert.resume import Standing
from nf4cli.convert.tasks import SeesFiles
from nf4cli.convert.transfers import Transfers
from nf4cli.convert.units import cut
from nf4cli.format.config import QuantConfig
from nf4cli.planning.make_plan import make_plan
from nf4cli.planning.resources import Resources

GB = 1e9
FILES, WEIGHTS, SHAPE = 12, 8, (4096, 3072)  # 2.4 GB: files of 201 MB
SIZE = 60_000_000  # of an output file: one for each source file
OUTPUT = 0.26  # bytes of output for a byte of bf16 source
NODES = (1, 2, 3, 4)
SCALES = ("absmax", "search")
MODELS = {"70B": (140, 30), "671B, from float8": (690, 160), "1T": (2000, 1000)}  # GB, files
CLUSTERS = (  # nodes, cores, GB/s of the shared storage, GB/s of a node's link
    (1, 32, 2, 2), (4, 32, 2, 2), (8, 32, 5, 3), (32, 32, 5, 3), (32, 32, 40, 3),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Parts:
    """What was measured.

    Attributes:
        core: seconds of one core for a GB of bf16 source, read, digested, encoded and written.
        command: seconds of the whole command for a model of a few kB, on a cluster that is there.
        task: seconds that Ray takes for a task, on one slot.
        plan, take: seconds of the driver for a file of the source, to plan and to take.
    """

    core: float
    command: float
    task: float
    plan: float
    take: float


@dataclass(frozen=True, slots=True)
class Place:
    """A cluster: nodes, slots for files on each, and bytes a second."""

    nodes: int
    slots: int
    shared: float
    node: float


class Nothing:
    """A task that does nothing."""

    name, nbytes, tensors, granule = "nothing", 1, 1, 1

    def do(self, tools: Tools, moved: Transfers) -> None: ...


def make(root: Path, files: int, shape: tuple[int, int]) -> Path:
    """Write a checkpoint of random weights."""
    root.mkdir(parents=True)
    rng = np.random.default_rng(0)
    size = 2 * shape[0] * shape[1]
    for number in range(files):
        header = {
            f"model.layers.{number * WEIGHTS + i}.mlp.up_proj.weight": {
                "dtype": "BF16", "shape": shape, "data_offsets": [i * size, (i + 1) * size]
            }
            for i in range(WEIGHTS)
        }  # fmt: skip
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        values = rng.standard_normal(size // 2, np.float32).view(np.uint32) >> 16
        with (root / f"model-{number + 1:05d}-of-{files:05d}.safetensors").open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for i in range(WEIGHTS):
                file.write(np.roll(values, 977 * i).astype("<u2").tobytes())
    return root


def core(source: Path, out: Path, scale: str) -> float:
    """Return the seconds that one core takes for a GB of source, as tasks do it."""
    config = QuantConfig(max_shard_size=SIZE, scale=scale)
    plan = make_plan(open_checkpoint(source), config, lambda _: None)
    tools = Tools(engines.load("cpu"), Resources(1, 8 << 20, 0))
    warm(source)
    out.mkdir()
    with place_for_units(out, "blake3", fsync=False) as place:
        tasks = [MakeFile(unit, place) for unit in cut(plan, Standing())]
        began = time.perf_counter()
        for task in tasks:
            task.do(tools, Transfers())
        seconds = time.perf_counter() - began
    return seconds / plan.source_bytes * GB


def through_ray(address: str, tasks: int) -> float:
    """Return the seconds that a number of empty tasks take, from the connection on."""
    began = time.perf_counter()
    RayCluster(address, Settings("cpu", workers=1)).do(
        [Nothing()] * tasks, SeesFiles({}), lambda task, answer: None, lambda name, nbytes: None
    )
    return time.perf_counter() - began


def modelled(parts: Parts, place: Place, size: float, files: int) -> tuple[float, str]:
    """Return the seconds that the model gives, and what binds.

    Args:
        size: GB of the source.
        files: that they lie in.
    """
    slots = place.nodes * place.slots
    moved = size * (1 + OUTPUT)
    waves = -(-files // slots) * (size / files * parts.core + parts.task)
    bounds = {
        "cores": waves, "shared storage": moved / place.shared,
        "a node's link": moved / place.nodes / place.node, "the driver": files * parts.take,
    }  # fmt: skip
    binds = max(bounds, key=lambda name: bounds[name])
    return parts.command + files * parts.plan + bounds[binds], binds


def with_nodes(count: int, run: Callable[[str], Any]) -> Any:
    """Return what a function of an address gives for a cluster of `count` nodes of one core."""
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False}
    )
    try:
        for _ in range(count - 1):
            cluster.add_node(num_cpus=1)
        return run(cluster.address)
    finally:
        cluster.shutdown()


def timed(*words: object) -> float:
    """Return the seconds of a command."""
    began = time.perf_counter()
    subprocess.run([*map(str, words)], check=True, capture_output=True)
    return time.perf_counter() - began


def converted(source: Path, out: Path, address: str, runs: int, scale: str = "absmax") -> float:
    """Return the seconds of the best run of a conversion on a cluster."""
    options = ("--max-shard-size", SIZE, "--no-fsync", "--workers", 1, "--scale", scale,
               "--ray", address)  # fmt: skip
    return min(timed(NF4, "quantize", source, fresh(out), *options) for _ in range(runs))


def check(parts: Parts, source: Path, out: Path, runs: int, scale: str) -> None:
    """Print measured runs beside the model."""
    size = warm(source) / GB
    print(f"\n| nodes of one core | --scale {scale}, {size:.1f} GB | speedup | model | off |")
    print("|---|---|---|---|---|", flush=True)
    alone = None
    for count in NODES:
        seconds = with_nodes(count, lambda address: converted(source, out, address, runs, scale))
        alone = alone or seconds
        cores = min(count, len(os.sched_getaffinity(0)))
        said, _ = modelled(parts, Place(cores, 1, 1e9, 1e9), size, FILES)
        shared = f" ({cores} cores)" if cores < count else ""
        print(
            f"| {count}{shared} | {seconds:.1f} s | {alone / seconds:.2f} | {said:.1f} s | "
            f"{said / seconds - 1:+.0%} |", flush=True,
        )  # fmt: skip


def table(parts: Parts, clusters: Sequence[tuple[int, int, float, float]]) -> None:
    """Print what the model says of large models on clusters."""
    print("\n| nodes x cores, storage, link | " + " | ".join(MODELS) + " |")
    print("|---|" + "---|" * len(MODELS))
    for nodes, cores, shared, node in clusters:
        cells = []
        for size, files in MODELS.values():
            # A file is made by four threads, which share its work.
            place = Place(nodes, cores // 4, shared, node)
            seconds, binds = modelled(replace(parts, core=parts.core / 4), place, size, files)
            cells.append(f"{seconds / 60:.1f} min ({binds})")
        where = f"{nodes} x {cores}, {shared:g} GB/s, {node:g} GB/s"
        print(f"| {where} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="a directory on the disk to use")
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument(
        "--driver",
        type=float,
        nargs=2,
        default=(0.022, 0.019),
        metavar="SECONDS",
        help="to plan and to take a file of 185 weights",
    )
    parser.add_argument("--nodes", type=int, help="of your cluster")
    parser.add_argument("--cores", type=int, default=32, help="of a node")
    parser.add_argument("--shared", default="2GB", help="bytes a second of the storage")
    parser.add_argument("--node", default="2GB", help="bytes a second of a node's link")
    options = parser.parse_args()
    work = options.work / "cluster-model"
    shutil.rmtree(work, ignore_errors=True)
    source, nothing = make(work / "source", FILES, SHAPE), make(work / "nothing", 1, (64, 64))
    out = work / "out"
    os.chdir(work)  # Ray's processes import from where they are started
    cores = {
        scale: min(core(source, Path(fresh(out)), scale) for _ in range(options.runs))
        for scale in SCALES
    }
    command, few, many = with_nodes(
        1, lambda address: (
            converted(nothing, out, address, 3), through_ray(address, 1), through_ray(address, 201)
        ),
    )  # fmt: skip
    task = (many - few) / 200
    print("| part | measured |\n|---|---|")
    for scale, seconds in cores.items():
        print(f"| one core, a GB of bf16 source, --scale {scale} | {seconds:.2f} s |")
    print(f"| a command for a model of nothing, on a cluster | {command:.1f} s |")
    print(f"| Ray: a task on one slot | {1000 * task:.0f} ms |")
    print(f"| driver: a file, planned and taken | {1000 * sum(options.driver):.0f} ms |")
    parts = Parts(cores["absmax"], command, task, *options.driver)
    for scale, seconds in cores.items():
        check(replace(parts, core=seconds), source, out, options.runs, scale)
    own = [(options.nodes, options.cores, parse_size(options.shared, "--shared") / GB,
            parse_size(options.node, "--node") / GB)] if options.nodes else []  # fmt: skip
    table(parts, own or CLUSTERS)
    shutil.rmtree(work)


if __name__ == "__main__":
    sys.exit(main())
