"""The recipe of an output: every option of a user that changes its bytes."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

QUANT_TYPES = ("nf4", "fp4")

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)

SCALES = ("absmax", "search")

METHODS = ("rtn", "gptq", "yaqa")
"""How codes are chosen: the nearest one, or by error feedback, see quality/calibration/gptq.py."""

ON_NONFINITE = ("error", "keep")

TARGETS = ("transformers", "vllm", "unsloth")
"""The loader that the output is made for.  vllm takes each expert of a mixture of experts as a
4-bit matrix of its own, unsloth and nf4cli.load all experts of a layer in one 4-bit stack;
transformers 5 alone takes neither."""

EXPERT_LAYOUTS = ("auto", "", "stacks", "lists")

SHARD_CUTS = ("auto", "", "source")


@dataclass(frozen=True, slots=True)
class ModuleFormat:
    """How some modules are packed that a recipe sets apart from the others.

    Attributes:
        blocksize, double_quant: as in `QuantConfig`.
        modules: patterns of their paths, as `keep` has them.
    """

    blocksize: int
    double_quant: bool
    modules: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the format as the manifest records it, its patterns sorted."""
        return {**asdict(self), "modules": sorted(self.modules)}


@dataclass(frozen=True, slots=True)
class AdapterRecord:
    """An adapter that is merged before the weights are quantized.

    Attributes:
        name: of its directory, or its repository.
        config, weights: SHA-256 of adapter_config.json and of adapter_model.safetensors.
        scale: factor of what it adds.
        repo, commit: where on a Hub it comes from, "" for a directory.
    """

    name: str
    config: str
    weights: str
    scale: float = 1.0
    repo: str = ""
    commit: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return the entry of the manifest, without what is empty."""
        return {name: value for name, value in asdict(self).items() if value != ""}

    @property
    def identity(self) -> tuple[str, str, float]:
        """Return what the bytes of an output depend on."""
        return self.config, self.weights, self.scale


@dataclass(frozen=True, slots=True)
class QuantConfig:
    """The options that decide the bytes of an output.

    Attributes:
        quant_type: the 4-bit table, one of QUANT_TYPES.
        blocksize: elements that share one absmax, one of BLOCKSIZES.
        double_quant: whether the absmax vector is quantized to 8 bits as well.
        quant_storage: dtype of the packed tensors, as torch spells it ("uint8").
        compute_dtype: bnb_4bit_compute_dtype, as torch spells it, or "auto" for the model's dtype.
        dtype: dtype of the floating tensors that are not packed, or "auto" for the model's.
        keep: patterns of modules to leave in full precision.
        target: the loader that the output is made for, one of TARGETS.
        on_nonfinite: what to do with a weight that holds a NaN or an infinity: "error", or "keep"
            it in full precision.
        asked: the library that decided which modules are packed ("transformers 5.23.0"); "" where
            the rules of this package decided alone.
        max_shard_size: bytes of tensors that an output shard may hold; a larger single tensor gets
            a shard of its own.
        scale: how a block's scale is chosen: "absmax", its largest magnitude, or "search", the
            scale of least loss, of either sign.
        method: how a code is chosen: one of METHODS.
        importance: BLAKE3 of the importance file that weights the loss, "" for none.
        requantize: whether GPTQ and AWQ sources are decoded, and rounded a second time.
        expert_layout: how experts are written where the target takes them in 4 bit, one of
            EXPERT_LAYOUTS: "", as matrices; "stacks", as the class of transformers 5 holds them;
            "lists", as unsloth's own class for gpt-oss does; "auto" for what the target reads
            best.  nf4 0.2 wrote matrices for unsloth as well.
        shard_cuts: where an output shard ends, one of SHARD_CUTS: "source", where a source file
            does, if the next one's weights do not fit as a whole, so that few shards are made of
            the same source file; "", where it is full, as in nf4 0.2; "auto" for "source" where
            there are several source files.
        formats: of modules that differ from `blocksize` and `double_quant`; no module is in two.
        adapters: those that are merged, in order, in float32.
    """

    quant_type: str = "nf4"
    blocksize: int = 64
    double_quant: bool = True
    quant_storage: str = "uint8"
    compute_dtype: str = "auto"
    dtype: str = "auto"
    keep: tuple[str, ...] = field(default=())
    target: str = "transformers"
    on_nonfinite: str = "error"
    asked: str = ""
    max_shard_size: int = 5_000_000_000
    scale: str = "absmax"
    method: str = "rtn"
    importance: str = ""
    requantize: bool = False
    expert_layout: str = "auto"
    shard_cuts: str = "auto"
    formats: tuple[ModuleFormat, ...] = ()
    adapters: tuple[AdapterRecord, ...] = ()

    @property
    def feeds_back(self) -> bool:
        """Tell whether error feedback chooses the codes; the source does not give them then."""
        return self.method != "rtn"

    @property
    def packings(self) -> frozenset[tuple[int, bool]]:
        """Every (blocksize, double_quant) that the recipe asks for."""
        apart = {(each.blocksize, each.double_quant) for each in self.formats}
        return frozenset({(self.blocksize, self.double_quant), *apart})

    def as_dict(self) -> dict[str, Any]:
        """Return the options as the manifest records them.

        The patterns of `keep` are sorted, since their order has no meaning.  `scale`, `method`,
        `importance`, `requantize`, `expert_layout`, `shard_cuts`, `formats` and `adapters` are left
        out where they are as in versions without these options, so that manifests stay equal to
        theirs.
        """
        fields = {
            **asdict(self),
            "keep": sorted(self.keep),
            "formats": [each.as_dict() for each in self.formats],
            "adapters": [adapter.as_dict() for adapter in self.adapters],
        }
        before = {
            "scale": "absmax", "method": "rtn", "importance": "", "requantize": False,
            "expert_layout": "", "shard_cuts": "", "formats": [], "adapters": [],
        }  # fmt: skip
        for name, value in before.items():
            if fields[name] == value:
                del fields[name]
        return fields
