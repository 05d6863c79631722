"""The Python interface: what the commands of nf4 do, as functions.

    import nf4cli

    done = nf4cli.quantize("org/name", "name-nf4")
    assert nf4cli.verify(done.output, source="org/name").ok

Everywhere a model is a path, or `org/name` or `org/name@revision` for one of the Hub. Errors are
those of nf4cli.errors: UsageError for options that make no sense, InputError for input that cannot
be converted, MachineError for a disk, a GPU or a network that fails; all are Nf4Error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..convert.listener import NOBODY, Listener
from ..format.config import QuantConfig
from .decoding import Dequantized, decode
from .inspecting import Inspected, look, look_at_tensor
from .machine import Machine
from .quantizing import SHARD_BYTES, Quantized, Request, prepared
from .verifying import Check, Verified, check

if TYPE_CHECKING:
    from ..output.inspection import TensorView
    from ..planning.model_plan import ModelPlan
    from ..quality.calibration.run import Calibrating

__all__ = [
    "Dequantized", "Inspected", "Quantized", "Verified", "dequantize", "inspect", "inspect_tensor",
    "plan", "quantize", "verify",
]  # fmt: skip

Place = str | Path


def plan(
    source: Place,
    output: Place | None = None,
    config: QuantConfig | None = None,
    *,
    importance: Place | None = None,
    max_shard_size: int | None = None,
    exact: bool = False,
    trust_remote_code: bool = False,
    engine: str = "auto",
    workers: int | None = None,
    memory: int | None = None,
    listener: Listener = NOBODY,
) -> ModelPlan:
    """Return what `quantize` would write, from the headers of the source alone.

    Args: as of `quantize`.

    Raises:
        UsageError, InputError, MachineError: it cannot be converted.
    """
    request = Request(
        source=Path(source),
        output=_path(output),
        config=_recipe(config, importance, None),
        shard_size=max_shard_size,
        importance_file=_path(importance),
        exact=exact,
        trust_remote_code=trust_remote_code,
        machine=Machine(engine, None, workers, memory, listener),
        listener=listener,
    )
    with prepared(request, only_plan=True) as job:
        return job.model


def quantize(
    source: Place,
    output: Place | None = None,
    config: QuantConfig | None = None,
    *,
    importance: Place | None = None,
    calibration: Calibrating | None = None,
    max_shard_size: int | None = None,
    exact: bool = False,
    trust_remote_code: bool = False,
    digest: str = "auto",
    engine: str = "auto",
    device: str | None = None,
    workers: int | None = None,
    memory: int | None = None,
    disk: int | None = None,
    push_to: str | None = None,
    public: bool = False,
    replace_card: bool = False,
    fsync: bool = True,
    resume: bool = False,
    listener: Listener = NOBODY,
) -> Quantized:
    """Convert a full-precision checkpoint or pipeline to bitsandbytes 4-bit, streaming.

    Args:
        source: a directory, one .safetensors file, or a model of the Hub.
        output: a new directory; None for NAME-nf4 here, or, with `push_to`, for none.
        config: the recipe, None for bitsandbytes' usual one (NF4, blocksize 64, double
            quantization). Its max_shard_size is not looked at: see below.
        importance: file that weights the loss of the scales, of an earlier calibration.
        calibration: text that is run through the model first.
        max_shard_size: bytes of the largest output file; None for 5 GB, or 1 GB where files leave
            a bounded disk.
        exact: ask transformers which modules it holds in 4 bit, whatever the family.
        trust_remote_code: transformers may run the model's own code for that.
        digest: "blake3", "sha256", or "auto" for SHA-256 where a Hub is involved.
        engine: "auto", "cpu", "cuda" or "torch".
        device: of the engine, such as "cuda:1".
        workers: threads, None for one a processor.
        memory: bytes that the process shall stay below.
        disk: bytes that may lie on the disk at once.
        push_to: repository of the Hub to publish in.
        public: whether one that is new is seen by everybody.
        replace_card: whether a README.md that is there is replaced.
        fsync: wait until the disk has it all.
        resume: continue a run that was stopped.
        listener: told of stages, progress and notes.

    Raises:
        UsageError, InputError, MachineError: it cannot be converted.
        UnfinishedRunError: it was stopped on the way, and what was done is kept.
    """
    request = Request(
        source=Path(source),
        output=_path(output),
        config=_recipe(config, importance, calibration),
        shard_size=max_shard_size,
        importance_file=_path(importance),
        calibrating=calibration,
        exact=exact,
        trust_remote_code=trust_remote_code,
        digest=digest,
        machine=Machine(engine, device, workers, memory, listener),
        disk=disk,
        push_to=push_to,
        public=public,
        replace_card=replace_card,
        fsync=fsync,
        resume=resume,
        listener=listener,
    )
    with prepared(request) as job:
        return job.run()


def verify(
    path: Place,
    source: Place | None = None,
    *,
    calibration: Sequence[Place] = (),
    sample: float | int | None = None,
    seed: int | None = None,
    disk: int | None = None,
    engine: str = "auto",
    device: str | None = None,
    workers: int | None = None,
    memory: int | None = None,
    listener: Listener = NOBODY,
) -> Verified:
    """Check a 4-bit checkpoint or pipeline, written by nf4 or not.

    Args:
        source: what it was made from: it is quantized again and compared, byte for byte.
        calibration: text files to measure again what the output records of its calibration.
        sample: share (0.05) of the weights, or bytes (an int), to look at; None for all.
        seed: of the sample.
        disk: bytes that may lie on the disk at once, with `source`.
        engine, device, workers, memory, listener: as of `quantize`.

    Raises:
        UsageError, InputError, MachineError: it cannot be verified at all. What is wrong with it is
            no error but a finding.
    """
    machine = Machine(engine, device, workers, memory, listener)
    texts = tuple(Path(text) for text in calibration)
    return check(Check(Path(path), _path(source), texts, sample, seed, disk, machine))


def dequantize(
    source: Place,
    output: Place,
    *,
    dtype: str = "auto",
    max_shard_size: int = SHARD_BYTES,
    engine: str = "auto",
    device: str | None = None,
    workers: int | None = None,
    memory: int | None = None,
    fsync: bool = True,
    listener: Listener = NOBODY,
) -> Dequantized:
    """Decode any bitsandbytes 4-bit checkpoint or pipeline into a new directory.

    Args:
        dtype: of all floats: "float32", "float16", "bfloat16"; "auto" for the original ones.
        max_shard_size: bytes of the largest output file.
        engine, device, workers, memory, fsync, listener: as of `quantize`.

    Raises:
        UsageError, InputError, MachineError: it cannot be decoded.
    """
    machine = Machine(engine, device, workers, memory, listener)
    return decode(Path(source), Path(output), dtype, max_shard_size, fsync, machine)


def inspect(path: Place, *, listener: Listener = NOBODY) -> Inspected:
    """Return what a checkpoint or pipeline holds: 4-bit or not, sizes, errors where known.

    Raises:
        InputError, MachineError: it cannot be read.
    """
    return look(Path(path), listener)


def inspect_tensor(path: Place, tensor: str, *, listener: Listener = NOBODY) -> TensorView:
    """Return the state and histograms of one tensor; in a pipeline COMPONENT.TENSOR.

    Raises:
        UsageError, InputError, MachineError: it cannot be read.
    """
    return look_at_tensor(Path(path), tensor, listener)


def _path(place: Place | None) -> Path | None:
    return None if place is None else Path(place)


def _recipe(
    config: QuantConfig | None, importance: Place | None, calibration: Calibrating | None
) -> QuantConfig:
    """Return the recipe; data has a say only where scales are searched for."""
    config = config or QuantConfig()
    return replace(config, scale="search") if importance or calibration else config
