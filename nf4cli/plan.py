"""Checkpoint + QuantConfig -> Plan: everything that will be written, before a byte is read.

From headers alone: each tensor's fate and why, every output file with the place of every tensor,
the exact sizes, config.json.  Everything that can be refused is refused here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Any

from . import bnb_format, keeping, model_config, selection
from .bnb_format import QuantState
from .codebook import BLOCKSIZES, QUANT_TYPES
from .errors import InputError, UsageError
from .families import consult, names_of
from .importance import ImportanceFile
from .records import (
    ITEMSIZE,
    METHODS,
    ON_NONFINITE,
    SAFETENSORS_NAME,
    SCALES,
    STORAGE_NAME,
    TARGETS,
    TORCH_NAME,
    Answer,
    Checkpoint,
    QuantConfig,
    Shard,
    TensorInfo,
    View,
    Weight,
)
from .source import links_note, shard_count, shard_name
from .weights import Contents, contents
from .writer import ShardLayout, fill_shards, lay_out

if TYPE_CHECKING:
    from .codes import CodeSource
    from .engines import F32


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """What happens to one weight, or to a stored tensor that becomes none.

    Attributes:
        weight: what it is and where it lies.
        action: "quantize", "cast", "copy", or "drop" for a tensor that nothing is written for.
        rule: the name of the selection rule that decided.
        reason: the same in words.
        view: the stored matrix whose transpose is written (Conv1D, fused experts), None for
            the tensor as it lies.
        state: for "quantize": the quantization state, its offset not known yet.
        outputs: key -> (dtype, shape) of everything written for it, the weight itself first.
        file: index of the output shard it goes to.
    """

    weight: Weight
    action: str
    rule: str
    reason: str
    view: View | None
    state: QuantState | None
    outputs: Mapping[str, tuple[str, tuple[int, ...]]]
    file: int = 0

    @property
    def name(self) -> str:
        """Its key in the output."""
        return self.weight.name

    @property
    def numel(self) -> int:
        """Elements."""
        return prod(self.weight.shape)

    @property
    def nbytes_out(self) -> int:
        return sum(_nbytes(dtype, shape) for dtype, shape in self.outputs.values())


@dataclass(frozen=True, slots=True)
class Plan:
    """The whole conversion, decided.

    Attributes:
        checkpoint: the source.
        config: as asked, with every "auto" resolved.
        tensors: in the order they will be read.
        shards: output files.
        index: content of the index, None for a single output file.
        output_config: content of the new config.json, None where the source has none.
        notes: what the user should know, one sentence each.
        importance: what the loss is weighted by, None for no data.
        codes: those that are not the nearest, None where all are.
    """

    checkpoint: Checkpoint
    config: QuantConfig
    tensors: tuple[TensorPlan, ...]
    shards: tuple[ShardLayout, ...]
    index: dict[str, Any] | None
    output_config: dict[str, Any] | None
    notes: tuple[str, ...]
    importance: ImportanceFile | None = None
    codes: CodeSource | None = None

    def importance_of(self, tensor: TensorPlan) -> F32 | None:
        """float32 [columns] of a weight's matrix, None where nothing is known of it."""
        found = self.importance.columns.get(tensor.name) if self.importance else None
        return found if found is not None and found.any() else None

    @property
    def source_bytes(self) -> int:
        """Bytes of all source shards."""
        return sum(shard.size for shard in self.checkpoint.shards)

    @property
    def shard_bytes(self) -> int:
        """Bytes of all output shards, exactly."""
        return sum(layout.size for layout in self.shards)

    @property
    def parameters(self) -> int:
        """Elements of all floating-point weights."""
        return sum(
            t.numel for t in self.tensors if t.weight.dtype in TORCH_NAME and t.action != "drop"
        )

    @property
    def written(self) -> int:
        """Weights of the output."""
        return sum(bool(t.outputs) for t in self.tensors)

    @property
    def quantized_parameters(self) -> int:
        return sum(t.numel for t in self.tensors if t.action == "quantize")

    @property
    def bits_per_weight(self) -> float:
        """Bits in the output's tensors for each source parameter."""
        return 8 * sum(t.nbytes_out for t in self.tensors) / max(1, self.parameters)

    @property
    def scratch_bytes(self) -> int:
        """Largest temporary file: the float32 absmax of the biggest weight."""
        return max(
            (4 * -(-t.numel // t.state.blocksize) for t in self.tensors if t.state),
            default=0,
        )

    def groups(self) -> list[tuple[str, str, int, int, int]]:
        """(action, reason, tensors, elements, bytes out), the largest first."""
        count: Counter[tuple[str, str]] = Counter()
        elements: Counter[tuple[str, str]] = Counter()
        nbytes: Counter[tuple[str, str]] = Counter()
        for t in self.tensors:
            key = (t.action, t.reason)
            count[key] += 1
            elements[key] += t.numel
            nbytes[key] += t.nbytes_out
        order = sorted(count, key=lambda key: (key[0] != "quantize", -nbytes[key], key))
        return [(*key, count[key], elements[key], nbytes[key]) for key in order]


def _nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    n = ITEMSIZE[dtype]
    for dimension in shape:
        n *= dimension
    return n


Oracle = Callable[[Checkpoint], Answer | None]
"""Given the source as the model holds it, what transformers says of it, or None for the rules."""


Scan = Callable[[Plan], Collection[str]]
"""Given a plan, those of its weights to quantize that hold a NaN or an infinity (nonfinite.py)."""


def no_scan(plan: Plan) -> Collection[str]:
    """The Scan that reads nothing: a conversion will refuse what it meets."""
    return ()


def make_plan(
    checkpoint: Checkpoint,
    config: QuantConfig,
    oracle: Oracle = consult,
    scan: Scan = no_scan,
    importance: ImportanceFile | None = None,
) -> Plan:
    """Decide the whole conversion.

    Args:
        oracle: see `families.consult`.
        scan: asked where config.on_nonfinite is "keep"; it reads all that would be quantized.
        importance: weights the loss of `--scale search`.

    Raises:
        UsageError: an option has an impossible value, or a pattern matches nothing.
        InputError: the source is already quantized, or is of a kind that nf4 cannot convert; or
            the importance is that of another model.
    """
    _check_options(config)
    if checkpoint.is_diffusers and config.quant_storage != "uint8":
        raise UsageError(
            f"--quant-storage {config.quant_storage} does not go with {checkpoint.name}: diffusers "
            "reads uint8 only"
        )
    _refuse_part_of_a_set(checkpoint)
    _refuse_packed(checkpoint)
    model_dtype = model_config.dtype_of(checkpoint, config.dtype)
    found = contents(checkpoint, model_dtype)
    model = found.as_checkpoint(checkpoint)
    model_config.check_headers(model)
    answer = oracle(model)
    torch_dtype = TORCH_NAME[model_dtype]
    config = replace(
        config,
        dtype=torch_dtype,
        compute_dtype=torch_dtype if config.compute_dtype == "auto" else config.compute_dtype,
        asked=f"transformers {answer.version}" if answer else "",
        importance=importance.digest if importance else "",
    )

    def decide(nonfinite: Collection[str]) -> Plan:
        choices = selection.select(model, config.keep, config.target, answer, nonfinite)
        skip = keeping.skip_modules(choices, names_of(checkpoint.config, answer), config.target)
        selection.refuse_nothing(checkpoint, choices)  # more may be kept now than was selected
        return _plan(checkpoint, config, model_dtype, found, choices, skip, importance)

    plan = decide(())
    nonfinite = scan(plan) if config.on_nonfinite == "keep" else ()
    return decide(nonfinite) if nonfinite else plan


def _plan(
    checkpoint: Checkpoint,
    config: QuantConfig,
    model_dtype: str,
    found: Contents,
    choices: dict[str, selection.Choice],
    skip: list[str],
    importance: ImportanceFile | None,
) -> Plan:
    tensors = [
        _plan_weight(weight, choices[weight.name], config, model_dtype) for weight in found.weights
    ] + [_drop(*checkpoint.tensors[name], reason) for name, reason in found.left.items()]
    _refuse_key_clashes(tensors)
    tensors, shards = _place(tensors, checkpoint, config.max_shard_size)
    return Plan(
        checkpoint=checkpoint,
        config=config,
        tensors=tuple(tensors),
        shards=tuple(shards),
        index=index_of(shards),
        output_config=_output_config(checkpoint, config, skip),
        notes=(
            *_notes(checkpoint, config, tensors),
            *(_importance_notes(importance, tensors) if importance else ()),
        ),
        importance=importance,
    )


def _check_options(config: QuantConfig) -> None:
    for option, value, allowed in (
        ("--quant-type", config.quant_type, QUANT_TYPES),
        ("--blocksize", config.blocksize, BLOCKSIZES),
        ("--quant-storage", config.quant_storage, tuple(STORAGE_NAME)),
        ("--compute-dtype", config.compute_dtype, ("auto", *SAFETENSORS_NAME)),
        ("--dtype", config.dtype, ("auto", *SAFETENSORS_NAME)),
        ("--target", config.target, TARGETS),
        ("--on-nonfinite", config.on_nonfinite, ON_NONFINITE),
        ("--scale", config.scale, SCALES),
        ("--method", config.method, METHODS),
    ):
        if value not in allowed:
            raise UsageError(f"{option} {value} is not one of {', '.join(str(a) for a in allowed)}")
    if config.target == "vllm" and config.quant_storage != "uint8":
        raise UsageError(
            f"--quant-storage {config.quant_storage} does not go with --target vllm, which reads "
            "uint8 only"
        )
    check_shard_size(config.max_shard_size)


def check_shard_size(size: int) -> None:
    """Raises UsageError for less than 1 MB."""
    if size < 1_000_000:
        raise UsageError(f"--max-shard-size {size:,} bytes is below 1 MB")


def _refuse_part_of_a_set(checkpoint: Checkpoint) -> None:
    """One shard of several is no model, though the config.json beside it says it is."""
    path = checkpoint.shards[0].path
    count = shard_count(path.name)
    if checkpoint.is_file and count > 1:
        raise InputError(
            f"{path} is one of {count} shards of a model: give its directory, {path.parent}"
        )


def _refuse_packed(checkpoint: Checkpoint) -> None:
    if bnb_format.quant_method(checkpoint.config) is not None:
        return  # float8.py reads it or refuses it by name
    packed = bnb_format.find_quantized(checkpoint)
    if packed:
        raise InputError(
            f"{checkpoint.root} already holds packed 4-bit weights ({next(iter(packed))!r} and "
            f"{len(packed) - 1} more), though config.json does not say so: undo them first with "
            "nf4 dequantize"
        )


def _plan_weight(
    weight: Weight, choice: selection.Choice, config: QuantConfig, model_dtype: str
) -> TensorPlan:
    rule, view = choice.rule, weight.view
    if not choice.quantize:
        cast = (
            weight.dtype in TORCH_NAME
            and weight.stored.dtype != model_dtype
            and rule not in (selection.DIFFUSERS_FP32, selection.KEPT_FP32)
        )
        outputs = {weight.name: (model_dtype if cast else weight.dtype, weight.shape)}
        action = "cast" if cast else "copy"
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
    tensors: list[TensorPlan], checkpoint: Checkpoint, max_shard_size: int
) -> tuple[list[TensorPlan], list[ShardLayout]]:
    """Fill output files in source order; a weight and its companions stay together."""
    written = [plan for plan in tensors if plan.outputs]
    files = fill_shards(
        written, lambda plan: [(key, *spec) for key, spec in plan.outputs.items()], max_shard_size
    )
    layouts = []
    for number, members in enumerate(files):
        name = shard_name(checkpoint.stem, number, len(files))
        entries = [[(key, *spec) for key, spec in plan.outputs.items()] for plan in members]
        layouts.append(
            lay_out(name, [e[0] for e in entries], [e for rest in entries for e in rest[1:]])
        )
    placed = [replace(plan, file=i) for i, members in enumerate(files) for plan in members]
    placed += [plan for plan in tensors if not plan.outputs]
    # Read in the order of the source: its files are digested on the way.
    order = {shard.path: i for i, shard in enumerate(checkpoint.shards)}
    placed.sort(key=lambda plan: (order[plan.weight.shard.path], plan.weight.stored.start))
    return placed, layouts


def index_of(shards: Sequence[ShardLayout]) -> dict[str, Any] | None:
    """The index's content; None for a single file, which needs none."""
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
    checkpoint: Checkpoint, config: QuantConfig, skip: list[str]
) -> dict[str, Any] | None:
    if not checkpoint.config:
        return None
    output = model_config.without_quantization(checkpoint.config)
    model_config.set_dtype(output, config.dtype)
    output["quantization_config"] = bnb_format.quantization_config(
        config.quant_type, config.double_quant, config.quant_storage, config.compute_dtype, skip
    )
    return output


def _some(names: list[str]) -> str:
    """The first five of a list, in words."""
    more = len(names) - 5
    return ", ".join(names[:5]) + (f" and {more:,} more" if more > 0 else "")


def _importance_notes(importance: ImportanceFile, tensors: list[TensorPlan]) -> list[str]:
    """What the importance says nothing of.

    Raises:
        InputError: it says something of weights that these are not.
    """
    missing = []
    for tensor in tensors:
        if tensor.state is None:
            continue
        found = importance.columns.get(tensor.name)
        if found is None:
            missing.append(tensor.name)
        elif found.size != tensor.state.shape[-1]:
            raise InputError(
                f"{importance.path} has {found.size:,} columns of {tensor.name}, the model has "
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


def _notes(checkpoint: Checkpoint, config: QuantConfig, tensors: list[TensorPlan]) -> list[str]:
    notes = []
    nonfinite = [t.name for t in tensors if t.rule == selection.NONFINITE.name]
    if nonfinite:
        along = [t.name for t in tensors if t.rule in keeping.FOLLOWING]
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
    notes += links_note(checkpoint.root, checkpoint.left_files)
    needed = [f for f in checkpoint.left_files if f.endswith("_Dense/pytorch_model.bin")]
    if needed:
        notes.append(
            f"{needed[0]} is a pickle that sentence-transformers needs and nf4 does not copy: save "
            "the model again with safetensors first"
        )
    return notes
