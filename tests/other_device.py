"""A second torch device, which computes on the CPU and refuses the CPU's tensors as a GPU does.

torch lets a program register a device of its own ("privateuseone"). Its tensors have no values that
torch could read: each operator is caught here, and run on tensors of the CPU that hold them. So a
tensor that was left on the CPU by mistake is found on a machine without a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, partial
from typing import Any

import torch
import torch.utils.backend_registration
from torch.utils import _pytree as pytree

DEVICE = "elsewhere"
_FROM_BOTH = ("_copy_from", "index.Tensor", "_index_put_impl_")  # a GPU takes them as well
_VIEWS = ("as_strided", "view", "_reshape_alias", "detach", "alias")
_held: dict[int, torch.Tensor] = {}  # by storage: its values, flat


def _is_here(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type == DEVICE


def _values(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor of the CPU with the same memory as one of the device."""
    flat = _held[tensor.untyped_storage()._cdata]
    return flat.view(tensor.dtype).as_strided(
        tensor.shape, tensor.stride(), tensor.storage_offset()
    )


def _put(values: torch.Tensor) -> torch.Tensor:
    """Return a tensor of the device."""
    tensor = torch._C._acc.create_empty_tensor(values.shape, values.dtype)
    _held[tensor.untyped_storage()._cdata] = values.contiguous().flatten()
    return tensor


def _call(operator: Any, *args: Any, **kwargs: Any) -> Any:
    """Run an operator on the values of its tensors."""
    name = operator._schema.name.removeprefix("aten::")
    tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    here = [t for t in tensors if _is_here(t)]
    if name not in _FROM_BOTH and here and any(t.ndim and not _is_here(t) for t in tensors):
        raise RuntimeError(f"{name}: expected all tensors to be on the same device")
    if name == "_fused_sdp_choice":
        return 0  # attention made of other operators
    if name in _VIEWS:
        return operator._op_dk(torch._C.DispatchKey.Meta, *args, **kwargs)
    values = {id(t): _values(t) for t in here}
    if name == "_copy_from":
        source, target = args[0], args[1]
        values.get(id(target), target).copy_(values.get(id(source), source))
        return target
    same = {id(values[id(t)]): t for t in here}  # an operator may return what it was given

    def there(value: Any) -> Any:
        if isinstance(value, torch.device):
            return torch.device("cpu")
        return values.get(id(value), value)

    def back(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return same[id(value)] if id(value) in same else _put(value)

    found = operator(*pytree.tree_map(there, args), **pytree.tree_map(there, kwargs))
    return pytree.tree_map(back, found)


@cache
def register() -> tuple[torch.library.Library, ...]:
    """Make the device known to torch, once in a process; the result has to be kept."""
    torch.utils.backend_registration._setup_privateuseone_for_python_backend(DEVICE)
    library = torch.library.Library("_", "IMPL")
    library.fallback(_call, "PrivateUse1")
    composed = torch.library.Library("aten", "IMPL")
    for operator in _composed():
        composed.impl(operator, partial(_call, operator), "PrivateUse1")
    return library, composed


def _composed() -> Iterator[Any]:
    """Yield what torch would compose of operators that resize an empty tensor given for the result.

    That resizing cannot be caught, so these are run as a whole.
    """
    for name in torch._C._dispatch_get_registrations_for_dispatch_key("CompositeExplicitAutograd"):
        base, _, overload = name.removeprefix("aten::").partition(".")
        if name == "aten::_to_copy" or not hasattr(torch.ops.aten, base):
            continue
        packet = getattr(torch.ops.aten, base)
        if (overload or "default") not in packet.overloads():
            continue
        operator = getattr(packet, overload or "default")
        results = operator._schema.returns
        if results and not any(r.alias_info for r in results) and "out" in str(packet.overloads()):
            yield operator
