"""Hold packed stacks of experts in stock transformers, with bitsandbytes' own parametrization.

transformers' quantizer for bitsandbytes replaces linear layers.  The one here also replaces the
parameters of experts: by packed ones before the weights are loaded, so that no stack is ever held
in 16 bits, and by parametrized ones afterwards.  bitsandbytes then decodes a layer's stacks when
its experts run, and drops them behind it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, dequantize_blockwise
from bitsandbytes.nn import parametrize as bnb_parametrize
from safetensors import safe_open
from torch.nn.utils import parametrize
from transformers import BitsAndBytesConfig
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
)
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

from ..errors import InputError
from ..planning.selection import module_path
from ..planning.skip_list import Names
from ..planning.weights import ROUTER
from .experts import Stack

METHOD = "nf4cli_stacks"
"""What the quantizer is registered as.  The model that it loads says bitsandbytes, as its files."""

_MOST_ELEMENTS = 2**31
"""bitsandbytes' CUDA kernels count weights in 32 bits: a larger stack is decoded in slices."""

Stacks = Mapping[str, Stack]
_asked: ContextVar[tuple[Stacks, Names]] = ContextVar("stacks to load")


_OF_ONE_EXPERT = r"([0-9]+\.\w+|(gate_up|down)_projs\.[0-9]+)\.weight(\.|$)"
"""Regular expression of the keys of a packed matrix below the module of the experts."""


@dataclass(frozen=True, slots=True)
class Place:
    """The parameter of a model that a stack is held in.

    Attributes:
        module: that it belongs to.
        name: of the parameter in it.
        turned: whether the model holds the transpose of each expert's matrix.
    """

    module: Any
    name: str
    turned: bool


@register_quantization_config(METHOD)
class StackedConfig(BitsAndBytesConfig):  # type: ignore[misc]
    """The quantization_config of a model with packed stacks."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.quant_method = METHOD


@register_quantizer(METHOD)
class StackedQuantizer(Bnb4BitHfQuantizer):  # type: ignore[misc]
    """transformers' quantizer for bitsandbytes in 4 bit, which holds stacks of experts as well."""

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        quantization_config.quant_method = BitsAndBytesConfig().quant_method
        quantization_config.load_in_4bit = True
        super().__init__(quantization_config, **kwargs)
        stacks, names = _asked.get()
        self._stacks = stacks
        self._names = names
        self._places: dict[str, Place] = {}
        self._own: list[Any] = []

    def _process_model_before_weight_loading(self, model: Any, *args: Any, **kwargs: Any) -> None:
        super()._process_model_before_weight_loading(model, *args, **kwargs)
        for key, place in _places(model, self._stacks, self._names).items():
            self._places[key] = place
            empty = _placeholder(self._stacks[key])
            place.module._parameters[place.name] = torch.nn.Parameter(empty, requires_grad=False)
        companions = {
            rf"^{re.escape(form)}\.({re.escape(place.name)}\.|{_OF_ONE_EXPERT})"
            for key, place in self._places.items()
            for form in self._names.forms(module_path(key))
        }
        ignored = set(model._keys_to_ignore_on_load_unexpected or ())
        model._keys_to_ignore_on_load_unexpected = ignored | companions

    def update_weight_conversions(self, weight_conversions: list[Any], *rest: Any) -> list[Any]:
        """Return the conversions that put packed stacks together, and none that rearranges one.

        Args:
            weight_conversions: of the model.
            rest: the model, which transformers gives from 5.18 on.
        """
        names = {place.name for place in self._places.values()}
        kept = [
            conversion
            for conversion in weight_conversions
            if not any(
                pattern.rpartition(".")[2] in names
                for pattern in getattr(conversion, "target_patterns", ())
                if isinstance(conversion, WeightConverter)
            )
        ]
        self._own = _conversions(self._stacks.values())
        return list(super().update_weight_conversions([*self._own, *kept], *rest))

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        model = super()._process_model_after_weight_loading(model, **kwargs) or model
        for key, place in self._places.items():
            _parametrize(place, self._stacks[key], model.dtype)
        # Saved are stacks: save_pretrained must not take them apart.
        own = [conversion.target_patterns for conversion in self._own]
        model._weight_conversions = [
            conversion
            for conversion in getattr(model, "_weight_conversions", None) or ()
            if conversion.target_patterns not in own
        ]
        return model

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        for place in self._places.values():
            module, name = place.module, place.name
            value = getattr(module, name).to(dtype).contiguous()
            parametrize.remove_parametrizations(module, name, leave_parametrized=False)
            module._parameters[name] = torch.nn.Parameter(value, requires_grad=False)
        return super()._dequantize(model, dtype)


@contextmanager
def loading(stacks: Stacks, names: Names) -> Iterator[None]:
    """Give the quantizers that are made within the block the stacks to hold.

    Args:
        stacks: by key in the checkpoint.
        names: by which transformers knows the checkpoint's modules.
    """
    token = _asked.set((stacks, names))
    try:
        yield
    finally:
        _asked.reset(token)


def _storage(dtype: str) -> Any:
    """Return the torch dtype of a quant_storage, a safetensors name."""
    return {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[dtype]


def _placeholder(stack: Stack) -> Any:
    """Return an empty tensor of a packed stack's shape, in no memory."""
    packed = stack.members[0].packed[1]
    shape = packed.shape
    if stack.patterns:  # transformers puts the codes of the matrices together
        shape = (stack.shape[0], packed.numel * len(stack.patterns), 1)
    dtype = torch.uint8 if packed.dtype == "U8" else _storage(packed.dtype)
    return torch.empty(shape, dtype=dtype, device="meta")


def _conversions(stacks: Iterable[Stack]) -> list[Any]:
    """Return the conversions that put the codes of packed matrices together, as transformers does
    with floats, and what lies beside them."""
    found: dict[tuple[str, tuple[str, ...]], Any] = {}
    for stack in stacks:
        name, patterns = stack.key.rpartition(".")[2], stack.patterns
        if patterns:
            found[name, patterns] = WeightConverter(
                [rf"\.experts\.{pattern}$" for pattern in patterns],
                f".experts.{name}",
                [MergeModulelist(dim=0), *([Concatenate(dim=1)] if len(patterns) > 1 else [])],
            )
        if len(patterns) == 1 and patterns[0].endswith("_projs.*.weight"):  # gpt-oss
            bias = patterns[0].replace("weight", "bias")
            found[name, (bias,)] = WeightConverter(
                [rf"\.experts\.{bias}$"], f".experts.{name}_bias", [MergeModulelist(dim=0)]
            )
            found["router", ROUTER] = WeightRenaming(re.escape(ROUTER[1]), ROUTER[0])
    return list(found.values())


def _places(model: Any, stacks: Stacks, names: Names) -> dict[str, Place]:
    """Return the parameter of each stack, by its key.

    Raises:
        InputError: the model has no such parameter, or one of another shape.
    """
    modules, found, turned = dict(model.named_modules()), {}, set()
    for key, stack in stacks.items():
        path, name = module_path(key), key.rpartition(".")[2]
        form = next((form for form in names.forms(path) if form in modules), "")
        parameter = modules[form]._parameters.get(name) if form else None
        across = (stack.shape[0], *stack.shape[:0:-1])
        if parameter is None or parameter.shape not in (stack.shape, across):
            has = "no such parameter" if parameter is None else f"{list(parameter.shape)} there"
            raise InputError(
                f"{key} is a packed stack of experts, {list(stack.shape)}, and transformers' "
                f"{type(model).__name__} has {has}: config.json is of another model, or this "
                "version of transformers holds the experts of this family otherwise. Then decode "
                "the model first: nf4 dequantize"
            )
        if parameter.shape != stack.shape:
            turned.add(form)
        found[key] = form, name
    # The stacks of a layer lie all alike: of a square one the shape does not tell.
    return {key: Place(modules[form], name, form in turned) for key, (form, name) in found.items()}


def _state_of(stack: Stack) -> dict[str, Any]:
    """Return the tensors of a stack's quantization state, as bitsandbytes names them."""
    states = []
    for member in stack.members:
        state = {}
        for shard, tensor in member.parts()[1:]:
            with safe_open(shard.path, "pt") as file:
                state[tensor.name.removeprefix(member.name + ".")] = file.get_tensor(tensor.name)
        states.append(state)
    if not stack.patterns:
        return states[0]
    parts = [QuantState.from_dict(state, device=torch.device("cpu")) for state in states]
    joined = QuantState(
        absmax=torch.cat([_scales(part) for part in parts]),
        shape=torch.Size(stack.shape),
        code=parts[0].code,
        blocksize=parts[0].blocksize,
        quant_type=parts[0].quant_type,
        dtype=parts[0].dtype,
    )
    return dict(joined.as_dict(packed=True))


def _scales(state: Any) -> Any:
    """Return the scales of a bitsandbytes QuantState, float32 [blocks]."""
    if not state.nested:
        return state.absmax.float()
    return (dequantize_blockwise(state.absmax, state.state2) + state.offset).float()


def _parametrize(place: Place, stack: Stack, dtype: Any) -> None:
    """Put bitsandbytes' parametrization over a packed parameter.

    Args:
        dtype: of the model, which the stack is decoded to.

    Raises:
        InputError: the parameter was not loaded, but left on the disk.
    """
    module, name = place.module, place.name
    packed = module._parameters[name]
    if packed.device.type == "meta":
        raise InputError(
            f"{stack.key} would stay on the disk: stacks of experts need to be in memory. Choose "
            "a device_map without 'disk'"
        )
    packed.data = packed.data.reshape(-1, 1)
    bnb_parametrize.replace_parameter_4bit_prequantized(
        module, name, _state_of(stack), packed.device
    )
    quant_state = module.parametrizations[name][0].quant_state
    if dtype.is_floating_point:
        quant_state.dtype = dtype
    module.parametrizations[name][0] = Decoder(quant_state, place.turned)


class Decoder(bnb_parametrize.Bnb4bitParametrization):  # type: ignore[misc]
    """bitsandbytes' parametrization, which decodes a stack of any size to the right values.

    Args:
        quant_state: bitsandbytes' QuantState.
        turned: whether the model holds the transpose of each expert's matrix.
    """

    def __init__(self, quant_state: Any, turned: bool) -> None:
        super().__init__(quant_state)
        self._turned = turned

    def forward(self, quantized_param: Any) -> Any:
        """Return the decoded stack.

        Args:
            quantized_param: the packed one.
        """
        with torch.no_grad():
            stack = decoded(quantized_param, self.quant_state)
            return stack.transpose(1, 2) if self._turned else stack


def decoded(packed: Any, state: Any, most: int = _MOST_ELEMENTS) -> Any:
    """Decode a stack with bitsandbytes' kernels.

    They are given one block a row: on a CPU they decode rows that are no multiple of 64 weights to
    wrong values (bitsandbytes 0.50.2), and on a GPU they count weights in 32 bits.

    Args:
        packed: the codes; uint8 [n, 1], or of another storage dtype.
        state: bitsandbytes' QuantState of the whole.
        most: weights that a call decodes are fewer than this.

    Returns:
        The weights, of the state's shape and dtype.
    """
    numel, size = prod(state.shape), state.blocksize
    if numel % size:  # no stack of whole matrices; the last block is not full
        return dequantize_4bit(packed, state)
    absmax = _scales(state)
    step = (most - 1) // size * size
    raw, out = packed.reshape(-1).view(torch.uint8), None
    for start in range(0, numel, step):
        count = min(step, numel - start)
        part = QuantState(
            absmax=absmax[start // size : (start + count) // size],
            shape=torch.Size((count // size, size)),
            code=state.code,
            blocksize=size,
            quant_type=state.quant_type,
            dtype=state.dtype,
        )
        weights = dequantize_4bit(raw[start // 2 : (start + count) // 2].unsqueeze(-1), part)
        if count == numel:
            return weights.reshape(state.shape)
        if out is None:
            out = torch.empty(numel, dtype=state.dtype, device=packed.device)
        out[start : start + count] = weights.reshape(-1)
    return None if out is None else out.reshape(state.shape)
