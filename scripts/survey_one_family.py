"""One family of models, surveyed: every class of it built on the meta device, the rules compared.

Runs in the processes that scripts/survey_families.py forks.
"""

# ruff: noqa: PLC0415  - heavy imports wait until the worker has set its environment

from __future__ import annotations

import contextlib
import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from copy import deepcopy
from importlib import import_module
from pathlib import Path
from time import monotonic
from typing import Any

NOWHERE = Path("checkpoint")

LAYERS = re.compile(r"(^|_)(n_?layers?|layers?|depth)$")
MOST_LAYERS = 8  # enough to meet each kind of layer of the families that mix them
SECONDS_OF_SWITCHES = 4

OUTSIDE_DEFAULTS = {
    "architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path",
    "is_encoder_decoder", "is_decoder", "return_dict", "output_hidden_states",
    "output_attentions", "torchscript", "use_cache", "use_bfloat16", "pruned_heads",
    "add_cross_attention", "tie_encoder_decoder", "gradient_checkpointing", "use_timm_backbone",
}  # fmt: skip
"""Switches and keys that say nothing about which family member this is."""

FILLED = {
    "head_dim": 128, "num_key_value_heads": 8, "prediction_length": 24, "vocab_size": 32000,
    "pad_token_id": 0, "n_routed_experts": 8, "num_experts": 8, "rope_theta": 10000.0,
    "vocabulary_map": {"<image>": 4}, "n_shared_experts": 1, "num_experts_per_tok": 2,
    "moe_intermediate_size": 256, "top_k_experts": 2, "downsample_rate": "4/8",
    "deepstack_layer_map": [[0, 0]],
}  # fmt: skip
"""Values for the defaults that some families leave open."""

MENDED: dict[str, dict[str, Any]] = {
    "aya_vision": {
        "vision_config": {"model_type": "siglip_vision_model", "num_attention_heads": 16}
    },
    "dbrx": {"attn_config": {"rope_theta": 10000.0}},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 4, "num_hidden_layers": 8},
    "moonshine_streaming": {"num_key_value_heads": 8},
    "qwen3_omni_moe": {
        "talker_config": {
            "text_config": {"shared_expert_intermediate_size": 512},
            "spatial_merge_size": 2,
        }
    },
    "qwen3_omni_moe_talker_text": {"shared_expert_intermediate_size": 512},
    "t5gemma2_decoder": {"dropout_rate": 0.0},
    "t5gemma2_encoder": {"text_config": {"dropout_rate": 0.0}},
    "t5gemma2_text": {"dropout_rate": 0.0},
}
"""Values for the defaults that contradict each other or lack something."""


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


def mended(config: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with some values changed, also inside of others."""
    deeper = {k: mended(config.get(k, {}), v) for k, v in changes.items() if isinstance(v, dict)}
    return {**config, **changes, **deeper}


def why_not(model: Any, wrong: set[str], rearranged: Collection[str]) -> dict[str, str]:
    """Why transformers cannot hold these in 4 bit; without those that only its default keeps."""
    from nf4cli.planning.transformers_answer import converts, is_linear, targets_of

    state = model.state_dict()
    targets = targets_of(model, wrong, state)
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    shared = {*tied, *tied.values()}

    def reason(name: str) -> str:
        if name in rearranged:
            return "rearranged while loading"
        (target, *_), _ = targets.get(name, (("",), False))
        if target not in state:
            return "no place in the model"
        path = target.rpartition(".")[0]
        module = model.get_submodule(path)
        if target != f"{path}.weight" or not is_linear(module):
            return f"in {type(module).__name__}"
        if model.get_output_embeddings() is module:
            return "output embedding"
        if target in shared:
            return "tied"
        return "" if converts(path, model._keep_in_fp32_modules or ()) else "kept in float32"

    reasons = {name: reason(name) for name in wrong}
    return {name: why for name, why in reasons.items() if why}


def wrongly_quantized(
    model: Any, names: dict[str, tuple[int, ...]], configs: list[dict[str, Any]]
) -> tuple[dict[str, str], Counter[str]]:
    """What the rules quantize and transformers cannot; the rules that keep what it could."""
    from nf4cli.checkpoint.types import Checkpoint, Shard, TensorInfo
    from nf4cli.planning.selection import QUANTIZED, Context, rule_of
    from nf4cli.planning.transformers_answer import answer_of

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
    return why_not(model, wrong, answer.rearranged), kept


def classes_of(made: Any) -> list[Any]:
    """The model classes of a configuration, likeliest first; parts of models have no Auto class."""
    from transformers import PreTrainedModel

    from nf4cli.planning.meta_model import auto_classes

    if found := auto_classes(made):
        return found
    module = import_module(type(made).__module__.replace(".configuration_", ".modeling_"))
    return [
        c
        for c in vars(module).values()
        if isinstance(c, type)
        and issubclass(c, PreTrainedModel)
        and c.__dict__.get("config_class", c.__dict__.get("config")) is not None
        and getattr(c, "config_class", None) is type(made)
    ]


def generic(names: Mapping[str, str]) -> dict[str, str]:
    """Names with layer numbers as *, each once, with their reasons."""
    return {re.sub(r"(?<=\.)\d+(?=\.)", "*", name): names[name] for name in sorted(names)}


def written(made: Any, use_diff: bool) -> dict[str, Any]:
    """A configuration as config.json has it."""
    from nf4cli.planning.meta_model import structure

    found: dict[str, Any] = structure(json.loads(made.to_json_string(use_diff=use_diff)))
    return found


def matrices(names: Mapping[str, tuple[int, ...]]) -> list[str]:
    """The modules with a matrix, of the first layers alone and without experts."""
    first = re.compile(r"(\.[2-9]|\.\d\d+)\.")
    suffix = ".weight"
    found = [n for n, shape in names.items() if len(shape) == 2 and n.endswith(suffix)]
    found = [name for name in found if not first.search(name) and ".experts." not in name]
    return [name.removesuffix(suffix) for name in found]


def renamings(model: Any, paths: Iterable[str]) -> set[tuple[str, str]]:
    """Leading parts of module paths in a checkpoint -> what they are in the model."""
    from nf4cli.planning.transformers_answer import targets_of

    state = model.state_dict()
    prefix = model.base_model_prefix + "."
    pairs = set()
    targets = targets_of(model, [f"{path}.weight" for path in paths], state)
    for name, (found, _) in targets.items():
        here = name.removesuffix(".weight")
        for there in (target.removesuffix(".weight") for target in found if target in state):
            if here.removeprefix(prefix) != there.removeprefix(prefix):
                pairs.add(leading(here, there))
    return pairs


def leading(here: str, there: str) -> tuple[str, str]:
    """Two paths without the parts that they end in alike, but a part of each; numbers as *."""
    ours, theirs = (re.sub(r"\b\d+\b", "*", path).split(".") for path in (here, there))
    while len(ours) > 1 < len(theirs) and ours[-1] == theirs[-1]:
        ours.pop()
        theirs.pop()
    return ".".join(ours), ".".join(theirs)


def facts_of(model: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """What scripts/families_page.py applies the rules to: matrices, each layer's once."""
    tensors: dict[str, tuple[int, ...]] = {}
    for name, shape in sorted(checkpoint_names(model).items()):
        if len(shape) > 1:
            tensors.setdefault(re.sub(r"(?<=\.)\d+(?=\.)", "*", name), shape)
    return {"class": type(model).__name__, "config": told(config), "tensors": tensors}


def told(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a configuration that the rules look at."""
    found = {k: told(v) if isinstance(v, dict) else v for k, v in config.items()}
    return {
        k: v
        for k, v in found.items()
        if k == "model_type" or k.endswith("vocab_size") or (isinstance(v, dict) and v)
    }


def short_config(made: Any, model_class: Any) -> dict[str, Any]:
    """config.json as save_pretrained writes it: what is at its default may be absent."""
    return {
        **written(made, True),
        "model_type": made.model_type,
        "architectures": [model_class.__name__],
    }


def survey_family(model_type: str, older: Mapping[str, list[str]]) -> dict[str, Any]:
    """The outcome for one family.

    Args:
        older: model class -> paths of modules in the checkpoints that an older version writes.
    """
    from transformers import CONFIG_MAPPING

    from nf4cli.planning import meta_model

    config_class = CONFIG_MAPPING[model_type]
    full = mended(written(config_class(), False), MENDED.get(model_type, {}))
    config = shortened(full)

    seen: set[Any] = set()
    prefixes: list[str] = []
    renamed: set[tuple[str, str]] = set()
    called: dict[str, list[str]] = {}
    facts: list[dict[str, Any]] = []

    def attempt(model_class: Any, wanted: dict[str, Any]) -> tuple[dict[str, str], Counter[str]]:
        made = config_class.from_dict(deepcopy(wanted))
        meta_model.without_downloads(made)
        model = meta_model.build(model_class, made)
        kind = (model_class, *((n, *tensor.shape) for n, tensor in model.state_dict().items()))
        if kind in seen or len(kind) == 1:
            return {}, Counter()
        seen.add(kind)
        configs = [short_config(made, model_class), written(made, False)]
        names = checkpoint_names(model)
        if not facts:
            facts.append(facts_of(model, written(made, False) | {"model_type": model_type}))
        paths = matrices(names)
        called.setdefault(model_class.__name__, []).extend(paths)
        renamed.update(renamings(model, [*paths, *older.get(model_class.__name__, ())]))
        if base := model.base_model_prefix:
            prefixes.append(base if hasattr(model, base) else "")
        return wrongly_quantized(model, names, configs)

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
        "facts": facts[0],
        "wrong": wrong,
        "kept": kept,
        "prefix": next(filter(None, prefixes), ""),
        "renamed": sorted(renamed),
        "called": {name: sorted({*paths}) for name, paths in called.items()},
        "failures": [" ".join(f.split())[:200] for f in failures],
    }
