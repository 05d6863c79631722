"""Checkpoint + QuantConfig -> Plan: everything that will be written, before a byte is read.

From headers alone: each tensor's fate and why, every output file with the place of every tensor,
the exact sizes, config.json.  Everything that can be refused is refused here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from . import bnb_format, selection
from .bnb_format import QuantState
from .codebook import BLOCKSIZES, QUANT_TYPES
from .errors import InputError, UsageError
from .records import (
    ITEMSIZE,
    SAFETENSORS_NAME,
    STORAGE_NAME,
    TORCH_NAME,
    Checkpoint,
    QuantConfig,
    Shard,
    TensorInfo,
)
from .source import SINGLE, shard_count
from .writer import ShardLayout, fill_shards, lay_out


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """What happens to one source tensor.

    Attributes:
        source: where it lies.
        shard: the source file that holds it.
        action: "quantize", "cast" or "copy".
        rule: the name of the selection rule that decided.
        reason: the same in words.
        transposed: the encoded matrix is the transpose of the stored one (Conv1D).
        state: for "quantize": the quantization state, its offset not known yet.
        outputs: key -> (dtype, shape) of everything written for it, the weight itself first.
        file: index of the output shard it goes to.
    """

    source: TensorInfo
    shard: Shard
    action: str
    rule: str
    reason: str
    transposed: bool
    state: QuantState | None
    outputs: Mapping[str, tuple[str, tuple[int, ...]]]
    file: int = 0

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
    """

    checkpoint: Checkpoint
    config: QuantConfig
    tensors: tuple[TensorPlan, ...]
    shards: tuple[ShardLayout, ...]
    index: dict[str, Any] | None
    output_config: dict[str, Any] | None
    notes: tuple[str, ...]

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
        """Elements of all floating-point source tensors."""
        return sum(t.source.numel for t in self.tensors if t.source.dtype in TORCH_NAME)

    @property
    def quantized_parameters(self) -> int:
        return sum(t.source.numel for t in self.tensors if t.action == "quantize")

    @property
    def bits_per_weight(self) -> float:
        """Bits in the output's tensors for each source parameter."""
        return 8 * sum(t.nbytes_out for t in self.tensors) / max(1, self.parameters)

    @property
    def scratch_bytes(self) -> int:
        """Largest temporary file: the float32 absmax of the biggest weight."""
        return max(
            (4 * -(-t.source.numel // t.state.blocksize) for t in self.tensors if t.state),
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
            elements[key] += t.source.numel
            nbytes[key] += t.nbytes_out
        order = sorted(count, key=lambda key: (key[0] != "quantize", -nbytes[key], key))
        return [(*key, count[key], elements[key], nbytes[key]) for key in order]


def _nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    n = ITEMSIZE[dtype]
    for dimension in shape:
        n *= dimension
    return n


def make_plan(checkpoint: Checkpoint, config: QuantConfig) -> Plan:
    """Decide the whole conversion.

    Raises:
        UsageError: an option has an impossible value, or a pattern matches nothing.
        InputError: the source is already quantized, or is of a kind that nf4 cannot convert.
    """
    _check_options(config)
    _refuse_part_of_a_set(checkpoint)
    _refuse_quantized(checkpoint)
    choices = selection.select(checkpoint, config.keep)
    model_dtype = _model_dtype(checkpoint, config)
    torch_dtype = TORCH_NAME[model_dtype]
    config = replace(
        config,
        dtype=torch_dtype,
        compute_dtype=torch_dtype if config.compute_dtype == "auto" else config.compute_dtype,
    )
    tensors = [
        _plan_tensor(shard, tensor, choices[tensor.name], config, model_dtype)
        for shard in checkpoint.shards
        for tensor in shard.tensors
    ]
    _refuse_key_clashes(tensors)
    tensors, shards = _place(tensors, config.max_shard_size)
    return Plan(
        checkpoint=checkpoint,
        config=config,
        tensors=tuple(tensors),
        shards=tuple(shards),
        index=index_of(shards),
        output_config=_output_config(checkpoint, config, tensors),
        notes=tuple(_notes(checkpoint, tensors)),
    )


def _check_options(config: QuantConfig) -> None:
    for option, value, allowed in (
        ("--quant-type", config.quant_type, QUANT_TYPES),
        ("--blocksize", config.blocksize, BLOCKSIZES),
        ("--quant-storage", config.quant_storage, tuple(STORAGE_NAME)),
        ("--compute-dtype", config.compute_dtype, ("auto", *SAFETENSORS_NAME)),
        ("--dtype", config.dtype, ("auto", *SAFETENSORS_NAME)),
    ):
        if value not in allowed:
            raise UsageError(f"{option} {value} is not one of {', '.join(str(a) for a in allowed)}")
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


def _refuse_quantized(checkpoint: Checkpoint) -> None:
    method = bnb_format.is_quantized_config(checkpoint.config)
    if method is not None:
        advice = (
            "undo it first: nf4 dequantize" if method == "bitsandbytes" else
            "start from the original full-precision checkpoint"
        )  # fmt: skip
        raise InputError(
            f"{checkpoint.root} is already quantized (quant_method {method!r} in config.json's "
            f"quantization_config): {advice}"
        )
    packed = bnb_format.find_quantized(checkpoint)
    if packed:
        raise InputError(
            f"{checkpoint.root} already holds packed 4-bit weights ({next(iter(packed))!r} and "
            f"{len(packed) - 1} more), though config.json does not say so: undo them first with "
            "nf4 dequantize"
        )


def _model_dtype(checkpoint: Checkpoint, config: QuantConfig) -> str:
    """The safetensors dtype that every kept floating tensor gets.

    Loaders build the model in one dtype, and transformers 5 fails on a mixture: it is the one
    asked for, else the config's, else the one that most of the source's bytes have.
    """
    if config.dtype != "auto":
        return SAFETENSORS_NAME[config.dtype]
    declared = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
    if isinstance(declared, str) and declared.removeprefix("torch.") in SAFETENSORS_NAME:
        return SAFETENSORS_NAME[declared.removeprefix("torch.")]
    nbytes: Counter[str] = Counter()
    for _, tensor in checkpoint.tensors.values():
        if tensor.dtype in TORCH_NAME:
            nbytes[tensor.dtype] += tensor.nbytes
    return max(nbytes, key=lambda dtype: (nbytes[dtype], dtype), default="BF16")


def _plan_tensor(
    shard: Shard,
    tensor: TensorInfo,
    choice: selection.Choice,
    config: QuantConfig,
    model_dtype: str,
) -> TensorPlan:
    rule = choice.rule
    if not choice.quantize:
        cast = tensor.dtype in TORCH_NAME and tensor.dtype != model_dtype
        outputs = {tensor.name: (model_dtype if cast else tensor.dtype, tensor.shape)}
        action = "cast" if cast else "copy"
        return TensorPlan(tensor, shard, action, rule.name, rule.reason, False, None, outputs)
    packed_bytes = (tensor.numel + 1) // 2
    if packed_bytes % ITEMSIZE[STORAGE_NAME[config.quant_storage]]:
        raise UsageError(
            f"--quant-storage {config.quant_storage} does not fit {tensor.name!r}, whose "
            f"{packed_bytes:,} packed bytes are no multiple of its size: use uint8, or keep the "
            f"module with --keep {selection.module_path(tensor.name)}"
        )
    state = QuantState(
        quant_type=config.quant_type,
        blocksize=config.blocksize,
        dtype=TORCH_NAME[tensor.dtype],
        shape=tensor.shape[::-1] if choice.transposed else tensor.shape,
        nested=config.double_quant,
    )
    outputs = bnb_format.expected_tensors(tensor.name, state, config.quant_storage)
    return TensorPlan(
        tensor, shard, "quantize", rule.name, rule.reason, choice.transposed, state, outputs
    )


def _refuse_key_clashes(tensors: list[TensorPlan]) -> None:
    owners: dict[str, str] = {}
    for plan in tensors:
        for key in plan.outputs:
            if key in owners:
                raise InputError(
                    f"the output key {key!r} is wanted by both {owners[key]!r} and "
                    f"{plan.source.name!r}: rename the tensor in the source"
                )
            owners[key] = plan.source.name


def _place(
    tensors: list[TensorPlan], max_shard_size: int
) -> tuple[list[TensorPlan], list[ShardLayout]]:
    """Fill output files in source order; a weight and its companions stay together."""
    files = fill_shards(tensors, lambda plan: plan.nbytes_out, max_shard_size)
    layouts = []
    for number, members in enumerate(files):
        name = shard_name(number, len(files))
        entries = [[(key, *spec) for key, spec in plan.outputs.items()] for plan in members]
        layouts.append(
            lay_out(name, [e[0] for e in entries], [e for rest in entries for e in rest[1:]])
        )
    return [
        replace(plan, file=number) for number, members in enumerate(files) for plan in members
    ], layouts


def shard_name(number: int, count: int) -> str:
    """The file name of shard `number` (from 0) of `count`."""
    return SINGLE if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def index_of(shards: list[ShardLayout]) -> dict[str, Any] | None:
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


def set_dtype(config: dict[str, Any], dtype: str) -> None:
    """Make config.json name `dtype`, under the keys it has (versions of transformers differ)."""
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]
    config |= dict.fromkeys(keys, dtype)


def _output_config(
    checkpoint: Checkpoint, config: QuantConfig, tensors: list[TensorPlan]
) -> dict[str, Any] | None:
    if not checkpoint.config:
        return None
    context = selection.Context.of(checkpoint)
    skip = bnb_format.skip_modules(
        kept=(
            selection.module_path(t.source.name)
            for t in tensors
            if t.action != "quantize"
            and len(t.source.shape) == 2
            and t.source.name.endswith(selection.WEIGHT)
        ),
        quantized=(selection.module_path(t.source.name) for t in tensors if t.action == "quantize"),
        base_prefix=selection.base_prefix(context.model_types),
    )
    for t in tensors:
        module = selection.module_path(t.source.name)
        if t.rule == selection.USER.name and not any(bnb_format.hits(k, module) for k in skip):
            raise UsageError(
                f"--keep cannot leave {module} alone in full precision: loaders would take its "
                "name to mean packed modules as well. Keep those too, or none"
            )
    output = dict(checkpoint.config)
    set_dtype(output, config.dtype)
    output["quantization_config"] = bnb_format.quantization_config(
        config.quant_type, config.double_quant, config.quant_storage, config.compute_dtype, skip
    )
    return output


def _notes(checkpoint: Checkpoint, tensors: list[TensorPlan]) -> list[str]:
    notes = []
    experts = [t for t in tensors if t.rule == "experts"]
    if experts:
        share = sum(t.source.numel for t in experts) / sum(t.source.numel for t in tensors)
        notes.append(
            f"{len(experts)} expert weights ({share:.0%} of all) stay in full precision: "
            "transformers 5 cannot load experts in 4 bit"
        )
    if not checkpoint.config:
        notes.append(
            "there is no config.json: the output holds tensors only, and heads or embeddings with "
            "unusual names were not recognised by their vocabulary size"
        )
    else:
        model_type = checkpoint.config.get("model_type")
        if not isinstance(model_type, str) or model_type not in selection.CHECKED_FAMILIES:
            notes.append(
                f"model_type {model_type!r} was not compared with transformers: look at --plan, "
                "and load the output once before you publish it"
            )
    needed = [f for f in checkpoint.left_files if f.endswith("_Dense/pytorch_model.bin")]
    if needed:
        notes.append(
            f"{needed[0]} is a pickle that sentence-transformers needs and nf4 does not copy: save "
            "the model again with safetensors first"
        )
    return notes
