"""Do a task on a node of a Ray cluster, and report how far it is.

What runs here is started by ray_tasks.py, on whatever machine Ray chooses.
"""

from __future__ import annotations

import platform
import threading
import time
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple

from .. import engines
from ..convert.conversion import Tools
from ..convert.tasks import Check, Task
from ..convert.transfers import Transfers
from ..engines.protocol import GRANULE, Engine
from ..errors import MachineError, Nf4Error, TransferError, exit_code_of
from ..planning.resources import Resources, make_resources
from ..version import __version__

_REPORTS_EVERY = 0.5  # seconds between two reports of a task


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
class Failed:
    """An error of a task, as words: an exception may not survive the way back.

    Attributes:
        exit_code: of the error.
        message: names the node.
        in_transfer: a Hub refused, and finished work is kept: see `TransferError`.
    """

    exit_code: int
    message: str
    in_transfer: bool = False


@dataclass(frozen=True, slots=True)
class Done:
    """What a task returned.

    Attributes:
        node: name of the machine that did it.
        seconds: that it took.
        result: of `Task.do`.
    """

    node: str
    seconds: float
    result: Any


class Report(NamedTuple):
    """How far a task is.

    Attributes:
        done, downloaded, uploaded: bytes so far.
        name: of the weight or file at work.
        node: id of the node; "" for a task that has not begun.
    """

    done: int = 0
    downloaded: int = 0
    uploaded: int = 0
    name: str = ""
    node: str = ""


class Counter:
    """What running tasks report: an actor."""

    def __init__(self) -> None:
        self._reports: dict[int, Report] = {}

    def told(self, number: int, report: Report) -> None:
        """Take the report of a task."""
        self._reports[number] = report

    def news(self) -> dict[int, Report]:
        """Return what was reported since the last call, after a short while."""
        time.sleep(_REPORTS_EVERY)
        news, self._reports = self._reports, {}
        return news


def look(check: Check, version: str) -> Failed | None:
    """Return why this node cannot take part, None if it can."""
    if version != __version__:
        return _failed(
            f"it has nf4 {__version__}, and {version} asks for its work: install the same"
        )
    fault = check.fault()
    return None if fault is None else _failed(fault)


def _failed(why: str, exit_code: int = MachineError.exit_code) -> Failed:
    return Failed(exit_code, f"on the node {platform.node()} {why}")


def work(task: Task, common: tuple[Settings, Check], counter: Any, number: int) -> Done | Failed:
    """Do a task."""
    began = time.monotonic()
    settings, check = common
    try:
        if fault := _fault_of(check):
            return _failed(fault)
        engine = _engine(settings.engine, settings.device)
        limits = resources_for(engine, settings, task)
        with _Reporter(counter, number) as reporter:
            result = task.do(Tools(engine, limits, reporter.add), reporter.moved)
        return Done(platform.node(), time.monotonic() - began, result)
    except Nf4Error as error:
        failed = _failed(str(error), error.exit_code)
        return replace(failed, in_transfer=isinstance(error, TransferError))
    except OSError as error:
        return _failed(str(error), exit_code_of(error))


def _fault_of(check: Check) -> str | None:
    """Return why this node cannot take part; asked once in a process, which may be on a node that
    joined later."""
    if check != _passed.get("check"):
        if fault := check.fault():
            return fault
        _passed["check"] = check
    return None


_passed: dict[str, Check] = {}


class _Reporter:
    """A thread that reports how far a task is, now and then.

    Args:
        counter: the actor that hears of it.
        number: of the task.

    Attributes:
        moved: counts what the task fetches and uploads.
    """

    def __init__(self, counter: Any, number: int) -> None:
        import ray

        self._counter, self._number = counter, number
        self._node = ray.get_runtime_context().get_node_id()
        self.moved = Transfers()
        self._done, self._name, self._lock = 0, "", threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._tell, name="nf4-report", daemon=True)

    def add(self, name: str, nbytes: int) -> None:
        """Count bytes of work: the task's `Progress`."""
        with self._lock:
            self._done += nbytes
            self._name = name

    def _tell(self) -> None:
        told = None
        while not self._stop.wait(_REPORTS_EVERY):
            with self._lock:
                moved = self.moved.downloaded, self.moved.uploaded
                name = f"{platform.node()}: {self._name}"
                report = Report(self._done, *moved, name, self._node)
            if report != told:
                self._counter.told.remote(self._number, report)
                told = report

    def __enter__(self) -> _Reporter:
        self._counter.told.remote(self._number, Report(node=self._node))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


@cache
def _engine(name: str, device: str | None) -> Engine:
    """Return the engine of this process, which does one task after the other."""
    return engines.load(name, device)


def resources_for(engine: Engine, settings: Settings, task: Task) -> Resources:
    workers, least = settings.workers or 1, max(GRANULE, task.granule)
    return make_resources(engine, workers, settings.memory, workers, task.tensors, least)
