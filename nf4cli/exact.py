"""Which tensors become 4-bit, asked of the installed transformers itself.

The model is built on the meta device: no weights, no bitsandbytes, no network, and the
checkpoint's own code only where the user trusts it.  Each checkpoint name is then followed to
its parameter through transformers' own renaming.  Versions 4.55 to 5.23 are understood.
"""

from __future__ import annotations

import logging
import os
import re
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .bnb_format import ABSMAX
from .errors import InputError, MachineError, Nf4Error
from .selection import WEIGHT, Answer

_INSTALL = "pip install 'nf4cli[exact]'"

_COUNTS = re.compile(r"(layers?|experts|blocks?|depths?)$")
_MOST = 10_000
"""Modules of one kind that a config may ask for: each costs time and memory even without data."""

_NOT_STRUCTURE = re.compile(r"^quantization_config$|^compression_config$|attn_implementation")
"""Config keys that say how to load or to compute, not what the model is made of."""

_AUTO_ORDER = (
    "IMAGE_TEXT_TO_TEXT", "CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ",
    "MULTIMODAL_LM", "MASKED_LM", "PRETRAINING",
)  # fmt: skip
"""Auto mappings to look for a model class in first."""


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
    _refuse_absurd(config, root)
    with _offline(), _quiet():
        try:
            import transformers
        except ImportError as error:
            raise MachineError(f"transformers cannot be imported: {error}. {_INSTALL}") from error
        if _is_4() and find_spec("accelerate") is None:
            raise MachineError(
                f"transformers {transformers.__version__} needs accelerate to tell what it "
                "quantizes: pip install accelerate"
            )
        with _blaming(root, transformers.__version__):
            return answer_of(_best_model(root, config, names, trust_remote_code), names, root)


# -- the surroundings -------------------------------------------------------------------------


@contextmanager
def _offline() -> Iterator[None]:
    """Keeps huggingface_hub off the network, already imported or not."""
    before = os.environ.get("HF_HUB_OFFLINE")
    os.environ["HF_HUB_OFFLINE"] = "1"
    constants: Any = None
    try:
        if find_spec("huggingface_hub") is not None:
            from huggingface_hub import constants
        was = getattr(constants, "HF_HUB_OFFLINE", None)
        if constants is not None:
            constants.HF_HUB_OFFLINE = True
        yield
    finally:
        if before is None:
            del os.environ["HF_HUB_OFFLINE"]
        else:
            os.environ["HF_HUB_OFFLINE"] = before
        if constants is not None:
            constants.HF_HUB_OFFLINE = was if before is not None else False


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences warnings and the loggers of every library."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextmanager
def _blaming(root: Path, version: str) -> Iterator[None]:
    """Turns whatever transformers raises into an error that names its cause.

    Anything may come out of a constructor that is fed a wrong config.
    """
    try:
        yield
    except Nf4Error:
        raise
    except ImportError as error:
        raise MachineError(
            f"transformers {version} needs a missing library for the model in {root}: "
            f"{_one_line(error)}"
        ) from error
    except Exception as error:
        hint = "Correct config.json or try another version of transformers"
        if "offline" in str(error).lower():
            hint = "nf4 never goes online: download what it needs into the cache first"
        raise InputError(
            f"transformers {version} cannot build the model that {root / 'config.json'} "
            f"describes: {type(error).__name__}: {_one_line(error)}. {hint}"
        ) from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".") or "no message"


def _is_4() -> bool:
    import transformers

    return str(transformers.__version__).startswith("4.")


# -- config.json ------------------------------------------------------------------------------


def _refuse_absurd(config: Mapping[str, Any], root: Path) -> None:
    """Refuses a config that would have transformers build modules for hours."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            _refuse_absurd(value, root)
        counts = value if isinstance(value, list) else [value]
        if _COUNTS.search(key) and any(isinstance(n, int) and n > _MOST for n in counts):
            raise InputError(
                f"{root / 'config.json'}: {key} is {value!r}, expected at most {_MOST}. "
                "Correct config.json"
            )


def structure(value: Any) -> Any:
    """The part of a config.json that decides what the model is made of."""
    if isinstance(value, Mapping):
        if value.keys() == {
            "__float__"
        }:  # transformers 5's way to write what JSON has no number for
            return float(value["__float__"])
        return {k: structure(v) for k, v in value.items() if not _NOT_STRUCTURE.search(k)}
    return [structure(entry) for entry in value] if isinstance(value, list) else value


def without_downloads(config: Any) -> None:
    """Keeps backbones from fetching pretrained weights while they are built."""
    for value in vars(config).values():
        if hasattr(value, "to_dict"):
            without_downloads(value)
    if getattr(config, "use_pretrained_backbone", False):
        config.use_pretrained_backbone = False


def _config_of(root: Path, config: Mapping[str, Any], trust: bool) -> Any:
    """The configuration object; the checkpoint's own class only where the user trusts it."""
    import transformers
    from transformers import CONFIG_MAPPING

    where = root / "config.json"
    model_type = config.get("model_type")
    remote = _remote_code(config)
    if "AutoConfig" in remote and trust:
        found = _remote_class(remote["AutoConfig"], root)
    elif isinstance(model_type, str) and model_type in CONFIG_MAPPING:
        found = CONFIG_MAPPING[model_type]
    elif remote:
        raise InputError(
            f"{where}: transformers {transformers.__version__} does not know model_type "
            f"{model_type!r}, which comes with its own code "
            f"({', '.join(sorted(set(remote.values())))}). "
            "If you trust that code, pass --trust-remote-code to run it"
        )
    elif model_type is None and (named := _named_classes(config)):
        found = named[0].config_class
    else:
        raise InputError(
            f"{where}: model_type is {model_type!r}, expected one of the "
            f"{len(CONFIG_MAPPING)} that transformers {transformers.__version__} knows. "
            "Try a newer transformers"
        )
    made = found.from_dict(structure(config))
    without_downloads(made)
    return made


# -- the model --------------------------------------------------------------------------------


def _remote_code(config: Mapping[str, Any]) -> dict[str, str]:
    """Auto class -> the class in the checkpoint's own code that stands for it."""
    found = config.get("auto_map")
    if not isinstance(found, Mapping):
        return {}
    return {key: value for key, value in found.items() if isinstance(value, str)}


def _remote_class(reference: str, root: Path) -> Any:
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    return get_class_from_dynamic_module(reference, str(root), local_files_only=True)


def _named_classes(config: Mapping[str, Any]) -> list[Any]:
    """The classes of transformers that `architectures` names."""
    import transformers

    wanted = config.get("architectures")
    names = wanted if isinstance(wanted, list) else []
    found = [getattr(transformers, n, None) for n in names if isinstance(n, str)]
    return [c for c in found if isinstance(c, type) and issubclass(c, transformers.PreTrainedModel)]


def auto_classes(made: Any) -> list[Any]:
    """Every class that transformers' Auto classes give for a configuration, likeliest first."""
    from transformers.models.auto import modeling_auto

    names = [f"MODEL_FOR_{task}_MAPPING" for task in _AUTO_ORDER] + ["MODEL_MAPPING"]
    names += [n for n in vars(modeling_auto) if re.fullmatch(r"MODEL_FOR_\w+_MAPPING", n)]
    found: dict[Any, None] = {}
    for name in names:
        entry = getattr(modeling_auto, name, {}).get(type(made), None)
        found |= dict.fromkeys(entry if isinstance(entry, tuple | list) else [entry])
    return [model_class for model_class in found if model_class is not None]


def _model_classes(root: Path, config: Mapping[str, Any], made: Any, trust: bool) -> list[Any]:
    """The classes that a checkpoint may be of: one where config.json says so."""
    remote = {key: value for key, value in _remote_code(config).items() if key != "AutoConfig"}
    if remote and trust:
        wanted = config.get("architectures") or []
        best = [ref for ref in remote.values() if ref.rpartition(".")[2] in wanted]
        likely = [ref for key, ref in remote.items() if key.startswith("AutoModel")]
        if references := best + likely:
            return [_remote_class(references[0], root)]
    fitting = [c for c in _named_classes(config) if isinstance(made, c.config_class or ())]
    return fitting[:1] or auto_classes(made)


def build(model_class: Any, made: Any) -> Any:
    """A model without data, as transformers' own from_pretrained first builds it."""
    import torch

    with ExitStack() as stack:
        if _is_4():
            from accelerate import init_empty_weights
            from transformers.modeling_utils import no_init_weights

            stack.enter_context(no_init_weights())
            stack.enter_context(init_empty_weights())
        else:
            from transformers import initialization

            stack.enter_context(torch.device("meta"))
            for name in ("no_init_weights", "no_tie_weights", "meta_device_safe_creation_ops"):
                if hasattr(initialization, name):
                    stack.enter_context(getattr(initialization, name)())
        return model_class(made)


def _best_model(
    root: Path, config: Mapping[str, Any], names: Mapping[str, tuple[int, ...]], trust: bool
) -> Any:
    """The model of a checkpoint: of several possible classes, the one that takes most tensors."""
    made = _config_of(root, config, trust)
    classes = _model_classes(root, config, made, trust)
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
        return sum(target in state for target, _ in targets_of(model, names, state).values())

    return max((build(model_class, deepcopy(made)) for model_class in classes), key=taken)


# -- from checkpoint names to modules ---------------------------------------------------------


def four_bit_modules(model: Any) -> frozenset[str]:
    """Paths of the modules that transformers' bitsandbytes integration replaces by default."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    if _is_4():
        from transformers.integrations.bitsandbytes import get_keys_to_not_convert

        kept = [*get_keys_to_not_convert(model), *(model._keep_in_fp32_modules or ())]
        converts: Callable[[str], bool] = lambda path: _converts_4(path, kept)  # noqa: E731
        # Its subclass in nn.MultiheadAttention would be replaced too, and then fail.
        attention = nn.modules.linear.NonDynamicallyQuantizableLinear
        is_linear: Callable[[Any], bool] = lambda module: (  # noqa: E731
            isinstance(module, (nn.Linear, Conv1D)) and not isinstance(module, attention)
        )
    else:
        from transformers.quantizers.base import get_keys_to_not_convert
        from transformers.quantizers.quantizers_utils import should_convert_module

        kept = list({*get_keys_to_not_convert(model), *(model._keep_in_fp32_modules or ())})
        converts = lambda path: bool(should_convert_module(path, kept))  # noqa: E731
        is_linear = lambda module: isinstance(module, Conv1D) or type(module) is nn.Linear  # noqa: E731
    return frozenset(
        path
        for path, module in model.named_modules(remove_duplicate=not _is_4())
        if path and is_linear(module) and converts(path)
    )


def _converts_4(path: str, kept: Collection[str]) -> bool:
    """transformers 4's matching, which it has inline in its recursion over the modules."""
    if path.rpartition(".")[2] in kept:
        return False
    return not any(f"{key}." in path or key == path for key in kept)


def targets_of(
    model: Any, names: Iterable[str], state: Mapping[str, Any]
) -> dict[str, tuple[str, bool]]:
    """Checkpoint name -> (parameter it is loaded into, whether it is changed on the way)."""
    return _targets_4(model, list(names)) if _is_4() else _targets_5(model, names, state)


def _targets_5(
    model: Any, names: Iterable[str], state: Mapping[str, Any]
) -> dict[str, tuple[str, bool]]:
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
    prefix = model.base_model_prefix
    targets = {}
    for name in sorted(names, key=dot_natural_key):  # some renamings depend on the order
        target, converter = rename_source_key(name, renamings, converters, prefix, state)
        if target not in state and name in state:
            target, converter = rename_source_key(name, [], [], prefix, state)
        targets[name] = (target, converter is not None)
    return targets


def _targets_4(model: Any, names: list[str]) -> dict[str, tuple[str, bool]]:
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
    return {name: (target, False) for name, target in renamed.items()}


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
    for name, shape in names.items():
        target, changed = targets.get(name, ("", False))
        if target not in state:
            continue
        if changed:
            rearranged.add(name)
        elif target in packed:
            if targets.get(name + ABSMAX) != (target + ABSMAX, False):
                rearranged.add(name)
                continue
            _check_shape(name, shape, tuple(state[target].shape), root)
            quantized.add(name)
    if not any(targets.get(name, ("",))[0] in state for name in names):
        raise InputError(
            f"{root}: none of the {len(names)} tensors (the first is {min(names, default='')!r}) "
            f"has a place in {type(model).__name__}, which config.json describes. Correct "
            "model_type and architectures in config.json"
        )
    return Answer(str(transformers.__version__), frozenset(quantized), frozenset(rearranged))


def _check_shape(name: str, found: tuple[int, ...], expected: tuple[int, ...], root: Path) -> None:
    if found != expected:
        raise InputError(
            f"{root}: tensor {name!r} has shape {found}, but config.json describes a model with "
            f"{expected} there. Correct config.json or take the checkpoint that belongs to it"
        )
