"""Make the units of a conversion on a Ray cluster whose nodes share source and output directories.

Ray's tasks get a unit of some kB and return what is known of its file; the bytes go from the shared
directory to the shared directory.  Ray runs a task again whose process or node died.
"""

from __future__ import annotations

import logging
import os
import platform
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

from .. import engines, stopping
from ..callbacks import Notify, no_notice
from ..convert.conversion import Tools
from ..convert.units import Made, Place, Unit, make
from ..engines.protocol import GRANULE, Engine
from ..errors import MachineError, Nf4Error, UsageError, error_with, exit_code_of
from ..planning.resources import Resources, make_resources, unit_of
from ..version import __version__

LOCAL = "local"
"""In place of an address: a cluster on this machine, for the length of the run."""
_RETRIES = 3  # of a task whose process or node died
_EVERY = 0.2  # seconds between two looks at whether to stop
_ANSWER = 10  # seconds within which a cluster takes a connection
_AHEAD = 2  # tasks that are handed to Ray for each that can run at once


@dataclass(frozen=True, slots=True)
class Settings:
    """What each task runs with.

    Attributes:
        engine, device: see `engines.load`.
        workers: threads, for which the task asks Ray as many CPUs; None for 4, or as many as the
            smallest node has.
        memory: bytes that a task's process stays below, None for no limit.
    """

    engine: str = "auto"
    device: str | None = None
    workers: int | None = None
    memory: int | None = None


@dataclass(frozen=True, slots=True)
class _Failed:
    """An error of a task, as words: an exception may not survive the way back.

    Attributes:
        exit_code: of the error.
        message: names the node.
    """

    exit_code: int
    message: str


class _NoNodeError(MachineError):
    """A task's process or node died each time that it was tried."""


class RayUnits:
    """The `Units` that a Ray cluster makes.

    Args:
        address: of the cluster: host:port, "auto" for that of RAY_ADDRESS or of this machine, or
            LOCAL.
        note: told which nodes there are.
    """

    def __init__(self, address: str, settings: Settings, note: Notify = no_notice) -> None:
        self._address, self._settings, self._note = address, settings, note

    def carry_out(
        self, units: Sequence[Unit], place: Place, take: Callable[[Unit, Made], None]
    ) -> None:
        """Make all units, see `Units`.

        Raises:
            MachineError: Ray is missing, no cluster answers, or a node cannot take part.
        """
        # Tasks run in directories of their own.
        place = replace(place, directory=place.directory.absolute(), tries=place.tries.absolute())
        with _connected(self._address) as ray:
            nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
            threads = self._threads(nodes)
            settings = replace(self._settings, workers=threads)
            nodes = _that_see(ray, nodes, units, place)
            at_once = sum(int(node["Resources"]["CPU"]) // threads for node in nodes)
            self._note(
                f"Ray: {_count(len(nodes), 'node')}, {_count(at_once, 'file')} at a time, "
                f"{_count(threads, 'thread')} each"
            )
            gpus = int(settings.engine == "cuda")
            task = ray.remote(num_cpus=threads, num_gpus=gpus, max_retries=_RETRIES)(_work)
            _run(ray, task, units, (place, settings), _AHEAD * at_once, take)

    def _threads(self, nodes: Sequence[dict[str, Any]]) -> int:
        """Return the number of threads of a task.

        Raises:
            MachineError: there is no node.
            UsageError: no node has so many CPUs.
        """
        if not nodes:
            raise MachineError("the Ray cluster has no node with CPUs")
        sizes = [int(node["Resources"]["CPU"]) for node in nodes]
        workers = self._settings.workers or max(1, min(4, *sizes))
        if workers > max(sizes):
            raise UsageError(
                f"--workers {workers} are more threads than any node of the cluster has CPUs: "
                f"the largest has {max(sizes)}"
            )
        return workers


@contextmanager
def _connected(address: str) -> Iterator[Any]:
    """Yield the module ray, connected to a cluster.

    Raises:
        MachineError: Ray is missing, or no cluster answers.
    """
    try:
        import ray
    except ImportError as error:
        raise MachineError(
            f"--ray needs the package ray ({error}): pip install 'nf4cli[ray]'"
        ) from error
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address == LOCAL:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        options |= {"address": "local", "include_dashboard": False}
        options["num_cpus"] = len(os.sched_getaffinity(0))
    else:
        options["address"] = address
        _require_answer(address)
    try:
        ray.init(**options)
    except (ConnectionError, ValueError, RuntimeError, TimeoutError) as error:
        raise MachineError(_no_cluster(address, error)) from error
    finally:
        stopping.listen_again()  # Ray ends the process at a SIGTERM
    try:
        yield ray
    finally:
        ray.shutdown()


def _require_answer(address: str) -> None:
    """Raise MachineError if nothing listens at host:port: Ray itself tries for minutes."""
    stated = os.environ.get("RAY_ADDRESS", "") if address == "auto" else address
    host, colon, port = stated.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdecimal():
        return  # "auto" on this machine, or a form that Ray explains
    try:
        socket.create_connection((host.strip("[]"), int(port)), _ANSWER).close()
    except (OSError, OverflowError) as error:
        raise MachineError(_no_cluster(stated, error)) from error


def _no_cluster(address: str, why: object) -> str:
    return (
        f"no Ray cluster answers at {address!r} ({why}): start one with `ray start --head`, or "
        "give --ray local for one on this machine"
    )


def _count(number: int, what: str) -> str:
    """Return "1 node", "2 nodes"."""
    return f"{number} {what}{'s' * (number != 1)}"


def _that_see(
    ray: Any, nodes: Sequence[dict[str, Any]], units: Sequence[Unit], place: Place
) -> list[dict[str, Any]]:
    """Return the nodes that are alive, all of which have this nf4 and see source and output.

    Raises:
        MachineError: one has not, or does not; or none is alive.
    """
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    files = {s.path: s.size for unit in units for s in unit.plan.checkpoint.shards}
    look = ray.remote(num_cpus=0, max_retries=0)(_look)
    looks = [
        look.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote(files, place.tries, __version__)
        for node in nodes
    ]
    alive = []
    for node, answer in zip(nodes, looks, strict=True):
        try:
            said = _answer(ray, answer, f"the node {node['NodeManagerHostname']}")
        except _NoNodeError:
            continue  # it has died, and Ray will notice: the others go on
        if isinstance(said, _Failed):
            raise MachineError(said.message)
        alive.append(node)
    if not alive:
        raise MachineError("no node of the Ray cluster answers")
    return alive


def _run(
    ray: Any, task: Any, units: Sequence[Unit], common: tuple[Any, ...], ahead: int,
    take: Callable[[Unit, Made], None],
) -> None:  # fmt: skip
    """Have units made, a number of them at a time.

    An error leaves tasks behind; Ray ends them when the run disconnects.  They are not cancelled:
    Ray 2.60 may abort the process that cancels a task which is just done.

    Raises:
        InputError, UsageError, MachineError: of a unit.
        InterruptedRunError: a stop was asked for.
    """
    # The largest first, so that no node works alone at the end.
    queue = iter(sorted(units, key=lambda unit: -unit.source_bytes))
    running: dict[Any, Unit] = {}
    shared = ray.put(common)
    while True:
        for unit in islice(queue, ahead - len(running)):
            running[task.remote(unit, shared)] = unit
        if not running:
            return
        done, _ = ray.wait([*running], num_returns=1, timeout=_EVERY)
        stopping.check()
        for reference in done:
            unit = running.pop(reference)
            take(unit, _made(ray, reference, unit))


def _made(ray: Any, reference: Any, unit: Unit) -> Made:
    """Return what a task has made.

    Raises:
        InputError, UsageError, MachineError: the task's own; see `_answer`.
    """
    made: Made | _Failed = _answer(ray, reference, "a node")
    if isinstance(made, _Failed):
        raise error_with(made.exit_code, f"{unit.name}: {made.message}")
    return made


def _answer(ray: Any, reference: Any, node: str) -> Any:
    """Return what a task returned.

    Raises:
        MachineError: the node has no nf4.
        _NoNodeError: its process or node died more often than it is tried.
        InterruptedRunError: a stop was asked for.
    """
    try:
        while not ray.wait([reference], timeout=_EVERY)[0]:
            stopping.check()
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, ImportError):
            raise MachineError(
                f"{node} cannot run nf4 ({error.cause}): install nf4cli {__version__} there"
            ) from error
        raise  # a bug
    except ray.exceptions.RayError as error:
        raise _NoNodeError(
            f"{node} failed {_RETRIES + 1} times ({type(error).__name__}: "
            f"{str(error).splitlines()[0]}): what is finished is kept"
        ) from error


def _look(files: dict[Path, int], tries: Path, version: str) -> _Failed | None:
    """Return why this node cannot take part, None if it can."""
    if version != __version__:
        return _failed(
            f"it has nf4 {__version__}, and {version} asks for its work: install the same"
        )
    if not tries.is_dir():
        return _failed(
            f"it does not see {tries.parent.parent}: source and output must lie in directories "
            "that all nodes share"
        )
    for path, size in files.items():
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            what = "does not see" if found is None else f"sees {found:,} bytes of"
            return _failed(
                f"it {what} {path}, {size:,} bytes: source and output must lie in directories that "
                "all nodes share"
            )
    return None


def _failed(why: str, exit_code: int = MachineError.exit_code) -> _Failed:
    return _Failed(exit_code, f"on the node {platform.node()} {why}")


def _work(unit: Unit, common: tuple[Place, Settings]) -> Made | _Failed:
    """Make a unit: a task."""
    place, settings = common
    try:
        engine = _engine(settings.engine, settings.device)
        return make(unit, Tools(engine, _resources(engine, settings, unit)), place)
    except Nf4Error as error:
        return _failed(str(error), error.exit_code)
    except OSError as error:
        return _failed(str(error), exit_code_of(error))


@cache
def _engine(name: str, device: str | None) -> Engine:
    """Return the engine of this process, which runs one task after the other."""
    return engines.load(name, device)


def _resources(engine: Engine, settings: Settings, unit: Unit) -> Resources:
    workers = settings.workers or 1
    least = max(GRANULE, unit_of(unit.plan.config))
    return make_resources(engine, workers, settings.memory, workers, len(unit.plan.tensors), least)
