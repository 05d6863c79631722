"""The proof: quantize the source again, with the code that writes, and compare every byte."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from .. import __version__
from ..callbacks import Progress
from ..checkpoint import bnb_format
from ..checkpoint.discovery import MANIFEST, open_checkpoint
from ..checkpoint.given_codes import written
from ..checkpoint.packed import PackedWeight, has_chosen_scales
from ..checkpoint.reader import ByteReader, ShardReaders
from ..checkpoint.types import Checkpoint
from ..checkpoint.untrusted import RECORD, read_json
from ..convert.conversion import Conversion
from ..convert.find_nonfinite import scanner
from ..engines.protocol import Engine
from ..errors import UsageError
from ..format.config import QuantConfig
from ..format.dtypes import SAFETENSORS_NAME, TORCH_NAME
from ..output.against_source import compare_beside
from ..output.manifest import Manifest
from ..output.recorded_choices import fed_back, recorded_answer, recorded_importance
from ..output.report import Report
from ..planning import selection, skip_list
from ..planning.families import names_of
from ..planning.make_plan import make_plan
from ..planning.plan import Plan
from ..planning.resources import Resources
from .comparison import Comparison
from .foreign import ForeignConversion


def check_source(
    checkpoint: Checkpoint,
    weights: dict[str, PackedWeight],
    manifest: Manifest | None,
    source: Path,
    engine: Engine,
    resources: Resources,
    report: Report,
    progress: Progress,
) -> None:
    """Quantize `source` again, in memory, and compare it with everything of `checkpoint`.

    With a manifest, which only nf4 writes, nothing may differ: shards, headers, index,
    configuration, copied files, and the manifest itself.  Without one the checkpoint may be
    anybody's: tensors are compared, config.json where both say something (see also foreign.py).

    Raises:
        InputError: the source cannot be quantized.
    """
    plan = plan_of(checkpoint, weights, manifest, source, engine, resources, report)
    if plan is None:
        return
    conversion, sink = compare(
        checkpoint, weights, plan, engine, resources, report, progress,
        foreign=manifest is None, algorithm=manifest.digest if manifest else None,
    )  # fmt: skip
    if manifest is not None:
        digests = {k: d for record in manifest.tensors.values() for k, d in record.outputs.items()}
        compare_manifest(checkpoint, manifest, conversion.manifest(digests), source, report)
    add_differences(checkpoint, weights, sink, report)
    compare_beside(checkpoint, plan, manifest, report)
    same = (
        "is the one the source gives, or as good (see the note)"
        if report.notes
        else "is the one the source gives"
    )
    made = f"({sink.compared:,} bytes, quantized again with {engine.name})"
    if manifest is None or manifest.config.method != "gptq":
        report.check("source", f"every byte {same} {made}")
        return
    bound = max(
        (r.error.worst_block or 0.0 for r in conversion.results.values() if r.error), default=0.0
    )
    report.check(
        "source",
        f"every byte but the codes {same} {made}; the codes, which gptq chose by text that is not "
        "here, lose of every weight what the manifest says: no block's root mean square error is "
        f"above {bound:.4f} of its scale",
    )


def plan_of(
    checkpoint: Checkpoint,
    weights: dict[str, PackedWeight],
    manifest: Manifest | None,
    source: Path,
    engine: Engine,
    resources: Resources,
    report: Report,
) -> Plan | None:
    """The plan that would make `checkpoint` from `source`; None, and why in the report."""
    if manifest is None and not weights:
        report.unchecked.append("the bytes against the source: no quantization state is complete")
        return None
    config = manifest.config if manifest else recipe_of(checkpoint, weights)
    original = open_checkpoint(source)
    importance = recorded_importance(checkpoint, config, report)
    if config.importance and importance is None:
        return None
    try:
        plan = make_plan(
            original, config, lambda _: recorded_answer(manifest), scanner(engine, resources),
            importance,
        )  # fmt: skip
        # GPTQ's codes follow from the calibration text, which is not here: they are taken from the
        # output, and have to lose what the manifest says.
        return replace(plan, codes=written(fed_back(weights, manifest))) if manifest else plan
    except UsageError as error:
        report.add(
            "source", str(source), f"{source} does not fit the recipe of {checkpoint.root}: {error}"
        )
        return None


def compare(
    checkpoint: Checkpoint,
    weights: dict[str, PackedWeight],
    plan: Plan,
    engine: Engine,
    resources: Resources,
    report: Report,
    progress: Progress,
    foreign: bool,
    algorithm: str | None = None,
) -> tuple[Conversion, Comparison]:
    """Carry `plan` out and compare every tensor's bytes.

    Args:
        foreign: whether another program may have written the checkpoint: see foreign.py.
        algorithm: for the source's digests, None for none.
    """
    with ShardReaders(checkpoint.shards) as readers:
        sink = Comparison(checkpoint, readers)
        if not foreign:
            conversion = Conversion(plan, engine, resources, sink, algorithm, progress=progress)
            conversion.run()
        else:
            conversion = theirs = ForeignConversion(
                weights, readers, plan=plan, engine=engine, resources=resources, sink=sink,
                digest=algorithm, progress=progress,
            )  # fmt: skip
            theirs.run()
            if note := theirs.note():
                report.notes.append(note)
    return conversion, sink


def add_differences(
    checkpoint: Checkpoint, weights: dict[str, PackedWeight], sink: Comparison, report: Report
) -> None:
    """What a comparison found, tensor by tensor."""
    for key, place in sorted(sink.first.items()):
        report.add("source", key, _difference(checkpoint, weights, key, place))
    for key, message in sorted(sink.states.items()):
        report.add("source", key, message)


def compare_manifest(
    checkpoint: Checkpoint,
    manifest: Manifest,
    made: Manifest,
    source: Path,
    report: Report,
) -> None:
    """The manifest's statements, against those of the run just made; but for its list of files."""
    expected = replace(
        made,
        source_name=manifest.source_name,  # a directory may be renamed
        output_files=manifest.output_files,  # compared with the files themselves
        tool_version=manifest.tool_version,
    )
    for name, record in expected.source_files.items():
        found = manifest.source_files.get(name)
        if found != record:
            place = source if source.is_file() else source / name
            named = found.digest if found else "no such file"
            report.add(
                "source",
                name,
                f"{place} is not the file that this was made from: its {manifest.digest} is "
                f"{record.digest}, the manifest has {named}",
            )
    counted = any(t.error and t.error.outlier_blocks is not None for t in manifest.tensors.values())
    for name, tensor in expected.tensors.items():
        there, error = manifest.tensors.get(name), tensor.error
        if error is not None and not counted:  # an earlier nf4 did not
            error = replace(error, blocks=None, outlier_blocks=None)
        expected_record = replace(tensor, reason="", error=error)
        if there is None or replace(there, reason="") != expected_record:
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
    """This very version wrote the manifest, so its JSON must be the same, field by field."""
    there = read_json(checkpoint.root / MANIFEST, RECORD)
    wanted = expected.to_dict()
    for part in (there, wanted):
        part.pop("run", None)  # earlier manifests have it: how long a run took
        for key in ("repo", "commit"):  # where the bytes came from is not in the bytes
            part["source"].pop(key, None)
    for key in sorted(there.keys() | wanted.keys()):
        if there.get(key) != wanted.get(key):
            report.add("source", MANIFEST, f"{MANIFEST}: {key} is not what the source gives")


def recipe_of(checkpoint: Checkpoint, weights: dict[str, PackedWeight]) -> QuantConfig:
    """The options that would have made a checkpoint without manifest, as far as it shows them."""
    weight = next(iter(weights.values()))
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
    found = checkpoint.config.get("quantization_config")
    compute = found.get("bnb_4bit_compute_dtype") if isinstance(found, dict) else None
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
        blocksize=weight.state.blocksize,
        double_quant=weight.state.nested,
        quant_storage=bnb_format.storage_of(weight.packed[1]) or "uint8",
        compute_dtype=(
            compute if isinstance(compute, str) and compute in SAFETENSORS_NAME else "auto"
        ),
        dtype=kept,
        scale="search" if has_chosen_scales(weight) else "absmax",
        keep=tuple(keep),
        target="vllm" if any("experts" in name.split(".") for name in weights) else "transformers",
    )


def _difference(
    checkpoint: Checkpoint, weights: dict[str, PackedWeight], key: str, place: int
) -> str:
    shard, tensor = checkpoint.tensors[key]
    with ByteReader(shard.path, shard.size) as reader:
        value = int(reader.read(tensor.start + place, 1)[0])
    if key in weights:
        where = f"elements {2 * place} and {2 * place + 1}"
    else:
        width = max(1, tensor.nbytes // max(1, tensor.numel))
        where = f"element {place // width}"
    return (
        f"{key} in {shard.path.name}: byte {place:,} ({where}) is 0x{value:02x}, not what the "
        "source gives; it is the first difference"
    )
