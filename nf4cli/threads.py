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
    leave_behind: bool = False,
) -> None:
    """Call a worker with every item, in several threads.

    Items are handed out in order, each to one thread.  The calling thread only waits, so that it
    hears signals.  The first exception of a worker, or a signal, stops all threads: each finishes
    the item in its hands, and the exception is raised here.

    Args:
        make_worker: called once in each thread; the function it returns is called with each item.
        workers: number of threads.  One worker runs in the calling thread, unless that is the main
            thread.
        abort: called once, at the first failure; must release every worker that waits for another.
        leave_behind: after a failure do not wait for the items in hand, which may take as long as
            the network likes; their threads end with the process.
    """
    queue = iter(items)
    lock = threading.Lock()
    failures: list[BaseException] = []
    failing = threading.Lock()  # not `lock`: a thread that holds it may wait for `abort`
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

    main = threading.current_thread() is threading.main_thread()
    if workers == 1 and not (main or leave_behind):
        work()  # this thread is a worker of an outer run, whose main thread hears the signals
    else:
        threads = [
            threading.Thread(target=work, name=f"nf4-{i}", daemon=leave_behind)
            for i in range(workers)
        ]
        _start_and_wait(threads, fail, until=lambda: leave_behind and failures)
    if failures:
        raise failures[0]


def _start_and_wait(
    threads: list[threading.Thread],
    fail: Callable[[BaseException], None],
    until: Callable[[], object],
) -> None:
    """Start threads and wait for their end, or until something holds; a signal calls `fail`."""
    # No thread may outlive this block, but those that are left behind: the caller closes the files
    # that they write to.
    with stopping.held_back():
        try:
            for thread in threads:
                thread.start()
            stopping.join(threads, until)
        except BaseException as error:
            fail(error)
            for thread in threads:
                # What the others write to is closed behind this: they must not outlive it.
                if thread.ident is not None and not thread.daemon:
                    thread.join()


def each(
    items: Iterable[Item],
    work: Callable[[Item, threading.Event], None],
    workers: int,
    leave_behind: bool = False,
) -> None:
    """Call `work(item, stop)` for each item, several at a time; the first failure ends it.

    An item may take long: `stop` is set after a failure, or a signal, and `work` looks at it.

    Args:
        workers: threads.
        leave_behind: see `run`.
    """
    stop = threading.Event()
    run(items, lambda: lambda item: work(item, stop), workers, stop.set, leave_behind)
