"""Hosts of their own for the nodes of a cluster: network, mounts and name, in Linux' namespaces."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

BIN = Path(sys.executable).parent
PORT = 6379
HEALTH = '{"health_check_initial_delay_ms": 500, "health_check_period_ms": 500, ' \
    '"health_check_timeout_ms": 500, "health_check_failure_threshold": 4}'  # fmt: skip


def why_not() -> str:
    """Why there can be none here, "" where they can."""
    if sys.platform != "linux" or not shutil.which("ip") or not shutil.which("unshare"):
        return "needs Linux with ip and unshare"
    done = subprocess.run(
        ["unshare", "-nmu", "ip", "link", "add", "nf4try", "type", "bridge"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return f"no namespaces here: {done.stderr.strip()}" if done.returncode else ""


class Hosts:
    """Hosts that a bridge connects; a context that removes them all.

    Args:
        home: directory that is their HOME, with the cluster's token.
    """

    def __init__(self, home: Path) -> None:
        self._number = os.getpid() % 10_000
        self._bridge = f"nf4b{self._number}"
        self._net = f"10.{80 + self._number % 100}.7"
        self.names: list[str] = []
        self._running: list[subprocess.Popen[bytes]] = []
        self.environment = {
            **os.environ, "HOME": str(home), "RAY_USAGE_STATS_ENABLED": "0",
            "HF_HUB_OFFLINE": "1", "RAY_AUTH_MODE": "token",
        }  # fmt: skip
        home.mkdir()
        subprocess.run(
            [BIN / "ray", "get-auth-token", "--generate"], env=self.environment, check=True,
            capture_output=True,
        )  # fmt: skip

    def __enter__(self) -> Hosts:
        _ip("link", "add", self._bridge, "type", "bridge")
        _ip("addr", "add", f"{self._net}.254/24", "dev", self._bridge)
        _ip("link", "set", self._bridge, "up")
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._running:
            _end(process)
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], check=False)
        subprocess.run(["ip", "link", "del", self._bridge], check=False)

    @property
    def address(self) -> str:
        """Address of the cluster, whose head is the first host."""
        return f"{self._net}.1:{PORT}"

    def add(self) -> str:
        """Add a host, and return its address."""
        place = len(self.names) + 1
        name, link = f"nf4h{self._number}x{place}", f"v{self._number}x{place}"
        _ip("netns", "add", name)
        self.names.append(name)
        _ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", name)
        _ip("link", "set", link, "master", self._bridge, "up")
        _ip("-n", name, "addr", "add", f"{self._net}.{place}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            _ip("-n", name, "link", "set", device, "up")
        _ip("-n", name, "route", "add", "default", "via", f"{self._net}.254")
        return f"{self._net}.{place}"

    def node(self, name: str, setup: str = "true") -> subprocess.Popen[bytes]:
        """Start a node of one CPU on a host of its own; the first one is the head.

        Args:
            name: of the host.
            setup: shell commands that change its mounts.
        """
        address = self.add()
        if len(self.names) == 1:
            join = f"--head --port {PORT} --include-dashboard=false --system-config='{HEALTH}'"
        else:
            join = f"--address {self.address}"
        script = (
            f"hostname {name} && {setup} && exec {BIN}/ray start {join} --num-cpus 1 "
            f"--node-ip-address {address} --block"
        )
        process = subprocess.Popen(
            ["ip", "netns", "exec", self.names[-1], "unshare", "-mu", "sh", "-ec", script],
            env=self.environment, cwd="/",
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        self._running.append(process)
        self._wait_for(address)
        return process

    @contextmanager
    def guest(self, name: str, setup: str = "true") -> Iterator[subprocess.Popen[bytes]]:
        """Start a node that is killed at the end of the block."""
        node = self.node(name, setup)
        try:
            yield node
        finally:
            _end(node)

    def _wait_for(self, address: str) -> None:
        """Until the cluster lists a node as alive."""
        code = (
            "import ray, sys; ray.init(sys.argv[1], logging_level=50); "
            "print([n['NodeManagerAddress'] for n in ray.nodes() if n['Alive']])"
        )
        for _ in range(20):
            done = self.run(sys.executable, "-c", code, self.address)
            if f"'{address}'" in done.stdout:
                return
            time.sleep(0.2)
        raise AssertionError(f"{address} never joined: {done.stderr}")

    def command(self, *words: object, cwd: str | Path = "/") -> list[str]:
        """The words that run a command on the head's host."""
        return ["ip", "netns", "exec", self.names[0], *map(str, words)]

    def start(self, *words: object, cwd: Path) -> subprocess.Popen[str]:
        """Start a command on the head's host."""
        return subprocess.Popen(
            self.command(*words), env=self.environment, cwd=cwd, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def run(self, *words: object, cwd: str | Path = "/") -> subprocess.CompletedProcess[str]:
        """Run a command on the head's host."""
        return subprocess.run(
            self.command(*words), env=self.environment, cwd=cwd, text=True, capture_output=True,
            check=False,
        )  # fmt: skip

    def received(self, number: int) -> int:
        """Bytes that a host got over its link."""
        name = self.names[number]
        done = subprocess.run(
            ["ip", "netns", "exec", name, "cat", "/proc/net/dev"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        line = next(line for line in done.stdout.splitlines() if line.strip().startswith("eth0"))
        return int(line.split()[1])


def processes_of(node: subprocess.Popen[bytes]) -> Sequence[int]:
    """The processes of a node: all that are in its mount namespace."""
    mine = Path(f"/proc/{node.pid}/ns/mnt").readlink()
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                if (entry / "ns" / "mnt").readlink() == mine:
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


def tell(node: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """Send a signal to every process of a node."""
    for pid in processes_of(node):
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


@contextmanager
def slowed(node: subprocess.Popen[bytes]) -> Iterator[None]:
    """Let a node stand still for four fifths of the time."""
    done = threading.Event()

    def hinder() -> None:
        while not done.wait(0.1):
            tell(node, signal.SIGSTOP)
            done.wait(0.4)
            tell(node, signal.SIGCONT)

    thread = threading.Thread(target=hinder)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _end(node: subprocess.Popen[bytes]) -> None:
    if node.poll() is None:
        tell(node, signal.SIGKILL)
        node.wait()


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)
