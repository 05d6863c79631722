"""Ask the installed transformers which tensors of a checkpoint it would hold in 4 bit.

It builds the model on the meta device, so that neither weights nor bitsandbytes nor a network is
needed; meta_model.py has the details.  transformers' own renaming then leads from each tensor of
the checkpoint to its parameter in the model.  Versions 4.55 to 5.23 are understood.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from collections.abc import Set as AbstractSet
from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..checkpoint.bnb_format import ABSMAX
from ..checkpoint.types import TensorInfo
from ..errors import InputError, MachineError
from .answer import Answer
from .meta_model import (
    build,
    config_of,
    failures_explained,
    is_version_4,
    model_classes,
    offline,
    quiet,
    refuse_absurd,
)  # fmt: skip
from .model_config import config_items
from .selection import QUANTIZED, WEIGHT, Context, rule_of

_INSTALL = "pip install 'nf4cli[exact]'"


def available() -> bool:
    """Return whether transformers and torch are installed; import neither."""
    return all(find_spec(name) is not None for name in ("torch", "transformers"))


def ask_transformers(
    root: Path,
    config: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    trust_remote_code: bool,
) -> Answer:
    """Return which tensors of a checkpoint transformers would hold in 4 bit.

    Args:
        root: the checkpoint's directory, for its own code and for messages.
        config: its config.json.
        shapes: tensor name -> shape, for every tensor.
        trust_remote_code: run the modeling code beside the checkpoint where config.json names it.

    Raises:
        InputError: transformers cannot build a model from this config, or not one that has these
            tensors.
        MachineError: transformers, or a library that this model needs, is missing.
    """
    if not available():
        raise MachineError(
            f"the exact answer needs transformers and torch, which are not installed: {_INSTALL}"
        )
    refuse_absurd(config, root)
    with offline(), quiet():
        try:
            import transformers
        except ImportError as error:
            raise MachineError(f"transformers cannot be imported: {error}. {_INSTALL}") from error
        if is_version_4() and find_spec("accelerate") is None:
            raise MachineError(
                f"transformers {transformers.__version__} needs accelerate to tell what it "
                "quantizes: pip install accelerate"
            )
        with failures_explained(root, transformers.__version__):
            return answer_of(_best_model(root, config, shapes, trust_remote_code), shapes, root)


def _best_model(
    root: Path, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], trust: bool
) -> Any:
    """Return the model of a checkpoint, without weights.

    Of several possible classes it is the one that has a place for most tensors.
    """
    configuration = config_of(root, config, trust)
    classes = model_classes(root, config, configuration, trust)
    if not classes:
        raise InputError(
            f"{root / 'config.json'}: transformers has a configuration for model_type "
            f"{configuration.model_type!r} but no model. Name its class "
            'under "architectures"'
        )
    if len(classes) == 1:
        return build(classes[0], configuration)

    def tensors_with_a_place(model: Any) -> int:
        state = model.state_dict()
        targets = targets_of(model, shapes, state)
        return sum(target in state for (target, *_), _ in targets.values())

    models = (build(model_class, deepcopy(configuration)) for model_class in classes)
    return max(models, key=tensors_with_a_place)


# -- from checkpoint names to modules ---------------------------------------------------------


def four_bit_modules(model: Any) -> frozenset[str]:
    """Return the paths of the modules that transformers' bitsandbytes integration makes 4-bit by
    default."""
    if is_version_4():
        from transformers.integrations.bitsandbytes import get_keys_to_not_convert
    else:
        from transformers.quantizers.base import get_keys_to_not_convert

    kept = [*get_keys_to_not_convert(model), *(model._keep_in_fp32_modules or ())]
    return frozenset(
        path
        for path, module in model.named_modules(remove_duplicate=not is_version_4())
        if path and is_linear(module) and converts(path, kept)
    )


def is_linear(module: Any) -> bool:
    """Return whether the integration replaces modules of this class."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    if is_version_4():
        # Its subclass in nn.MultiheadAttention would be replaced too, and then fail.
        attention = nn.modules.linear.NonDynamicallyQuantizableLinear
        return isinstance(module, (nn.Linear, Conv1D)) and not isinstance(module, attention)
    return isinstance(module, Conv1D) or type(module) is nn.Linear


def tied_linears(model: Any) -> frozenset[str]:
    """Return the paths of a model's linear layers that share float weights with other modules.

    Of a list in which every linear layer does, it is `LIST.*`: nobody has to count them.  Layers
    that share a weight which the rules pack are left out: a packed weight is shared as any other.
    """
    linears = {p for p, m in model.named_modules(remove_duplicate=False) if p and is_linear(m)}
    context = _context(model)
    tied: set[str] = set()
    for group in _tied_parameters(model):
        members = {name.removesuffix(WEIGHT) for name in group} & linears
        packed = [m for m in members if _is_packed(context, m, model.get_submodule(m))]
        if len(members) == 1 or not packed:
            tied |= members
    found = set()
    for path in tied:
        container = re.split(r"\.\d+(?:\.|$)", path)[0]
        inside = {linear for linear in linears if linear.startswith(container + ".")}
        found.add(f"{container}.*" if container != path and inside <= tied else path)
    return frozenset(found)


def _tied_parameters(model: Any) -> Iterable[set[str]]:
    """Return groups of names of parameters that share their values."""
    groups: dict[Any, set[str]] = {}
    if not is_version_4():
        for target, source in model.all_tied_weights_keys.items():
            groups.setdefault(source, {source}).add(target)
        return groups.values()
    model.tie_weights()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), set()).add(name)
    return [names for names in groups.values() if len(names) > 1]


def _context(model: Any) -> Context:
    """Return what the rules need to know of a model without a checkpoint."""
    # Labels are numbered: their keys are no strings.
    items = [(k, v) for k, v in config_items(model.config.to_dict()) if isinstance(k, str)]
    sizes = (v for k, v in items if k.endswith("vocab_size") and isinstance(v, int) and v > 1)
    return Context(
        model_types=frozenset(v for k, v in items if k == "model_type" and isinstance(v, str)),
        vocab_sizes=frozenset(sizes),
        num_layers=None,
        names=frozenset(model.state_dict()),
    )


def _is_packed(context: Context, path: str, module: Any) -> bool:
    tensor = TensorInfo(path + WEIGHT, "BF16", tuple(module.weight.shape), 0)
    return rule_of(context, tensor) is QUANTIZED


def converts(path: str, kept: Collection[str]) -> bool:
    """Return whether the integration replaces a module under this list of names to keep."""
    if not is_version_4():
        from transformers.quantizers.quantizers_utils import should_convert_module

        return bool(should_convert_module(path, list(kept)))
    if path.rpartition(".")[2] in kept:  # version 4 has this in its recursion over the modules
        return False
    return not any(f"{key}." in path or key == path for key in kept)


def targets_of(
    model: Any, names: Iterable[str], state: Mapping[str, Any]
) -> dict[str, tuple[tuple[str, ...], bool]]:
    """Return tensor name -> (parameters that it is loaded into, whether it is changed on the way).

    Args:
        names: of the checkpoint's tensors.
        state: the model's state_dict.
    """
    if is_version_4():
        return {name: ((target,), False) for name, target in _renamed_4(model, [*names]).items()}
    return _targets_5(model, names, state)


def _targets_5(
    model: Any, names: Iterable[str], state: Mapping[str, Any]
) -> dict[str, tuple[tuple[str, ...], bool]]:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    mapping = get_model_conversion_mapping(model) or []
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    parts = {source: c.target_patterns for c in converters for source in c.source_patterns}
    prefix = model.base_model_prefix
    targets = {}
    for name in sorted(names, key=dot_natural_key):  # some renamings depend on the order
        target, source = rename_source_key(name, renamings, converters, prefix, state)
        if target not in state and name in state:
            target, source = rename_source_key(name, [], [], prefix, state)
        first, *others = parts.get(source, [target])
        parameters = (target, *(target.replace(first, other, 1) for other in others))
        targets[name] = (parameters, source is not None)
    return targets


def _renamed_4(model: Any, names: list[str]) -> Mapping[str, str]:
    from transformers.modeling_utils import VLMS

    prefix = model.base_model_prefix
    in_names = bool(prefix) and any(name.startswith(prefix) for name in names)
    in_model = bool(prefix) and hasattr(model, prefix)
    classes = [c.__name__.lower() for c in type(model).__mro__[:-1]]
    is_vlm = any(vlm in name for vlm in VLMS for name in classes)
    renamed: Mapping[str, str] = model._get_key_renaming_mapping(
        names,
        model._checkpoint_conversion_mapping if is_vlm else None,
        in_names and not in_model,
        in_model and not in_names,
    )
    return renamed


def answer_of(model: Any, shapes: Mapping[str, tuple[int, ...]], root: Path) -> Answer:
    """Return which of these tensors transformers would hold in 4 bit in this model.

    Args:
        shapes: tensor name -> shape.
        root: for messages.

    Raises:
        InputError: the model has no place for any tensor, or one of another shape.
    """
    import transformers

    state = dict(model.state_dict())
    packed = {path + WEIGHT for path in four_bit_modules(model)}
    # A packed weight has companions, which have to be loaded beside it.
    companions = [name + ABSMAX for name in shapes if name.endswith(WEIGHT)]
    state_with_companions = state | {target + ABSMAX: state[target] for target in packed}
    targets = targets_of(model, [*shapes, *companions], state_with_companions)
    quantized, rearranged = set(), set()
    modules = {}
    has_place = False
    for name, shape in shapes.items():
        parameters, changed = targets.get(name, (("",), False))
        target = parameters[0]
        if target not in state:
            continue
        has_place = True
        if name.endswith(WEIGHT):
            weights = [parameter for parameter in parameters if parameter.endswith(WEIGHT)]
            paths = tuple(weight.removesuffix(WEIGHT) for weight in weights)
            modules[name.removesuffix(WEIGHT)] = paths
        if changed:
            rearranged.add(name)
        elif target in packed:
            if targets.get(name + ABSMAX) != ((target + ABSMAX,), False):
                rearranged.add(name)
                continue
            _check_shape(name, shape, tuple(state[target].shape), root)
            quantized.add(name)
    if not has_place:
        raise InputError(
            f"{root}: none of the {len(shapes)} tensors (the first is {min(shapes, default='')!r}) "
            f"has a place in {type(model).__name__}, which config.json describes. Correct "
            "model_type and architectures in config.json"
        )
    _check_filled(model, packed, targets, shapes, root)
    return Answer(
        version=str(transformers.__version__),
        quantized=frozenset(quantized),
        rearranged=frozenset(rearranged),
        modules={path: paths for path, paths in modules.items() if paths != (path,)},
        tied=tied_linears(model),
        float32=_float32(model, targets),
    )


def _float32(model: Any, targets: Mapping[str, tuple[tuple[str, ...], bool]]) -> frozenset[str]:
    """Return the names of the tensors that a model holds in float32 in every 16-bit dtype.

    Args:
        targets: see `targets_of`.
    """
    patterns = [part.replace("*", ".*") for part in model._keep_in_fp32_modules_strict or ()]
    if not patterns:
        return frozenset()
    pattern = re.compile("|".join(patterns))
    return frozenset(name for name, (paths, _) in targets.items() if pattern.search(paths[0]))


def _check_filled(
    model: Any,
    packed: AbstractSet[str],
    targets: Mapping[str, tuple[tuple[str, ...], bool]],
    names: Collection[str],
    root: Path,
) -> None:
    """Raise InputError if most linear layers of the model get no tensor.

    transformers would fill them with random numbers.  A few may be missing: a pooler, another task.

    Args:
        packed: the weights of its linear layers.
        targets: as `targets_of` returns.
        names: of the checkpoint's tensors.
    """
    loaded = {target for name in names for target in targets.get(name, ((), False))[0]}
    missing = sorted(packed - loaded)
    if 2 * len(missing) <= len(packed):
        return
    state = model.state_dict().keys()
    placeless = [n for n in names if state.isdisjoint(targets.get(n, ((), False))[0])]
    raise InputError(
        f"{root}: {len(missing):,} of {len(packed):,} linear weights of {type(model).__name__}, "
        f"which config.json describes, have no tensor (the first is {missing[0]!r}), and "
        f"{len(placeless):,} tensors have no place in it"
        + (f" (the first is {placeless[0]!r})" if placeless else "")
        + ": a loader would fill them with random numbers. Correct model_type and architectures in "
        "config.json, or the names of the tensors"
    )


def _check_shape(name: str, shape: tuple[int, ...], expected: tuple[int, ...], root: Path) -> None:
    if shape != expected:
        raise InputError(
            f"{root}: tensor {name!r} has shape {shape}, but config.json describes a model with "
            f"{expected} there. Correct config.json or take the checkpoint that belongs to it"
        )
