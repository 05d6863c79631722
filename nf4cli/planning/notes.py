"""Write the notes of a plan: what the user should know of it, one sentence each."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from ..checkpoint import model_files
from ..checkpoint.adapter_files import Adapter
from ..checkpoint.discovery import (
    REPOSITORYS,
    is_weight_file,
    sentence_transformers_modules,
    weights_note,
)
from ..checkpoint.importance_file import ImportanceFile
from ..checkpoint.reader import read_shard
from ..checkpoint.types import Checkpoint
from ..checkpoint.untrusted import home_of, is_regular, leads_out
from ..errors import InputError
from ..format.config import QuantConfig
from ..format.dtypes import FLOAT64, TORCH_NAME
from . import kept_with, model_config, selection, vllm_rules
from .plan import Plan, TensorPlan, is_renamed
from .quantizers import leftover_note
from .tensor_names import prefix_note

_OTHERS = "files that a model is not made of"


def _some(names: list[str]) -> str:
    """Return the first five names in words, and how many more there are."""
    more = len(names) - 5
    return ", ".join(names[:5]) + (f" and {more:,} more" if more > 0 else "")


def merging_notes(plan: Plan, merging: Iterable[Adapter]) -> list[str]:
    """Return notes of the adapters that are merged: how many weights, and which base they name."""
    every, notes, checkpoint = list(merging), [], plan.checkpoint
    for adapter in every:
        base = adapter.config.get("base_model_name_or_path")
        revision = adapter.config.get("revision")
        origin = checkpoint.origin
        names = {checkpoint.name, str(checkpoint.root), origin.repo if origin else ""}
        if isinstance(base, str) and base and not {base, base.rpartition("/")[2]} & names:
            notes.append(
                f"{adapter.name} names {base!r} as its base, and {checkpoint.name} is given: names "
                "and shapes fit, but only the weights that it was trained on make it right"
            )
        if isinstance(revision, str) and revision and (not origin or origin.commit != revision):
            given = f"commit {origin.commit}" if origin else "a base without a commit"
            notes.append(f"{adapter.name} names revision {revision!r} of its base; this is {given}")
    if every:
        count = sum(bool(t.deltas) for t in plan.tensors)
        called = ", then ".join(adapter.name for adapter in every)
        notes.append(f"{count:,} weights are merged in float32 with {called}")
    return notes


def importance_notes(importance: ImportanceFile, tensors: list[TensorPlan]) -> list[str]:
    """Return a note that names the quantized weights whose importance is not known, if any.

    Raises:
        InputError: the importance has another number of columns than a weight, or knows none of
            the quantized weights.
    """
    missing = []
    quantized = {
        source.name: tensor.state.shape[-1]
        for tensor in tensors
        if tensor.state is not None
        for source in tensor.weight.sources
    }
    for name, width in quantized.items():
        columns = importance.columns.get(name)
        if columns is None:
            missing.append(name)
        elif columns.size != width:
            raise InputError(
                f"{importance.path} has {columns.size:,} columns of {name}, the model has "
                f"{width:,}: it was measured on another model"
            )
    if quantized and len(missing) == len(quantized):
        raise InputError(
            f"{importance.path} knows none of the {len(quantized):,} weights to quantize, such as "
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

    What chooses between experts has a rule of its own, and so have diffusers and single files.
    """
    rules = (selection.DIFFUSERS_FP32, selection.KEPT_FP32, selection.BESIDE_DENOISER)
    has_rule = tensor.rule in {rule.name for rule in rules}
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
            "the model is float32, and vLLM computes with bitsandbytes checkpoints in 16 bits: it "
            "rounds what it loads, and fails with --dtype float32. Convert with --dtype bfloat16, "
            "and the output is smaller"
        )


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


def _encoded_note(tensors: list[TensorPlan], dtype: str) -> list[str]:
    """Return a note about the weights that are stored as codes, in a list; [] if there are none.

    Args:
        dtype: the model's, as torch spells it.
    """
    encoded = [t for t in tensors if t.weight.encoding is not None]
    if not encoded:
        return []
    formats = {t.weight.encoding.format for t in encoded if t.weight.encoding is not None}
    again = any(t.state is not None for t in encoded)
    return [
        f"{len(encoded):,} {'weights are' if encoded[1:] else 'weight is'} stored in "
        f"{' and '.join(sorted(formats))}, and decoded to {dtype} first"
        + (
            ". What becomes 4-bit is rounded a second time; the errors are against the decoded "
            "values, not against the model before its first rounding"
            if again
            else ""
        )
    ]


def _nonfinite_note(nonfinite: list[str], tensors: list[TensorPlan], dtype: str) -> list[str]:
    """Return a note about weights that stay in float for a NaN, in a list; [] if there are none.

    Args:
        nonfinite: their names.
        dtype: the model's, as torch spells it.
    """
    if not nonfinite:
        return []
    along = [t.name for t in tensors if t.rule in kept_with.FOLLOWING]
    return [
        f"{_some(nonfinite)} {'hold' if nonfinite[1:] else 'holds'} a NaN or an infinity and "
        f"{'stay' if nonfinite[1:] else 'stays'} in {dtype}"
        + (f"; so do, as loaders take them for the same, {_some(along)}" if along else "")
        + ". Whatever the model computes with it is not finite either: repair the source"
    ]


def notes_of(checkpoint: Checkpoint, config: QuantConfig, tensors: list[TensorPlan]) -> list[str]:
    """Return the notes of a checkpoint's plan.

    Args:
        config: with every "auto" resolved.
    """
    notes: list[str] = []
    nonfinite = [t.name for t in tensors if t.rule == selection.NONFINITE.name]
    notes += _nonfinite_note(nonfinite, tensors, config.dtype)
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
    if "quantization" in checkpoint.params:
        notes.append(
            "params.json is copied as it is, and says how the source's weights were quantized: "
            'take its "quantization" out before a program reads the output by it'
        )
    if not checkpoint.config:
        notes.append(
            "there is no config.json: the output holds tensors only"
            + (
                ""
                if checkpoint.params.get("vocab_size")
                else ", and heads or embeddings with unusual names were not recognised by their "
                "vocabulary size"
            )
        )
    if config.asked:
        notes.append(
            f"{config.asked} was asked which modules it holds in 4 bit (its answer is recorded in "
            "the manifest)"
        )
    if checkpoint.index_errors:
        notes.append(
            f"{'; '.join(checkpoint.index_errors)}: loaders pass over that, and the output's index "
            "is right"
        )
    notes += leftover_note(checkpoint)
    notes += weights_note(checkpoint)
    notes += prefix_note((t.weight.stored.name, t.name) for t in tensors if is_renamed(t))
    notes += _float64_note(tensors, config.dtype)
    notes += _encoded_note(tensors, config.dtype)
    notes += model_config.dtype_notes(checkpoint, config.dtype)
    return notes + copies_notes(
        checkpoint.root,
        checkpoint.extra_files,
        checkpoint.left_files,
        [shard.path for shard in checkpoint.shards],
    )


def copies_notes(
    root: Path, copied: Iterable[str], left: Iterable[str], shards: Iterable[Path] = ()
) -> list[str]:
    """Return notes about the files beside a model: what is copied in full precision, what is not.

    Args:
        root: directory of the model.
        copied, left: paths relative to it.
        shards: weight files of the model; of a pipeline none, whose components have them.
    """
    shards, copied = tuple(shards), tuple(copied)
    rest = {n for n in left if n not in REPOSITORYS and not n.endswith(".index.json")}
    home = home_of(root, shards)
    links = {n for n in rest if (root / n).is_symlink() and leads_out(root / n, root, home)}
    links = {name for name in links if not is_weight_file(name)}
    adapters = {name for name in rest - links if model_files.is_adapter(name)}
    pickles = _needed_pickles(rest - links, copied)
    rest -= links | adapters | pickles
    return [
        *_links_note(links),
        *_adapter_note(adapters),
        *(_parts_note(root, copied) if shards else ()),
        *_pickles_note(root, pickles),
        *_left_note(root, rest),
    ]


def _links_note(links: Collection[str]) -> list[str]:
    if not links:
        return []
    return [
        "not copied are links that lead to something that is not the model's, which would be "
        f"published with it: {_some(sorted(links))}. Copy the files themselves there if they "
        "belong to it"
    ]


def _adapter_note(adapters: Collection[str]) -> list[str]:
    if not adapters:
        return []
    return [
        f"{' and '.join(sorted(adapters))} beside the model {_are(adapters)} of a PEFT adapter, "
        f"and {_are(adapters)} not copied: loaders would apply the adapter once more, or fail. If "
        "it is not merged into these weights yet, merge it first"
    ]


def _parts_note(root: Path, copied: Iterable[str]) -> list[str]:
    """Return a note that names the parts beside a model which are copied in full precision."""
    modules = sentence_transformers_modules(root)
    parts = [n for n in copied if n.endswith(".safetensors") and (root / n).parent not in modules]
    if not parts:
        return []
    return [
        f"{_some(parts)} {'lie' if parts[1:] else 'lies'} beside the model and {_are(parts)} "
        "copied byte for byte, in full precision"
    ]


def _needed_pickles(left: Iterable[str], copied: Iterable[str]) -> set[str]:
    """Return the pickles among the files that are left which hold something else than the model."""
    has_weights = {name.rpartition("/")[0] for name in copied if name.endswith(".safetensors")}
    return {
        name
        for name in left
        if model_files.is_like(name, model_files.PICKLES)
        and not model_files.never_kind(name)
        and not model_files.is_same_weights(name)
        and not (
            name.rpartition("/")[0] in has_weights
            and model_files.is_same_weights(name.rpartition("/")[2])
        )
    }


def _pickles_note(root: Path, pickles: Collection[str]) -> list[str]:
    modules = sentence_transformers_modules(root)
    needed = sorted(name for name in pickles if (root / name).parent in modules)
    others = sorted(set(pickles) - {*needed})
    notes = []
    if needed:
        notes.append(
            f"{_some(needed)} {'are pickles' if needed[1:] else 'is a pickle'} that "
            "sentence-transformers needs and nf4 does not copy: save the model again with "
            "safetensors first, or copy the file as it is with --copy"
        )
    if others:
        notes.append(
            f"{_some(others)} beside the model {'are pickles' if others[1:] else 'is a pickle'}, "
            "which nf4 neither opens nor copies: a program that loads "
            f"{'them' if others[1:] else 'it'} will find nothing. Save "
            f"{'them' if others[1:] else 'it'} as safetensors first, or copy what you trust with "
            "--copy"
        )
    return notes


def _left_note(root: Path, left: Iterable[str]) -> list[str]:
    """Return a note about the other files that are not copied, by kind.

    There is none where all of them repeat the model's weights, as in most repositories.
    """
    left = sorted(left)
    if all(is_weight_file(n) and model_files.is_same_weights(n.rpartition("/")[2]) for n in left):
        return []
    kinds: dict[str, list[str]] = {}
    for name in left:
        kinds.setdefault(_kind_of(root, name), []).append(name)
    said = [f"{kind} ({_places(names)})" for kind, names in sorted(kinds.items())]
    advice = "; --copy PATTERN copies more" if _OTHERS in kinds else ""
    return [f"not copied: {', '.join(said)}{advice}"]


def _kind_of(root: Path, name: str) -> str:
    """Return the kind of a file that is not copied, in words."""
    if kind := model_files.never_kind(name):
        return kind
    if not is_weight_file(name.rpartition("/")[2]):
        return _OTHERS
    if model_files.may_be_part(name) and is_regular(root / name):
        try:
            read_shard(root / name)
        except InputError:
            return "safetensors that cannot be read"
    return "other weight files"


def _places(names: Iterable[str]) -> str:
    """Return files in words; those in a subdirectory by the subdirectory alone."""
    return _some(list(dict.fromkeys(n.partition("/")[0] + "/" * ("/" in n) for n in names)))


def _are(names: Collection[str]) -> str:
    return "are" if len(names) > 1 else "is"
