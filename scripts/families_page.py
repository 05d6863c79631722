#!/usr/bin/env python3
"""Writes docs/families.md: what the selection rules do with every family of models surveyed.

    PYTHONPATH=. python scripts/families_page.py [--check]

From the rules themselves, applied to the tensors that scripts/survey_families.py found
(tests/goldens/families.json); transformers is not needed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from nf4cli.checkpoint.types import Checkpoint, Shard, TensorInfo
from nf4cli.planning import families
from nf4cli.planning.selection import QUANTIZED, RULES, Context, is_transposed, module_path, rule_of

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "families.md"
GOLDENS = ROOT / "tests" / "goldens"
SILENT = {"not-a-weight", "not-2d", "dtype", "empty"}
"""Rules that say nothing about one family: biases, norms and convolutions stay everywhere."""

HEAD = """# Families of models

Written by `scripts/families_page.py` from the selection rules; a test holds it to them.

**What loads where.** The output of `--target transformers`, the default, loads in stock
transformers 4.55 and newer and 5.x, in PEFT and, but for mixtures of experts, in vLLM: the tests
load {tested} architectures in transformers 5.23.0 and 4.57.6, run them, and compare every byte with
bitsandbytes. [loaders.md](loaders.md) says what was tried in vLLM, unsloth and other programs.
Experts stay in 16 bit there, because transformers 5 fuses them; `--target vllm` and
`--target unsloth` write them in 4 bit, which `nf4cli.load` opens in stock transformers 5. Llama 4's
experts are 4-bit for every target.

**Who decides.** The rules below, from config.json and tensor names and shapes alone, for the
{follow} families that follow them in every version of transformers surveyed ({versions}).
{asked} families are asked of the installed transformers instead (`pip install 'nf4cli[exact]'`);
where it is not installed they are refused. So is any family that is not on this page.

## The rules, in their order

The first that holds keeps a tensor in full precision; what none of them keeps is quantized.

| rule | keeps |
|---|---|
"""


def checkpoint_of(facts: Mapping[str, Any]) -> Checkpoint:
    """A family's tensors as a checkpoint without bytes; numbers in names are 0."""
    shard = Shard(Path("x.safetensors"), 0, 0, ())
    tensors = {
        name.replace("*", "0"): (shard, TensorInfo(name.replace("*", "0"), "BF16", tuple(shape), 0))
        for name, shape in facts["tensors"].items()
    }
    return Checkpoint(Path("x"), "x", (shard,), tensors, facts["config"], False, (), ())


def leaves(paths: Iterable[str]) -> str:
    """The last parts of module paths, each once; a number says nothing without its parent."""
    found: dict[str, None] = {}
    for path in paths:
        parts = path.split(".")
        keep = 2 if parts[-1].isdecimal() and len(parts) > 1 else 1
        found[".".join("*" if p.isdecimal() else p for p in parts[-keep:])] = None
    return " ".join(f"`{leaf}`" for leaf in sorted(found))


def row(family: str, facts: Mapping[str, Any]) -> str:
    checkpoint = checkpoint_of(facts)
    context = Context.of(checkpoint)
    packed: list[str] = []
    kept: dict[str, list[str]] = {}
    for name, (_, tensor) in checkpoint.tensors.items():
        rule = rule_of(context, tensor)
        path = module_path(name)
        if rule is QUANTIZED:
            packed.append(path)
        elif rule.name not in SILENT:
            kept.setdefault(rule.name, []).append(path if name.endswith(".weight") else name)
    why = "; ".join(f"{rule}: {leaves(paths)}" for rule, paths in sorted(kept.items()))
    transposed = any(is_transposed(context.model_types, p.rpartition(".")[2]) for p in packed)
    note = " (transposed)" if transposed else ""
    return f"| {family} | {leaves(packed) or 'nothing: it is refused'}{note} | {why} |"


def page() -> str:
    survey = families.survey()
    facts = json.loads((GOLDENS / "families.json").read_text())
    tested = json.loads((GOLDENS / "architectures.json").read_text())
    lines = [
        HEAD.format(
            tested=len(tested),
            follow=len(survey["follow"]),
            versions=" and ".join(survey["transformers"]),
            asked=len(survey["differ"]) + len(survey["not_built"]),
        ).rstrip()
    ]
    lines += [f"| {rule.name} | {rule.reason} |" for rule in RULES]
    lines += ["", "## Families that follow them", "", "Module names, without the layers they repeat"
              " in. Tested in both versions: " + ", ".join(sorted(
                  {f"`{t['config']['model_type']}`" for t in tested.values()})) + ".",
              "", "| family | 4-bit | kept, by rule |", "|---|---|---|"]  # fmt: skip
    lines += [row(family, facts[family]) for family in sorted(survey["follow"])]
    lines += ["", "## Families that transformers is asked about", "",
              "| family | the rules would quantize, wrongly |", "|---|---|"]  # fmt: skip
    for family, names in sorted(survey["differ"].items()):
        lines.append(f"| {family} | {' '.join(f'`{name}`' for name in names)} |")
    lines += ["", "Not surveyed, because no model could be built from the default configuration: "
              + ", ".join(sorted(survey["not_built"])) + "."]  # fmt: skip
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare, and write nothing")
    text = page()
    if not parser.parse_args().check:
        PAGE.write_text(text)
    elif PAGE.read_text() != text:
        sys.exit(f"{PAGE} is not what the rules say: run scripts/families_page.py")


if __name__ == "__main__":
    main()
