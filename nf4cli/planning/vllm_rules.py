"""What vLLM takes of a 4-bit checkpoint: what it loads as one, and mixtures of experts.

vLLM 0.32 with its plugin for bitsandbytes was run and read.  It joins the packed experts of a layer
into one weight with one list of scales, and asks for every expert in 4 bits whatever the skip list
says.  Where that list does not fit, it decodes other weights than were written, without a word.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from ..errors import InputError, UsageError
from ..format.codebook import BLOCKSIZES
from . import selection
from .plan import Plan, TensorPlan

_FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
    "in_proj_qkvz": ("in_proj_qkv", "in_proj_z"),
    "in_proj_ba": ("in_proj_b", "in_proj_a"),
}
"""Module of vLLM -> the modules of transformers that it loads as this one."""


def partners(module: str, packed: Collection[str]) -> list[str]:
    """Return the packed modules that vLLM loads as one with `module`."""
    layer, experts, _ = module.partition(".experts.")
    if experts:
        return [other for other in packed if other.startswith(f"{layer}.experts.")]
    parent, _, leaf = module.rpartition(".")
    parts = [part for parts in _FUSED.values() if leaf in parts for part in parts]
    return [f"{parent}.{part}" for part in parts if f"{parent}.{part}" in packed]


def partners_to_keep(kept: Mapping[str, selection.Choice], packed: Collection[str]) -> set[str]:
    """Return the packed modules that vLLM loads as one with a module that has to be kept.

    Where --keep names a part, `fused_modules` has the user decide.
    """
    return {
        partner
        for module, choice in kept.items()
        if choice.rule in (selection.NONFINITE, selection.FUSED_WITH)
        or not (choice.rule is selection.USER or ".experts." in module)
        for partner in partners(module, packed)
    }


def fused_modules(kept: Collection[str], packed: Collection[str]) -> list[str]:
    """Return vLLM's names for the modules that it fuses from kept ones: vLLM matches its skip list
    against these.

    Raises:
        UsageError: one part of a fused module is kept and another is packed.  All experts of a
            layer are one fused module.
    """
    kept_set, packed_set = set(kept), set(packed)
    experts = {module.partition(".experts.")[0] for module in packed_set if ".experts." in module}
    fused = []
    for module in sorted(kept_set):
        if ".experts." in module and module.partition(".experts.")[0] in experts:
            raise UsageError(
                f"--target vllm: {module} stays in full precision and other experts of its layer "
                "do not, but vLLM loads them as one, and in 4 bits only: keep them all, with "
                "--target transformers or unsloth, or none"
            )
        parent, _, leaf = module.rpartition(".")
        for name, parts in _FUSED.items():
            if leaf not in parts or "experts" in parent.split("."):
                continue
            siblings = (f"{parent}.{part}" for part in parts)
            other = next((sibling for sibling in siblings if sibling in packed_set), None)
            if other is not None:
                raise UsageError(
                    f"--target vllm: {module} stays in full precision and {other} does not, but "
                    f"vLLM loads both as one {name}: keep both, or none"
                )
            fused.append(f"{parent}.{name}")
    return list(dict.fromkeys(fused))


def require_loadable(plan: Plan) -> None:
    """Raise if a plan made for vLLM writes experts that vLLM does not load, or decodes wrongly.

    A proof makes plans as well, of outputs that are there: it does not ask.

    Raises:
        UsageError: an option says so: --keep, --quant-type, --blocksize.
        InputError: the source says so: a NaN, experts in 3-D parameters, of several dtypes, or of
            sizes that no blocksize divides.
    """
    if plan.config.target != "vllm":
        return
    experts = [tensor for tensor in plan.tensors if is_expert(tensor)]
    packed = [tensor for tensor in experts if tensor.state is not None]
    _refuse_kept([tensor for tensor in experts if tensor.state is None], plan.config.dtype)
    if packed and plan.config.quant_type != "nf4":
        raise UsageError(
            f"--quant-type {plan.config.quant_type} does not go with --target vllm and "
            f"{packed[0].name}: vLLM decodes experts as nf4, whatever they are. Leave the option "
            "out, or convert for another loader: --target unsloth"
        )
    _refuse_partial_blocks(packed)
    _refuse_several_formats(packed)
    _refuse_several_dtypes(packed)


def is_expert(tensor: TensorPlan) -> bool:
    """Return whether a weight is an expert, or all experts of a layer, in a layer that loaders
    load."""
    if not tensor.outputs or tensor.rule in ("extra-layer", "router", "dtype"):
        return False
    parts = tensor.name.split(".")
    if len(tensor.weight.shape) == 3:
        return "experts" in parts or any("moe" in part for part in parts[:-1])
    return len(tensor.weight.shape) == 2 and "experts" in parts[:-1] and "bias" not in parts[-1]


def _refuse_kept(kept: list[TensorPlan], dtype: str) -> None:
    """Raise if there is an expert that stays a float."""
    if not kept:
        return
    # The one that the others are kept for is the one to speak of.
    first = next((t for t in kept if t.rule == selection.NONFINITE.name), kept[0])
    if first.rule == selection.USER.name:
        raise UsageError(
            f"--target vllm: {first.name} would stay in {dtype} by --keep, and vLLM loads no "
            "bitsandbytes checkpoint with experts in 16 bits: keep none of them, or convert for "
            "another loader: --target transformers or unsloth"
        )
    raise InputError(
        f"--target vllm: {first.name} would stay in {dtype} ({first.reason}), and vLLM loads no "
        "bitsandbytes checkpoint with experts in 16 bits: "
        + ("repair the source, or " if first.rule == selection.NONFINITE.name else "")
        + "convert for another loader: --target transformers or unsloth"
    )


def _refuse_partial_blocks(packed: list[TensorPlan]) -> None:
    """Raise if a packed expert ends with a block that is not full."""
    states = ((tensor, tensor.state) for tensor in packed if tensor.state)
    first, blocksize = next(
        ((t, state.blocksize) for t, state in states if t.numel % state.blocksize), (None, 0)
    )
    if first is None:
        return
    what = (
        f"--target vllm: {first.name} has {first.numel:,} weights, no multiple of the blocksize "
        f"{blocksize}. vLLM joins the blocks of all experts, and would give weights the scales of "
        "others"
    )
    fitting = [size for size in BLOCKSIZES if not any(t.numel % size for t in packed)]
    if not fitting:
        raise InputError(
            f"{what}. No blocksize divides all experts: convert for another loader, --target "
            "transformers"
        )
    raise UsageError(f"{what}: take --blocksize {' or '.join(str(size) for size in fitting)}")


def _refuse_several_formats(packed: list[TensorPlan]) -> None:
    """Raise UsageError if a recipe gives the packed experts of a layer several formats."""
    first_of: dict[str, TensorPlan] = {}
    for tensor in packed:
        first = first_of.setdefault(tensor.name.partition(".experts.")[0], tensor)
        own, others = ((t.state.blocksize, t.state.nested) for t in (tensor, first) if t.state)
        if own != others:
            raise UsageError(
                f"--target vllm: the recipe gives {tensor.name} and {first.name} different "
                "formats, but vLLM loads all experts of a layer as one: give them the same, or "
                "convert for another loader: --target transformers"
            )


def _refuse_several_dtypes(packed: list[TensorPlan]) -> None:
    """Raise InputError if the packed experts of a layer were stored in several dtypes."""
    first_of: dict[str, TensorPlan] = {}
    for tensor in packed:
        layer = tensor.name.partition(".experts.")[0]
        first = first_of.setdefault(layer, tensor)
        if tensor.weight.dtype != first.weight.dtype:
            raise InputError(
                f"--target vllm: {tensor.name} is {tensor.weight.dtype} and {first.name} is "
                f"{first.weight.dtype}, but vLLM loads them as one: save the source in one dtype, "
                "or convert for another loader: --target transformers"
            )
