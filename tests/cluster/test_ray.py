"""nf4 quantize --ray: the real command on a real Ray cluster of several nodes on this machine."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import (
    LLAMA,
    MACHINE,
    USAGE,
    nf4_ok,
    nf4_process,
    nightly_but,
    refused,
    same_files,
    write_checkpoint_dir,
)
from tiny_adapters import write_adapter

from nf4cli.cluster import ray_node, ray_tasks
from nf4cli.cluster.ray_connection import connected
from nf4cli.convert.tasks import SeesFiles
from nf4cli.engines.protocol import GRANULE
from nf4cli.errors import MachineError, UsageError
from nf4cli.version import __version__

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="Ray's nodes of the tests run on Linux"
)
OPTIONS = ("--max-shard-size", "2MB", "--scale", "search")


@pytest.fixture(scope="module")
def cluster() -> Iterator[object]:
    """A head and two nodes of one CPU each; nodes are added to it."""
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    for _ in range(2):
        made.add_node(num_cpus=1)
    yield made
    made.shutdown()


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A model of 24 shards in 4 bit, which take a node some 100 ms each."""
    weights = {
        f"model.layers.{i}.mlp.up_proj.weight": torch.randn(2048, 1024).bfloat16()
        for i in range(24)
    }
    config = {**LLAMA, "num_hidden_layers": 24, "tie_word_embeddings": True}
    return write_checkpoint_dir(tmp_path_factory.mktemp("ray") / "model", weights, config, 12)


@pytest.fixture(scope="module")
def expected(source) -> Path:
    nf4_ok("quantize", source, source.parent / "one", *OPTIONS)
    return source.parent / "one"


def start(source: Path, output: Path, address: str, *more: object) -> subprocess.Popen[str]:
    return command("quantize", source, output, *OPTIONS, "--ray", address, *more, cwd=output.parent)


def command(*words: object, cwd: Path) -> subprocess.Popen[str]:
    """Start nf4, in a directory that holds no Python: Ray's processes import from there."""
    return subprocess.Popen(
        [Path(sys.executable).with_name("nf4"), *map(str, words)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=cwd,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip


def wait_for_weights(output: Path, count: int, process: subprocess.Popen[str]) -> None:
    """Until so many weights are finished, and the journal says so."""
    journal = output.parent / f".{output.name}.partial" / "journal"
    while not journal.exists() or journal.read_bytes().count(b'"weight"') < count:
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)


def tasks_of(cluster) -> list[int]:
    """Processes that do a task for a cluster, and not for another one here."""
    words = ["pgrep", "-f", "ray::work"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    found = []
    for pid in map(int, done.stdout.split()):
        with contextlib.suppress(OSError):
            parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
            if cluster.address in Path(f"/proc/{parent}/cmdline").read_text():
                found.append(pid)
    return found


def end(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, stderr = process.communicate(timeout=120)
    assert "Traceback" not in stderr, stderr
    return process.returncode, stderr


def test_the_bytes_are_those_of_one_machine(cluster, source, expected, tmp_path):
    code, stderr = end(start(source, tmp_path / "out", cluster.address))
    assert code == 0, stderr
    assert "Ray: 3 nodes, 3 files at a time, 1 thread each" in stderr
    assert same_files(expected, tmp_path / "out")


def test_the_way_back_gives_the_bytes_of_one_machine(cluster, expected, tmp_path):
    nf4_ok("dequantize", expected, tmp_path / "one", "--max-shard-size", "9MB")
    code, stderr = end(
        command("dequantize", expected, "out", "--max-shard-size", "9MB", "--ray", cluster.address,
                cwd=tmp_path)
    )  # fmt: skip
    assert code == 0, stderr
    assert same_files(tmp_path / "one", tmp_path / "out")


def test_an_adapter_is_merged_on_nodes(cluster, source, tmp_path):
    adapter = write_adapter(source, tmp_path / "lora")
    nf4_ok("quantize", source, tmp_path / "one", *OPTIONS, "--adapter", adapter)
    for words in (
        ("quantize", source, "out", *OPTIONS, "--adapter", "lora"),
        ("verify", "out", "--source", source, "--adapter", "lora"),
        ("dequantize", "out", "wide", "--adapter", "lora", "--max-shard-size", "9MB"),
    ):
        code, stderr = end(command(*words, "--ray", cluster.address, cwd=tmp_path))
        assert code == 0, stderr
    assert same_files(tmp_path / "one", tmp_path / "out")
    nf4_ok("dequantize", tmp_path / "one", tmp_path / "here", "--adapter", adapter,
           "--max-shard-size", "9MB")  # fmt: skip
    assert same_files(tmp_path / "here", tmp_path / "wide")


def test_a_proof_finds_what_one_machine_finds(cluster, source, expected, tmp_path):
    """Damage that shows alone, by the manifest and by the source, and none."""
    damaged = tmp_path / "damaged"
    shutil.copytree(expected, damaged)
    file = damaged / "model-00003-of-00024.safetensors"
    data = bytearray(file.read_bytes())
    data[-2000] ^= 16
    file.write_bytes(data)
    for output in (expected, damaged):
        for more in ((), ("--source", source)):
            one = nf4_process("verify", output, *more, "--json")
            process = command(
                "verify", output, *more, "--json", "--ray", cluster.address, cwd=tmp_path
            )
            printed, stderr = process.communicate(timeout=120)
            assert process.returncode == one.returncode == int(output == damaged), stderr
            many, alone = json.loads(printed), json.loads(one.stdout)
            assert many["findings"] == alone["findings"]
            assert [check["what"].partition(" (")[0] for check in many["checks"]] == [
                check["what"].partition(" (")[0] for check in alone["checks"]
            ]


def test_a_pipeline(cluster, pipe, tmp_path):
    """Its components one after the other; what lies beside them is the driver's."""
    nf4_ok("quantize", pipe, tmp_path / "one")
    for words in (("quantize", pipe, "many"), ("verify", "many", "--source", pipe)):
        code, stderr = end(command(*words, "--ray", cluster.address, cwd=tmp_path))
        assert code == 0, stderr
    assert same_files(tmp_path / "one", tmp_path / "many")


def test_a_cluster_for_one_run(source, expected, tmp_path):
    code, stderr = end(start(source, tmp_path / "out", "local"))
    assert code == 0, stderr
    assert same_files(expected, tmp_path / "out")


STOPS = [signal.SIGINT, signal.SIGTERM, signal.SIGKILL]


@pytest.mark.parametrize("number", nightly_but([signal.SIGINT, signal.SIGKILL], STOPS))
def test_a_stopped_run_goes_on_where_it_was(cluster, source, expected, tmp_path, number):
    process = start(source, tmp_path / "out", cluster.address)
    wait_for_weights(tmp_path / "out", 1, process)
    process.send_signal(number)
    code, stderr = end(process)
    assert code == {signal.SIGKILL: -9}.get(number, 130), stderr
    assert not (tmp_path / "out").exists()
    code, stderr = end(start(source, tmp_path / "out", cluster.address, "--resume"))
    assert code == 0, stderr
    assert "weights are there, checked by their digests" in stderr
    assert same_files(expected, tmp_path / "out")


def test_an_error_names_the_node_and_the_file(cluster, tmp_path):
    weights = {"a.b.weight": torch.full((64, 64), torch.inf).bfloat16()}
    source = write_checkpoint_dir(tmp_path / "src", weights, LLAMA)
    code, stderr = end(start(source, tmp_path / "out", cluster.address))
    assert code == 3
    for word in ("on the node", "model.safetensors", "a.b.weight[0, 0]", "is infinite"):
        assert word in stderr
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (("quantize", "out", "--calibration", "text"), "--calibration is for one machine"),
        (("quantize", "out", "--disk", "1GB"), "here is no Hub"),
        (("verify", "--sample", "5%"), "--sample is for one machine"),
        (("verify", "--source", "src", "--disk", "1GB"), "--disk is for one machine"),
        (("verify", "--source", "org/model"), "a directory that all nodes share"),
        (("verify", "--source", "src", "--calibration", "text"), "--calibration is for one"),
    ],
)
def test_what_is_for_one_machine_is_refused(source, expected, tmp_path, command, says):
    (tmp_path / "text").write_text("words")
    name, *options = command
    place = source if name == "quantize" else expected
    refused(USAGE, name, place, *options, "--ray", "auto", says=(says,), cwd=tmp_path)
    assert len(list(tmp_path.iterdir())) == 1


def test_more_threads_than_a_node_has(cluster, source, tmp_path):
    code, stderr = end(start(source, tmp_path / "out", cluster.address, "--workers", 64))
    assert code == USAGE
    assert "--workers 64 are more threads than any node of the cluster has CPUs" in stderr
    assert not list(tmp_path.iterdir())


def test_where_no_cluster_is(source, tmp_path):
    code, stderr = end(start(source, tmp_path / "out", "127.0.0.1:1"))
    assert code == MACHINE
    assert "no Ray cluster answers at '127.0.0.1:1'" in stderr
    assert "ray start --head" in stderr
    assert not list(tmp_path.iterdir())


def test_what_a_task_asks_for():
    """CPUs for its threads, memory for its buffers, and a GPU for that engine alone."""
    node = {"Resources": {"CPU": 16.0, "memory": 2e9, "GPU": 2.0}}
    for engine, memory, times in (("cpu", 2e9, 4), ("cpu", 400e6, 2), ("cuda", 2e9, 2)):
        node["Resources"]["memory"] = memory
        settings = ray_node.Settings(engine, workers=4)
        asked = ray_tasks.RayCluster("auto", settings)._asked([node], [Small()])
        assert (asked.threads, asked.gpus) == (4, int(engine == "cuda"))
        assert 100e6 < asked.memory < 200e6
        assert asked.times_on(node) == times
    assert asked.times_on({"Resources": {"CPU": 16.0, "memory": 2e9}}) == 0, "it has no GPU"
    tiny = {"Resources": {"CPU": 16.0, "memory": 1e8}}
    with pytest.raises(UsageError, match="no node of the cluster has more than"):
        ray_tasks.RayCluster("auto", ray_node.Settings(workers=4))._asked([tiny], [Small()])


class Small:
    """A task that holds the plan of ten tensors."""

    name, nbytes, tensors, granule = "small", 1, 10, GRANULE


def test_without_ray(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MachineError, match=r"pip install 'nf4cli\[ray\]'"), \
            connected("auto"):  # fmt: skip
        pass


def test_a_node_says_what_it_lacks(tmp_path):
    """What a node is asked before anything is written."""
    (tmp_path / "files" / ".tries" / "x").mkdir(parents=True)
    tries = tmp_path / "files" / ".tries" / "x"
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"12345")
    version = __version__
    assert ray_node.look(SeesFiles({file: 5}, tries), version) is None
    for answer, words in (
        (ray_node.look(SeesFiles({file: 5}, tries), "0.0.1"), "install the same"),
        (ray_node.look(SeesFiles({file: 5}, tries.parent / "y"), version), "does not see"),
        (ray_node.look(SeesFiles({file: 6}, tries), version), "sees 5 bytes of"),
        (ray_node.look(SeesFiles({tmp_path / "no": 5}, tries), version), "does not see"),
    ):
        assert answer is not None
        assert words in answer.message
        assert "on the node" in answer.message


def test_nodes_and_processes_that_die_are_replaced(cluster, source, expected, tmp_path):
    node = cluster.add_node(num_cpus=2)
    process = start(source, tmp_path / "out", cluster.address)
    wait_for_weights(tmp_path / "out", 1, process)
    killed = tasks_of(cluster)[:2]
    for pid in killed:
        os.kill(pid, signal.SIGKILL)
    cluster.remove_node(node, allow_graceful=False)
    code, stderr = end(process)
    assert killed, "no task was running"
    assert code == 0, stderr
    assert same_files(expected, tmp_path / "out")
