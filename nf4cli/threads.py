"""The one loop: threads that take work items in order until there are none.

No stage queues: a worker reads, encodes and writes its item before it takes the next, so memory
is workers x buffers whatever the model's size.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import TypeVar

from . import stopping

Item = TypeVar("Item")


def run(
    items: Iterable[Item],
    make_worker: Callable[[], Callable[[Item], None]],
    workers: int,
    abort: Callable[[], None],
) -> None:
    """Work off every item.

    Items are handed out in order, each to one of the threads; the main thread only waits, so that
    it hears signals.  The first exception of any worker, or a signal, stops all (the items in hand
    are finished) and is raised here.

    Args:
        make_worker: called once a thread; what it returns is called with each item.
        abort: called once on failure; must release every worker that waits for another.
    """
    queue = iter(items)
    lock = threading.Lock()
    failures: list[BaseException] = []
    failing = threading.Lock()  # another one: who holds `lock` may wait for what `abort` ends
    stop = threading.Event()

    def fail(error: BaseException) -> None:
        with failing:
            failures.append(error)
            first = len(failures) == 1
        stop.set()
        if first:
            abort()

    def work() -> None:
        try:
            worker = make_worker()
            while not stop.is_set():
                with lock:
                    item = next(queue, None)
                if item is None:
                    return
                worker(item)
        except BaseException as error:
            fail(error)

    if workers == 1 and threading.current_thread() is not threading.main_thread():
        work()  # this thread is a worker of another run, which hears of a stop
    else:
        _run_threads(work, workers, fail)
    if failures:
        raise failures[0]


def _run_threads(
    work: Callable[[], None], workers: int, fail: Callable[[BaseException], None]
) -> None:
    """Run `work` in threads to its end; a signal calls `fail`, and they are waited for as well."""
    threads = [threading.Thread(target=work, name=f"nf4-{i}") for i in range(workers)]
    with stopping.held_back():  # no thread outlives this: what they write to is closed behind it
        try:
            for thread in threads:
                thread.start()
            stopping.join(threads)
        except BaseException as error:
            fail(error)
            for thread in threads:
                if thread.ident is not None:  # it was started
                    thread.join()
