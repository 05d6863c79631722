"""Prove an output from its source: quantize the source again and compare every byte.

The conversion is the one that writes outputs, with another sink.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from ..checkpoint import bnb_format
from ..checkpoint.adapter_files import Adapter
from ..checkpoint.discovery import MANIFEST, open_checkpoint
from ..checkpoint.given_codes import written
from ..checkpoint.packed import PackedWeight, has_chosen_scales
from ..checkpoint.reader import ByteReader, ShardReaders
from ..checkpoint.types import Checkpoint
from ..checkpoint.untrusted import RECORD, read_json
from ..convert.conversion import Conversion, Tools
from ..convert.find_nonfinite import scanner
from ..convert.tasks import Cluster
from ..errors import UsageError
from ..format.config import QuantConfig
from ..format.dtypes import SAFETENSORS_NAME, TORCH_NAME
from ..output.against_manifest import recorded_digests
from ..output.against_source import compare_beside
from ..output.manifest import Manifest, manifest_of
from ..output.recorded_choices import (
    fed_back,
    recorded_answer,
    recorded_copies,
    recorded_importance,
)
from ..output.report import Report
from ..planning import selection, skip_list
from ..planning.families import names_of
from ..planning.formats import formats_like
from ..planning.make_plan import make_plan
from ..planning.plan import Plan
from ..version import __version__
from .comparison import Compared, Comparison
from .foreign import ForeignConversion
from .on_nodes import compare_on_nodes


@dataclass(frozen=True, slots=True)
class Proof:
    """A checkpoint that is proved from its source, and what the proof works with.

    Attributes:
        checkpoint: the one that is proved.
        weights: its packed weights, by name.
        manifest: its record; None where it has none, so that another program may have written it.
        source: path of the checkpoint that it was made from.
        tools: the engine that quantizes again, its threads and buffers, and who is told of it.
        report: takes the findings.
        cluster: quantizes again; None to do it here.
        merging: adapters that are merged into the source, in order.
    """

    checkpoint: Checkpoint
    weights: dict[str, PackedWeight]
    manifest: Manifest | None
    source: Path
    tools: Tools
    report: Report
    cluster: Cluster | None = None
    merging: tuple[Adapter, ...] = ()


def check_source(proof: Proof) -> None:
    """Quantize the source again, in memory, and compare it with everything of the checkpoint.

    With a manifest, which only nf4 writes, nothing may differ: shards, headers, index,
    configuration, copied files, and the manifest itself.  Without one any program may have written
    the checkpoint: its tensors are compared, and what both config.json state (see also foreign.py).

    Raises:
        InputError: the source cannot be quantized.
    """
    manifest, report = proof.manifest, proof.report
    plan = plan_of(proof)
    if plan is None:
        return
    algorithm = manifest.digest if manifest else None
    if proof.cluster is not None:
        found = compare_on_nodes(
            proof.cluster, plan, proof.checkpoint, algorithm or "", proof.tools.progress
        )
    else:
        found = compare(proof, plan, algorithm)
    if manifest is not None:
        digests = recorded_digests(manifest)
        made = manifest_of(plan, manifest.digest, found.results, found.sources, digests)
        compare_manifest(proof.checkpoint, manifest, made, proof.source, report)
    add_differences(proof, found)
    compare_beside(proof.checkpoint, plan, manifest, report)
    same = (
        "is the one the source gives, or as good (see the note)"
        if report.notes
        else "is the one the source gives"
    )
    who = proof.tools.engine.name if proof.cluster is None else "ray"
    how = f"({found.nbytes:,} bytes, quantized again with {who})"
    if manifest is None or not manifest.config.feeds_back:
        report.check("source", f"every byte {same} {how}")
        return
    bound = max(
        (r.error.worst_block or 0.0 for r in found.results.values() if r.error), default=0.0
    )
    report.check(
        "source",
        f"every byte but the codes {same} {how}; the codes, which {manifest.config.method} chose "
        "by text that is not here, lose of every weight what the manifest says: no block's root "
        f"mean square error is above {bound:.4f} of its scale",
    )


def plan_of(proof: Proof) -> Plan | None:
    """Return the plan that would make the checkpoint from its source; None where there is none.

    The report then says why.

    Raises:
        InputError: the source cannot be quantized.
    """
    weights, manifest, report = proof.weights, proof.manifest, proof.report
    if manifest is None and not weights:
        report.unchecked.append("the bytes against the source: no quantization state is complete")
        return None
    config = manifest.config if manifest else recipe_of(proof.checkpoint, weights)
    original = recorded_copies(open_checkpoint(proof.source), manifest, report)
    importance = recorded_importance(proof.checkpoint, config, report)
    if config.importance and importance is None:
        return None
    scan = scanner(proof.tools.engine, proof.tools.resources)
    try:
        plan = make_plan(
            original, config, lambda _: recorded_answer(manifest), scan, importance,
            proof.merging,
        )  # fmt: skip
        # Codes by error feedback follow from the calibration text, which is not here: they are
        # taken from the output, and have to lose what the manifest says.
        return replace(plan, codes=written(fed_back(weights, manifest))) if manifest else plan
    except UsageError as error:
        report.add(
            "source",
            str(proof.source),
            f"{proof.source} does not fit the recipe of {proof.checkpoint.root}: {error}",
        )
        return None


def compare(proof: Proof, plan: Plan, algorithm: str | None = None) -> Compared:
    """Carry a plan out, and compare every tensor's bytes with those of the checkpoint.

    Args:
        algorithm: of the source files' digests; None to compute none.
    """
    with ShardReaders(proof.checkpoint.shards) as readers:
        sink = Comparison(proof.checkpoint, readers)
        if proof.manifest is not None:
            conversion = Conversion(plan, proof.tools, sink, algorithm)
            conversion.run()
        else:
            conversion = foreign = ForeignConversion(
                proof.weights, readers, plan, proof.tools, sink, algorithm
            )
            foreign.run()
            if note := foreign.note():
                proof.report.notes.append(note)
    return sink.outcome(conversion.results, conversion.digested)


def add_differences(proof: Proof, found: Compared) -> None:
    """Report what a comparison found, tensor by tensor."""
    for key, offset in sorted(found.first.items()):
        proof.report.add("source", key, _difference(proof, key, offset))
    for key, message in sorted(found.states.items()):
        proof.report.add("source", key, message)


def compare_manifest(
    checkpoint: Checkpoint,
    manifest: Manifest,
    made: Manifest,
    source: Path,
    report: Report,
) -> None:
    """Compare a checkpoint's manifest with that of a new run, but for its list of output files.

    Args:
        checkpoint: whose manifest it is.
        made: the manifest of the new run.
        source: that the run read, for messages.
        report: takes what differs.
    """
    expected = replace(
        made,
        source_name=manifest.source_name,  # a directory may be renamed
        output_files=manifest.output_files,  # compared with the files themselves
        tool_version=manifest.tool_version,
    )
    for name, record in expected.source_files.items():
        listed = manifest.source_files.get(name)
        if listed != record:
            path = source if source.is_file() else source / name
            digest = listed.digest if listed else "no such file"
            report.add(
                "source",
                name,
                f"{path} is not the file that this was made from: its {manifest.digest} is "
                f"{record.digest}, the manifest has {digest}",
            )
    counted = any(t.error and t.error.outlier_blocks is not None for t in manifest.tensors.values())
    for name, tensor in expected.tensors.items():
        recorded, error = manifest.tensors.get(name), tensor.error
        if error is not None and not counted:  # an earlier version of nf4 wrote the manifest
            error = replace(error, blocks=None, outlier_blocks=None)
        expected_record = replace(tensor, reason="", error=error)
        if recorded is None or replace(recorded, reason="") != expected_record:
            report.add(
                "source", name, f"{MANIFEST} has of {name} another record than the source gives"
            )
    for name in sorted(manifest.tensors.keys() - expected.tensors.keys()):
        report.add("source", name, f"{MANIFEST} lists {name}, which the source does not hold")
    for name in sorted(manifest.source_files.keys() - expected.source_files.keys()):
        report.add("source", name, f"{MANIFEST} lists {name}, which the source does not hold")
    for name in ("parameters", "quantized_parameters"):
        if getattr(manifest, name) != getattr(expected, name):
            report.add("source", MANIFEST, f"{MANIFEST}: {name} is not what the source gives")
    if manifest.tool_version == __version__:
        _compare_text(checkpoint, manifest, expected, report)


def _compare_text(
    checkpoint: Checkpoint, manifest: Manifest, expected: Manifest, report: Report
) -> None:
    """Compare the JSON of a manifest that this very version wrote, field by field."""
    if _is_text(checkpoint.root / MANIFEST, expected.pieces()):
        return
    written_json = read_json(checkpoint.root / MANIFEST, RECORD)
    expected_json = expected.to_dict()
    for document in (written_json, expected_json):
        document.pop("run", None)  # earlier manifests have it: how long a run took
        for key in ("repo", "commit"):  # where the bytes came from is not in the bytes
            document["source"].pop(key, None)
    for key in sorted(written_json.keys() | expected_json.keys()):
        if written_json.get(key) != expected_json.get(key):
            report.add("source", MANIFEST, f"{MANIFEST}: {key} is not what the source gives")


def _is_text(path: Path, pieces: Iterable[str]) -> bool:
    """Return whether a file holds a text, which is not put together for that."""
    with path.open("rb") as file:
        return all(
            file.read(len(data)) == data for data in (piece.encode() for piece in pieces)
        ) and not file.read(1)


def recipe_of(checkpoint: Checkpoint, weights: dict[str, PackedWeight]) -> QuantConfig:
    """Return the recipe of a checkpoint without manifest, as far as its files show it."""
    weight = next(iter(weights.values()))
    (blocksize, nested), formats = formats_like(
        {
            selection.module_path(name): (each.state.blocksize, each.state.nested)
            for name, each in weights.items()
        }
    )
    kept = next(
        (
            TORCH_NAME[t.dtype]
            for name, (_, t) in checkpoint.tensors.items()
            if t.dtype in TORCH_NAME
            and name not in weights
            and bnb_format.companion_owner(name) not in weights
        ),
        "auto",
    )
    section = checkpoint.config.get("quantization_config")
    compute = section.get("bnb_4bit_compute_dtype") if isinstance(section, dict) else None
    context = selection.Context.of(checkpoint)
    names = names_of(checkpoint.config)
    keys = bnb_format.skip_list(checkpoint.config)
    keep = [
        selection.module_path(name)
        for name, (_, tensor) in checkpoint.tensors.items()
        if name not in weights
        and bnb_format.companion_owner(name) not in weights
        and selection.rule_of(context, tensor).name == "linear"
        and any(skip_list.means(key, selection.module_path(name), names) for key in keys)
    ]
    return QuantConfig(
        quant_type=weight.state.quant_type,
        blocksize=blocksize,
        double_quant=nested,
        formats=formats,
        quant_storage=bnb_format.storage_of(weight.packed[1]) or "uint8",
        compute_dtype=(
            compute if isinstance(compute, str) and compute in SAFETENSORS_NAME else "auto"
        ),
        dtype=kept,
        scale="search" if has_chosen_scales(weight) else "absmax",
        keep=tuple(keep),
        target="unsloth" if any("experts" in n.split(".") for n in weights) else "transformers",
        expert_layout="stacks" if any(len(w.state.shape) == 3 for w in weights.values()) else "",
    )


def _difference(proof: Proof, key: str, offset: int) -> str:
    """Return what to say of a tensor whose first different byte lies at `offset` in it."""
    shard, tensor = proof.checkpoint.tensors[key]
    with ByteReader(shard.path, shard.size) as reader:
        value = int(reader.read(tensor.start + offset, 1)[0])
    if key in proof.weights:
        elements = f"elements {2 * offset} and {2 * offset + 1}"
    else:
        itemsize = max(1, tensor.nbytes // max(1, tensor.numel))
        elements = f"element {offset // itemsize}"
    return (
        f"{key} in {shard.path.name}: byte {offset:,} ({elements}) is 0x{value:02x}, not what the "
        "source gives; it is the first difference"
    )
