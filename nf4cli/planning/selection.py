"""Select the tensors that become 4-bit, and give the reasons, from config.json and headers alone.

The rules restate what `transformers` quantizes with bitsandbytes: every Linear, except heads,
what is tied to them, and what a loader cannot take in 4 bit.  They are tried in order.  The first
that holds keeps the tensor, and gives the reason that --plan and the manifest show.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import pairwise
from typing import Any

from ..checkpoint.types import Checkpoint, TensorInfo
from ..errors import NothingToQuantizeError, UsageError
from ..format.dtypes import TORCH_NAME
from . import single_file
from .answer import Answer
from .diffusers_rules import EMBEDDERS, NOT_LINEAR, fp32_modules
from .model_config import config_items
from .skip_list import hits_v4

WEIGHT = ".weight"

HEADS = frozenset(
    (
        "lm_head embed_out proj_out vocab_projector output_projection lm_loss score classifier "
        "qa_outputs seq_relationship head pre_classifier text_projection objective"
    ).split()
)
"""Last name parts of output heads, and of layers near them that transformers never packs."""

HEAD_PARTS = frozenset(
    (
        "classifier lm_predictions bbox_embed class_embed bbox_predictor enc_bbox_head "
        "enc_score_head"
    ).split()
)
"""Name parts in the paths of heads with several layers."""

VALUE_HEADS = ("v_head", "value_head")
"""What reinforcement learning (TRL) calls the head that it adds to a model, beside it.  Within a
model the same name may be a layer's (Funnel's attention)."""

EMBEDDINGS = re.compile(
    r"embed|_emb$|codebook|reference_points|^query_feat|^queries_feat|^query_\d"
    r"|bias_values|prompt_ctx|emb_layers|^pe_k$"
    r"|^(wte|wpe|shared|relative_attention_bias|\w+_tokens?)$",
    re.IGNORECASE,
)
ROUTERS = frozenset(["gate", "router", "shared_expert_gate", "wg"])

CONV1D_FAMILIES: Mapping[str, frozenset[str]] = {
    family: frozenset(("c_attn", "q_attn", "c_proj", "c_fc"))
    for family in (
        "gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp", "clvp_decoder"
    )
}  # fmt: skip
"""Family -> last name parts of its Conv1D layers.  Their weights are stored as [in, out], and
bitsandbytes encodes the transposed weight."""

REARRANGED_PARTS: Mapping[str, frozenset[str]] = {
    family: frozenset(parts.split())
    for families, parts in {
        "dinov2 dinov2_with_registers": "weights_in weights_out",
        "nomic_bert jina_embeddings_v3": "Wqkv",
        "gte": "qkv_proj up_gate_proj",
        "molmo2 molmo2_text": "ff_proj att_proj",
        "kimi_k25": "wqkv",
        "minimax_m3_vl": "shared_experts",
        "mistral_large4": "wk wq",
        "radio nemotron_h_omni qianfan_ocr": "qkv",
        "unlimited_ocr unlimited_ocr_vision unlimited_ocr_vision_encoder": "qkv_proj",
        "tipsv2 tipsv2_dpt tipsv2_vision_model": "qkv w12",
        "sapiens2": "w12",
        "hrm_text": "gqkv_proj gate_up_proj",
        "nemo_speechlm": "w_qkv",
        "gradium_phonon_tts": "in_proj",
    }.items()
    for family in families.split()
}
"""Family -> name parts of the weights that transformers 5 splits, merges or permutes."""

T5_FAMILIES = frozenset(
    ("t5", "mt5", "umt5", "longt5", "pix2struct_text_model", "udop", "pop2piano")
)


_TOKEN_EMBEDDING = re.compile(r"(^|\.)(tok_embeddings|embed_tokens|word_embeddings|wte)\.weight$")
"""Matches the embedding of tokens, whose length is the vocabulary's, in the layouts in use."""


@dataclass(frozen=True, slots=True)
class Context:
    """What the rules know of a checkpoint.

    Attributes:
        model_types: model_type of the config and its sub-configs.
        vocab_sizes: every `*vocab_size` of the config and its sub-configs, but type_vocab_size; of
            params.json without a config; without either, the lengths of token embeddings.
        num_layers: num_hidden_layers of the decoder, None where unknown.
        names: every tensor name.
        target: the loader that the output is for, see config.TARGETS.
        diffusers: whether it is a component of a diffusers pipeline.
        fp32: names of the modules that diffusers keeps in float32.
        stacks: names of the stacks of experts that the loader takes in 4 bit, see stacks.py.
        denoiser: of a diffusion model in a single file, what the names of the denoiser's tensors
            begin with; "" where the file has nothing else; None for any other checkpoint.
    """

    model_types: frozenset[str]
    vocab_sizes: frozenset[int]
    num_layers: int | None
    names: frozenset[str]
    target: str = "transformers"
    diffusers: bool = False
    fp32: tuple[str, ...] = ()
    stacks: Collection[str] = ()
    denoiser: str | None = None

    @staticmethod
    def of(
        checkpoint: Checkpoint, target: str = "transformers", stacks: Collection[str] = ()
    ) -> Context:
        """Return what the rules need to know of a checkpoint."""
        config = checkpoint.config
        items = list(config_items(config or checkpoint.params))
        text = config.get("text_config")
        layers = (text if isinstance(text, dict) else config).get("num_hidden_layers")
        return Context(
            model_types=frozenset(v for k, v in items if k == "model_type" and isinstance(v, str)),
            vocab_sizes=_vocab_sizes(items)
            or (frozenset() if config else _embedding_lengths(checkpoint)),
            num_layers=layers if isinstance(layers, int) else None,
            names=frozenset(checkpoint.tensors),
            target=target,
            diffusers=checkpoint.is_diffusers,
            fp32=fp32_modules(config) if checkpoint.is_diffusers else (),
            stacks=stacks,
            denoiser=None if config else single_file.denoiser_of(checkpoint.tensors),
        )

    @property
    def takes_experts(self) -> bool:
        """Return whether the loader takes experts as 4-bit matrices of their own."""
        return (
            self.target != "transformers"
            or self.diffusers
            or bool(self.model_types & {"llama4", "llama4_text"})
        )


def _vocab_sizes(items: Iterable[tuple[str, Any]]) -> frozenset[int]:
    """Return the vocabularies' sizes among the (key, value) pairs of a configuration.

    Meta's params.json says -1 where its tokenizer knows.
    """
    return frozenset(
        value
        for key, value in items
        if key.endswith("vocab_size")
        and key != "type_vocab_size"
        and isinstance(value, int)
        and value > 1
    )


def _embedding_lengths(checkpoint: Checkpoint) -> frozenset[int]:
    """Return the lengths of the matrices that are called like embeddings of tokens."""
    return frozenset(
        tensor.shape[0]
        for name, (_, tensor) in checkpoint.tensors.items()
        if len(tensor.shape) == 2 and _TOKEN_EMBEDDING.search(name)
    )


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule that keeps a tensor in full precision.

    Attributes:
        name: as the manifest has it.
        reason: the same in words.
        holds: given the context, a tensor and the parts of its module's path, returns whether the
            rule keeps the tensor.
    """

    name: str
    reason: str
    holds: Callable[[Context, TensorInfo, list[str]], bool]


def _is_number(part: str) -> bool:
    return part.isascii() and part.isdecimal()


def _layer_index(path: list[str]) -> int | None:
    for part, following in pairwise(path):
        if part == "layers" and _is_number(following):
            return int(following)
    return None


def _inside_numbered_layer(path: list[str]) -> bool:
    """Return whether a module lies below a number: `h.0.mlp.c_fc`, but not `embed_tokens.0`.

    Matrices of the vocabulary's size lie outside of the numbered layers, where a width may equal a
    vocab_size by chance.
    """
    return any(_is_number(part) for part in path[:-1])


def _is_embedder(path: list[str]) -> bool:
    """Return whether a module of a diffusers component is, or lies in, an embedder.

    Inside numbered blocks only the last part of the path counts: a large layer may lie in a module
    that is called like an embedder.
    """
    parts = path[-1:] if _inside_numbered_layer(path) else path
    return any(EMBEDDERS.search(part) for part in parts)


def _has_experts(context: Context, path: list[str]) -> bool:
    """Return whether experts lie beside a module, so that it may be their router.

    Krea's gated MLP calls a large layer `gate`, and has no experts.
    """
    experts = ".".join([*path[:-1], "experts", ""])
    return any(name.startswith(experts) for name in context.names)


DIFFUSERS_FP32 = Rule(
    "diffusers-fp32",
    "diffusers keeps this module in float32",
    # Its loader matches modules as transformers 4 does, and tensors by any part of their names.
    lambda c, t, p: any(hits_v4(key, ".".join(p)) or key in t.name.split(".") for key in c.fp32),
)


def _is_embedding(path: list[str]) -> bool:
    """Return whether a module, or the list that it is an entry of, is called like an embedding."""
    if path == ["query"]:
        return True
    numbered = _is_number(path[-1]) and len(path) > 1
    return bool(EMBEDDINGS.search(path[-2] if numbered else path[-1]))


KEPT_FP32 = Rule(
    "fp32-value",
    "transformers keeps this in float32: it chooses between experts",
    lambda c, t, p: not {"e_score_correction_bias", "moe_statics"}.isdisjoint(t.name.split(".")),
)


BESIDE_DENOISER = Rule(
    "beside-denoiser",
    "of a text encoder or VAE in the same file, which programs load as it is stored",
    lambda c, t, p: bool(c.denoiser) and not t.name.startswith(c.denoiser or ""),
)


RULES: tuple[Rule, ...] = (
    BESIDE_DENOISER,
    DIFFUSERS_FP32,
    KEPT_FP32,
    Rule(
        "fused-experts",
        "experts in one 3-D parameter, which no loader holds in 4 bit",
        lambda c, t, p: len(t.shape) == 3 and "experts" in t.name.split("."),
    ),
    Rule("not-a-weight", "a bias or buffer", lambda c, t, p: not t.name.endswith(WEIGHT)),
    Rule("not-2d", "not a matrix: a norm, a convolution", lambda c, t, p: len(t.shape) != 2),
    Rule("dtype", "not F32, F16 or BF16", lambda c, t, p: t.dtype not in TORCH_NAME),
    Rule("empty", "no elements", lambda c, t, p: t.numel == 0),
    Rule(
        "shape-read",
        "programs tell the model's sizes from the shape of this layer",
        lambda c, t, p: c.denoiser is not None and single_file.is_read(c.denoiser, t.name),
    ),
    Rule("norm", "a norm for each head", lambda c, t, p: p[-1].endswith("norm")),
    Rule(
        "embedding",
        "an embedding",
        lambda c, t, p: _is_embedding(p) or (c.diffusers and _is_embedder(p)),
    ),
    Rule(
        "head",
        "an output head",
        lambda c, t, p: (
            not c.diffusers
            and (
                p[-1] in HEADS
                or p[0] in VALUE_HEADS
                or not HEAD_PARTS.isdisjoint(p)
                or (p[-1] == "decoder" and len(p) > 1 and p[-2] in ("predictions", "lm_head"))
                or p[-2:] == ["pred_layer", "proj"]
            )
        ),
    ),
    Rule(
        "vocabulary",
        "an embedding or head: its first dimension is a vocab_size",
        lambda c, t, p: t.shape[0] in c.vocab_sizes and not _inside_numbered_layer(p),
    ),
    Rule(
        "router",
        "a mixture-of-experts router",
        lambda c, t, p: (
            (p[-1] in ROUTERS and (not c.diffusers or _has_experts(c, p))) or "router" in p
        ),
    ),
    Rule(
        "experts",
        "an expert: transformers 5 fuses experts into 3-D parameters it cannot hold in 4 bit",
        lambda c, t, p: "experts" in p and not c.takes_experts,
    ),
    Rule(
        "fp32-module",
        "transformers keeps this module in float32",
        lambda c, t, p: (
            (p[-1] == "wo" and bool(c.model_types & T5_FAMILIES))
            or "qformer" in p
            or ("compressor" in p and "deepseek_v4" in c.model_types)
        ),
    ),
    Rule(
        "multihead-attention",
        "part of nn.MultiheadAttention, which reads its weights directly",
        lambda c, t, p: ".".join([*p[:-1], "in_proj_weight"]) in c.names,
    ),
    Rule(
        "own-linear",
        "this family has its own Linear class, which bitsandbytes does not replace",
        lambda c, t, p: (
            (c.diffusers and not NOT_LINEAR.isdisjoint(p))
            or bool(c.model_types & {"falcon", "ibert"})
            or (p[-1] == "dt_proj" and bool(c.model_types & {"mamba", "falcon_mamba", "jamba"}))
            or (p[-1] == "wo_a" and "deepseek_v4" in c.model_types)
        ),
    ),
    Rule(
        "shared",
        "several layers share this module, which is saved with each of them",
        lambda c, t, p: not {"shared_transf", "shared_transformer"}.isdisjoint(p),
    ),
    Rule(
        "name",
        "transformers 5.0 to 5.10 fail on modules called *weight*",
        lambda c, t, p: "weight" in p[-1],
    ),
    Rule(
        "changed-on-load",
        "transformers 5 rearranges this weight while loading",
        lambda c, t, p: any(
            not REARRANGED_PARTS.get(family, frozenset()).isdisjoint(p) for family in c.model_types
        ),
    ),
    Rule(
        "extra-layer",
        "a layer beyond num_hidden_layers, which loaders ignore",
        lambda c, t, p: (
            c.num_layers is not None
            and (_layer_index(p) or 0) >= c.num_layers > 0
            and p[0] == "model"
        ),
    ),
)

REARRANGED = Rule(
    "changed-on-load", "transformers rearranges this weight while loading", lambda c, t, p: True
)
NOT_REPLACED = Rule(
    "asked", "transformers, when asked, does not hold this in 4 bit", lambda c, t, p: True
)
ENTANGLED = Rule(
    "entangled",
    "loaders cannot tell its name from that of a module that has to be kept",
    lambda c, t, p: True,
)
FUSED_WITH = Rule(
    "fused-with", "vLLM loads it as one with a module that has to be kept", lambda c, t, p: True
)
NONFINITE = Rule(
    "nonfinite", "holds a NaN or an infinity, which 4-bit blocks cannot", lambda c, t, p: True
)
STACK_RULES = tuple(rule for rule in RULES if rule.name in ("dtype", "empty", "extra-layer"))
"""The rules that may keep a stack of experts: it is no linear layer, and not called like one."""

STACKED_WITH = Rule(
    "stacked-with",
    "experts of its layer have to be kept, and loaders hold those of a layer all alike",
    lambda c, t, p: True,
)
QUANTIZED = Rule("linear", "a linear layer", lambda c, t, p: True)
QUANTIZED_STACK = Rule("stack", "the experts of a layer in one stack", lambda c, t, p: True)
USER = Rule("user", "kept by --keep", lambda c, t, p: True)


@dataclass(frozen=True, slots=True)
class Choice:
    """The fate of one tensor.

    Attributes:
        quantize: whether it becomes 4-bit.
        rule: the rule that decided.
        transposed: whether it is stored as [in, out] (Conv1D).
        matrix: whether it is the 2-D weight of a module.
        float32: whether the model holds it in float32 whatever its dtype is, see `ties`.
    """

    quantize: bool
    rule: Rule
    transposed: bool = False
    matrix: bool = True
    float32: bool = False


def module_path(tensor_name: str) -> str:
    """Return the path of the module that owns a tensor: `model.norm` of `model.norm.weight`."""
    return tensor_name.rpartition(".")[0] or tensor_name


def matches(pattern: str, path: str) -> bool:
    """Return whether a --keep pattern names a module.

    A pattern with a wildcard is a glob over the whole dotted path; one without names any run of
    whole parts: `mlp`, `layers.0`, `self_attn.q_proj`.
    """
    if any(c in pattern for c in "*?["):
        return fnmatchcase(path, pattern)
    return f".{pattern}." in f".{path}."


def select(
    checkpoint: Checkpoint,
    keep: Iterable[str] = (),
    target: str = "transformers",
    answer: Answer | None = None,
    nonfinite: Collection[str] = (),
    stacks: Collection[str] = (),
) -> dict[str, Choice]:
    """Return the fate of every tensor, by name.

    Args:
        checkpoint: with its tensors as the model holds them (weights.py).
        keep: the user's patterns, see `matches`.
        target: the loader that the output is for.
        answer: of transformers, where it was asked.  It can only keep more.
        nonfinite: names of the tensors to keep because they hold a NaN or an infinity.
        stacks: names of the stacks of experts that the loader takes in 4 bit.

    Raises:
        NothingToQuantizeError: nothing is left.
        UsageError: a pattern matches no module.
    """
    context = Context.of(checkpoint, target, stacks)
    patterns = tuple(keep)
    unmatched = set(patterns)
    choices: dict[str, Choice] = {}
    for name, (_, tensor) in checkpoint.tensors.items():
        path = module_path(name)
        matching = {pattern for pattern in patterns if matches(pattern, path)}
        unmatched -= matching
        choices[name] = _choose(context, tensor, bool(matching), answer)
        if choices[name].quantize and name in nonfinite:
            choices[name] = Choice(False, NONFINITE)
    _keep_whole_layers(choices, stacks)
    for pattern in sorted(unmatched):
        raise UsageError(
            f"--keep {pattern!r} matches no module; the modules are called like "
            f"{', '.join(_examples(checkpoint))}. A pattern is a glob over the whole path "
            "('*.down_proj') or whole parts of it ('layers.0'); repeat --keep for several"
        )
    require_quantized(checkpoint, choices)
    return choices


def _keep_whole_layers(choices: dict[str, Choice], stacks: Collection[str]) -> None:
    """Keep all stacks of a layer where one of them has to be kept: they share a module."""
    kept = {module_path(name) for name in stacks if not choices[name].quantize}
    for name in stacks:
        if choices[name].quantize and module_path(name) in kept:
            choices[name] = Choice(False, STACKED_WITH)


def require_quantized(checkpoint: Checkpoint, choices: Mapping[str, Choice]) -> None:
    """Raise NothingToQuantizeError if every tensor is kept."""
    if any(choice.quantize for choice in choices.values()):
        return
    kept = Counter(choice.rule.reason for choice in choices.values())
    why = "; ".join(f"{count} x {reason}" for reason, count in kept.items())
    raise NothingToQuantizeError(
        f"{checkpoint.root} has no linear layer to quantize among {len(choices)} tensors: {why}"
    )


def kept_modules(choices: Mapping[str, Choice]) -> dict[str, Choice]:
    """Return the kept modules with a matrix, by path: a loader could expect them in 4 bit."""
    return {module_path(n): c for n, c in choices.items() if c.matrix and not c.quantize}


def rule_of(context: Context, tensor: TensorInfo) -> Rule:
    """Return the first rule that keeps a tensor, or QUANTIZED, or QUANTIZED_STACK."""
    path = module_path(tensor.name).split(".")
    is_stack = tensor.name in context.stacks
    rules, default = (STACK_RULES, QUANTIZED_STACK) if is_stack else (RULES, QUANTIZED)
    return next((rule for rule in rules if rule.holds(context, tensor, path)), default)


def _choose(context: Context, tensor: TensorInfo, kept: bool, answer: Answer | None) -> Choice:
    """Return the fate of a tensor.

    Args:
        kept: whether a --keep pattern names its module.
    """
    rule = rule_of(context, tensor)
    if rule is QUANTIZED and answer is not None and "experts" not in tensor.name.split("."):
        if tensor.name in answer.rearranged:
            rule = REARRANGED
        elif tensor.name not in answer.quantized:
            rule = NOT_REPLACED
    if rule not in (QUANTIZED, QUANTIZED_STACK):
        matrix = len(tensor.shape) == 2 and tensor.name.endswith(WEIGHT)
        return Choice(False, rule, matrix=matrix)
    if kept:
        return Choice(False, USER)
    leaf = module_path(tensor.name).rpartition(".")[2]
    transposed = rule is QUANTIZED and is_transposed(context.model_types, leaf)
    return Choice(True, rule, transposed)


def is_transposed(model_types: Iterable[str], leaf: str) -> bool:
    """Return whether a module's weight is stored transposed, as [in, out] (Conv1D).

    Args:
        leaf: last part of the module's path.
    """
    return any(leaf in CONV1D_FAMILIES.get(model_type, ()) for model_type in model_types)


def _examples(checkpoint: Checkpoint) -> list[str]:
    """Return up to three paths of modules from all over a checkpoint."""
    paths = [module_path(n) for n, (_, t) in checkpoint.tensors.items() if len(t.shape) == 2]
    return paths[:: max(1, len(paths) // 3)][:3]
