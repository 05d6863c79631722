"""The one thread pool: threads that take items of work in order until none is left.

A worker reads, encodes and writes its item before it takes the next one.  There are no queues
between these steps, so memory is workers x buffers, whatever the size of the model.
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
    """Call a worker with every item, in several threads.

    Items are handed out in order, each to one thread.  The main thread only waits, so that it
    hears signals.  The first exception of a worker, or a signal, stops all threads: each finishes
    the item in its hands, and the exception is raised here.

    Args:
        make_worker: called once in each thread; the function it returns is called with each item.
        workers: number of threads.  One worker runs in the calling thread, unless that is the main
            thread.
        abort: called once, at the first failure; must release every worker that waits for another.
    """
    queue = iter(items)
    lock = threading.Lock()
    failures: list[BaseException] = []
    failing = threading.Lock()  # not `lock`: its holder may wait until `abort` releases it
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
        work()  # this thread is a worker of an outer run, whose main thread hears the signals
    else:
        _run_threads(work, workers, fail)
    if failures:
        raise failures[0]


def _run_threads(
    work: Callable[[], None], workers: int, fail: Callable[[BaseException], None]
) -> None:
    """Run `work` in threads and wait until all have ended; a signal calls `fail` first."""
    threads = [threading.Thread(target=work, name=f"nf4-{i}") for i in range(workers)]
    # No thread may outlive this block: the caller closes the files that they write to.
    with stopping.held_back():
        try:
            for thread in threads:
                thread.start()
            stopping.join(threads)
        except BaseException as error:
            fail(error)
            for thread in threads:
                if thread.ident is not None:  # it was started
                    thread.join()
