"""Write the notes of a plan: what the user should know of it, one sentence each."""

from __future__ import annotations

from collections.abc import Iterator

from ..checkpoint.discovery import links_note
from ..checkpoint.importance_file import ImportanceFile
from ..checkpoint.types import Checkpoint
from ..errors import InputError
from ..format.config import QuantConfig
from ..format.dtypes import TORCH_NAME
from . import kept_with, selection, vllm_rules
from .plan import TensorPlan


def _some(names: list[str]) -> str:
    """Return the first five names in words, and how many more there are."""
    more = len(names) - 5
    return ", ".join(names[:5]) + (f" and {more:,} more" if more > 0 else "")


def importance_notes(importance: ImportanceFile, tensors: list[TensorPlan]) -> list[str]:
    """Return a note that names the quantized weights whose importance is not known, if any.

    Raises:
        InputError: the importance has another number of columns than a weight, or knows none of
            the quantized weights.
    """
    missing = []
    for tensor in tensors:
        if tensor.state is None:
            continue
        columns = importance.columns.get(tensor.name)
        if columns is None:
            missing.append(tensor.name)
        elif columns.size != tensor.state.shape[-1]:
            raise InputError(
                f"{importance.path} has {columns.size:,} columns of {tensor.name}, the model has "
                f"{tensor.state.shape[-1]:,}: it was measured on another model"
            )
    quantized = sum(tensor.state is not None for tensor in tensors)
    if quantized and len(missing) == quantized:
        raise InputError(
            f"{importance.path} knows none of the {quantized:,} weights to quantize, such as "
            f"{missing[0]}: it was measured on another model"
        )
    if not missing:
        return []
    return [
        f"nothing is known of the inputs of {_some(missing)}: {'their' if missing[1:] else 'its'} "
        "scales were chosen without data"
    ]


def _stays_in_float32(tensor: TensorPlan, config: QuantConfig) -> bool:
    """Return whether a float32 tensor of a 16-bit model is kept for the family's sake.

    What chooses between experts has a rule of its own, and so has diffusers.
    """
    has_rule = tensor.rule in (selection.DIFFUSERS_FP32.name, selection.KEPT_FP32.name)
    return (
        tensor.action == "copy"
        and tensor.weight.dtype == "F32"
        and config.dtype != "float32"
        and not has_rule
    )


def _expert_notes(
    checkpoint: Checkpoint, config: QuantConfig, tensors: list[TensorPlan]
) -> Iterator[str]:
    """Yield what experts that stay floats cost, and that vLLM does not load them.

    Args:
        config: with every "auto" resolved.
    """
    experts = [t for t in tensors if t.rule in ("experts", "fused-experts")]
    vllm = "vLLM loads no bitsandbytes checkpoint with experts in 16 bits"
    if experts:
        weights = [t for t in tensors if t.weight.dtype in TORCH_NAME and t.outputs]
        total = sum(t.numel for t in weights)
        bits = 8 * sum(t.nbytes_out for t in tensors) / total
        fused = all(t.rule == "fused-experts" for t in experts)
        yield (
            f"the experts stay in {config.dtype}: {sum(t.numel for t in experts) / total:.0%} of "
            f"all weights, so the output has {bits:.2f} bits a weight. "
            + (
                f"They lie in 3-D parameters, which no loader holds in 4 bit; {vllm}"
                if fused
                else "transformers 5 cannot hold experts in 4 bit; vLLM and unsloth can: "
                f"--target vllm, --target unsloth. {vllm}, so it does not load this output"
            )
        )
    elif config.target == "transformers" and not checkpoint.is_diffusers:
        kept = [t.name for t in tensors if t.state is None and vllm_rules.is_expert(t)]
        if kept:
            yield f"{_some(kept)} {'stay' if kept[1:] else 'stays'} in {config.dtype}: {vllm}"


def _vllm_notes(config: QuantConfig, tensors: list[TensorPlan], nonfinite: bool) -> Iterator[str]:
    """Yield the notes of a plan that is made for vLLM.

    Args:
        config: with every "auto" resolved.
        nonfinite: whether another note names what is kept along with a NaN.
    """
    along = [t.name for t in tensors if t.rule == selection.FUSED_WITH.name]
    if along and not nonfinite:
        yield (
            f"{_some(along)} {'stay' if along[1:] else 'stays'} in {config.dtype}: vLLM loads "
            f"{'them' if along[1:] else 'it'} as one with what has to be kept"
        )
    if config.dtype == "float32":
        yield (
            "the model is float32, and vLLM computes with bitsandbytes checkpoints in 16 bits "
            "only: it does not load this output. Convert with --dtype bfloat16"
        )


def notes_of(checkpoint: Checkpoint, config: QuantConfig, tensors: list[TensorPlan]) -> list[str]:
    """Return the notes of a checkpoint's plan.

    Args:
        config: with every "auto" resolved.
    """
    notes = []
    nonfinite = [t.name for t in tensors if t.rule == selection.NONFINITE.name]
    if nonfinite:
        along = [t.name for t in tensors if t.rule in kept_with.FOLLOWING]
        notes.append(
            f"{_some(nonfinite)} {'hold' if nonfinite[1:] else 'holds'} a NaN or an infinity and "
            f"{'stay' if nonfinite[1:] else 'stays'} in {config.dtype}"
            + (f"; so do, as loaders take them for the same, {_some(along)}" if along else "")
            + ". Whatever the model computes with it is not finite either: repair the source"
        )
    notes += _expert_notes(checkpoint, config, tensors)
    if config.target == "vllm":
        notes += _vllm_notes(config, tensors, bool(nonfinite))
    float32 = [t.name for t in tensors if _stays_in_float32(t, config)]
    if float32:
        notes.append(
            f"{_some(float32)} {'stay' if float32[1:] else 'stays'} in float32, as in the source: "
            f"transformers holds {'them' if float32[1:] else 'it'} in float32 whatever the model's "
            "dtype is"
        )
    if not checkpoint.config:
        notes.append(
            "there is no config.json: the output holds tensors only, and heads or embeddings with "
            "unusual names were not recognised by their vocabulary size"
        )
    if config.asked:
        notes.append(
            f"{config.asked} was asked which modules it holds in 4 bit (its answer is recorded in "
            "the manifest)"
        )
    notes += links_note(checkpoint.root, checkpoint.left_files)
    pickles = [f for f in checkpoint.left_files if f.endswith("_Dense/pytorch_model.bin")]
    if pickles:
        notes.append(
            f"{pickles[0]} is a pickle that sentence-transformers needs and nf4 does not copy: "
            "save the model again with safetensors first"
        )
    return notes
