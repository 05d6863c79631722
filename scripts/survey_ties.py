#!/usr/bin/env python3
"""Records which linear layers transformers ties to other weights, and what it keeps in float32.

    PYTHONPATH=. python scripts/survey_ties.py [PYTHON ...]

Each PYTHON is an interpreter with a version of transformers in it, the oldest first (default:
this one).  Every model class of every family is built on the meta device with its weights tied, a
class with tie rules of its own also with each of the configuration's switches turned.  Writes
nf4cli/planning/ties.json:

- tied: family -> class -> paths of linear layers that are tied to other weights; LIST.* where all
  of a list are;
- float32: family -> patterns of the names that its classes keep in float32 in every 16-bit dtype;
- float32_in_float16: the same for float16 alone.
"""

# ruff: noqa: PLC0415  - heavy imports wait until the worker has set its environment

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from functools import partial
from importlib import import_module
from itertools import combinations
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic
from typing import Any

from survey_families import in_a_fork
from survey_one_family import (
    LAYERS,
    MENDED,
    classes_of,
    filled,
    mended,
    shortened,
    switches,
    turned,
    written,
)

OUTPUT = Path(__file__).resolve().parent.parent / "nf4cli" / "planning" / "ties.json"
FEWEST_LAYERS = 3  # a list of tied heads has one for each of them
SECONDS_OF_SWITCHES = 4


# -- one family ---------------------------------------------------------------------------------


def with_ties(config: dict[str, Any], depth: int = 0) -> dict[str, Any]:
    """The configuration with everything tied that may be."""
    tied = {k: with_ties(v, depth + 1) if isinstance(v, dict) else v for k, v in config.items()}
    if depth == 0 or "tie_word_embeddings" in tied:
        tied["tie_word_embeddings"] = True
    return tied


def shallow(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration with a few layers alone."""
    return {
        k: shallow(v) if isinstance(v, dict)
        else min(v, FEWEST_LAYERS) if LAYERS.search(k) and type(v) is int
        else v
        for k, v in config.items()
    }  # fmt: skip


def without_timm(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration with a small backbone of transformers' own; no backbone ties anything."""
    if not config.keys() & {"backbone_config", "use_timm_backbone"}:
        return config
    backbone = {
        "model_type": "resnet", "embedding_size": 16, "hidden_sizes": [16, 16, 16, 16],
        "depths": [1, 1, 1, 1], "out_features": ["stage2", "stage3", "stage4"],
    }  # fmt: skip
    changes = {"use_timm_backbone": False, "backbone": None, "backbone_config": backbone}
    return {**{k: v for k, v in config.items() if k != "backbone_kwargs"}, **changes}


def rules_of_its_own(model_class: Any) -> bool:
    """Whether a class ties more than an output layer to an embedding."""
    keys = [*(getattr(model_class, "_tied_weights_keys", None) or ())]
    return any(not re.fullmatch(r"[\w.]+\.(weight|bias)", key) for key in keys)


def changed(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The configuration, and those with one or two switches turned."""
    yield config
    paths = [path for path in switches(config) if path[-1] != "tie_word_embeddings"]
    for path in paths:
        yield turned(config, path)
    for one, other in combinations(paths, 2):
        yield turned(turned(config, one), other)


def survey_family(model_type: str) -> dict[str, Any]:
    """What is tied in each class of a family, and what they keep in float32."""
    from transformers import CONFIG_MAPPING

    from nf4cli.planning import meta_model
    from nf4cli.planning.transformers_answer import tied_linears

    config_class = CONFIG_MAPPING[model_type]
    full = mended(written(config_class(), False), MENDED.get(model_type, {}))
    short = shortened(full)
    tied: dict[str, list[str]] = {}
    failures = []

    def tied_in(model_class: Any, config: dict[str, Any]) -> set[str]:
        made = config_class.from_dict(deepcopy(config))
        meta_model.without_downloads(made)
        return {*tied_linears(meta_model.build(model_class, made))}

    for model_class in classes_of(config_class()):
        given = (shallow(short), short, full, filled(short), filled(full))
        own = *given, *map(without_timm, given[:2])
        for config in (*map(with_ties, own), *own):  # some refuse to tie
            try:
                found = tied_in(model_class, config)
            except Exception as error:
                failures.append(f"{model_class.__name__}: {type(error).__name__}: {error}"[:200])
                continue
            start = monotonic()
            if rules_of_its_own(model_class):
                for other in changed(config):
                    if monotonic() - start > SECONDS_OF_SWITCHES:
                        break
                    with contextlib.suppress(Exception):
                        found |= tied_in(model_class, other)
            if found:
                tied[model_class.__name__] = sorted(found)
            failures = [f for f in failures if not f.startswith(model_class.__name__ + ":")]
            break
    return {"tied": tied, "failures": failures, **float32_of(config_class)}


def float32_of(config_class: Any) -> dict[str, list[str]]:
    """What the classes of a family keep in float32."""
    from transformers import PreTrainedModel

    place = config_class.__module__.replace(".configuration_", ".modeling_")
    found: dict[str, set[str]] = {"float32": set(), "float32_in_float16": set()}
    with contextlib.suppress(ImportError):
        for value in vars(import_module(place)).values():
            if (
                isinstance(value, type)
                and issubclass(value, PreTrainedModel)
                and value.config_class is config_class
            ):
                found["float32"] |= {*(value._keep_in_fp32_modules_strict or ())}
                found["float32_in_float16"] |= {*(value._keep_in_fp32_modules or ())}
    return {key: sorted(patterns) for key, patterns in found.items()}


# -- all families -------------------------------------------------------------------------------


def survey_version(only: list[str], result: Path) -> None:
    """Writes what this interpreter's transformers does."""
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="critical")
    import torch
    from transformers import CONFIG_MAPPING

    torch.set_num_threads(1)
    survey_family("llama")  # imports once what every fork needs
    wanted = sorted({*only} & {*CONFIG_MAPPING} if only else CONFIG_MAPPING)
    with ThreadPoolExecutor(1) as pool:
        surveys = pool.map(lambda name: in_a_fork(partial(survey_family, name)), wanted)
        families = {}
        for model_type, facts in zip(wanted, surveys, strict=True):
            families[model_type] = facts
            print(f"\r{len(families)} {model_type:40}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    result.write_text(json.dumps(families))


def in_version(python: str, only: list[str]) -> dict[str, Any]:
    """`survey_version` under another interpreter."""
    with TemporaryDirectory() as directory:
        result = Path(directory) / "result.json"
        options = [f"--worker={result}", *(f"--only={model_type}" for model_type in only)]
        subprocess.run([python, __file__, *options], check=True, stdout=subprocess.DEVNULL)
        families: dict[str, Any] = json.loads(result.read_text())
        return families


def merged(versions: list[dict[str, Any]], before: Mapping[str, Any]) -> dict[str, Any]:
    """ties.json: ties of any version, float32 of the newest that knows a family.

    Args:
        before: ties.json with what is known of families that are not surveyed now.
    """
    surveyed = {model_type for families in versions for model_type in families}
    new = of_surveyed(versions)
    for key, table in new.items():
        others = {k: v for k, v in before.get(key, {}).items() if k not in surveyed}
        new[key] = dict(sorted({**others, **table}.items()))
    return new


def of_surveyed(versions: list[dict[str, Any]]) -> dict[str, Any]:
    """What ties.json has of the surveyed families."""
    tied: dict[str, dict[str, set[str]]] = {}
    float32: dict[str, dict[str, list[str]]] = {"float32": {}, "float32_in_float16": {}}
    for families in versions:
        for model_type, facts in families.items():
            for name, paths in facts.get("tied", {}).items():
                tied.setdefault(model_type, {}).setdefault(name, set()).update(paths)
            for key, table in float32.items():
                table[model_type] = facts.get(key, table.get(model_type, []))
    return {
        "tied": {
            model_type: {name: kept for name in sorted(classes) if (kept := told(classes[name]))}
            for model_type, classes in sorted(tied.items())
            if any(map(told, classes.values()))
        },
        **{
            key: {
                model_type: table[model_type] for model_type in sorted(table) if table[model_type]
            }
            for key, table in float32.items()
        },
    }


def told(paths: set[str]) -> list[str]:
    """The paths that do not lie inside a list that is named too.

    Layers that are shared by blocks with numbers are not told by a class, but by a configuration.
    """
    lists = [path.removesuffix("*") for path in paths if path.endswith(".*")]
    return sorted(
        path
        for path in paths
        if not re.search(r"\.\d+(\.|$)", path)
        and (path.endswith(".*") or not path.startswith(tuple(lists)))
    )


def text_of(document: Mapping[str, Any]) -> str:
    """The document as JSON, a line for each family."""
    tables = (
        f' "{key}": {{\n'
        + ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in table.items())
        + "\n }"
        for key, table in document.items()
    )
    return "{\n" + ",\n".join(tables) + "\n}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("python", nargs="*", default=[sys.executable])
    parser.add_argument("--only", action="append", default=[], help="survey this family again")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--report", type=Path, help="also write everything that was found here")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        survey_version(arguments.only, arguments.worker)
        return
    with ThreadPoolExecutor(len(arguments.python)) as pool:
        versions = list(pool.map(partial(in_version, only=arguments.only), arguments.python))
    if arguments.report:
        arguments.report.write_text(json.dumps(versions, indent=1))
    before = json.loads(arguments.output.read_text()) if arguments.only else {}
    arguments.output.write_text(text_of(merged(versions, before)))
    for families in versions:
        failed = [
            k for k, facts in families.items() if facts.get("failures") or "tied" not in facts
        ]
        print(f"{len(families)} families, {len(failed)} with a class that cannot be built")


if __name__ == "__main__":
    main()
