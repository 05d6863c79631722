"""The Python interface: the commands of nf4 as functions.

    import nf4cli

    done = nf4cli.quantize("org/name", "name-nf4")
    assert nf4cli.verify(done.output, source="org/name").ok

A model is a path, or `org/name` or `org/name@revision` on the Hub. Errors are those of
nf4cli.errors, all of them Nf4Error: UsageError for options that make no sense, InputError for input
that cannot be converted, MachineError for a disk, a GPU or a network that fails.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..convert.listener import NOBODY, Listener
from ..format.config import QuantConfig
from .machine import Machine
from .request import SHARD_BYTES, Request

# Each function imports its work when it is called: a command imports this package too, and most
# need little of it.
if TYPE_CHECKING:
    from ..output.inspection import TensorView
    from ..planning.model_plan import ModelPlan
    from ..proof.attest import Attestation
    from ..quality.calibration.run import Calibrating
    from .allocating import Allocated
    from .decoding import Dequantized
    from .diffing import Compared
    from .evaluating import Evaluated
    from .inspecting import Inspected
    from .pushing import Pushed
    from .quantizing import Quantized
    from .verifying import Verified
    from .writing import Written

__all__ = [
    "Allocated", "Compared", "Dequantized", "Inspected", "Quantized", "Verified", "allocate",
    "attest", "dequantize", "diff", "evaluate", "inspect", "inspect_tensor", "load", "plan", "push",
    "quantize", "verify", "write_text",
]  # fmt: skip

Place = str | Path

_RESULTS = {
    "Allocated": "allocating", "Compared": "diffing", "Dequantized": "decoding",
    "Inspected": "inspecting", "Quantized": "quantizing", "Verified": "verifying",
}  # fmt: skip
"""The modules of results' classes."""


def __getattr__(name: str) -> Any:
    """Return the class of a result, loaded now.

    Raises:
        AttributeError: there is no such name.
    """
    if name not in _RESULTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_RESULTS[name]}"), name)


def plan(
    source: Place,
    output: Place | None = None,
    config: QuantConfig | None = None,
    *,
    copy: Sequence[str] = (),
    importance: Place | None = None,
    max_shard_size: int | None = None,
    exact: bool = False,
    trust_remote_code: bool = False,
    engine: str = "auto",
    workers: int | None = None,
    memory: int | None = None,
    listener: Listener = NOBODY,
) -> ModelPlan:
    """Return the plan of everything that `quantize` would write, from the source's headers alone.

    The arguments are those of `quantize`.

    Raises:
        UsageError, InputError, MachineError: the source cannot be converted.
    """
    from .quantizing import prepared

    request = Request(
        source=Path(source),
        output=_path(output),
        config=_recipe(config, importance, None),
        shard_size=max_shard_size,
        copy=tuple(copy),
        importance_file=_path(importance),
        exact=exact,
        trust_remote_code=trust_remote_code,
        machine=Machine(engine, None, workers, memory, listener),
        listener=listener,
    )
    with prepared(request, only_plan=True) as job:
        return job.model


def allocate(
    source: Place, *, bits: float | None = None, max_size: int | None = None,
    max_kl: float | None = None, config: QuantConfig | None = None,
    calibration: Calibrating | None = None, exact: bool = False, trust_remote_code: bool = False,
    engine: str = "auto", device: str | None = None, workers: int | None = None,
    memory: int | None = None, listener: Listener = NOBODY,
) -> Allocated:  # fmt: skip
    """Choose each module's format within one budget; `quantize` takes the result's `config`.

    Args:
        source: as in `quantize`.
        bits: most bits of a weight in the linear layers, with their scales.
        max_size: most bytes of all output shards.
        max_kl: most KL divergence a token, as estimated on the calibration text.
        config: the recipe for everything but formats.
        calibration: text to measure modules with; None to go by the error of their weights.
        exact, trust_remote_code, engine, device, workers, memory: as in `quantize`.
        listener: told of stages, progress and notes.

    Raises:
        UsageError: there is not one budget, or it is below what is possible.
        InputError, MachineError: the model cannot be converted, or measured.
    """
    from .allocating import Budget, allocated

    machine = Machine(engine, device, workers, memory, listener)
    return allocated(
        Path(source), Budget(bits, max_size, max_kl), config or QuantConfig(), calibration,
        machine, exact, trust_remote_code,
    )  # fmt: skip


def quantize(
    source: Place, output: Place | None = None, config: QuantConfig | None = None, *,
    copy: Sequence[str] = (), importance: Place | None = None,
    calibration: Calibrating | None = None,
    max_shard_size: int | None = None, exact: bool = False, trust_remote_code: bool = False,
    digest: str = "auto", engine: str = "auto", device: str | None = None,
    workers: int | None = None, memory: int | None = None, ray: str | None = None,
    disk: int | None = None, push_to: str | None = None, public: bool = False,
    replace_card: bool = False, fsync: bool = True, resume: bool = False,
    listener: Listener = NOBODY,
    adapters: Sequence[Place] = (), adapter_scales: Sequence[float] = (),
) -> Quantized:  # fmt: skip
    """Convert a full-precision checkpoint or pipeline to bitsandbytes 4-bit, streaming.

    Args:
        source: a directory, one .safetensors file, or a model on the Hub.
        output: a new directory. None for NAME-nf4 in the working directory; with `push_to`, None
            for an output on the Hub alone.
        config: the recipe, None for bitsandbytes' usual one (NF4, blocksize 64, double
            quantization). Its max_shard_size does not count; the argument below does.
        copy: patterns of files that are copied beside those that a model is made of.
        importance: importance file of an earlier calibration; weights errors when scales are
            searched for.
        calibration: text to run through the model first.
        max_shard_size: bytes of the largest output file. None for 5 GB; for 1 GB where `disk` is
            given and the output stays on the Hub alone.
        exact: ask transformers which modules it holds in 4 bit, whatever the family.
        trust_remote_code: let transformers run the model's own code for that.
        digest: "blake3", "sha256", or "auto" for SHA-256 where a Hub is involved, else BLAKE3.
        engine: "auto", "cpu", "cuda" or "torch".
        device: a device of the engine, such as "cuda:1".
        workers: threads, None for one a processor, at most 16.
        memory: most bytes of memory that the process shall take.
        ray: address of a Ray cluster that converts, each output file on its own: host:port,
            "auto", or "local" for one on this machine (docs/cluster.md).
        disk: most bytes that may lie on the disk at once.
        push_to: the repository on the Hub to publish the output in.
        public: make a new repository public.
        replace_card: replace the repository's README.md.
        fsync: wait until every file is on the disk.
        resume: continue a run that was stopped; listener: told of stages, progress and notes.
        adapters: PEFT LoRAs to merge first, in order; adapter_scales: one factor for all, or each.

    Raises:
        UsageError, InputError, MachineError: the source cannot be converted.
        UnfinishedRunError: the run was stopped on the way; `resume` continues it.
    """
    from .quantizing import prepared

    request = Request(
        source=Path(source), output=_path(output), copy=tuple(copy),
        config=_recipe(config, importance, calibration), shard_size=max_shard_size,
        importance_file=_path(importance), calibrating=calibration, exact=exact,
        trust_remote_code=trust_remote_code, digest=digest, disk=disk, push_to=push_to,
        machine=Machine(engine, device, workers, memory, listener, ray), public=public,
        replace_card=replace_card, fsync=fsync, resume=resume, listener=listener,
        adapters=tuple(map(Path, adapters)), adapter_scales=tuple(adapter_scales),
    )  # fmt: skip
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
    ray: str | None = None,
    listener: Listener = NOBODY,
    adapters: Sequence[Place] = (),
) -> Verified:
    """Check a 4-bit checkpoint or pipeline, written by nf4 or not.

    Args:
        path: the checkpoint or pipeline.
        source: what it was made from. It is quantized again and compared byte by byte.
        calibration: text files, to calibrate again and compare with the output's record.
        sample: the part to check, as a share (0.05) or in bytes (an int); None for all.
        seed: chooses the sample; None for another one every time.
        disk: most bytes that may lie on the disk at once, with `source`.
        engine, device, workers, memory, ray, listener: as in `quantize`.
        adapters: with `source`, those that were merged into it, in order.

    Raises:
        UsageError, InputError, MachineError: it cannot be verified at all. Anything wrong with the
            checkpoint is a finding in the result instead.
    """
    from .verifying import Check, check

    machine = Machine(engine, device, workers, memory, listener, ray)
    texts = tuple(Path(text) for text in calibration)
    merged = tuple(Path(adapter) for adapter in adapters)
    return check(Check(Path(path), _path(source), texts, sample, seed, disk, machine, merged))


def load(
    path: Place, *, class_name: str | None = None, listener: Listener = NOBODY, **options: Any
) -> Any:
    """Open an output in its own library, ready to run or to train (extra `load`).

    transformers alone holds no experts in 4 bit. Here it does, with bitsandbytes' parametrization:
    a layer's experts are decoded while they run.

    Args:
        path: the checkpoint or pipeline, of any target but vllm's mixtures of experts.
        class_name: class of transformers or diffusers to load it by; None for the one that its
            files say.
        options: for from_pretrained of that class: device_map, dtype, attn_implementation, ...

    Returns:
        The model of transformers, the pipeline of diffusers, or the SentenceTransformer.

    Raises:
        UsageError, InputError, MachineError: it cannot be loaded; the message says why.
    """
    from .loading import opened

    return opened(Path(path), class_name, options, listener)


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
    ray: str | None = None,
    fsync: bool = True,
    listener: Listener = NOBODY,
    adapters: Sequence[Place] = (),
    adapter_scales: Sequence[float] = (),
) -> Dequantized:
    """Decode any bitsandbytes 4-bit checkpoint or pipeline into a new directory.

    Args:
        source: the checkpoint or pipeline.
        output: the new directory.
        dtype: of all floats: "float32", "float16", "bfloat16"; "auto" for the original ones.
        max_shard_size: bytes of the largest output file.
        engine, device, workers, memory, ray, fsync, listener: as in `quantize`.
        adapters, adapter_scales: as in `quantize`; merged into the decoded weights.

    Raises:
        UsageError, InputError, MachineError: the checkpoint cannot be decoded.
    """
    from .decoding import decode

    machine = Machine(engine, device, workers, memory, listener, ray)
    return decode(
        Path(source), Path(output), dtype, max_shard_size, fsync, machine,
        [Path(adapter) for adapter in adapters], adapter_scales,
    )  # fmt: skip


def inspect(path: Place, *, listener: Listener = NOBODY) -> Inspected:
    """Return what a checkpoint or pipeline holds: kinds of weights, sizes, known errors.

    Raises:
        InputError, MachineError: it cannot be read.
    """
    from .inspecting import look

    return look(Path(path), listener)


def inspect_tensor(path: Place, tensor: str, *, listener: Listener = NOBODY) -> TensorView:
    """Return the state and histograms of one tensor.

    Args:
        path: a checkpoint or pipeline.
        tensor: the tensor's name; in a pipeline COMPONENT.TENSOR.

    Raises:
        UsageError, InputError, MachineError: it cannot be read.
    """
    from .inspecting import look_at_tensor

    return look_at_tensor(Path(path), tensor, listener)


def diff(
    a: Place,
    b: Place,
    *,
    engine: str = "auto",
    workers: int | None = None,
    memory: int | None = None,
    listener: Listener = NOBODY,
) -> Compared:
    """Compare two checkpoints or pipelines, 4-bit or full, whoever wrote them.

    Args:
        a, b: the models.
        engine, workers, memory, listener: as in `quantize`; the engine decodes.

    Raises:
        UsageError, InputError, MachineError: one cannot be read.
    """
    from .diffing import compare

    return compare(Path(a), Path(b), Machine(engine, None, workers, memory, listener))


def evaluate(
    output: Place,
    source: Place,
    *,
    other: Place | None = None,
    texts: Sequence[Place] = (),
    tokens: int = 8192,
    context: int = 512,
    dtype: str = "auto",
    device: str | None = None,
    cache_directory: Place | None = None,
    cache_size: int = 4_000_000_000,
    max_kl: float | None = None,
    min_top1: float | None = None,
    engine: str = "auto",
    workers: int | None = None,
    memory: int | None = None,
    listener: Listener = NOBODY,
) -> Evaluated:
    """Measure how far an output is from its source, as a model (extra `eval`).

    Args:
        output: a 4-bit checkpoint or any other model.
        source: the model that it was made from.
        other: another output of that source: says how their losses stand to each other.
        texts: text files and directories to measure on; none for two built-in texts.
        tokens: most tokens of each text.
        context: tokens of a window.
        dtype: what both models compute in: "float32", "float16", "bfloat16"; "auto" for float32 on
            the CPU, else the model's own.
        device: a torch device, None for a GPU where there is one.
        cache_directory: where the source's results are kept, None for the user's cache.
        cache_size: most bytes of them.
        max_kl: largest mean KL divergence of a text that is good.
        min_top1: smallest share of equal most likely tokens that is good.
        engine, workers, memory, listener: as in `quantize`; the engine decodes 4-bit weights.

    Raises:
        UsageError, InputError, MachineError: the models cannot be compared. A limit that is not
            kept is a failure in the result instead.
    """
    from .evaluating import Evaluation, compare

    return compare(
        Evaluation(
            output=Path(output),
            source=Path(source),
            other=_path(other),
            texts=tuple(Path(text) for text in texts),
            tokens=tokens,
            context=context,
            dtype=dtype,
            device=device,
            cache_directory=_path(cache_directory),
            cache_size=cache_size,
            max_kl=max_kl,
            min_top1=min_top1,
            machine=Machine(engine, None, workers, memory, listener),
        )
    )


def write_text(
    model: Place,
    file: Place,
    *,
    tokens: int = 40_000,
    seed: int = 0,
    dtype: str = "auto",
    device: str | None = None,
    listener: Listener = NOBODY,
) -> Written:
    """Have a language model write text, to calibrate it on without data (extra `calibrate`).

    Args:
        model: a directory, or a model of the Hub.
        file: a .jsonl file to write, one document a line.
        tokens: at least as many are written.
        seed: of the random numbers; another machine may draw other text.
        dtype: what the model computes in, as in `evaluate`.
        device: a torch device, None for a GPU where there is one.
        listener: as in `quantize`.

    Raises:
        UsageError, InputError, MachineError: the model cannot write text.
    """
    from .writing import Writing, write

    machine = Machine("auto", None, None, None, listener)
    return write(Writing(Path(model), Path(file), tokens, seed, dtype, device, machine))


def attest(
    output: Place,
    source: Place | None = None,
    *,
    builder_id: str | None = None,
    engine: str = "auto",
    device: str | None = None,
    workers: int | None = None,
    memory: int | None = None,
    listener: Listener = NOBODY,
) -> Attestation:
    """Return an unsigned statement of what an output is and was made from (SLSA, in-toto).

    Args:
        output: a directory that `quantize` wrote.
        source: what it was made from: prove that first, as `verify` does.
        builder_id: URI of who ran the conversion, SLSA's builder.id.
        engine, device, workers, memory, listener: as in `quantize`; the engine serves the proof.

    Returns:
        The statement, or the findings for which there is none.

    Raises:
        UsageError, InputError, MachineError: the output cannot be read or proved at all.
    """
    from .attesting import state

    machine = Machine(engine, device, workers, memory, listener)
    return state(Path(output), _path(source), builder_id, machine)


def push(
    output: Place,
    repo: str,
    *,
    public: bool = False,
    replace_card: bool = False,
    message: str | None = None,
    workers: int | None = None,
    listener: Listener = NOBODY,
) -> Pushed:
    """Publish a finished output on the Hub, in one commit.

    Every file is read first. Nothing is sent unless all are what the manifest says.

    Args:
        output: a directory that `quantize` wrote.
        repo: `org/name`, or `name` for your own. It is made where there is none.
        public: make a new repository public.
        replace_card: replace the repository's README.md.
        message: of the commit.
        workers: files read at a time, None for one a processor.
        listener: told of stages, progress and notes.

    Returns:
        The commit, or the findings for which nothing was sent.

    Raises:
        UsageError, InputError, MachineError: the output cannot be read or published.
    """
    from .pushing import Push, publish

    return publish(Push(Path(output), repo, public, replace_card, message, workers, listener))


def _path(place: Place | None) -> Path | None:
    return None if place is None else Path(place)


def _recipe(
    config: QuantConfig | None, importance: Place | None, calibration: Calibrating | None
) -> QuantConfig:
    """Return the recipe; with data the scales are searched for."""
    config = config or QuantConfig()
    return replace(config, scale="search") if importance or calibration else config
