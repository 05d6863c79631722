"""Check an output against its manifest: whether every byte is the one that was written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from ..callbacks import Progress
from ..checkpoint import bnb_format
from ..checkpoint.digest import digest_file, digest_shards
from ..checkpoint.discovery import CARD, MANIFEST, REPOSITORYS, is_weight_file
from ..checkpoint.packed import PackedWeight
from ..checkpoint.types import Checkpoint, Shard
from ..checkpoint.untrusted import home_of, is_regular, leads_out
from ..errors import InputError
from ..planning.formats import formats_of
from ..planning.resources import Resources
from ..planning.selection import module_path
from .manifest import FileRecord, Manifest
from .report import Finding, Report

_CODE = (".py", ".so", ".pkl")
"""Endings of files that a loader could run: one that was added later is a finding."""


def read_manifest(checkpoint: Checkpoint, report: Report) -> Manifest | None:
    """Return the manifest beside the shards; report and return None if there is none to read."""
    path = checkpoint.root / MANIFEST
    if not is_regular(path):
        report.unchecked.append(
            f"that the bytes are the ones written: there is no {MANIFEST} "
            "(another program wrote this, or the run did not finish)"
        )
        return None
    try:
        return Manifest.from_file(path)
    except InputError as error:
        report.add("manifest", MANIFEST, str(error))
        return None


def check_manifest(
    checkpoint: Checkpoint,
    weights: Mapping[str, PackedWeight],
    manifest: Manifest,
    resources: Resources,
    report: Report,
    progress: Progress,
) -> None:
    """Check that every file and tensor has the digest of the manifest, and that nothing was added.

    Args:
        weights: packed weights of the checkpoint, by name.
        manifest: of the checkpoint.
        report: takes the findings.
    """
    shards = check_lists(checkpoint, weights, manifest, report)
    digests = digest_shards(shards, manifest.digest, resources.workers, progress, tensors=False)
    wrong = [
        shard
        for shard, (digest, _) in zip(shards, digests, strict=True)
        if manifest.output_files[shard.path.name] != FileRecord(shard.size, digest)
    ]
    # Only where a file is not as it was written do its tensors' digests say more.
    digests = digest_shards(wrong, manifest.digest, resources.workers, progress)
    report_digests(zip(wrong, digests, strict=True), manifest, report)


def report_digests(
    wrong: Iterable[tuple[Shard, tuple[str, Mapping[str, str]]]], manifest: Manifest,
    report: Report,
) -> None:  # fmt: skip
    """Report what every file's digest says.

    Args:
        wrong: each file that has not the digest of the manifest, with (its digest, those of its
            tensors by key).
        manifest: of the checkpoint.
        report: takes the findings.
    """
    expected = recorded_digests(manifest)
    for shard, (digest, tensors) in wrong:
        report.findings += _digest_findings(shard, digest, tensors, manifest, expected)
    report.check("manifest", f"every byte is the one written ({manifest.digest} of the manifest)")


def recorded_digests(manifest: Manifest) -> dict[str, str]:
    """Return the digest of every output tensor, by key."""
    return {k: d for record in manifest.tensors.values() for k, d in record.outputs.items()}


def check_lists(
    checkpoint: Checkpoint,
    weights: Mapping[str, PackedWeight],
    manifest: Manifest,
    report: Report,
) -> list[Shard]:
    """Check everything in the manifest that needs no bytes of the shards.

    Returns:
        The shards that the manifest lists.
    """
    shards = {shard.path.name: shard for shard in checkpoint.shards}
    for name, file in sorted(manifest.output_files.items()):
        if name not in shards:
            check_other_file(checkpoint.root, name, file, manifest.digest, report)
    for name in sorted(shards.keys() - manifest.output_files.keys()):
        report.add("manifest", name, f"{name} is not in the manifest: it is of another run")
    _check_additions(checkpoint, manifest, report)
    _check_recipe(weights, manifest, report)
    for weight in weights.values():
        record = manifest.tensors.get(weight.name)
        if record is not None and record.state is not None and record.state != weight.state:
            report.add(
                "manifest",
                weight.name,
                f"{weight.name}: its quantization state is {weight.state}, the manifest has "
                f"{record.state}",
            )
    recorded = recorded_digests(manifest)
    for key in sorted(recorded.keys() - checkpoint.tensors.keys()):
        report.add("manifest", key, f"{key} is missing: the manifest lists it")
    for key in sorted(checkpoint.tensors.keys() - recorded.keys()):
        report.add("manifest", key, f"{key} is there, but the manifest does not list it")
    return [shard for name, shard in shards.items() if name in manifest.output_files]


def _check_additions(checkpoint: Checkpoint, manifest: Manifest, report: Report) -> None:
    """Report files that were added later: weights and code as findings, others as unchecked."""
    if checkpoint.is_file:
        return  # its directory may hold anything
    added = {*checkpoint.extra_files, *checkpoint.left_files} - manifest.output_files.keys()
    wrong = {name for name in added if is_weight_file(name) or name.endswith(_CODE)}
    for name in sorted(wrong):
        report.add("manifest", name, f"{name} is not in the manifest: it is of another run")
    if others := sorted(added - wrong - {*REPOSITORYS, MANIFEST}):
        report.unchecked.append(f"files that the manifest does not list: {', '.join(others[:10])}")


def _check_recipe(weights: Mapping[str, PackedWeight], manifest: Manifest, report: Report) -> None:
    """Report the first weight that is packed otherwise than the manifest's recipe says."""
    recipe = manifest.config
    recipe_of = formats_of(recipe)
    for weight in weights.values():
        state, own = weight.state, recipe_of(module_path(weight.name))
        recorded = (own.quant_type, own.blocksize, own.double_quant, own.quant_storage)
        storage = bnb_format.storage_of(weight.packed[1])
        actual = (state.quant_type, state.blocksize, state.nested, storage)
        if actual != recorded:
            report.add(
                "manifest",
                MANIFEST,
                f"{weight.name} has (quant_type, blocksize, double_quant, quant_storage) {actual}, "
                f"the manifest's recipe says {recorded}",
            )
            return


def check_other_file(
    root: Path, name: str, record: FileRecord, algorithm: str, report: Report
) -> None:
    """Check a file beside the shards, such as configuration, tokenizer or code, by its digest.

    Args:
        root: directory of the output.
        name: of the file, relative to `root`.
        algorithm: of the digest in `record`.
    """
    path = root / name
    if leads_out(path, root, home_of(root)):
        report.add("manifest", name, f"{name} leads out of the directory")
    elif not is_regular(path):
        report.add("manifest", name, f"{name} is missing: the manifest lists it")
    elif (digest := digest_file(path, algorithm)) != record.digest:
        if name == CARD:  # of an output of nf4 0.2
            report.unchecked.append(f"{CARD}: it was edited since, as a model card may be")
        else:
            report.add(
                "manifest",
                name,
                f"{name} is not what was written: {algorithm} is {digest}, expected "
                f"{record.digest}",
            )


def _digest_findings(
    shard: Shard,
    digest: str,
    tensors: Mapping[str, str],
    manifest: Manifest,
    expected: Mapping[str, str],
) -> Iterable[Finding]:
    """Yield what is wrong with a shard that is not as the manifest says.

    Args:
        digest: of the shard.
        tensors: digests of its tensors, by key.
        expected: digests of all output tensors, by key.
    """
    name = shard.path.name
    record = manifest.output_files[name]
    if shard.size != record.size:
        yield Finding(
            "manifest", name, f"{name} has {shard.size:,} bytes, the manifest says {record.size:,}"
        )
    wrong = [key for key in expected if tensors.get(key, expected[key]) != expected[key]]
    yield from tensor_findings(name, wrong, tensors, expected)
    if digest != record.digest:
        why = "" if wrong else "; no tensor differs, so the header does, or the manifest was edited"
        yield Finding(
            "manifest",
            name,
            f"{name}: {manifest.digest} is {digest}, the manifest says {record.digest}{why}",
        )


def tensor_findings(
    name: str, wrong: Iterable[str], digests: Mapping[str, str], expected: Mapping[str, str]
) -> Iterable[Finding]:
    """Yield a finding for each tensor that is not what was written.

    Args:
        name: of the file that they lie in.
        wrong: their keys.
        digests, expected: digests by key.
    """
    for key in wrong:
        yield Finding(
            "manifest",
            key,
            f"{key} in {name} is not what was written: its digest is {digests[key]}, expected "
            f"{expected[key]}",
        )
