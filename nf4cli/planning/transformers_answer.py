"""Which tensors become 4-bit, asked of the installed transformers itself.

The model is built on the meta device: no weights, no bitsandbytes, no network, and the
checkpoint's own code only where the user trusts it.  Each checkpoint name is then followed to
its parameter through transformers' own renaming.  Versions 4.55 to 5.23 are understood.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..checkpoint.bnb_format import ABSMAX
from ..errors import InputError, MachineError
from .answer import Answer
from .meta_model import (
    blaming,
    build,
    config_of,
    is_4,
    model_classes,
    offline,
    quiet,
    refuse_absurd,
)  # fmt: skip
from .selection import WEIGHT

_INSTALL = "pip install 'nf4cli[exact]'"


def available() -> bool:
    """Whether transformers and torch are installed; imports neither."""
    return all(find_spec(name) is not None for name in ("torch", "transformers"))


def ask_transformers(
    root: Path,
    config: Mapping[str, Any],
    names: Mapping[str, tuple[int, ...]],
    trust_remote_code: bool,
) -> Answer:
    """What transformers would hold in 4 bit of a checkpoint.

    Args:
        root: the checkpoint's directory, for its own code and for messages.
        config: its config.json.
        names: the shape of every tensor.
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
        if is_4() and find_spec("accelerate") is None:
            raise MachineError(
                f"transformers {transformers.__version__} needs accelerate to tell what it "
                "quantizes: pip install accelerate"
            )
        with blaming(root, transformers.__version__):
            return answer_of(_best_model(root, config, names, trust_remote_code), names, root)


def _best_model(
    root: Path, config: Mapping[str, Any], names: Mapping[str, tuple[int, ...]], trust: bool
) -> Any:
    """The model of a checkpoint: of several possible classes, the one that takes most tensors."""
    made = config_of(root, config, trust)
    classes = model_classes(root, config, made, trust)
    if not classes:
        raise InputError(
            f"{root / 'config.json'}: transformers has a configuration for model_type "
            f"{made.model_type!r} but no model. Name its class "
            'under "architectures"'
        )
    if len(classes) == 1:
        return build(classes[0], made)

    def taken(model: Any) -> int:
        state = model.state_dict()
        return sum(target in state for (target, *_), _ in targets_of(model, names, state).values())

    return max((build(model_class, deepcopy(made)) for model_class in classes), key=taken)


# -- from checkpoint names to modules ---------------------------------------------------------


def four_bit_modules(model: Any) -> frozenset[str]:
    """Paths of the modules that transformers' bitsandbytes integration replaces by default."""
    if is_4():
        from transformers.integrations.bitsandbytes import get_keys_to_not_convert
    else:
        from transformers.quantizers.base import get_keys_to_not_convert

    kept = [*get_keys_to_not_convert(model), *(model._keep_in_fp32_modules or ())]
    return frozenset(
        path
        for path, module in model.named_modules(remove_duplicate=not is_4())
        if path and is_linear(module) and converts(path, kept)
    )


def is_linear(module: Any) -> bool:
    """Whether the integration replaces modules of this class."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    if is_4():
        # Its subclass in nn.MultiheadAttention would be replaced too, and then fail.
        attention = nn.modules.linear.NonDynamicallyQuantizableLinear
        return isinstance(module, (nn.Linear, Conv1D)) and not isinstance(module, attention)
    return isinstance(module, Conv1D) or type(module) is nn.Linear


def converts(path: str, kept: Collection[str]) -> bool:
    """Whether the integration replaces a module that a list of names may keep."""
    if not is_4():
        from transformers.quantizers.quantizers_utils import should_convert_module

        return bool(should_convert_module(path, list(kept)))
    if path.rpartition(".")[2] in kept:  # version 4 has this in its recursion over the modules
        return False
    return not any(f"{key}." in path or key == path for key in kept)


def targets_of(
    model: Any, names: Iterable[str], state: Mapping[str, Any]
) -> dict[str, tuple[tuple[str, ...], bool]]:
    """Checkpoint name -> (parameters it is loaded into, whether it is changed on the way)."""
    if is_4():
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
        found = (target, *(target.replace(first, other, 1) for other in others))
        targets[name] = (found, source is not None)
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


def answer_of(model: Any, names: Mapping[str, tuple[int, ...]], root: Path) -> Answer:
    """What transformers would hold in 4 bit of these tensors in this model."""
    import transformers

    state = dict(model.state_dict())
    packed = {path + WEIGHT for path in four_bit_modules(model)}
    # A packed weight has companions, which must take the same way.
    companions = [name + ABSMAX for name in names if name.endswith(WEIGHT)]
    wanted = state | {target + ABSMAX: state[target] for target in packed}
    targets = targets_of(model, [*names, *companions], wanted)
    quantized, rearranged = set(), set()
    modules = {}
    placed = False
    for name, shape in names.items():
        found, changed = targets.get(name, (("",), False))
        target = found[0]
        if target not in state:
            continue
        placed = True
        if name.endswith(WEIGHT):
            parts = tuple(part.removesuffix(WEIGHT) for part in found if part.endswith(WEIGHT))
            modules[name.removesuffix(WEIGHT)] = parts
        if changed:
            rearranged.add(name)
        elif target in packed:
            if targets.get(name + ABSMAX) != ((target + ABSMAX,), False):
                rearranged.add(name)
                continue
            _check_shape(name, shape, tuple(state[target].shape), root)
            quantized.add(name)
    if not placed:
        raise InputError(
            f"{root}: none of the {len(names)} tensors (the first is {min(names, default='')!r}) "
            f"has a place in {type(model).__name__}, which config.json describes. Correct "
            "model_type and architectures in config.json"
        )
    return Answer(
        version=str(transformers.__version__),
        quantized=frozenset(quantized),
        rearranged=frozenset(rearranged),
        modules={path: there for path, there in modules.items() if there != (path,)},
    )


def _check_shape(name: str, found: tuple[int, ...], expected: tuple[int, ...], root: Path) -> None:
    if found != expected:
        raise InputError(
            f"{root}: tensor {name!r} has shape {found}, but config.json describes a model with "
            f"{expected} there. Correct config.json or take the checkpoint that belongs to it"
        )
