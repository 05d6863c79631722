"""Have tasks done by a Ray cluster.

Ray's tasks get some kB and return some kB; the bytes go from a shared directory, or a Hub, to
another one.  Ray does a task again whose process or node died.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from .. import engines, stopping
from ..callbacks import Notify, Progress, no_notice
from ..convert.tasks import AnyTask, Check, Crowd, Task
from ..convert.transfers import Transfers
from ..errors import MachineError, TransferError, UsageError, error_with
from ..units import format_duration, format_size, plural
from ..version import __version__
from .ray_connection import connected
from .ray_node import Counter, Done, Failed, Report, Settings, look, resources_for, work

_RETRIES = 3  # of a task whose process or node died
_EVERY = 0.2  # seconds between two looks at whether to stop
_LOOKS_EVERY = 1.0  # seconds between two looks at which nodes are alive
_GRACE = 5.0  # seconds that Ray has to do a dead node's tasks again by itself
_AHEAD = 2  # tasks that are handed to Ray for each that can run at once


class _NoNodeError(MachineError):
    """A task's process or node died each time that it was tried."""


class RayCluster:
    """The `Cluster` that Ray runs.

    Args:
        address: see `connected`.
        settings: of each task.
        note: told which nodes there are.
        detail: told of each task that is done, for those who want to know.

    Attributes:
        crowd: see `Cluster`.
    """

    def __init__(
        self, address: str, settings: Settings, note: Notify = no_notice,
        detail: Notify = no_notice,
    ) -> None:  # fmt: skip
        self._address, self._settings = address, settings
        self._note, self._detail = note, detail
        self.crowd = Crowd()

    def do(
        self, tasks: Sequence[AnyTask], check: Check, take: Callable[[AnyTask, Any], None],
        progress: Progress, moved: Transfers | None = None,
    ) -> None:  # fmt: skip
        """Do all tasks, see `Cluster`.

        Raises:
            MachineError: Ray is missing, no cluster answers, or a node cannot take part.
        """
        if not tasks:
            return
        with connected(self._address) as ray:
            nodes = _with_cpus(ray.nodes())
            asked = self._asked(nodes, tasks)
            settings = replace(self._settings, workers=asked.threads)
            nodes = _that_pass(ray, nodes, check)
            at_once = sum(map(asked.times_on, nodes))
            if not at_once:
                raise MachineError(
                    "no node that can take part has the CPUs, memory and GPUs for a task"
                )
            self.crowd.total += len(tasks)
            self._note(
                f"Ray: {plural(len(nodes), 'node')}, {plural(at_once, 'file')} at a time, "
                f"{plural(asked.threads, 'thread')} each"
            )
            run = _Run(ray, tasks, progress, moved or Transfers(), self.crowd)
            task_of = ray.remote(max_retries=_RETRIES, **asked.options)(work)
            common = ray.put((settings, check))

            def send(number: int, task: Task, node: str | None) -> Any:
                chosen = task_of if node is None else task_of.options(**_preferring(node))
                return chosen.remote(task, common, run.counter, number)

            def take_done(task: AnyTask, done: Done) -> None:
                take(task, done.result)
                self.crowd.done += 1
                self._detail(
                    f"node {done.node}: {task.name}, {format_size(task.nbytes)} in "
                    f"{format_duration(done.seconds)}"
                )

            run.go(send, asked, take_done)

    def _asked(self, nodes: Sequence[dict[str, Any]], tasks: Sequence[Task]) -> _Asked:
        """Return what each task asks Ray for.

        Raises:
            MachineError: there is no node.
            UsageError: no node has so many CPUs, or so much memory.
        """
        if not nodes:
            raise MachineError("the Ray cluster has no node with CPUs")
        settings = self._settings
        sizes = [int(node["Resources"]["CPU"]) for node in nodes]
        threads = settings.workers or max(1, min(4, *sizes))
        if threads > max(sizes):
            raise UsageError(
                f"--workers {threads} are more threads than any node of the cluster has CPUs: "
                f"the largest has {max(sizes)}"
            )
        # The memory of its plan, and of the CPU engine's buffers: the least that a task takes.
        limits = replace(settings, workers=threads)
        memory = max(resources_for(engines.load("cpu"), limits, task).memory for task in tasks)
        most = max(int(node["Resources"].get("memory", memory)) for node in nodes)
        if memory > most:
            raise UsageError(
                f"a task takes {format_size(memory)} of memory, and no node of the cluster has "
                f"more than {format_size(most)} for tasks: give --memory, or a smaller --workers"
            )
        return _Asked(threads, memory, int(settings.engine == "cuda"))


@dataclass(frozen=True, slots=True)
class _Asked:
    """What a task asks Ray for: threads (CPUs), bytes of memory, and GPUs."""

    threads: int
    memory: int
    gpus: int

    @property
    def options(self) -> dict[str, Any]:
        """The same as options of a Ray task."""
        return {"num_cpus": self.threads, "memory": self.memory, "num_gpus": self.gpus}

    def times_on(self, node: Mapping[str, Any]) -> int:
        """Return how many such tasks a node runs at once."""
        has = node["Resources"]
        room = [has["CPU"] // self.threads]
        if "memory" in has:
            room.append(has["memory"] // self.memory)
        if self.gpus:
            room.append(has.get("GPU", 0) // self.gpus)
        return int(min(room))


class _Run:
    """Tasks that are handed to Ray, a number of them at a time, and how far they are.

    Args:
        ray: the module.
        tasks: to do.
        progress, moved: told what the tasks report.
        crowd: told how many nodes there are.

    Attributes:
        counter: the actor that the tasks report to.  It lives on the driver's node: reports of a
            node that dies are lost with the node alone.
    """

    def __init__(
        self, ray: Any, tasks: Sequence[Task], progress: Progress, moved: Transfers, crowd: Crowd
    ) -> None:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        self._ray, self._progress, self._moved, self._crowd = ray, progress, moved, crowd
        # The largest first, so that no node works alone at the end.
        self._tasks = sorted(tasks, key=lambda task: -task.nbytes)
        self._known = [Report()] * len(tasks)
        self._tries, self._sent = [0] * len(tasks), [0.0] * len(tasks)
        self._nodes, self._hears = _Nodes(ray), True
        here = ray.get_runtime_context().get_node_id()
        self.counter = (
            ray.remote(num_cpus=0)(Counter)
            .options(scheduling_strategy=NodeAffinitySchedulingStrategy(here, soft=True))
            .remote()
        )

    def go(
        self, send: Callable[[int, Task, str | None], Any], asked: _Asked,
        take: Callable[[Any, Done], None],
    ) -> None:  # fmt: skip
        """Have the tasks done.

        An error leaves tasks behind; Ray ends them when the run disconnects.  They are not
        cancelled: Ray 2.60 may abort the process that cancels a task which is just done.  Of two
        tries of a task the first that is done counts.

        Args:
            send: (number, task, id of a node to do it or None for any) -> Ray's reference to its
                result.
            asked: what each task asks for.  Nodes that join later get their share.
            take: gets each task that is done.

        Raises:
            InputError, UsageError, MachineError: of a task.
            InterruptedRunError: a stop was asked for.
        """
        queue = iter(range(len(self._tasks)))
        running: dict[Any, int] = {}
        news = None
        while True:
            alive = self._nodes.alive()
            self._crowd.nodes = len(alive)
            left = max(1, _AHEAD * sum(map(asked.times_on, alive))) - len({*running.values()})
            able = [node["NodeID"] for node in alive if asked.times_on(node)]
            begun = [(number, None) for number in islice(queue, max(0, left))]
            again = [
                (number, able[number % len(able)] if able else None)
                for number in self._lost({*running.values()})
            ]
            for number, node in [*begun, *again]:
                self._tries[number] += 1
                self._sent[number] = time.monotonic()
                running[send(number, self._tasks[number], node)] = number
            if not running:
                return
            if news is None and self._hears:
                news = self.counter.news.remote()
            awaited = [*running] if news is None else [*running, news]
            done, _ = self._ray.wait(awaited, num_returns=1, timeout=_EVERY)
            stopping.check()
            for reference in done:
                if reference == news:
                    self._hear(reference)
                    news = None
                elif reference in running:  # and no other try of the same task was done
                    number = running[reference]
                    self._take(number, reference, take)
                    running = {r: n for r, n in running.items() if n != number}

    def _take(self, number: int, reference: Any, take: Callable[[Any, Done], None]) -> None:
        """Hand over a task that is done.

        Raises:
            InputError, UsageError, MachineError: of the task.
        """
        task = self._tasks[number]
        done = _done(self._ray, reference, task)
        self._report(number, self._known[number]._replace(name=task.name, done=task.nbytes))
        take(task, done)

    def _lost(self, running: Collection[int]) -> list[int]:
        """Return running tasks that wait for a node which is dead, to be tried once more.

        Ray does a task again when the connection to its process ends.  That of a node without
        power, or which stands still, does not end: Ray 2.60 waits for it although it knows that
        the node is dead.  A task that has not said where it is may have been sent there.  It is
        tried on a node by name: for tasks that are alike Ray has one request for a process, which
        may lie with the dead node, and the second try would wait for its answer as well.
        """
        dead = self._nodes.dead_for(_GRACE)
        last = max(dead.values(), default=0.0)

        def is_lost(number: int) -> bool:
            node, sent = self._known[number].node, self._sent[number]
            return sent < dead.get(node, 0.0 if node else last)

        return [n for n in running if self._tries[n] <= _RETRIES and is_lost(n)]

    def _hear(self, reference: Any) -> None:
        """Pass on what the tasks reported, until the counter dies."""
        try:
            reports = self._ray.get(reference)
        except self._ray.exceptions.RayError:
            self._hears = False
            return
        for number, report in reports.items():
            self._report(number, report)

    def _report(self, number: int, now: Report) -> None:
        """Count what a task did since its last report; one that is done again counts once."""
        known = self._known[number]
        done = max(0, now.done - known.done)
        downloaded = max(0, now.downloaded - known.downloaded)
        uploaded = max(0, now.uploaded - known.uploaded)
        self._known[number] = Report(
            known.done + done, known.downloaded + downloaded, known.uploaded + uploaded,
            now.name, now.node,
        )  # fmt: skip
        if done:
            self._progress(now.name, min(done, max(0, self._tasks[number].nbytes - known.done)))
        self._moved.add_downloaded(downloaded)
        self._moved.add_uploaded(uploaded)


def _preferring(node: str) -> dict[str, Any]:
    """Return the options of a Ray task that has a node do it, another one where that is gone."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return {"scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=True)}


def _with_cpus(nodes: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the nodes that are alive and have CPUs."""
    return [node for node in nodes if node["Alive"] and node["Resources"].get("CPU")]


class _Nodes:
    """The nodes of a cluster, and how long those have been dead that died in this run.

    Args:
        ray: the module.
    """

    def __init__(self, ray: Any) -> None:
        self._ray, self._nodes = ray, ray.nodes()
        self._before = {node["NodeID"] for node in self._nodes if not node["Alive"]}
        self._died: dict[str, float] = {}
        self._looked = time.monotonic()

    def _look(self) -> float:
        """Ask for the nodes, not too often, and return the time."""
        now = time.monotonic()
        if now - self._looked >= _LOOKS_EVERY:
            self._looked, self._nodes = now, self._ray.nodes()
            for node in self._nodes:
                if not node["Alive"] and node["NodeID"] not in self._before:
                    self._died.setdefault(node["NodeID"], now)
        return now

    def alive(self) -> list[dict[str, Any]]:
        """Return the nodes that can take tasks."""
        self._look()
        return _with_cpus(self._nodes)

    def dead_for(self, seconds: float) -> dict[str, float]:
        """Return the nodes that have been dead for so long: id -> when that was noticed."""
        now = self._look()
        return {node: since for node, since in self._died.items() if now - since >= seconds}


def _that_pass(ray: Any, nodes: Sequence[dict[str, Any]], check: Check) -> list[dict[str, Any]]:
    """Return the nodes that are alive, all of which have this nf4 and pass the check.

    Raises:
        MachineError: one has not, or does not; or none is alive.
    """
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    asking = ray.remote(num_cpus=0, max_retries=0)(look)
    looks = [
        asking.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote(check, __version__)
        for node in nodes
    ]
    alive, health = [], _Nodes(ray)
    for node, reference in zip(nodes, looks, strict=True):
        try:
            said = _said(ray, reference, node, health)
        except _NoNodeError:
            continue  # it has died, and Ray will notice: the others go on
        if isinstance(said, Failed):
            raise MachineError(said.message)
        alive.append(node)
    if not alive:
        raise MachineError("no node of the Ray cluster answers")
    return alive


def _said(ray: Any, reference: Any, node: Mapping[str, Any], health: _Nodes) -> Failed | None:
    """Return what a node says of itself.

    Raises:
        _NoNodeError: it has died.
        MachineError: see `_answer`.
    """
    while not ray.wait([reference], timeout=_EVERY)[0]:
        stopping.check()
        if node["NodeID"] in health.dead_for(0):  # Ray may go on waiting
            raise _NoNodeError("the node does not answer")
    answer: Failed | None = _answer(ray, reference, f"the node {node['NodeManagerHostname']}")
    return answer


def _done(ray: Any, reference: Any, task: Task) -> Done:
    """Return what a task has done.

    Raises:
        InputError, UsageError, MachineError: the task's own; see `_answer`.
    """
    done: Done | Failed = _answer(ray, reference, "a node")
    if isinstance(done, Failed):
        error = error_with(done.exit_code, f"{task.name}: {done.message}")
        raise TransferError(error) if done.in_transfer else error
    return done


def _answer(ray: Any, reference: Any, node: str) -> Any:
    """Return what a Ray task returned.

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
        if isinstance(error.cause, ray.exceptions.RayError):
            raise MachineError(
                f"{node} cannot reach this process ({type(error.cause).__name__}): nodes and "
                "driver have to reach each other on all ports, with the same RAY_AUTH_MODE and "
                "token"
            ) from error
        raise  # a bug
    except ray.exceptions.RayError as error:
        raise _NoNodeError(
            f"{node} failed {_RETRIES + 1} times ({type(error).__name__}: "
            f"{str(error).splitlines()[0]}): what is finished is kept"
        ) from error
