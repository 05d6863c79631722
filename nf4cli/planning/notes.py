"""Write the notes of a plan: what the user should know of it, one sentence each."""

from __future__ import annotations

from ..checkpoint.discovery import links_note, weights_note
from ..checkpoint.importance_file import ImportanceFile
from ..checkpoint.types import Checkpoint
from ..errors import InputError
from ..format.config import QuantConfig
from ..format.dtypes import FLOAT64, TORCH_NAME
from . import kept_with, model_config, selection
from .plan import TensorPlan, is_renamed
from .quantizers import leftover_note
from .tensor_names import prefix_note


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


def _float64_note(tensors: list[TensorPlan], dtype: str) -> list[str]:
    """Return a note about the tensors that are stored in float64, in a list; [] if there are none.

    Args:
        dtype: the model's, as torch spells it.
    """
    names = [t.name for t in tensors if t.weight.stored.dtype == FLOAT64 and t.outputs]
    return names and [
        f"{_some(names)} {'are' if names[1:] else 'is'} stored in float64, in which no loader of "
        f"4-bit models computes: each value is rounded once to {dtype}, the model's dtype, and "
        "what becomes 4-bit is packed from that"
    ]


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
    experts = [t for t in tensors if t.rule in ("experts", "fused-experts")]
    if experts:
        weights = [t for t in tensors if t.weight.dtype in TORCH_NAME and t.outputs]
        total = sum(t.numel for t in weights)
        bits = 8 * sum(t.nbytes_out for t in tensors) / total
        fused = all(t.rule == "fused-experts" for t in experts)
        notes.append(
            f"the experts stay in {config.dtype}: {sum(t.numel for t in experts) / total:.0%} of "
            f"all weights, so the output has {bits:.2f} bits a weight. "
            + (
                "They lie in 3-D parameters, which no loader holds in 4 bit"
                if fused
                else "transformers 5 cannot hold experts in 4 bit; vLLM and unsloth can: "
                "--target vllm, --target unsloth"
            )
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
    notes += leftover_note(checkpoint)
    notes += weights_note(checkpoint)
    notes += prefix_note((t.weight.stored.name, t.name) for t in tensors if is_renamed(t))
    notes += _float64_note(tensors, config.dtype)
    notes += model_config.dtype_notes(checkpoint, config.dtype)
    notes += links_note(checkpoint.root, checkpoint.left_files)
    pickles = [f for f in checkpoint.left_files if f.endswith("_Dense/pytorch_model.bin")]
    if pickles:
        notes.append(
            f"{pickles[0]} is a pickle that sentence-transformers needs and nf4 does not copy: "
            "save the model again with safetensors first"
        )
    return notes
