"""Read and write the metadata at the head of a model card.

A source's card is a text that anybody may have made.  So only the lines of a few known fields are
parsed, each field alone and of a bounded length, into strings and lists of strings.  Aliases, tags
and types of YAML are not followed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ..checkpoint.discovery import CARD
from ..checkpoint.untrusted import home_of, leads_out, read_start
from ..errors import InputError

Metadata = dict[str, str | list[str]]

STRINGS = ("license", "license_name", "license_link", "pipeline_tag", "library_name")
_LISTS = ("language", "datasets", "tags")
_HEAD = re.compile(rb"\A(?:\xef\xbb\xbf)?---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
_KEY = re.compile(r"([A-Za-z_][\w-]*)[ \t]*:")
_MAX_HEAD = 4_000_000  # bytes; benchmarks' results make some of 500 KB
_MAX_FIELD = 8_000  # characters of one field
_MAX_STRING = 300
_MAX_BRACKETS = 100  # of a field: the parser takes seconds for thousands of levels
_MAX_ITEMS = 100  # of a list; a few multilingual models name as many languages


def read_metadata(root: Path) -> Metadata:
    """Return the metadata of a source's card, {} where there is no card that can be read."""
    path = root / CARD
    if path.is_symlink() and leads_out(path, root, home_of(root)):
        return {}
    try:
        data, *_ = read_start(path, _MAX_HEAD)
    except (InputError, OSError):
        return {}
    head = _HEAD.match(data)
    return parse_metadata(head[1].decode("utf-8", "replace")) if head else {}


def parse_metadata(text: str) -> Metadata:
    """Return the known fields at a card's head, without values that are none of theirs.

    Args:
        text: YAML, without the lines of dashes around it.
    """
    metadata: Metadata = {}
    for key, block in _blocks(text).items():
        value = _value(block).get(key)
        if key in STRINGS and isinstance(value, list) and len(value) == 1:
            value = value[0]  # the Hub takes `license: [mit]`
        if isinstance(value, str) and _is_clean(value):
            metadata[key] = value if key in STRINGS else [value]
        elif isinstance(value, list) and key not in STRINGS:
            items = [item for item in value[:_MAX_ITEMS] if isinstance(item, str)]
            metadata[key] = list(dict.fromkeys(filter(_is_clean, items)))
    return {key: value for key, value in metadata.items() if value}


def _blocks(text: str) -> dict[str, str]:
    """Return the lines of each known field; where a field occurs twice, those of the first."""
    lines_of: dict[str, list[str]] = {}
    current, room = [""], 0
    for line in text.splitlines():
        if (match := _KEY.match(line)) is not None:
            is_wanted = match[1] in (*STRINGS, *_LISTS) and match[1] not in lines_of
            current, room = lines_of.setdefault(match[1], []) if is_wanted else [], _MAX_FIELD
        if room > 0:
            current.append(line[:room])
            room -= len(line) + 1
    return {key: "\n".join(lines) for key, lines in lines_of.items()}


def _value(block: str) -> dict[str, Any]:
    """Return the parsed lines of one field, {} where they are no mapping or could be an attack.

    YAML's base loader makes only strings, lists and mappings: no objects, and `no` is Norwegian,
    not false.  Aliases are refused: with them a few lines can grow to gigabytes.
    """
    if block.count("[") + block.count("{") > _MAX_BRACKETS:
        return {}
    try:
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(block, yaml.BaseLoader)):
            return {}
        value = yaml.load(block, Loader=yaml.BaseLoader)
    except (yaml.YAMLError, RecursionError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _is_clean(text: str) -> bool:
    return 0 < len(text) <= _MAX_STRING and text.isprintable() and text == text.strip()


def format_metadata(metadata: Mapping[str, Any]) -> str:
    """Return the head of a card, the same text for the same metadata."""
    body = yaml.safe_dump(
        dict(metadata), sort_keys=False, allow_unicode=True, default_flow_style=False, width=1000
    )
    return f"---\n{body}---\n"
