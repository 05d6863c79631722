"""Fuzz one target with atheris: python -m fuzz.drive TARGET RUNS [SEED]; see scripts/fuzz.

libFuzzer mutates bytes and follows the coverage of nf4cli's Python code.  On top of its own
mutations, half of the time a JSON value is exchanged for a hostile one, so that types as well as
bytes are tried.
"""

from __future__ import annotations

import json
import random
import resource
import sys
from pathlib import Path

import atheris

HOSTILE = [
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, 10**400, -(2**63), 0.5, 1e308, "", "nan",
    "..", "../x", "/etc/passwd", "a\0b", "\x1b[31m", "\ud800", "x" * 300, [], {}, [[]], [None],
    {"": None}, {"model_type": []}, [1, "a"], "(a+)+$", float("nan"), float("inf"), 64, "64", "nf4",
    "quant_method", "bitsandbytes", "fp8", [128, 0], [[1, 2], {"a": 1}], "llama", "gpt2", "t5",
]  # fmt: skip


def replaced(value: object, chance: random.Random) -> object:
    """A copy of a JSON value with one of its parts exchanged, removed, renamed or moved."""
    if not isinstance(value, (dict, list)) or not value or chance.random() < 0.15:
        return chance.choice(HOSTILE)
    if isinstance(value, dict):
        key = chance.choice([*value])
        action = chance.random()
        rest = {k: v for k, v in value.items() if k != key}
        if action < 0.1:
            return rest
        if action < 0.2:
            new = chance.choice([h for h in HOSTILE if isinstance(h, str)])
            return {**rest, new: value[key]}
        return {**value, key: replaced(value[key], chance)}
    place = chance.randrange(len(value))
    return [*value[:place], replaced(value[place], chance), *value[place + 1 :]]


def mutate(data: bytes, most: int, seed: int) -> bytes:
    """A custom mutator in libFuzzer's sense."""
    chance = random.Random(seed)
    head, separator, tail = data.partition(b"\n\n")
    if chance.random() < 0.5:
        try:
            value = json.loads(head)
            for _ in range(chance.choice((1, 1, 1, 2, 4))):
                value = replaced(value, chance)
            made = json.dumps(value, ensure_ascii=chance.random() < 0.9).encode("utf-8", "replace")
        except (ValueError, RecursionError):
            pass
        else:
            return (made + separator + tail)[:most]
    return bytes(atheris.Mutate(data, min(most, len(data) + 64)))


def main() -> None:
    name, runs, *rest = sys.argv[1:]
    with atheris.instrument_imports(include=["nf4cli"]):
        from . import targets
    corpus = targets.place() / f"corpus-{name}"
    corpus.mkdir()
    for number, seed in enumerate(targets.seeds(name)):
        (corpus / str(number)).write_bytes(seed)
    # A process begins with the peak of the one that started it.
    memory = 1024 + resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    crashes = Path(rest[1] if len(rest) > 1 else targets.place()).resolve()
    options = [
        f"-runs={runs}", "-max_len=8192", "-timeout=20", f"-rss_limit_mb={memory}",
        "-len_control=0", f"-seed={rest[0] if rest else 1}", f"-artifact_prefix={crashes}/{name}-",
        "-print_final_stats=1", str(corpus),
    ]  # fmt: skip
    atheris.Setup([sys.argv[0], *options], targets.TARGETS[name], custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
