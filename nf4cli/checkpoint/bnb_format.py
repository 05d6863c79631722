"""Everything this package knows of bitsandbytes' files; no other module does.

Key suffixes, the quant_state JSON, the quantization_config of config.json, and the skip list in
the dialects of its readers.  Facts were run against bitsandbytes 0.50.2 and transformers 4.55 to
5.23 (vLLM's matcher was read).
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from ..errors import InputError
from ..format.codebook import BLOCKSIZES, NESTED_BLOCKSIZE, QUANT_TYPES
from ..format.dtypes import ITEMSIZE, STORAGE_NAME, TORCH_NAME
from .types import Checkpoint, TensorInfo
from .untrusted import parse_json

ABSMAX = ".absmax"
QUANT_MAP = ".quant_map"
NESTED_ABSMAX = ".nested_absmax"
NESTED_QUANT_MAP = ".nested_quant_map"
_STATE = ".quant_state.bitsandbytes__"

QUANTIZATION_KEYS = ("quantization_config", "compression_config")
"""Where config.json says how a checkpoint is quantized."""

_FLOAT32_MAX = 3.4028234663852886e38
MAX_STATE = 65_536
"""Bytes of a quant_state; bitsandbytes writes about 250."""
_MAX_DIMENSIONS, _MAX_ELEMENTS = 8, 2**48
_OFFSET_ROOM = 24
"""Characters kept for nested_offset: the longest repr of a float32 is -1.1754943508222875e-38."""


def state_suffix(quant_type: str) -> str:
    """`.quant_state.bitsandbytes__nf4`."""
    return _STATE + quant_type


# -- quant_state ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class QuantState:
    """The JSON part of one weight's quantization state.

    Attributes:
        quant_type: "nf4" or "fp4".
        blocksize: elements that share one absmax.
        dtype: what decoding gives, as torch spells it ("bfloat16").
        shape: of the weight as the module holds it (Conv1D: transposed).
        nested: whether the absmax vector is itself quantized.
        nested_blocksize: elements of the absmax vector that share one nested_absmax.
        nested_dtype: "float32", the only one there is.
        nested_offset: a float32 value, added to every decoded absmax; 0.0 when not nested.
    """

    quant_type: str
    blocksize: int
    dtype: str
    shape: tuple[int, ...]
    nested: bool
    nested_blocksize: int = NESTED_BLOCKSIZE
    nested_offset: float = 0.0
    nested_dtype: str = "float32"


def encode_state(state: QuantState) -> bytes:
    """The state as bitsandbytes' pack_dict_to_tensor writes it, padded to `state_size` bytes.

    nested_offset prints in 3 to 24 characters, so its blob would have no known size until the
    weight has been read.  JSON may end in spaces and every reader goes through a JSON parser:
    padding makes every offset and size of the output known before the first byte is read.
    """
    fields: dict[str, Any] = {
        "quant_type": state.quant_type,
        "blocksize": state.blocksize,
        "dtype": state.dtype,
        "shape": list(state.shape),
    }
    if state.nested:
        fields |= {
            "nested_blocksize": state.nested_blocksize,
            "nested_dtype": state.nested_dtype,
            "nested_offset": state.nested_offset,
        }
    text = json.dumps(fields)
    if state.nested:
        text += " " * (_OFFSET_ROOM - len(repr(state.nested_offset)))
    return text.encode()


def state_size(state: QuantState) -> int:
    """Bytes of `encode_state`, whatever the offset turns out to be."""
    return len(encode_state(state))


def decode_state(blob: bytes, where: str) -> QuantState:
    """Parse a quant_state blob of any writer.

    Args:
        where: what to call it in a message.

    Raises:
        InputError: not JSON, or a field is missing or impossible.
    """
    fields = parse_json(blob, where)

    def field(name: str, valid: bool, expected: str) -> Any:
        if not valid:
            found = repr(fields.get(name))[:200]
            raise InputError(f"{where}: {name} is {found}, expected {expected}")
        return fields.get(name)

    def integer(value: object) -> bool:
        return isinstance(value, int) and not isinstance(value, bool)

    shape = fields.get("shape")
    nested = "nested_offset" in fields or "nested_blocksize" in fields
    if not nested:
        fields = {key: value for key, value in fields.items() if key != "nested_dtype"}
    offset = fields.get("nested_offset")
    nested_blocksize = fields.get("nested_blocksize")
    return QuantState(
        quant_type=field(
            "quant_type", fields.get("quant_type") in QUANT_TYPES, " or ".join(QUANT_TYPES)
        ),
        blocksize=field(
            "blocksize",
            integer(fields.get("blocksize")) and fields["blocksize"] in BLOCKSIZES,
            f"one of {', '.join(map(str, BLOCKSIZES))}",
        ),
        dtype=field(
            "dtype",
            fields.get("dtype") in TORCH_NAME.values(),
            f"one of {', '.join(TORCH_NAME.values())}",
        ),
        shape=tuple(
            field(
                "shape",
                isinstance(shape, list)
                and len(shape) <= _MAX_DIMENSIONS
                and all(integer(d) and 0 < d < _MAX_ELEMENTS for d in shape)
                and prod(shape) < _MAX_ELEMENTS,
                "a list of positive integers with a product below 2**48",
            )
        ),
        nested=nested,
        nested_blocksize=field(
            "nested_blocksize",
            not nested or (integer(nested_blocksize) and 0 < int(nested_blocksize or 0) <= 4096),
            "an integer from 1 to 4096",
        )
        or NESTED_BLOCKSIZE,
        nested_dtype=field(
            "nested_dtype",
            not nested or fields.get("nested_dtype") == "float32",
            "float32",
        )
        or "float32",
        nested_offset=float(
            field(
                "nested_offset",
                not nested
                or (
                    isinstance(offset, (int, float))
                    and not isinstance(offset, bool)
                    and abs(offset) <= _FLOAT32_MAX
                ),
                "a finite number",
            )
            or 0.0
        ),
    )


# -- which tensors of a file belong together ------------------------------------------------------


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """A packed weight and the names of its companions, as found in a checkpoint.

    Attributes:
        name: key of the packed tensor.
        state_key: key of its quant_state blob.
        quant_type: from the blob's key.
    """

    name: str
    state_key: str
    quant_type: str


def find_quantized(checkpoint: Checkpoint) -> dict[str, list[QuantizedWeight]]:
    """Every packed weight by name, recognised by its quant_state blob; there should be one each."""
    found: dict[str, list[QuantizedWeight]] = {}
    for key in checkpoint.tensors:
        name, separator, quant_type = key.partition(_STATE)
        if separator:
            found.setdefault(name, []).append(QuantizedWeight(name, key, quant_type))
    return found


def companion_owner(key: str) -> str | None:
    """The packed weight that a key is a companion of, None if it looks like no companion."""
    for suffix in (ABSMAX, QUANT_MAP, NESTED_ABSMAX, NESTED_QUANT_MAP):
        if key.endswith(suffix):
            return key.removesuffix(suffix)
    name, separator, _ = key.partition(_STATE)
    return name if separator else None


def expected_tensors(
    name: str, state: QuantState, quant_storage: str
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Key -> (dtype, shape) of a packed weight and its companions.

    Args:
        quant_storage: as torch spells it.
    """
    n = prod(state.shape)
    blocks = -(-n // state.blocksize)
    storage = STORAGE_NAME[quant_storage]
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {
        name: (storage, ((n + 1) // 2 // ITEMSIZE[storage], 1)),
        name + ABSMAX: ("U8" if state.nested else "F32", (blocks,)),
        name + QUANT_MAP: ("F32", (16,)),
    }
    if state.nested:
        tensors[name + NESTED_ABSMAX] = ("F32", (-(-blocks // state.nested_blocksize),))
        tensors[name + NESTED_QUANT_MAP] = ("F32", (256,))
    tensors[name + state_suffix(state.quant_type)] = ("U8", (state_size(state),))
    return tensors


def is_state_key(key: str) -> bool:
    """Whether a key is a quant_state blob's."""
    return _STATE in key


def storage_of(tensor: TensorInfo) -> str | None:
    """The quant_storage of a packed tensor, None where its dtype is not one."""
    return next((name for name, dtype in STORAGE_NAME.items() if dtype == tensor.dtype), None)


# -- config.json ------------------------------------------------------------------------------


def quantization_config(
    quant_type: str,
    double_quant: bool,
    quant_storage: str,
    compute_dtype: str,
    skip_modules: Iterable[str],
) -> dict[str, Any]:
    """The 13 keys that transformers 4 and 5 both write."""
    return {
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_compute_dtype": compute_dtype,
        "bnb_4bit_quant_storage": quant_storage,
        "bnb_4bit_quant_type": quant_type,
        "bnb_4bit_use_double_quant": double_quant,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": list(skip_modules),
        "llm_int8_threshold": 6.0,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "quant_method": "bitsandbytes",
    }


def config_problems(
    config: Mapping[str, Any], states: Iterable[QuantState], storages: Collection[str]
) -> list[str]:
    """What a loader would get wrong with this config.json and these states.

    Args:
        storages: the quant_storage of every packed tensor, each once.
    """
    found = config.get("quantization_config")
    if not isinstance(found, dict):
        return ["config.json has no quantization_config: loaders take the packed bytes for floats"]
    problems = []
    expected: dict[str, Any] = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
    }
    if len(storages) == 1:
        (expected["bnb_4bit_quant_storage"],) = storages
    kinds = {(state.quant_type, state.nested) for state in states}
    if len(kinds) == 1:
        ((expected["bnb_4bit_quant_type"], expected["bnb_4bit_use_double_quant"]),) = kinds
    defaults = {
        "bnb_4bit_quant_type": "fp4",
        "bnb_4bit_use_double_quant": False,
        "bnb_4bit_quant_storage": "uint8",
        "load_in_8bit": False,
    }
    for key, value in expected.items():
        if (have := found.get(key, defaults.get(key))) != value:
            problems.append(
                f"quantization_config.{key} is {have!r}, but the tensors need {value!r}"
            )
    compute = found.get("bnb_4bit_compute_dtype", "float32")
    if compute not in TORCH_NAME.values():
        problems.append(
            f"quantization_config.bnb_4bit_compute_dtype is {compute!r}: expected one of "
            f"{', '.join(TORCH_NAME.values())}"
        )
    if found.get("llm_int8_skip_modules") == []:
        problems.append(
            "quantization_config.llm_int8_skip_modules is []: loaders then expect the output head "
            "in 4 bit"
        )
    return problems


def has_skip_list(config: Mapping[str, Any]) -> bool:
    """Whether config.json says itself what is not packed, and does not leave it to the loader."""
    found = config.get("quantization_config")
    return isinstance(found, dict) and isinstance(found.get("llm_int8_skip_modules"), list)


def skip_list(config: Mapping[str, Any]) -> list[str]:
    """llm_int8_skip_modules of a config.json, [] where it has none."""
    found = config.get("quantization_config")
    keys = found.get("llm_int8_skip_modules") if isinstance(found, dict) else None
    return [key for key in keys if isinstance(key, str)] if isinstance(keys, list) else []


def without_skip_list(config: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a config.json whose quantization_config does not say what is not packed."""
    found = config.get("quantization_config")
    if not isinstance(found, dict):
        return dict(config)
    rest = {key: value for key, value in found.items() if key != "llm_int8_skip_modules"}
    return {**config, "quantization_config": rest}


def quantization_of(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The quantization_config of an already quantized checkpoint, None for a plain one.

    Multimodal models may have it in a sub-config ("text_config"); early compressed-tensors called
    it compression_config.
    """
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    for part in parts:
        for key in QUANTIZATION_KEYS:
            found = part.get(key)
            if found is not None:
                return found if isinstance(found, dict) else {}
    return None


def quant_method(config: Mapping[str, Any]) -> str | None:
    """The quant_method of an already quantized checkpoint, None for a plain one."""
    found = quantization_of(config)
    return None if found is None else str(found.get("quant_method", "unknown"))
