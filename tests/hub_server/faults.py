"""What goes wrong on the way: rules that the server follows for the requests that they match."""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass, field


@dataclass
class Fault:
    """One way of failing, for the next `times` requests that match.

    Attributes:
        path: searched for in "METHOD /path".
        status, headers, body: answered instead; 0 for the right answer.
        drop: close the connection before any answer.
        lose: do what was asked, then close the connection without an answer.
        cut: close the connection after so many bytes of a body.
        flip: the byte of the file at this offset is another one.
        whole: send all of a file although a part was asked for.
        endless: the body goes on with zeros until nobody listens.
        rate: bytes a second.
        stall: seconds without a byte, before the body.
        after: matching requests that pass before the first.
    """

    path: str
    times: int = 1
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b"failed on purpose"
    drop: bool = False
    lose: bool = False
    cut: int | None = None
    flip: int | None = None
    whole: bool = False
    endless: bool = False
    rate: float | None = None
    stall: float = 0.0
    after: int = 0


class Faults:
    """The rules in force; thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rules: list[Fault] = []
        self.seen = 0

    def add(self, fault: Fault) -> None:
        with self._lock:
            self._rules.append(fault)

    def clear(self) -> None:
        with self._lock:
            self._rules.clear()

    def take(self, request: str) -> Fault | None:
        """The fault of this request, counted."""
        with self._lock:
            for rule in self._rules:
                if rule.times > 0 and re.search(rule.path, request):
                    if rule.after > 0:
                        rule.after -= 1
                        continue
                    rule.times -= 1
                    self.seen += 1
                    return rule
        return None
