"""Make the plan of a conversion: Checkpoint + QuantConfig -> Plan.

Headers and config.json decide the fate of each tensor, the place of every tensor in the output
files, and the new config.json.  Everything that can be refused is refused here.  Bytes of tensors
are read only by a `Scan`, for --on-nonfinite keep.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

from ..checkpoint import bnb_format
from ..checkpoint.adapter_files import Adapter
from ..checkpoint.bnb_format import QuantState
from ..checkpoint.discovery import WEIGHTS_KEY, shard_count, shard_name
from ..checkpoint.importance_file import ImportanceFile
from ..checkpoint.types import Checkpoint, Shard, TensorInfo, View, Weight
from ..checkpoint.untrusted import INDEX, MAX_ALL_TENSORS
from ..checkpoint.writer import ShardLayout, fill_shards, lay_out
from ..errors import InputError, UsageError
from ..format.config import QuantConfig
from ..format.dtypes import FLOAT64, ITEMSIZE, STORAGE_NAME, TORCH_NAME
from . import adapters, encodings, kept_with, model_config, selection, tensor_names, ties
from .answer import Answer
from .families import consult, names_of
from .formats import formats_of, require_formats
from .merging import merged
from .notes import importance_notes, merging_notes, notes_of
from .options import check_options
from .plan import Plan, TensorPlan
from .stacks import as_unsloth_holds, reading_order, require_whole_blocks, taken_apart
from .weights import Contents, contents

Oracle = Callable[[Checkpoint], Answer | None]
"""Given a source as the model holds it, returns what transformers says of it, or None where the
rules are enough."""

Scan = Callable[[Plan], Collection[str]]
"""Given a plan, returns the names of those weights to quantize that hold a NaN or an infinity
(convert/find_nonfinite.py)."""


_AS_STORED_RULES = (selection.DIFFUSERS_FP32, selection.KEPT_FP32, selection.BESIDE_DENOISER)
"""The rules that keep a tensor in the dtype that it is stored in."""


def no_scan(plan: Plan) -> Collection[str]:
    """Return (): a Scan that reads nothing, and leaves it to the conversion to refuse a NaN."""
    return ()


def make_plan(
    checkpoint: Checkpoint,
    config: QuantConfig,
    oracle: Oracle = consult,
    scan: Scan = no_scan,
    importance: ImportanceFile | None = None,
    merging: Sequence[Adapter] = (),
) -> Plan:
    """Decide the whole conversion of a checkpoint.

    Args:
        oracle: asked about the source, see `families.consult`.
        scan: called where config.on_nonfinite is "keep"; reads all that would be quantized.
        importance: of the input columns, by which `--scale search` weights the loss.
        merging: adapters that are merged first, in order.

    Raises:
        UsageError: an option has an impossible value, or a pattern matches nothing.
        InputError: the source is already quantized, is of a kind that nf4 cannot convert, or has
            nothing to quantize (NothingToQuantizeError); the importance is of another model.
    """
    check_options(config)
    _check_source(checkpoint, config)
    found = encodings.find(checkpoint, config.requantize)
    model_dtype = model_config.dtype_of(checkpoint, config.dtype, found.left)
    content = contents(checkpoint, found, model_dtype)
    model = content.as_checkpoint(checkpoint)
    tensor_names.check_layers(model)
    model_config.check_headers(model)
    answer = oracle(model)
    stacks, layout = frozenset[str](), ""
    if config.target == "unsloth" and config.expert_layout:
        content, stacks, layout = as_unsloth_holds(content, checkpoint)
        model = content.as_checkpoint(checkpoint)
    config = _resolved(config, checkpoint, model_dtype, answer, importance, layout, merging)
    names = names_of(checkpoint.config, answer)
    tied = ties.absent_tied(checkpoint.config, answer, model.tensors, names)
    is_float32 = ties.float32_test(checkpoint.config, answer, model_dtype, names)

    def decide(nonfinite: Collection[str]) -> Plan:
        choices = selection.select(model, config.keep, config.target, answer, nonfinite, stacks)
        skip = kept_with.skip_modules(choices, names, config.target, tied)
        selection.require_quantized(checkpoint, choices)  # skip_modules may have kept more
        # Stacks that stay floats are written as they are stored: every loader stacks those.
        written = taken_apart(content, {n for n in stacks if not choices[n].quantize}, checkpoint)
        choices = {
            source.name: replace(choices[w.name], float32=is_float32(source.name))
            for w in content.weights
            for source in (w, *w.parts)
        }
        tensors = _plan_weights(written, choices, config, model_dtype)
        tensors = merged(tensors, merging, selection.Context.of(checkpoint).model_types, tied)
        plan = _plan(checkpoint, config, tensors, written.left, skip, importance)
        more = *ties.random_head_note(checkpoint.config, tied), *merging_notes(plan, merging)
        return replace(plan, notes=(*plan.notes, *more))

    plan = decide(())
    nonfinite = scan(plan) if config.on_nonfinite == "keep" else ()
    return decide(nonfinite) if nonfinite else plan


def _resolved(
    config: QuantConfig,
    checkpoint: Checkpoint,
    model_dtype: str,
    answer: Answer | None,
    importance: ImportanceFile | None,
    layout: str,
    merging: Sequence[Adapter],
) -> QuantConfig:
    """Return the recipe with every "auto" resolved.

    Args:
        model_dtype: safetensors dtype of the model ("BF16").
        layout: of experts, see `QuantConfig.expert_layout`.
    """
    dtype = TORCH_NAME[model_dtype]
    cuts = "source" if len(checkpoint.shards) > 1 else ""
    return replace(
        config,
        dtype=dtype,
        compute_dtype=dtype if config.compute_dtype == "auto" else config.compute_dtype,
        asked=f"transformers {answer.version}" if answer else "",
        importance=importance.digest if importance else "",
        expert_layout=layout,
        adapters=tuple(adapter.record for adapter in merging),
        shard_cuts=cuts if config.shard_cuts == "auto" else config.shard_cuts,
    )


def _plan(
    checkpoint: Checkpoint,
    config: QuantConfig,
    tensors: list[TensorPlan],
    left: Mapping[str, str],
    skip: list[str],
    importance: ImportanceFile | None,
) -> Plan:
    """Return the plan that carries out a selection.

    Args:
        tensors: of the weights.
        left: see `Contents`.
        skip: llm_int8_skip_modules of the output.
    """
    _refuse_unknown_formats(tensors, config)
    tensors = tensors + [_drop(*checkpoint.tensors[name], why) for name, why in left.items()]
    require_whole_blocks(tensors, config)
    _refuse_key_clashes(tensors)
    tensors, shards = _place(tensors, checkpoint, config)
    index = index_of(shards)
    _refuse_unreadable(checkpoint, shards, index)
    return Plan(
        checkpoint=checkpoint,
        config=config,
        tensors=tuple(tensors),
        shards=tuple(shards),
        index=index,
        output_config=_output_config(checkpoint, config, tensors, skip),
        notes=(
            *notes_of(checkpoint, config, tensors),
            *(importance_notes(importance, tensors) if importance else ()),
        ),
        importance=importance,
    )


def _check_source(checkpoint: Checkpoint, config: QuantConfig) -> None:
    """Raise if a source is no whole model in full precision, or does not go with the options."""
    if checkpoint.is_diffusers and config.quant_storage != "uint8":
        raise UsageError(
            f"--quant-storage {config.quant_storage} does not go with {checkpoint.name}: diffusers "
            "reads uint8 only"
        )
    _refuse_part_of_a_set(checkpoint)
    adapters.refuse_adapter(checkpoint)
    _refuse_packed(checkpoint)


def _refuse_part_of_a_set(checkpoint: Checkpoint) -> None:
    """Raise InputError if the user named a single shard of several: it is not the model that the
    config.json beside it describes."""
    path = checkpoint.shards[0].path
    count = shard_count(path.name)
    if checkpoint.is_file and count > 1:
        raise InputError(
            f"{path} is one of {count} shards of a model: give its directory, {path.parent}"
        )


def _refuse_packed(checkpoint: Checkpoint) -> None:
    if bnb_format.quant_method(checkpoint.config) is not None:
        return  # encodings.py reads it or refuses it by name
    packed = bnb_format.find_quantized(checkpoint)
    if packed:
        raise InputError(
            f"{checkpoint.root} already holds packed 4-bit weights ({next(iter(packed))!r} and "
            f"{len(packed) - 1} more), though config.json does not say so: undo them first with "
            "nf4 dequantize"
        )


def _plan_weights(
    content: Contents, choices: Mapping[str, selection.Choice], config: QuantConfig, dtype: str
) -> list[TensorPlan]:
    """Return the plan of every weight, each packed one in its module's format."""
    recipe_of = formats_of(config)
    return [
        _plan_weight(w, choices[w.name], recipe_of(selection.module_path(w.name)), dtype)
        for w in content.weights
    ]


def _plan_weight(
    weight: Weight, choice: selection.Choice, config: QuantConfig, model_dtype: str
) -> TensorPlan:
    rule, view = choice.rule, weight.view
    if not choice.quantize:
        if weight.stored.dtype == FLOAT64 and rule in _AS_STORED_RULES:
            weight = replace(weight, dtype="F32")
        cast = (
            weight.dtype in TORCH_NAME
            and weight.stored.dtype != model_dtype
            and rule not in _AS_STORED_RULES
            and not (choice.float32 and weight.stored.dtype == "F32")
        )
        outputs = {weight.name: (model_dtype if cast else weight.dtype, weight.shape)}
        action = "cast" if cast or weight.stored.dtype == FLOAT64 else "copy"
        return TensorPlan(weight, action, rule.name, rule.reason, view, None, outputs)
    shape = weight.shape
    if choice.transposed:
        rows, columns = shape
        shape, view = (columns, rows), View(0, rows, columns, columns)
    packed_bytes = (prod(shape) + 1) // 2
    if packed_bytes % ITEMSIZE[STORAGE_NAME[config.quant_storage]]:
        raise UsageError(
            f"--quant-storage {config.quant_storage} does not fit {weight.name!r}, whose "
            f"{packed_bytes:,} packed bytes are no multiple of its size: use uint8, or keep the "
            f"module with --keep {selection.module_path(weight.name)}"
        )
    state = QuantState(
        quant_type=config.quant_type,
        blocksize=config.blocksize,
        dtype=TORCH_NAME[weight.dtype],
        shape=shape,
        nested=config.double_quant,
    )
    outputs = bnb_format.expected_tensors(weight.name, state, config.quant_storage)
    return TensorPlan(weight, "quantize", rule.name, rule.reason, view, state, outputs)


def _refuse_unknown_formats(tensors: Sequence[TensorPlan], config: QuantConfig) -> None:
    """Raise UsageError if the recipe gives a format to what does not become 4-bit."""
    if config.formats:
        paths = {selection.module_path(t.name): t.state is not None for t in tensors if t.outputs}
        packed = [path for path, is_packed in paths.items() if is_packed]
        require_formats(config, packed, paths.keys())


def _drop(shard: Shard, tensor: TensorInfo, reason: str) -> TensorPlan:
    weight = Weight(tensor.name, tensor.dtype, tensor.shape, shard, tensor)
    return TensorPlan(weight, "drop", "scale", reason, None, None, {})


def _refuse_key_clashes(tensors: list[TensorPlan]) -> None:
    owners: dict[str, str] = {}
    for plan in tensors:
        for key in plan.outputs:
            if key in owners:
                raise InputError(
                    f"the output key {key!r} is wanted by both {owners[key]!r} and "
                    f"{plan.name!r}: rename the tensor in the source"
                )
            owners[key] = plan.name


def _place(
    tensors: list[TensorPlan], checkpoint: Checkpoint, config: QuantConfig
) -> tuple[list[TensorPlan], list[ShardLayout]]:
    """Return all tensors with their output files, in reading order, and the layout of every file.

    Files are filled in the order of the source.  A weight and its companions stay together.
    """
    files = fill_shards(
        [plan for plan in tensors if plan.outputs],
        lambda plan: [(key, *spec) for key, spec in plan.outputs.items()],
        config.max_shard_size,
        source_file if config.shard_cuts else None,
    )
    layouts = []
    for number, members in enumerate(files):
        name = shard_name(checkpoint.stem, number, len(files))
        entries = [[(key, *spec) for key, spec in plan.outputs.items()] for plan in members]
        # The parts of a stack do not arrive in its order.
        scattered = [bool(plan.weight.parts) for plan in members]
        layouts.append(
            lay_out(
                name,
                [e[0] for e, apart in zip(entries, scattered, strict=True) if not apart],
                [t for e, apart in zip(entries, scattered, strict=True) for t in e[not apart :]],
            )
        )
    placed = [replace(plan, file=i) for i, members in enumerate(files) for plan in members]
    placed += [plan for plan in tensors if not plan.outputs]
    # Read in the order of the source: its files are digested on the way.
    by_place = reading_order(checkpoint)
    placed.sort(key=lambda plan: by_place(plan.weight))
    return placed, layouts


def _refuse_unreadable(
    checkpoint: Checkpoint, shards: Sequence[ShardLayout], index: dict[str, Any] | None
) -> None:
    """Raise InputError if the output would be larger than what `open_checkpoint` reads."""
    count = sum(len(layout.tensors) for layout in shards)
    names = index["weight_map"].items() if index else ()
    nbytes = sum(len(key) + len(filename) + 10 for key, filename in names)
    if count > MAX_ALL_TENSORS or nbytes > INDEX.nbytes:
        raise InputError(
            f"{checkpoint.name} would become {count:,} tensors with an index of {nbytes:,} bytes: "
            f"nf4 reads no more than {MAX_ALL_TENSORS:,} and {INDEX.nbytes:,}. --target unsloth "
            "and --no-double-quant make fewer"
        )


def source_file(plan: TensorPlan) -> Path:
    """Return the source file that a weight is complete with."""
    return plan.weight.sources[-1].shard.path


def index_of(shards: Sequence[ShardLayout]) -> dict[str, Any] | None:
    """Return the content of the index file, None for a single shard, which needs none."""
    if len(shards) == 1:
        return None
    return {
        "metadata": {
            "total_size": sum(t.nbytes for layout in shards for t in layout.tensors.values())
        },
        "weight_map": {
            key: layout.filename
            for key, layout in sorted((k, layout) for layout in shards for k in layout.tensors)
        },
    }


def _output_config(
    checkpoint: Checkpoint, config: QuantConfig, tensors: Sequence[TensorPlan], skip: list[str]
) -> dict[str, Any] | None:
    """Return the new config.json, None where the source has none.

    Loaders read each weight's own state; of several formats, config.json tells one.
    """
    if not checkpoint.config:
        return None
    output = model_config.without_quantization(checkpoint.config)
    output.pop(WEIGHTS_KEY, None)  # the output's files have the names that a loader looks for
    model_config.set_dtype(output, config.dtype)
    output["quantization_config"] = bnb_format.quantization_config(
        config.quant_type,
        any(tensor.state.nested for tensor in tensors if tensor.state),
        config.quant_storage,
        config.compute_dtype,
        skip,
    )
    return output
