#!/usr/bin/env python3
"""Compares the selection rules with transformers for every family of models that it knows.

    PYTHONPATH=. python scripts/survey_families.py [PYTHON ...]

Each PYTHON is an interpreter with a version of transformers in it, the oldest first (default:
this one).  Every
model class of every family is built on the meta device from its default configuration, and the
main one also with each of the configuration's switches turned.  A family follows the rules when
in no version they quantize a tensor that transformers cannot hold in 4 bit as it is.  (Its own
default also keeps whatever module comes last, which a skip list overrules: that is no
difference.)  Writes nf4cli/planning/families.json, with what each family's modules are called in
the checkpoint and in the model.

Some families need more libraries to be built: timm, torchvision, pillow, scipy.
"""

# ruff: noqa: PLC0415  - heavy imports wait until the worker has set its environment

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from survey_one_family import survey_family

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = ROOT / "nf4cli" / "planning" / "families.json"
FACTS = ROOT / "tests" / "goldens" / "families.json"

SECONDS = 120  # for one family
SHOWN = 5


# -- all families of one version ----------------------------------------------------------------


def in_a_fork(survey: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The result of a survey in a process of its own, which may hang or die."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(SECONDS)
        os.close(reader)
        try:
            found = survey()
        except BaseException as error:
            text = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            found = {"outcome": "not_built", "reason": text}
        with os.fdopen(writer, "w") as stream:
            json.dump(found, stream)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as stream:
        text = stream.read()
    _, status = os.waitpid(child, 0)
    if not text:
        return {"outcome": "not_built", "reason": f"died or took over {SECONDS} s ({status})"}
    found_there: dict[str, Any] = json.loads(text)
    return found_there


def survey_version(only: list[str], result: Path) -> None:
    """Writes what this interpreter's transformers says; `result` may hold what another said."""
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="critical")
    import torch
    import transformers
    from transformers import CONFIG_MAPPING

    torch.set_num_threads(1)
    before = json.loads(result.read_text()) if result.exists() else {"families": {}}
    called = {k: found.get("called", {}) for k, found in before["families"].items()}
    survey_family("llama", {})  # imports once what every fork needs
    wanted = sorted({*only} & {*CONFIG_MAPPING} if only else CONFIG_MAPPING)
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # the threads only wait for their forks
        found = pool.map(
            lambda name: in_a_fork(partial(survey_family, name, called.get(name, {}))), wanted
        )
        families = {}
        for model_type, facts in zip(wanted, found, strict=True):
            families[model_type] = facts
            print(f"\r{len(families)} {model_type:40}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    result.write_text(json.dumps({"transformers": transformers.__version__, "families": families}))


def in_version(python: str, only: list[str], older: dict[str, Any] | None) -> dict[str, Any]:
    """`survey_version` under another interpreter."""
    with TemporaryDirectory() as directory:
        result = Path(directory) / "result.json"
        if older:
            result.write_text(json.dumps(older))
        options = [f"--worker={result}", *(f"--only={model_type}" for model_type in only)]
        subprocess.run([python, __file__, *options], check=True, stdout=subprocess.DEVNULL)
        found: dict[str, Any] = json.loads(result.read_text())
        return found


# -- together -----------------------------------------------------------------------------------


def brief(known: Mapping[str, Any]) -> dict[str, Any]:
    """An entry of names: what both sides have under the base prefix is said once, without it."""
    prefix = known["prefix"] + "."
    pairs = {
        (a.removeprefix(prefix), b.removeprefix(prefix))
        if a.startswith(prefix) and b.startswith(prefix)
        else (a, b)
        for a, b in known["renamed"]
    }
    return {"prefix": known["prefix"], "renamed": sorted(pairs)}


def merged(versions: list[dict[str, Any]], before: Mapping[str, Any]) -> dict[str, Any]:
    """families.json from what each version said, and what it held of other families before."""
    differ: dict[str, set[str]] = {k: set(v) for k, v in before.get("differ", {}).items()}
    follow: set[str] = set(before.get("follow", ()))
    reasons: dict[str, str] = dict(before.get("not_built", {}))
    names: dict[str, Any] = dict(before.get("names", {}))
    surveyed = {model_type for version in versions for model_type in version["families"]}
    for table in (differ, reasons, names):
        for model_type in surveyed & table.keys():
            del table[model_type]
    follow -= surveyed
    for version in versions:
        for model_type, found in version["families"].items():
            if found["outcome"] == "not_built":
                reasons[model_type] = re.sub(r"'?/[\w./-]+'?>?", "...", found["reason"])
                continue
            known = names.setdefault(model_type, {"prefix": "", "renamed": []})
            known["prefix"] = known["prefix"] or found["prefix"]
            known["renamed"] = sorted({*map(tuple, [*known["renamed"], *found["renamed"]])})
            if found["outcome"] == "follows":
                follow.add(model_type)
            else:
                wrong = (name for listed in found["wrong"].values() for name in listed)
                differ.setdefault(model_type, set()).update(wrong)
    built = follow | differ.keys()
    names = {k: brief(v) for k, v in names.items()}
    usual = {"prefix": "model", "renamed": []}
    return {
        "transformers": sorted(version["transformers"] for version in versions),
        "follow": sorted(follow - differ.keys()),
        "differ": {k: sorted(v)[:SHOWN] for k, v in sorted(differ.items())},
        "not_built": {k: v for k, v in sorted(reasons.items()) if k not in built},
        "names": {k: v for k, v in sorted(names.items()) if v != usual},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("python", nargs="*", default=[sys.executable])
    parser.add_argument("--only", action="append", default=[], help="survey this family alone")
    parser.add_argument(
        "--again", action="store_true", help="survey only the families that do not follow yet"
    )
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--report", type=Path, help="also write everything that was found here")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        survey_version(arguments.only, arguments.worker)
        return
    before = json.loads(arguments.output.read_text()) if arguments.again or arguments.only else {}
    only = arguments.only
    if arguments.again:
        only = [*before["differ"], *before["not_built"]]
    versions: list[dict[str, Any]] = []
    for python in arguments.python:
        versions.append(in_version(python, only, versions[-1] if versions else None))
    if arguments.report:
        arguments.report.write_text(json.dumps(versions, indent=1))
    facts = json.loads(FACTS.read_text()) if before and FACTS.exists() else {}
    for version in versions:
        built = {k: v["facts"] for k, v in version["families"].items() if "facts" in v}
        facts |= built
    FACTS.write_text(json.dumps(dict(sorted(facts.items())), indent=None) + "\n")
    result = merged(versions, before)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    print(
        f"transformers {', '.join(result['transformers'])}: {len(result['follow'])} families "
        f"follow the rules, {len(result['differ'])} differ, {len(result['not_built'])} not built"
    )
    for model_type, names in result["differ"].items():
        print(f"  {model_type}: {', '.join(names)}")


if __name__ == "__main__":
    main()
