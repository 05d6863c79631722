"""Build the transformers model of a checkpoint without its weights, on torch's meta device.

Nothing is downloaded, and code of the checkpoint's own runs only where the user trusts it.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import InputError, MachineError, Nf4Error

_COUNTS = re.compile(r"(layers?|experts|blocks?|depths?)$")
_MOST_MODULES = 10_000
"""Modules of one kind that a config may ask for: each costs time and memory even without data."""

_NOT_STRUCTURE = re.compile(r"^quantization_config$|^compression_config$|attn_implementation")
"""Config keys that say how to load or to compute, not what the model is made of."""

_AUTO_ORDER = (
    "IMAGE_TEXT_TO_TEXT", "CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ",
    "MULTIMODAL_LM", "MASKED_LM", "PRETRAINING",
)  # fmt: skip
"""Tasks whose Auto mappings are searched first for a model class."""


# -- the surroundings -------------------------------------------------------------------------


@contextmanager
def offline() -> Iterator[None]:
    """Keep huggingface_hub off the network inside a with block, imported already or not."""
    variable_before = os.environ.get("HF_HUB_OFFLINE")
    os.environ["HF_HUB_OFFLINE"] = "1"
    constants: Any = None
    try:
        if find_spec("huggingface_hub") is not None:
            from huggingface_hub import constants
        constant_before = getattr(constants, "HF_HUB_OFFLINE", None)
        if constants is not None:
            constants.HF_HUB_OFFLINE = True
        yield
    finally:
        if variable_before is None:
            del os.environ["HF_HUB_OFFLINE"]
        else:
            os.environ["HF_HUB_OFFLINE"] = variable_before
        if constants is not None:
            constants.HF_HUB_OFFLINE = constant_before if variable_before is not None else False


@contextmanager
def quiet() -> Iterator[None]:
    """Silence warnings and all loggers inside a with block, and send what is printed to stderr.

    stdout is for nf4's own document.
    """
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(sys.stderr):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextmanager
def failures_explained(root: Path, version: str) -> Iterator[None]:
    """Turn whatever transformers raises inside a with block into an error that names its cause.

    A constructor that is given a wrong config may raise anything.

    Raises:
        MachineError: a library that the model needs is missing.
        InputError: transformers fails in another way.
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
    except (Exception, SystemExit, GeneratorExit) as error:
        hint = "Correct config.json or try another version of transformers"
        if "offline" in str(error).lower():
            hint = "nf4 never goes online: download what it needs into the cache first"
        raise InputError(
            f"transformers {version} cannot build the model that {root / 'config.json'} "
            f"describes: {type(error).__name__}: {_one_line(error)}. {hint}"
        ) from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()).rstrip(".") or "no message"


def is_version_4() -> bool:
    """Return whether the installed transformers is of version 4."""
    import transformers

    return str(transformers.__version__).startswith("4.")


# -- config.json ------------------------------------------------------------------------------


def refuse_absurd(config: Mapping[str, Any], root: Path) -> None:
    """Raise InputError if a config asks for so many modules that building them takes hours."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            refuse_absurd(value, root)
        counts = value if isinstance(value, list) else [value]
        if _COUNTS.search(key) and any(isinstance(n, int) and n > _MOST_MODULES for n in counts):
            raise InputError(
                f"{root / 'config.json'}: {key} is {value!r}, expected at most {_MOST_MODULES}. "
                "Correct config.json"
            )


def structure(value: Any) -> Any:
    """Return the part of a config.json that decides what the model is made of."""
    if isinstance(value, Mapping):
        if value.keys() == {"__float__"}:  # how transformers 5 writes NaN and infinity in JSON
            return float(value["__float__"])
        return {k: structure(v) for k, v in value.items() if not _NOT_STRUCTURE.search(k)}
    return [structure(entry) for entry in value] if isinstance(value, list) else value


def without_downloads(config: Any) -> None:
    """Change a configuration object so that its backbones fetch no pretrained weights."""
    for value in vars(config).values():
        if hasattr(value, "to_dict"):
            without_downloads(value)
    if getattr(config, "use_pretrained_backbone", False):
        config.use_pretrained_backbone = False


def config_of(root: Path, config: Mapping[str, Any], trust: bool) -> Any:
    """Return the configuration object of a checkpoint.

    Args:
        trust: the class may be one of the checkpoint's own code.

    Raises:
        InputError: transformers has no class for it, or only one of the checkpoint's own code.
    """
    import transformers
    from transformers import CONFIG_MAPPING

    where = root / "config.json"
    model_type = config.get("model_type")
    remote = _remote_code(config)
    if "AutoConfig" in remote and trust:
        configuration_class = _remote_class(remote["AutoConfig"], root)
    elif isinstance(model_type, str) and model_type in CONFIG_MAPPING:
        configuration_class = CONFIG_MAPPING[model_type]
    elif remote:
        raise InputError(
            f"{where}: transformers {transformers.__version__} does not know model_type "
            f"{model_type!r}, which comes with its own code "
            f"({', '.join(sorted(set(remote.values())))}). "
            "If you trust that code, pass --trust-remote-code to run it"
        )
    elif model_type is None and (named := _named_classes(config)):
        configuration_class = named[0].config_class
    else:
        raise InputError(
            f"{where}: model_type is {model_type!r}, none of the "
            f"{len(list(CONFIG_MAPPING.keys()))} that transformers {transformers.__version__} "
            "knows. Try a newer transformers"
        )
    configuration = configuration_class.from_dict(structure(config))
    without_downloads(configuration)
    return configuration


# -- the model --------------------------------------------------------------------------------


def _remote_code(config: Mapping[str, Any]) -> dict[str, str]:
    """Return Auto class -> the class in the checkpoint's own code that stands for it."""
    auto_map = config.get("auto_map")
    if not isinstance(auto_map, Mapping):
        return {}
    return {key: value for key, value in auto_map.items() if isinstance(value, str)}


def _remote_class(reference: str, root: Path) -> Any:
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    return get_class_from_dynamic_module(reference, str(root), local_files_only=True)


def _named_classes(config: Mapping[str, Any]) -> list[Any]:
    """Return the classes of transformers that `architectures` names."""
    import transformers

    architectures = config.get("architectures")
    names = architectures if isinstance(architectures, list) else []
    classes = [getattr(transformers, n, None) for n in names if isinstance(n, str)]
    return [
        c for c in classes if isinstance(c, type) and issubclass(c, transformers.PreTrainedModel)
    ]


def auto_classes(configuration: Any) -> list[Any]:
    """Return every class that transformers' Auto classes give for a configuration object, the
    likeliest first."""
    from transformers.models.auto import modeling_auto

    names = [f"MODEL_FOR_{task}_MAPPING" for task in _AUTO_ORDER] + ["MODEL_MAPPING"]
    names += [n for n in vars(modeling_auto) if re.fullmatch(r"MODEL_FOR_\w+_MAPPING", n)]
    classes: dict[Any, None] = {}
    for name in names:
        entry = getattr(modeling_auto, name, {}).get(type(configuration), None)
        classes |= dict.fromkeys(entry if isinstance(entry, tuple | list) else [entry])
    return [model_class for model_class in classes if model_class is not None]


def model_classes(
    root: Path, config: Mapping[str, Any], configuration: Any, trust: bool
) -> list[Any]:
    """Return the classes that a checkpoint may be of: a single one where config.json names it."""
    remote = {key: value for key, value in _remote_code(config).items() if key != "AutoConfig"}
    if remote and trust:
        given = config.get("architectures")
        architectures = given if isinstance(given, list) else []
        named = [ref for ref in remote.values() if ref.rpartition(".")[2] in architectures]
        likely = [ref for key, ref in remote.items() if key.startswith("AutoModel")]
        if references := named + likely:
            return [_remote_class(references[0], root)]
    fitting = [c for c in _named_classes(config) if isinstance(configuration, c.config_class or ())]
    return fitting[:1] or auto_classes(configuration)


def build(model_class: Any, configuration: Any) -> Any:
    """Return a model without data, built as transformers' own from_pretrained begins."""
    import torch

    with ExitStack() as stack:
        if is_version_4():
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
        return model_class(configuration)
