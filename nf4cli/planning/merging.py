"""Find for each weight of a model what adapters add to it.

An adapter names modules of the model that it was trained on: `base_model.model.` and the module's
path.  Every name has to fit a weight, and every shape; what fits nothing is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from ..checkpoint.adapter_files import Adapter
from ..checkpoint.types import Placed
from ..errors import InputError, UsageError
from ..format.dtypes import FLOAT64, TORCH_NAME
from . import selection
from .deltas import Delta, Matrix
from .plan import TensorPlan

_PREFIX = "base_model.model."
_OF_LORA = re.compile(
    r"(.+)\.(?:(lora_A|lora_B)(?:\.\w+)?\.(weight|bias)"
    r"|(lora_embedding_[AB])(?:\.\w+)?"
    r"|(lora_magnitude_vector)(?:\.\w+)??(?:\.weight)?)"
)
_WHOLE = re.compile(r"\.modules_to_save\.\w+\.|\.base_layer\.|\._orig_mod\.")
"""What PEFT and torch put into the name of a tensor that an adapter has whole."""


@dataclass(slots=True)
class _Module:
    """The tensors that an adapter has of one module, by their kind (`lora_A`), and the weights that
    it has whole, by the rest of their names (`weight`)."""

    parts: dict[str, Placed]
    whole: dict[str, Placed]


def merged(
    tensors: Iterable[TensorPlan], adapters: Iterable[Adapter], model_types: frozenset[str],
    tied: Iterable[str],
) -> list[TensorPlan]:  # fmt: skip
    """Return the plans of a model's weights with what adapters, in order, do to each.

    Args:
        model_types: families of the model.
        tied: modules that have no weight of their own, as another one's is used for them.

    Raises:
        InputError: a tensor of an adapter fits no weight, or not its shape; or two adapters cannot
            both have a weight.
    """
    plans = {t.name: t for t in tensors}
    for adapter in adapters:
        modules = _modules(adapter)
        rename = _renaming(adapter, modules, plans)
        for module, found in modules.items():
            for name, delta in _deltas(adapter, module, rename(module), found, plans, model_types):
                _refuse_tied(adapter, name, tied)
                plans[name] = _with(plans[name], delta)
    return list(plans.values())


def _modules(adapter: Adapter) -> dict[str, _Module]:
    """Return what an adapter has of each module, by its path in the adapter without PEFT's prefix.

    Raises:
        InputError: two tensors have the same name without what PEFT put into it.
    """
    modules: dict[str, _Module] = {}
    for tensor in adapter.shard.tensors:
        name = tensor.name.replace("._orig_mod.", ".").removeprefix("_orig_mod.")
        name = name.removeprefix("module.").removeprefix(_PREFIX)
        placed = adapter.shard, tensor
        if match := _OF_LORA.fullmatch(name):
            path = match[1]
            kind = match[2] or match[4] or match[5]
            if match[3] == "bias":
                kind += ".bias"
            table = modules.setdefault(path, _Module({}, {})).parts
        else:
            path, _, kind = _WHOLE.sub(".", name).rpartition(".")
            table = modules.setdefault(path, _Module({}, {})).whole
        if kind in table:
            raise InputError(
                f"{adapter.shard.path} holds both {table[kind][1].name!r} and {tensor.name!r}, "
                "which are the same tensor without what PEFT put into the names: remove the stale "
                "one"
            )
        table[kind] = placed
    return modules


class _Renamed:
    """Gives the path that a module of an adapter has in the model.

    Args:
        before, after: the part at the front that is another one in the model.
    """

    def __init__(self, before: str, after: str) -> None:
        self._before, self._after = before, after

    def __call__(self, module: str) -> str:
        return self._after + module.removeprefix(self._before)


def _renaming(
    adapter: Adapter, modules: Mapping[str, _Module], plans: Mapping[str, TensorPlan]
) -> _Renamed:
    """Return how the adapter's modules are called in the model.

    They may have another part at the front, such as that of a class around the model.  It has to be
    the same one for all modules, and the only one that fits.

    Raises:
        InputError: modules fit no weight.
    """
    paths = {name.rpartition(".")[0] for name in plans}
    missing = [module for module in modules if module not in paths]
    if not missing:
        return _Renamed("", "")
    first = next(iter(modules)).split(".")
    fitting = []
    for cut in range(len(first)):
        before, rest = "".join(f"{p}." for p in first[:cut]), ".".join(first[cut:])
        if not all(module.startswith(before) for module in modules):
            break
        for after in {p[: -len(rest)] for p in paths if p == rest or p.endswith(f".{rest}")}:
            if all(after + module.removeprefix(before) in paths for module in modules):
                fitting.append((before, after))
        if fitting:
            break
    if len(fitting) == 1:
        return _Renamed(*fitting[0])
    why = (
        f"they fit several: {', '.join(sorted(repr(after) for _, after in fitting)[:4])} in front"
        if fitting
        else f"no weight of the model is called so; its modules are called like {min(paths)!r}"
    )
    raise InputError(
        f"{adapter.name} changes {len(missing):,} modules that the model does not have, such as "
        f"{', '.join(repr(m) for m in sorted(missing)[:3])}: {why}. The adapter is of another "
        "model, or of experts that the model stores in one tensor: give its own base, or merge it "
        "with PEFT's merge_and_unload"
    )


def _deltas(
    adapter: Adapter, module: str, path: str, found: _Module, plans: Mapping[str, TensorPlan],
    model_types: frozenset[str],
) -> list[tuple[str, Delta]]:  # fmt: skip
    """Return (weight, what is done to it) of one module.

    Args:
        module, path: of the module in the adapter, and in the model.
    """
    deltas = []
    for leaf, placed in found.whole.items():
        name = f"{path}.{leaf}"
        _plan_of(adapter, name, placed, plans)
        _require_shape(adapter, name, placed, placed[1].shape, plans[name].weight.shape)
        if adapter.record.scale != 1:
            raise UsageError(
                f"--adapter-scale {adapter.record.scale} does not go with {adapter.name}, which "
                f"has {placed[1].name} whole (modules_to_save, a bias): a whole tensor has no scale"
            )
        deltas.append((name, Delta(adapter.name, Matrix(placed), replaces=True)))
    if found.parts:
        deltas += _of_lora(adapter, module, path, found.parts, plans, model_types)
    return deltas


def _of_lora(
    adapter: Adapter, module: str, path: str, parts: Mapping[str, Placed],
    plans: Mapping[str, TensorPlan], model_types: frozenset[str],
) -> list[tuple[str, Delta]]:  # fmt: skip
    """Return (weight, what is added to it) of a module that has a LoRA."""
    embedding = any(kind.startswith("lora_embedding") for kind in parts)
    narrow, wide = ("lora_embedding_B", "lora_embedding_A") if embedding else ("lora_B", "lora_A")
    for kind in (narrow, wide):
        if kind not in parts:
            have = ", ".join(sorted(placed[1].name for placed in parts.values()))
            raise InputError(
                f"{adapter.shard.path} has no {kind} of {module}, only {have}: the adapter is "
                "incomplete. Save or download it again"
            )
    name, first, second = f"{path}.weight", parts[narrow], parts[wide]
    plan = _plan_of(adapter, name, first, plans)
    rank = adapter.rank(module)
    for placed in (first, second):
        if len(placed[1].shape) != 2:
            raise InputError(
                f"{placed[1].name} in {adapter.shard.path} has shape {list(placed[1].shape)}, "
                "expected a matrix: nf4 merges no LoRA of a convolution. Merge it with PEFT's "
                "merge_and_unload"
            )
    (rows, r), (also_r, columns) = first[1].shape, second[1].shape
    if r != rank or also_r != rank:
        raise InputError(
            f"{adapter.shard.path}: {first[1].name} is {list(first[1].shape)} and {second[1].name} "
            f"{list(second[1].shape)}, but {module} has the rank {rank} by adapter_config.json: "
            "the two files are of different adapters"
        )
    conv1d = not embedding and selection.is_transposed(model_types, path.rpartition(".")[2])
    shape = (columns, rows) if embedding or conv1d else (rows, columns)
    _require_shape(adapter, name, first, shape, plan.weight.shape)
    magnitude = parts.get("lora_magnitude_vector")
    if bool(adapter.config.get("use_dora")) != (magnitude is not None):
        raise InputError(
            f"{adapter.shard.path} {'has no' if magnitude is None else 'has a'} "
            f"lora_magnitude_vector of {module}, but adapter_config.json says use_dora "
            f"{adapter.config.get('use_dora')!r}: the two files are of different adapters"
        )
    delta = Delta(adapter.name, Matrix(first), Matrix(second), adapter.scale(module), magnitude)
    # `delta` is of a matrix [out, in]; it is wanted as the plan reads the weight.
    turned = (embedding or conv1d) != (plan.view is not None)
    if magnitude is not None:
        _require_shape(adapter, name, magnitude, magnitude[1].shape, (rows,))
        if turned:
            raise InputError(
                f"{adapter.name} is a DoRA of {module}, whose rows nf4 does not read as rows (an "
                "embedding, or a Conv1D that is not quantized): merge it with PEFT's "
                "merge_and_unload"
            )
    found = [(name, delta.turn if turned else delta)]
    if "lora_B.bias" in parts:
        bias, placed = f"{path}.bias", parts["lora_B.bias"]
        _plan_of(adapter, bias, placed, plans)
        _require_shape(adapter, bias, placed, placed[1].shape, plans[bias].weight.shape)
        found.append((bias, Delta(adapter.name, Matrix(placed), scale=adapter.scale(module))))
    return found


def _plan_of(
    adapter: Adapter, name: str, placed: Placed, plans: Mapping[str, TensorPlan]
) -> TensorPlan:
    """Return the plan of a weight that an adapter changes.

    Raises:
        InputError: there is none, or it cannot be changed.
    """
    plan = plans.get(name)
    if plan is None or not plan.outputs:
        raise InputError(
            f"{placed[1].name} in {adapter.shard.path} fits no weight of the model: there is no "
            f"{name}. The adapter is of another model: give its own base"
        )
    joined = bool(plan.weight.parts) or plan.region is not None
    if joined or (plan.weight.view is not None and plan.packed is None):
        raise InputError(
            f"{adapter.name} changes {name}, which is a part of a tensor that holds all experts of "
            "a layer: nf4 does not merge into those. Take --target transformers, or merge it with "
            "PEFT's merge_and_unload"
        )
    if plan.weight.dtype not in TORCH_NAME and plan.weight.stored.dtype != FLOAT64:
        raise InputError(f"{adapter.name} changes {name}, which is {plan.weight.dtype}: no float")
    return plan


def _require_shape(
    adapter: Adapter, name: str, placed: Placed, shape: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    """Raise InputError if what an adapter has is not of its weight's shape."""
    if shape == expected:
        return
    raise InputError(
        f"{placed[1].name} in {adapter.shard.path} makes a change of shape {list(shape)}, and "
        f"{name} of the model has {list(expected)}: the adapter is of another model, or of this "
        "one with a resized vocabulary. Give its own base"
    )


def _refuse_tied(adapter: Adapter, name: str, tied: Iterable[str]) -> None:
    """Raise InputError if a weight is also another module's, which would change with it."""
    leaf = name.rpartition(".")[0].rpartition(".")[2]
    heads = list(tied)
    if heads and leaf in ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings"):
        raise InputError(
            f"{adapter.name} changes {name}, which the model also uses for {heads[0]} (tied): the "
            "change would be made in both, which is not what was trained. Untie the model first, "
            "save it with tie_word_embeddings false, and give that as the base"
        )


def _with(plan: TensorPlan, delta: Delta) -> TensorPlan:
    """Return a weight's plan with one more change.

    Raises:
        InputError: the change would undo that of an earlier adapter.
    """
    if delta.replaces and plan.view is not None:
        delta = delta.turn
    if delta.replaces and plan.deltas:
        raise InputError(
            f"{plan.deltas[-1].adapter} and {delta.adapter} both change {plan.name}, and the "
            "second one has it whole, which undoes the first: leave one of them out"
        )
    action = "cast" if plan.action == "copy" else plan.action
    return replace(plan, deltas=(*plan.deltas, delta), action=action)
