"""The on-disk format of bitsandbytes: tensor keys, quantization states, quantization_config.

No other module spells the keys of tensors and states.  The format was checked against bitsandbytes
0.50.2 and transformers 4.55 to 5.23.  How each loader interprets the list of modules that are not
packed is in planning/skip_list.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any, TypeGuard

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
"""The keys of config.json that describe a quantization."""

_FLOAT32_MAX = 3.4028234663852886e38
MAX_STATE = 65_536
"""Most bytes of a quant_state that are read; bitsandbytes writes about 250."""
_MAX_DIMENSIONS, _MAX_ELEMENTS = 8, 2**48
_MAX_NESTED_BLOCKSIZE = 4096
_OFFSET_ROOM = 24
"""Characters kept for nested_offset: the longest repr of a float32 is -1.1754943508222875e-38."""


def state_suffix(quant_type: str) -> str:
    """Return the suffix of a quant_state's key, ".quant_state.bitsandbytes__nf4" for NF4."""
    return _STATE + quant_type


# -- quant_state ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class QuantState:
    """The JSON part of one weight's quantization state.

    Attributes:
        quant_type: "nf4" or "fp4".
        blocksize: elements that share one absmax.
        dtype: dtype of the decoded weight, as torch spells it ("bfloat16").
        shape: shape of the weight as its module holds it (Conv1D: transposed).
        nested: whether the absmax vector is quantized as well.
        nested_blocksize: elements of the absmax vector that share one nested_absmax.
        nested_offset: a float32 value, added to every decoded absmax; 0.0 if not nested.
        nested_dtype: always "float32".
    """

    quant_type: str
    blocksize: int
    dtype: str
    shape: tuple[int, ...]
    nested: bool
    nested_blocksize: int = NESTED_BLOCKSIZE
    nested_offset: float = 0.0
    nested_dtype: str = "float32"

    @property
    def words(self) -> str:
        """Return how the weight is packed: "nf4, blocksize 64, nested"."""
        return f"{self.quant_type}, blocksize {self.blocksize}{', nested' if self.nested else ''}"

    @property
    def short(self) -> str:
        """Return the same but for the table, in five characters at most: "64n"."""
        return f"{self.blocksize}{'n' if self.nested else ''}"


def encode_state(state: QuantState) -> bytes:
    """Return the JSON of a state as bitsandbytes' pack_dict_to_tensor writes it, but padded.

    nested_offset is known only when the weight has been read, and takes 3 to 24 characters.  The
    padding gives every state a fixed size (`state_size`), so all offsets and sizes of the output
    are known before the first byte is read.  JSON may end in spaces, and every reader uses a JSON
    parser.
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
    """Return the bytes of `encode_state(state)`, which do not depend on nested_offset."""
    return len(encode_state(state))


def decode_state(blob: bytes, where: str) -> QuantState:
    """Parse the quant_state of a weight, written by any program.

    Args:
        blob: the JSON text.
        where: the name of the blob for messages.

    Raises:
        InputError: the blob is not JSON, or a field is missing or has an impossible value.
    """
    fields = parse_json(blob, where)
    nested = "nested_offset" in fields or "nested_blocksize" in fields

    def field(name: str, is_valid: Callable[[Any], bool], expected: str) -> Any:
        value = fields.get(name)
        if not is_valid(value):
            raise InputError(f"{where}: {name} is {repr(value)[:200]}, expected {expected}")
        return value

    dtypes = tuple(TORCH_NAME.values())
    state = QuantState(
        quant_type=field("quant_type", QUANT_TYPES.__contains__, " or ".join(QUANT_TYPES)),
        blocksize=field("blocksize", _is_blocksize, f"one of {', '.join(map(str, BLOCKSIZES))}"),
        dtype=field("dtype", dtypes.__contains__, f"one of {', '.join(dtypes)}"),
        shape=tuple(
            field("shape", _is_shape, "a list of positive integers with a product below 2**48")
        ),
        nested=nested,
    )
    if not nested:
        return state
    return replace(
        state,
        nested_blocksize=field(
            "nested_blocksize",
            _is_nested_blocksize,
            f"an integer from 1 to {_MAX_NESTED_BLOCKSIZE}",
        ),
        nested_dtype=field("nested_dtype", lambda value: value == "float32", "float32"),
        # -0.0, which only another program could write, becomes 0.0.
        nested_offset=float(field("nested_offset", is_offset, "a finite number") or 0.0),
    )


def _is_integer(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_blocksize(value: object) -> bool:
    return _is_integer(value) and value in BLOCKSIZES


def _is_shape(value: object) -> bool:
    """Return whether a JSON value is a shape that a weight may have."""
    return (
        isinstance(value, list)
        and len(value) <= _MAX_DIMENSIONS
        and all(_is_integer(size) and 0 < size < _MAX_ELEMENTS for size in value)
        and prod(value) < _MAX_ELEMENTS
    )


def _is_nested_blocksize(value: object) -> bool:
    return _is_integer(value) and 0 < value <= _MAX_NESTED_BLOCKSIZE


def is_offset(value: object) -> bool:
    """Return whether a JSON value is a number within the range of float32; a NaN is not."""
    return (isinstance(value, float) or _is_integer(value)) and abs(value) <= _FLOAT32_MAX


# -- which tensors of a checkpoint belong together --------------------------------------------


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """The keys of a packed weight in a checkpoint.

    Attributes:
        name: key of the packed tensor.
        state_key: key of its quant_state.
        quant_type: "nf4" or "fp4", as the key of the quant_state says.
    """

    name: str
    state_key: str
    quant_type: str


def find_quantized(checkpoint: Checkpoint) -> dict[str, list[QuantizedWeight]]:
    """Find the packed weights of a checkpoint by the keys of their quant_state.

    Returns:
        Name of the weight -> one entry for each of its quant_states; a valid weight has one.
    """
    quantized: dict[str, list[QuantizedWeight]] = {}
    for key in checkpoint.tensors:
        name, separator, quant_type = key.partition(_STATE)
        if separator:
            quantized.setdefault(name, []).append(QuantizedWeight(name, key, quant_type))
    return quantized


def companion_owner(key: str) -> str | None:
    """Return the name of the packed weight that a key belongs to, judged by the key's suffix.

    Returns None for a key without such a suffix: a packed weight itself, or any other tensor.
    """
    for suffix in (ABSMAX, QUANT_MAP, NESTED_ABSMAX, NESTED_QUANT_MAP):
        if key.endswith(suffix):
            return key.removesuffix(suffix)
    name, separator, _ = key.partition(_STATE)
    return name if separator else None


def expected_tensors(
    name: str, state: QuantState, quant_storage: str
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return key -> (safetensors dtype, shape) of a packed weight and of its companions.

    Args:
        quant_storage: dtype of the packed tensor, as torch spells it.
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
    """Return whether a key is that of a quant_state."""
    return _STATE in key


def storage_of(tensor: TensorInfo) -> str | None:
    """Return the quant_storage of a packed tensor as torch spells it; None for any other dtype."""
    return next((name for name, dtype in STORAGE_NAME.items() if dtype == tensor.dtype), None)


# -- config.json ------------------------------------------------------------------------------


def quantization_config(
    quant_type: str,
    double_quant: bool,
    quant_storage: str,
    compute_dtype: str,
    skip_modules: Iterable[str],
) -> dict[str, Any]:
    """Return the quantization_config of an output: the 13 keys that transformers 4 and 5 write.

    Args:
        quant_storage, compute_dtype: dtypes as torch spells them.
        skip_modules: the modules that are not packed.
    """
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
    """Return a sentence for each entry of config.json that does not fit the packed tensors.

    Args:
        config: the whole config.json.
        states: the states of all packed weights.
        storages: the quant_storage of the packed tensors, each value once.
    """
    quantization = config.get("quantization_config")
    if not isinstance(quantization, dict):
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
        if (actual := quantization.get(key, defaults.get(key))) != value:
            problems.append(
                f"quantization_config.{key} is {actual!r}, but the tensors need {value!r}"
            )
    compute_dtype = quantization.get("bnb_4bit_compute_dtype", "float32")
    if compute_dtype not in TORCH_NAME.values():
        problems.append(
            f"quantization_config.bnb_4bit_compute_dtype is {compute_dtype!r}: expected one of "
            f"{', '.join(TORCH_NAME.values())}"
        )
    if quantization.get("llm_int8_skip_modules") == []:
        problems.append(
            "quantization_config.llm_int8_skip_modules is []: loaders then expect the output head "
            "in 4 bit"
        )
    return problems


def has_skip_list(config: Mapping[str, Any]) -> bool:
    """Return whether config.json lists the modules that are not packed.

    Without the list, each loader decides by itself which modules to expect in full precision.
    """
    quantization = config.get("quantization_config")
    return isinstance(quantization, dict) and isinstance(
        quantization.get("llm_int8_skip_modules"), list
    )


def skip_list(config: Mapping[str, Any]) -> list[str]:
    """Return the modules that are not packed (llm_int8_skip_modules), [] without such a list."""
    quantization = config.get("quantization_config")
    modules = quantization.get("llm_int8_skip_modules") if isinstance(quantization, dict) else None
    if not isinstance(modules, list):
        return []
    return [module for module in modules if isinstance(module, str)]


def without_skip_list(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of a config.json without its list of modules that are not packed."""
    quantization = config.get("quantization_config")
    if not isinstance(quantization, dict):
        return dict(config)
    rest = {key: value for key, value in quantization.items() if key != "llm_int8_skip_modules"}
    return {**config, "quantization_config": rest}


def quantization_of(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the quantization_config of a config.json, None for a model that is not quantized.

    Multimodal models may have it in a sub-config ("text_config"), and early versions of
    compressed-tensors called it compression_config.  An entry that is no JSON object gives {}.
    """
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    for part in parts:
        for key in QUANTIZATION_KEYS:
            quantization = part.get(key)
            if quantization is not None:
                return quantization if isinstance(quantization, dict) else {}
    return None


def quant_method(config: Mapping[str, Any]) -> str | None:
    """Return the quant_method of a config.json, None for a model that is not quantized."""
    quantization = quantization_of(config)
    return None if quantization is None else str(quantization.get("quant_method", "unknown"))
