"""A cluster of this process alone: tasks go through bytes, as if another machine did them."""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable, Sequence
from typing import Any

from nf4cli.callbacks import Progress, no_progress
from nf4cli.convert.conversion import Tools
from nf4cli.convert.tasks import Check, Crowd, Task
from nf4cli.convert.transfers import Transfers
from nf4cli.engines.cpu import CpuEngine
from nf4cli.errors import MachineError
from nf4cli.planning.resources import Resources

RESOURCES = Resources(2, 8 << 20, 0)


class Elsewhere:
    """Does tasks as another process would: from bytes, and handed back as bytes.

    Args:
        seed: of their order.
        stop_after: so many are done before the run is broken off.
        spoil: called with a task before it is done.

    Attributes:
        made: names of the tasks that were done.
        sent, returned: bytes of the largest task and answer.
    """

    def __init__(
        self, seed: int = 0, stop_after: int | None = None,
        spoil: Callable[[Any], None] = lambda task: None,
    ) -> None:  # fmt: skip
        self._random, self._stop_after, self._spoil = random.Random(seed), stop_after, spoil
        self.made: list[str] = []
        self.sent = self.returned = 0
        self.crowd = Crowd()

    def do(
        self, tasks: Sequence[Task], check: Check, take: Callable[[Any, Any], None],
        progress: Progress = no_progress, moved: Transfers | None = None,
    ) -> None:  # fmt: skip
        assert pickle.loads(pickle.dumps(check)).fault() is None
        tasks = list(tasks)
        self._random.shuffle(tasks)
        for task in tasks:
            if len(self.made) == self._stop_after:
                raise MachineError("the cluster is gone")
            self._spoil(task)
            sent = pickle.dumps(task)
            tools = Tools(CpuEngine(), RESOURCES, progress)
            answer = pickle.dumps(pickle.loads(sent).do(tools, moved or Transfers()))
            self.sent, self.returned = max(self.sent, len(sent)), max(self.returned, len(answer))
            take(task, pickle.loads(answer))
            self.made.append(task.name)
