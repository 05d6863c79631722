"""Write HTML whose texts are escaped unless they say that they are HTML."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from ..checkpoint.untrusted import printable
from ..version import __version__

_LONGEST = 300  # characters of a name; its middle is left out
_VOID = ("meta",)


class Html(str):
    """Text that is HTML already."""

    __slots__ = ()


def shown(text: object) -> str:
    """Return a name on one line, without characters that hide text or turn its direction."""
    line = printable(str(text))
    if len(line) <= _LONGEST:
        return line
    return f"{line[: _LONGEST // 2]}…{line[-_LONGEST // 2 :]}"


def element(tag: str, *children: object, **attributes: object) -> Html:
    """Return an element; children that are not `Html` are escaped, as are all attributes.

    Args:
        attributes: by name, with `_` for `-` and behind a name that Python keeps for itself.
    """
    inside = "".join(c if isinstance(c, Html) else escape(shown(c)) for c in children)
    named = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{escape(shown(value))}"'
        for name, value in attributes.items()
    )
    return Html(f"<{tag}{named}>{inside}" + ("" if tag in _VOID else f"</{tag}>"))


def join(parts: Iterable[Html]) -> Html:
    """Return pieces of HTML one after another."""
    return Html("".join(parts))


def table(caption: str, headings: Sequence[str], rows: Iterable[Sequence[object]]) -> Html:
    """Return a table in a box that scrolls; the first cell of a row is its heading."""
    head = element("tr", *(element("th", h, scope="col") for h in headings))
    body = [
        element("tr", element("th", row[0], scope="row"), *(element("td", c) for c in row[1:]))
        for row in rows
    ]
    whole = element(
        "table", element("caption", caption), element("thead", head), element("tbody", *body)
    )
    return scrolling(f"Table: {caption}", whole)


def scrolling(label: str, *children: Html) -> Html:
    """Return a box that scrolls sideways, also with the keys."""
    return element("div", *children, class_="scroll", tabindex="0", role="region", aria_label=label)


def page(title: str, facts: Sequence[tuple[str, str]], sections: Iterable[Html]) -> bytes:
    """Return a whole page, UTF-8: a heading, facts about the whole, and sections.

    Its policy forbids scripts, and every request.
    """
    style = Path(__file__).with_name("page.css").read_text()
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", title),
        Html(f"<style>{style}</style>"),
    )
    known = [element("div", element("dt", name), element("dd", value)) for name, value in facts]
    body = element(
        "body",
        element("a", "Skip to the charts", href="#main", class_="skip"),
        element("header", element("h1", title), element("dl", *known)),
        element("main", *sections, id="main", tabindex="-1"),
        element(
            "footer", f"Written by nf4 {__version__}. This page loads nothing and runs no script."
        ),
    )
    whole = element("html", head, body, lang="en")
    return f"<!doctype html>\n{whole}\n".encode("utf-8", "replace")


def section(title: str, *children: Html) -> Html:
    """Return a section with its heading."""
    return element("section", element("h2", title), *children)
