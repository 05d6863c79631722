#!/usr/bin/env python3
"""Compares the selection rules with transformers for every family of models that it knows.

    PYTHONPATH=. python scripts/survey_families.py [PYTHON ...]

Each PYTHON is an interpreter with a version of transformers in it (default: this one).  Every
model class of every family is built on the meta device from its default configuration, and the
main one also with each of the configuration's switches turned.  A family follows the rules when
in no version they quantize a tensor that transformers cannot hold in 4 bit as it is.  (Its own
default also keeps whatever module comes last, which a skip list overrules: that is no
difference.)  Writes nf4cli/families.json.

Some families need more libraries to be built: timm, torchvision, pillow, scipy.
"""

# ruff: noqa: PLC0415  - heavy imports wait until the worker has set its environment

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from importlib import import_module
from pathlib import Path
from time import monotonic
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = ROOT / "nf4cli" / "families.json"
NOWHERE = Path("checkpoint")

LAYERS = re.compile(r"(^|_)(n_?layers?|layers?|depth)$")
MOST_LAYERS = 8  # enough to meet each kind of layer of the families that mix them
SECONDS = 120  # for one family
SECONDS_OF_SWITCHES = 20
SHOWN = 5

OUTSIDE_DEFAULTS = {
    "architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path",
    "is_encoder_decoder", "is_decoder", "return_dict", "output_hidden_states",
    "output_attentions", "torchscript", "use_cache", "use_bfloat16", "pruned_heads",
    "add_cross_attention", "tie_encoder_decoder", "gradient_checkpointing", "use_timm_backbone",
}  # fmt: skip
"""Switches and keys that say nothing about which family member this is."""

FILLED = {
    "head_dim": 128, "num_key_value_heads": 8, "prediction_length": 24, "vocab_size": 32000,
    "pad_token_id": 0, "moe_layer_start_index": 1, "hidden_size_per_layer_input": 256,
}  # fmt: skip
"""Values for the defaults that some families leave open."""


# -- one family -------------------------------------------------------------------------------


def shortened(config: dict[str, Any]) -> dict[str, Any]:
    """The same configuration with fewer layers, lists of one entry a layer left out."""
    short: dict[str, Any] = {}
    counts = {v for k, v in config.items() if LAYERS.search(k) and isinstance(v, int)}
    for key, value in config.items():
        if isinstance(value, dict):
            short[key] = shortened(value)
        elif LAYERS.search(key) and isinstance(value, int) and not isinstance(value, bool):
            short[key] = min(value, MOST_LAYERS)
        elif not (isinstance(value, list) and len(value) > MOST_LAYERS and len(value) in counts):
            short[key] = value
    return short


def switches(config: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """The paths of all booleans in a configuration and the configurations inside it."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from ((key, *rest) for rest in switches(value))
        elif isinstance(value, bool) and key not in OUTSIDE_DEFAULTS:
            yield (key,)


def turned(config: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    """The configuration with one switch turned."""
    changed = deepcopy(config)
    inner = changed
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = not inner[path[-1]]
    return changed


def checkpoint_names(model: Any) -> dict[str, tuple[int, ...]]:
    """The tensors that save_pretrained would write, by the names it gives them."""
    state = model.state_dict()
    try:
        from transformers.core_model_loading import revert_weight_conversion

        state = revert_weight_conversion(model, state)
    except ImportError:
        from transformers.modeling_utils import VLMS

        classes = [c.__name__.lower() for c in type(model).__mro__[:-1]]
        if any(vlm in name for vlm in VLMS for name in classes):
            state = {_reverted(model, name): tensor for name, tensor in state.items()}
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def _reverted(model: Any, name: str) -> str:
    for old, new in model._checkpoint_conversion_mapping.items():
        pattern = re.sub(r"\(.*\)", "", old.lstrip("^"))
        name, count = re.subn(new, pattern, name)
        if count:
            break
    return name


def filled(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration with values where its family has none."""
    return {
        key: filled(value)
        if isinstance(value, dict)
        else FILLED.get(key)
        if value is None
        else value
        for key, value in config.items()
    }


def why_not(model: Any, name: str, rearranged: Iterable[str]) -> str:
    """Why transformers does not hold this tensor in 4 bit, "" where only its default keeps it."""
    from torch import nn

    from nf4cli.exact import targets_of

    if name in rearranged:
        return "rearranged while loading"
    state = model.state_dict()
    target, _ = targets_of(model, [name], state).get(name, ("", False))
    if target not in state:
        return "no place in the model"
    path = target.rpartition(".")[0]
    module = model.get_submodule(path)
    if type(module) is not nn.Linear or target != f"{path}.weight":
        return f"in {type(module).__name__}"
    if model.get_output_embeddings() is module:
        return "output embedding"
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    if target in tied or target in tied.values():
        return "tied"
    last = list(model.named_parameters())[-1][0].removesuffix(".weight").removesuffix(".bias")
    return "" if path == last else "kept by name"


def wrongly_quantized(
    model: Any, names: dict[str, tuple[int, ...]], configs: list[dict[str, Any]]
) -> tuple[dict[str, str], Counter[str]]:
    """What the rules quantize and transformers cannot; the rules that keep what it could."""
    from nf4cli.exact import answer_of
    from nf4cli.records import Checkpoint, Shard, TensorInfo
    from nf4cli.selection import QUANTIZED, Context, rule_of

    answer = answer_of(model, names, NOWHERE)
    shard = Shard(Path("x.safetensors"), 0, 0, ())
    tensors = {name: (shard, TensorInfo(name, "BF16", s, 0)) for name, s in names.items()}
    wrong: set[str] = set()
    kept: Counter[str] = Counter()
    for config in configs:
        checkpoint = Checkpoint(NOWHERE, "x", (shard,), tensors, config, False, (), ())
        context = Context.of(checkpoint)
        rules = {name: rule_of(context, tensor) for name, (_, tensor) in tensors.items()}
        chosen = {name for name, rule in rules.items() if rule is QUANTIZED}
        wrong |= chosen - answer.quantized
        kept = Counter(rules[name].name for name in answer.quantized - chosen)
    reasons = {name: why_not(model, name, answer.rearranged) for name in wrong}
    return {name: reason for name, reason in reasons.items() if reason}, kept


def classes_of(made: Any) -> list[Any]:
    """The model classes of a configuration, likeliest first; parts of models have no Auto class."""
    from transformers import PreTrainedModel

    from nf4cli.exact import auto_classes

    if found := auto_classes(made):
        return found
    module = import_module(type(made).__module__.replace(".configuration_", ".modeling_"))
    return [
        c
        for c in vars(module).values()
        if isinstance(c, type)
        and issubclass(c, PreTrainedModel)
        and c.__dict__.get("config_class", c.__dict__.get("config")) is not None
        and c.config_class is type(made)
    ]


def generic(names: Mapping[str, str]) -> dict[str, str]:
    """Names with layer numbers as *, each once, with their reasons."""
    return {re.sub(r"(?<=\.)\d+(?=\.)", "*", name): names[name] for name in sorted(names)}


def written(made: Any, use_diff: bool) -> dict[str, Any]:
    """A configuration as config.json has it."""
    from nf4cli.exact import structure

    found: dict[str, Any] = structure(json.loads(made.to_json_string(use_diff=use_diff)))
    return found


def short_config(made: Any, model_class: Any) -> dict[str, Any]:
    """config.json as save_pretrained writes it: what is at its default may be absent."""
    return {
        **written(made, True),
        "model_type": made.model_type,
        "architectures": [model_class.__name__],
    }


def survey_family(model_type: str) -> dict[str, Any]:
    """The outcome for one family."""
    from transformers import CONFIG_MAPPING

    from nf4cli import exact

    config_class = CONFIG_MAPPING[model_type]
    full = written(config_class(), False)
    config = shortened(full)

    seen: set[Any] = set()

    def attempt(model_class: Any, wanted: dict[str, Any]) -> tuple[dict[str, str], Counter[str]]:
        made = config_class.from_dict(deepcopy(wanted))
        exact.without_downloads(made)
        model = exact.build(model_class, made)
        kind = (model_class, *((n, *tensor.shape) for n, tensor in model.state_dict().items()))
        if kind in seen or len(kind) == 1:
            return {}, Counter()
        seen.add(kind)
        configs = [short_config(made, model_class), written(made, False)]
        return wrongly_quantized(model, checkpoint_names(model), configs)

    wrong: dict[str, dict[str, str]] = {}
    failures: list[str] = []
    kept: Counter[str] = Counter()
    main = None
    for model_class in classes_of(config_class()):
        for wanted in (config, full, filled(config), filled(full)):
            try:
                names, held = attempt(model_class, wanted)
            except Exception as error:
                failures.append(f"{model_class.__name__}: {type(error).__name__}: {error}")
                continue
            if names:
                wrong[model_class.__name__] = generic(names)
            if main is None:
                main, config, kept = model_class, wanted, held
            break
    if main is None:
        reason = failures[-1] if failures else "no model class"
        return {"outcome": "not_built", "reason": " ".join(reason.split())[:200]}
    start = monotonic()
    for path in switches(config):
        if monotonic() - start > SECONDS_OF_SWITCHES:
            break
        with contextlib.suppress(Exception):
            if names := attempt(main, turned(config, path))[0]:
                wrong.setdefault(f"{main.__name__} {'.'.join(path)}", generic(names))
    return {
        "outcome": "differs" if wrong else "follows",
        "main": main.__name__,
        "wrong": wrong,
        "kept": kept,
        "failures": [" ".join(f.split())[:200] for f in failures],
    }


# -- all families of one version ----------------------------------------------------------------


def in_a_fork(model_type: str) -> dict[str, Any]:
    """`survey_family` in a process of its own, which may hang or die."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(SECONDS)
        os.close(reader)
        try:
            found = survey_family(model_type)
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


def survey_version(only: list[str]) -> None:
    """Prints one line of JSON for this interpreter's transformers."""
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="critical")
    import torch
    import transformers
    from transformers import CONFIG_MAPPING

    torch.set_num_threads(1)
    survey_family("llama")  # imports once what every fork needs
    families = {}
    for number, model_type in enumerate(only or sorted(CONFIG_MAPPING)):
        families[model_type] = in_a_fork(model_type)
        print(f"\r{number + 1} {model_type:40}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    json.dump({"transformers": transformers.__version__, "families": families}, sys.stdout)


# -- together -----------------------------------------------------------------------------------


def merged(versions: list[dict[str, Any]]) -> dict[str, Any]:
    """families.json from what each version said."""
    differ: dict[str, set[str]] = {}
    follow: set[str] = set()
    reasons: dict[str, str] = {}
    for version in versions:
        for model_type, found in version["families"].items():
            if found["outcome"] == "not_built":
                reasons[model_type] = found["reason"]
            elif found["outcome"] == "follows":
                follow.add(model_type)
            else:
                names = (name for wrong in found["wrong"].values() for name in wrong)
                differ.setdefault(model_type, set()).update(names)
    built = follow | differ.keys()
    return {
        "transformers": sorted(version["transformers"] for version in versions),
        "follow": sorted(follow - differ.keys()),
        "differ": {k: sorted(v)[:SHOWN] for k, v in sorted(differ.items())},
        "not_built": {k: v for k, v in sorted(reasons.items()) if k not in built},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("python", nargs="*", default=[sys.executable])
    parser.add_argument("--only", action="append", default=[], help="survey this family alone")
    parser.add_argument("--report", type=Path, help="also write everything that was found here")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        survey_version(arguments.only)
        return
    only = [f"--only={model_type}" for model_type in arguments.only]
    versions = [
        json.loads(
            subprocess.run(
                [python, __file__, "--worker", *only], check=True, stdout=subprocess.PIPE
            ).stdout
        )
        for python in arguments.python
    ]
    if arguments.report:
        arguments.report.write_text(json.dumps(versions, indent=1))
    result = merged(versions)
    if not arguments.only:
        OUTPUT.write_text(json.dumps(result, indent=1) + "\n")
    print(
        f"transformers {', '.join(result['transformers'])}: {len(result['follow'])} families "
        f"follow the rules, {len(result['differ'])} differ, {len(result['not_built'])} not built"
    )
    for model_type, names in result["differ"].items():
        print(f"  {model_type}: {', '.join(names)}")


if __name__ == "__main__":
    main()
