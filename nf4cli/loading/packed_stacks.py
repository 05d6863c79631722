"""Hold packed stacks of experts in stock transformers, with bitsandbytes' own parametrization.

transformers' quantizer for bitsandbytes replaces linear layers.  The one here also replaces the
parameters of experts: by packed ones before the weights are loaded, so that no stack is ever held
in 16 bits, and by parametrized ones afterwards.  bitsandbytes then decodes a layer's stacks when
its experts run, and drops them behind it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from math import prod
from typing import Any

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, dequantize_blockwise
from bitsandbytes.nn import parametrize as bnb_parametrize
from safetensors import safe_open
from torch.nn.utils import parametrize
from transformers import BitsAndBytesConfig
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

from ..checkpoint.packed import PackedWeight
from ..errors import InputError
from ..planning.selection import module_path
from ..planning.skip_list import Names

METHOD = "nf4cli_stacks"
"""What the quantizer is registered as.  The model that it loads says bitsandbytes, as its files."""

_MOST_ELEMENTS = 2**31
"""bitsandbytes' CUDA kernels count weights in 32 bits: a larger stack is decoded in slices."""

Stacks = Mapping[str, PackedWeight]
_asked: ContextVar[tuple[Stacks, Names]] = ContextVar("stacks to load")


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
        self._modules: dict[str, tuple[Any, str]] = {}

    def _process_model_before_weight_loading(self, model: Any, *args: Any, **kwargs: Any) -> None:
        super()._process_model_before_weight_loading(model, *args, **kwargs)
        for key, weight in self._stacks.items():
            module, name = self._modules[key] = _place(model, key, weight, self._names)
            packed = weight.packed[1]
            dtype = torch.uint8 if packed.dtype == "U8" else _storage(packed.dtype)
            empty = torch.empty(packed.shape, dtype=dtype, device="meta")
            module._parameters[name] = torch.nn.Parameter(empty, requires_grad=False)
        companions = {
            rf"^{re.escape(form)}\.{re.escape(name)}\."
            for key, (_, name) in self._modules.items()
            for form in self._names.forms(module_path(key))
        }
        ignored = set(model._keys_to_ignore_on_load_unexpected or ())
        model._keys_to_ignore_on_load_unexpected = ignored | companions

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """Return the conversions without those that would rearrange a packed stack."""
        leaves = {name for _, name in self._modules.values()}
        kept = [
            conversion
            for conversion in weight_conversions
            if not any(
                pattern.rpartition(".")[2] in leaves
                for pattern in getattr(conversion, "source_patterns", ())
            )
        ]
        return list(super().update_weight_conversions(kept, model))

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        model = super()._process_model_after_weight_loading(model, **kwargs) or model
        for key, (module, name) in self._modules.items():
            _parametrize(module, name, self._stacks[key], model.dtype)
        # save_pretrained would undo these, and fail: a packed weight is saved as it is.
        model._weight_conversions = [
            conversion
            for conversion in getattr(model, "_weight_conversions", None) or ()
            if not any(hasattr(op, "hf_quantizer") for op in getattr(conversion, "operations", ()))
        ]
        return model

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        for module, name in self._modules.values():
            value = getattr(module, name).to(dtype)
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


def _place(model: Any, key: str, weight: PackedWeight, names: Names) -> tuple[Any, str]:
    """Return the module of a stack, and the name of its parameter.

    Raises:
        InputError: the model has no such parameter, or one of another shape.
    """
    path, name = module_path(key), key.rpartition(".")[2]
    modules = dict(model.named_modules())
    form = next((form for form in names.forms(path) if form in modules), None)
    found = None if form is None else modules[form]._parameters.get(name)
    if form is None or found is None or found.shape != weight.state.shape:
        has = "no such parameter" if found is None else f"{list(found.shape)} there"
        raise InputError(
            f"{key} is a packed stack of experts, {list(weight.state.shape)}, and transformers' "
            f"{type(model).__name__} has {has}: config.json is of another model, or this version "
            "of transformers holds the experts of this family otherwise. Then decode the model "
            "first: nf4 dequantize"
        )
    return modules[form], name


def _parametrize(module: Any, name: str, weight: PackedWeight, dtype: Any) -> None:
    """Put bitsandbytes' parametrization over a packed parameter.

    Args:
        dtype: of the model, which the stack is decoded to.

    Raises:
        InputError: the parameter was not loaded, but left on the disk.
    """
    device = module._parameters[name].device
    if device.type == "meta":
        raise InputError(
            f"{weight.name} would stay on the disk: stacks of experts need to be in memory. Choose "
            "a device_map without 'disk'"
        )
    state = {}
    for shard, tensor in weight.parts()[1:]:
        with safe_open(shard.path, "pt") as file:
            state[tensor.name.removeprefix(weight.name + ".")] = file.get_tensor(tensor.name)
    bnb_parametrize.replace_parameter_4bit_prequantized(module, name, state, device)
    quant_state = module.parametrizations[name][0].quant_state
    if dtype.is_floating_point:
        quant_state.dtype = dtype
    module.parametrizations[name][0] = Decoder(quant_state)


class Decoder(bnb_parametrize.Bnb4bitParametrization):  # type: ignore[misc]
    """bitsandbytes' parametrization, which decodes a stack of any size to the right values."""

    def forward(self, quantized_param: Any) -> Any:
        """Return the decoded stack.

        Args:
            quantized_param: the packed one.
        """
        with torch.no_grad():
            return decoded(quantized_param, self.quant_state)


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
    absmax = state.absmax
    if state.nested:
        absmax = dequantize_blockwise(state.absmax, state.state2) + state.offset
    step = (most - 1) // size * size
    raw, out = packed.reshape(-1).view(torch.uint8), None
    for start in range(0, numel, step):
        count = min(step, numel - start)
        part = QuantState(
            absmax=absmax[start // size : (start + count) // size].float(),
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
