"""A model of transformers without weights: its class and configuration, built on the meta device.

No network, and no code of the checkpoint's own unless the user trusts it.
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
_MOST = 10_000
"""Modules of one kind that a config may ask for: each costs time and memory even without data."""

_NOT_STRUCTURE = re.compile(r"^quantization_config$|^compression_config$|attn_implementation")
"""Config keys that say how to load or to compute, not what the model is made of."""

_AUTO_ORDER = (
    "IMAGE_TEXT_TO_TEXT", "CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ",
    "MULTIMODAL_LM", "MASKED_LM", "PRETRAINING",
)  # fmt: skip
"""Auto mappings to look for a model class in first."""


# -- the surroundings -------------------------------------------------------------------------


@contextmanager
def offline() -> Iterator[None]:
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
def quiet() -> Iterator[None]:
    """Silences warnings and the loggers of every library; keeps stdout for our own document."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(sys.stderr):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextmanager
def blaming(root: Path, version: str) -> Iterator[None]:
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


def is_4() -> bool:
    import transformers

    return str(transformers.__version__).startswith("4.")


# -- config.json ------------------------------------------------------------------------------


def refuse_absurd(config: Mapping[str, Any], root: Path) -> None:
    """Refuses a config that would have transformers build modules for hours."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            refuse_absurd(value, root)
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


def config_of(root: Path, config: Mapping[str, Any], trust: bool) -> Any:
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
            f"{where}: model_type is {model_type!r}, none of the "
            f"{len(list(CONFIG_MAPPING.keys()))} that transformers {transformers.__version__} "
            "knows. Try a newer transformers"
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


def model_classes(root: Path, config: Mapping[str, Any], made: Any, trust: bool) -> list[Any]:
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
        if is_4():
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
