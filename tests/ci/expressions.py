"""GitHub's expressions, as far as the project's own files use them; anything else is an error."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_TOKEN = re.compile(r"\s*('(?:[^']|'')*'|&&|\|\||==|!=|!|[()]|[A-Za-z_][\w.-]*)")


def render(text: str, contexts: Mapping[str, Any]) -> str:
    """Text with every ${{ expression }} replaced by its value."""
    return re.sub(r"\$\{\{(.*?)\}\}", lambda match: _text(evaluate(match[1], contexts)), text)


def evaluate(expression: str, contexts: Mapping[str, Any]) -> Any:
    """The value of one expression.

    Args:
        contexts: by name; a callable is a function without arguments, like always.
    """
    parser = _Parser(_tokens(expression), contexts)
    value = parser.either()
    assert not parser.tokens, f"{expression!r}: {parser.tokens} is not understood"
    return value


def _tokens(expression: str) -> list[str]:
    found, at = [], 0
    while expression[at:].strip():
        match = _TOKEN.match(expression, at)
        assert match, f"{expression[at:]!r} is not understood"
        found.append(match[1])
        at = match.end()
    return found


def _text(value: Any) -> str:
    return "" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


class _Parser:
    def __init__(self, tokens: list[str], contexts: Mapping[str, Any]) -> None:
        self.tokens, self._contexts = tokens, contexts

    def either(self) -> Any:
        value = self._both()
        while self._take("||"):
            other = self._both()
            value = value or other
        return value

    def _both(self) -> Any:
        value = self._equal()
        while self._take("&&"):
            other = self._equal()
            value = value and other
        return value

    def _equal(self) -> Any:
        value = self._one()
        for operator, expected in (("==", True), ("!=", False)):
            if self._take(operator):
                # GitHub compares strings without regard to case.
                value = (_text(value).lower() == _text(self._one()).lower()) is expected
        return value

    def _one(self) -> Any:
        if self._take("!"):
            return not self._one()
        if self._take("("):
            value = self.either()
            assert self._take(")")
            return value
        token = self.tokens.pop(0)
        if token.startswith("'"):
            return token[1:-1].replace("''", "'")
        if self._take("("):
            assert self._take(")")
            return self._contexts[token]()
        value: Any = self._contexts
        first, *rest = token.split(".")
        value = self._contexts[first]  # a context that does not exist is a mistake
        for name in rest:
            value = value.get(name) if isinstance(value, Mapping) else None
        return value

    def _take(self, token: str) -> bool:
        if self.tokens and self.tokens[0] == token:
            self.tokens.pop(0)
            return True
        return False
