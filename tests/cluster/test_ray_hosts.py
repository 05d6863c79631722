"""nf4 --ray over a network: hosts of their own, and what goes wrong on one of them."""

from __future__ import annotations

import random
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import LLAMA, MACHINE, nf4_ok, same_files, write_checkpoint_dir
from ray_hosts import BIN, Hosts, slowed, tell, why_not

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not() or "-")
OPTIONS = ("--max-shard-size", "2MB", "--scale", "search", "--workers", "1")


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    """A directory that all hosts see, with a model of 16 shards in 4 bit and what becomes of it."""
    root = tmp_path_factory.mktemp("shared")
    weights = {
        f"model.layers.{i}.mlp.up_proj.weight": torch.randn(2048, 1024).bfloat16()
        for i in range(16)
    }
    config = {**LLAMA, "num_hidden_layers": 16, "tie_word_embeddings": True}
    write_checkpoint_dir(root / "model", weights, config, 8)
    nf4_ok("quantize", root / "model", root / "one", *OPTIONS)
    return root


@pytest.fixture(scope="module")
def hosts(tmp_path_factory) -> Iterator[Hosts]:
    """A head and two nodes, each on a host of its own, with a token."""
    with Hosts(tmp_path_factory.mktemp("hosts") / "home") as made:
        for name in ("head", "first", "second"):
            made.node(name)
        yield made


def quantize(hosts: Hosts, shared: Path, name: str, *more: str):
    return hosts.start(
        BIN / "nf4", "quantize", shared / "model", shared / name, *OPTIONS, "--ray",
        hosts.address, *more, cwd=shared,
    )  # fmt: skip


def end(process) -> tuple[int, str]:
    _, stderr = process.communicate(timeout=120)
    assert "Traceback" not in stderr, stderr
    return process.returncode, stderr


def wait_for_weights(shared: Path, name: str, count: int, process) -> None:
    journal = shared / f".{name}.partial" / "journal"
    while not journal.exists() or journal.read_bytes().count(b'"weight"') < count:
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)


def test_it_crosses_the_network(hosts, shared):
    """With the token that `ray get-auth-token` made; nothing large goes over the network."""
    before = hosts.received(1)
    code, stderr = end(quantize(hosts, shared, "out", "-v"))
    assert code == 0, stderr
    assert "Ray: 3 nodes" in stderr
    assert "node first: model-000" in stderr
    assert same_files(shared / "one", shared / "out")
    assert 10_000 < hosts.received(1) - before < 3_000_000


@pytest.mark.long
def test_another_token_is_refused(hosts, shared):
    process = hosts.start(
        "env", "RAY_AUTH_TOKEN=" + "0" * 64, BIN / "nf4", "quantize", shared / "model",
        shared / "no", *OPTIONS, "--ray", hosts.address, cwd=shared,
    )  # fmt: skip
    code, stderr = end(process)
    assert code == MACHINE
    assert "asks for a token, or another one" in stderr
    assert not list(shared.glob("*no*"))


def test_a_node_that_does_not_see_the_directory(hosts, shared):
    with hosts.guest("blind", f"mount -t tmpfs none {shared}"):
        code, stderr = end(quantize(hosts, shared, "unseen"))
    assert code == MACHINE
    assert f"on the node blind it does not see {shared}" in stderr
    assert not list(shared.glob("*unseen*"))


def test_a_node_whose_disk_is_full(hosts, shared, tmp_path):
    """Its writes go to a disk of a megabyte; the run ends, and goes on without that node."""
    upper = tmp_path / "upper"
    upper.mkdir()
    small = (
        f"mount -t tmpfs -o size=1m none {upper} && mkdir {upper}/u {upper}/w && mount -t overlay "
        f"-o lowerdir={shared},upperdir={upper}/u,workdir={upper}/w none {shared}"
    )
    with hosts.guest("full", small):
        code, stderr = end(quantize(hosts, shared, "filled"))
    assert code == MACHINE
    for word in ("on the node full", "No space left on device"):
        assert word in stderr
    assert ("--resume" in stderr) == (shared / ".filled.partial").exists()
    code, stderr = end(quantize(hosts, shared, "filled", "--resume"))
    assert code == 0, stderr
    assert same_files(shared / "one", shared / "filled")


def test_a_node_that_comes_back_late(hosts, shared):
    """It stands still in mid-run, is taken for dead, and wakes up when its work is done."""
    with hosts.guest("late") as node:
        process = quantize(hosts, shared, "late")
        wait_for_weights(shared, "late", 1, process)
        tell(node, signal.SIGSTOP)
        code, stderr = end(process)
        assert code == 0, stderr
        assert same_files(shared / "one", shared / "late")
        tell(node, signal.SIGCONT)
        time.sleep(2)
        assert same_files(shared / "one", shared / "late")


@pytest.mark.long
def test_a_slow_node(hosts, shared):
    with hosts.guest("slow") as node, slowed(node):
        code, stderr = end(quantize(hosts, shared, "slow"))
    assert code == 0, stderr
    assert same_files(shared / "one", shared / "slow")


DEATHS = [pytest.param(3, id="3"), pytest.param(30, id="30", marks=pytest.mark.long)]


@pytest.mark.parametrize("deaths", DEATHS)
def test_nodes_that_die_anywhere(hosts, shared, deaths):
    """A node joins, and is killed at a random moment of the run; again and again."""
    rng = random.Random(deaths)
    died = 0
    while died < deaths:
        name = f"deaths{deaths}-{died}"
        with hosts.guest(f"mortal{died}"):
            process = quantize(hosts, shared, name)
            wait_for_weights(shared, name, rng.randrange(1, 8), process)
            time.sleep(rng.random() * 0.3)
            died += process.poll() is None
        code, stderr = end(process)
        assert code == 0, stderr
        assert same_files(shared / "one", shared / name)
        assert not list(shared.glob(f".{name}*"))
        shutil.rmtree(shared / name)
