"""A plan and what came of it -> the manifest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from .bnb_format import QuantState
from .manifest import FileRecord, Manifest, TensorRecord
from .planned import Plan, TensorPlan
from .records import FileDigests, Result

_NOTHING = Result(None, None, {})


def manifest_of(
    plan: Plan,
    algorithm: str,
    results: Mapping[str, Result],
    sources: Mapping[str, FileDigests],
    outputs: Mapping[str, str],
) -> Manifest:
    """The record of a finished conversion, but for the output's files.

    Args:
        algorithm: of the source files' digests.
        results: by weight.
        sources: digests of every source file, by name.
        outputs: digests of every output tensor, by key.
    """
    origin = plan.checkpoint.origin
    stored = {name: digest for file in sources.values() for name, digest in file.tensors.items()}
    return Manifest(
        config=plan.config,
        digest=algorithm,
        source_name=plan.checkpoint.name,
        source_files={
            shard.path.name: FileRecord(shard.size, sources[shard.path.name].digest)
            for shard in plan.checkpoint.shards
        },
        source_repo=origin.repo if origin else None,
        source_commit=origin.commit if origin else None,
        output_files={},
        tensors={
            t.name: TensorRecord(
                action=t.action,
                rule=t.rule,
                reason=t.reason,
                transposed=t.view is not None,
                source_tensor=t.weight.stored.name,
                source_file=t.weight.shard.path.name,
                source_dtype=t.weight.stored.dtype,
                source_shape=t.weight.stored.shape,
                source_digest=stored[t.weight.stored.name],
                output_file=plan.shards[t.file].filename if t.outputs else "",
                outputs={key: outputs.get(key, "") for key in t.outputs},
                state=_state(t, results.get(t.name, _NOTHING)),
                error=results.get(t.name, _NOTHING).error,
            )
            for t in plan.tensors
        },
        parameters=plan.parameters,
        quantized_parameters=plan.quantized_parameters,
        bits_per_weight=plan.bits_per_weight,
    )


def _state(plan: TensorPlan, result: Result) -> QuantState | None:
    """The quantization state as it is written."""
    if plan.state is None or result.nested_offset is None:
        return plan.state
    return replace(plan.state, nested_offset=result.nested_offset)
