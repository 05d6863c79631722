"""Forty architectures as tiny random models: their configs, and inputs to run them on.

Imported by the tests and by architecture_worker.py, in either version of transformers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Tiny:
    """A model to make: names of transformers' classes, the config's arguments, what it takes."""

    config: str
    model: str
    arguments: dict[str, Any]
    takes: str = "ids"


H, I, V, L = 64, 128, 512, 2  # hidden, intermediate and vocabulary size, layers  # noqa: E741
ENCODER: dict[str, Any] = {
    "hidden_size": H, "intermediate_size": I, "vocab_size": V, "num_hidden_layers": L,
    "num_attention_heads": 4, "max_position_embeddings": 128, "pad_token_id": 0,
}  # fmt: skip
DECODER = {**ENCODER, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
WIDE_HEADS = {**DECODER, "head_dim": 16}
VISION = {
    "hidden_size": H, "intermediate_size": I, "num_hidden_layers": L, "num_attention_heads": 4,
    "image_size": 32, "patch_size": 8,
}  # fmt: skip
UNTIED = {"tie_word_embeddings": False}
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2}
SPARSE = {"num_experts_per_tok": 2}


def _causal(family: str, arguments: dict[str, Any]) -> Tiny:
    return Tiny(f"{family}Config", f"{family}ForCausalLM", arguments)


MODELS: dict[str, Tiny] = {
    # Decoders of one shape.
    "llama": _causal("Llama", {**DECODER, **UNTIED}),
    "llama_tied": _causal("Llama", {**DECODER, "tie_word_embeddings": True}),
    "llama_seqcls": Tiny(
        "LlamaConfig", "LlamaForSequenceClassification", {**DECODER, **UNTIED, "num_labels": 32}
    ),
    "llama_base": Tiny("LlamaConfig", "LlamaModel", DECODER),
    "qwen2": _causal("Qwen2", DECODER),
    "qwen3": _causal("Qwen3", WIDE_HEADS),
    "gemma3_text": Tiny("Gemma3TextConfig", "Gemma3ForCausalLM", WIDE_HEADS),
    "phi3": _causal("Phi3", DECODER),
    "stablelm": _causal("StableLm", DECODER),
    "olmo2": _causal("Olmo2", DECODER),
    "smollm3": _causal("SmolLM3", DECODER),
    "gpt_neox": _causal("GPTNeoX", ENCODER),
    # Decoders with words of their own.
    "gpt2": Tiny(
        "GPT2Config", "GPT2LMHeadModel",
        {"n_embd": H, "n_layer": L, "n_head": 4, "vocab_size": V, "n_positions": 128, **SPECIAL},
    ),
    "gpt_neo": _causal("GPTNeo", {
        "hidden_size": H, "num_layers": L, "num_heads": 4, "vocab_size": V,
        "max_position_embeddings": 128, "attention_types": [[["global", "local"], 1]],
    }),
    "opt": _causal("OPT", {
        "hidden_size": H, "ffn_dim": I, "vocab_size": V, "num_hidden_layers": L,
        "num_attention_heads": 4, "max_position_embeddings": 128, "word_embed_proj_dim": H,
    }),
    "falcon": _causal("Falcon", {
        "hidden_size": H, "vocab_size": V, "num_hidden_layers": L, "num_attention_heads": 4,
        **SPECIAL,
    }),
    "bloom": _causal("Bloom", {"hidden_size": H, "n_layer": L, "n_head": 4, "vocab_size": V}),
    "mpt": _causal("Mpt", {
        "d_model": H, "n_layers": L, "n_heads": 4, "vocab_size": V, "max_seq_len": 128,
    }),
    # Encoders, and encoders with decoders.
    "bert_mlm": Tiny("BertConfig", "BertForMaskedLM", ENCODER),
    "bert_base": Tiny("BertConfig", "BertModel", ENCODER),
    "roberta_cls": Tiny(
        "RobertaConfig", "RobertaForSequenceClassification", {**ENCODER, "num_labels": 2}
    ),
    "distilbert_cls": Tiny(
        "DistilBertConfig", "DistilBertForSequenceClassification",
        {"dim": H, "hidden_dim": I, "n_layers": L, "n_heads": 4, "vocab_size": V,
         "max_position_embeddings": 128, "num_labels": 2},
    ),
    "distilbert_mlm": Tiny(
        "DistilBertConfig", "DistilBertForMaskedLM",
        {"dim": H, "hidden_dim": I, "n_layers": L, "n_heads": 4, "vocab_size": V,
         "max_position_embeddings": 128},
    ),
    "modernbert_mlm": Tiny("ModernBertConfig", "ModernBertForMaskedLM", ENCODER),
    "t5": Tiny(
        "T5Config", "T5ForConditionalGeneration",
        {"d_model": H, "d_kv": 16, "d_ff": I, "num_layers": L, "num_decoder_layers": L,
         "num_heads": 4, "vocab_size": V, "decoder_start_token_id": 0},
        "ids twice",
    ),
    "whisper": Tiny(
        "WhisperConfig", "WhisperForConditionalGeneration",
        {"d_model": H, "encoder_ffn_dim": I, "decoder_ffn_dim": I, "encoder_layers": L,
         "decoder_layers": L, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
         "vocab_size": V, "num_mel_bins": 16, "max_source_positions": 50,
         "max_target_positions": 64, "pad_token_id": 0, "decoder_start_token_id": 1, **SPECIAL},
        "sound",
    ),
    # Vision.
    "vit": Tiny("ViTConfig", "ViTForImageClassification", {**VISION, "num_labels": 10}, "pixels"),
    "dinov2_swiglu": Tiny(
        "Dinov2Config", "Dinov2Model",
        {"hidden_size": H, "num_hidden_layers": L, "num_attention_heads": 4, "image_size": 32,
         "patch_size": 8, "use_swiglu_ffn": True},
        "pixels",
    ),
    "clip": Tiny(
        "CLIPConfig", "CLIPModel",
        {"text_config": {**ENCODER, "eos_token_id": 2, "projection_dim": 32},
         "vision_config": {**VISION, "projection_dim": 32}, "projection_dim": 32},
        "ids and pixels",
    ),
    "llava": Tiny(
        "LlavaConfig", "LlavaForConditionalGeneration",
        {"text_config": {**DECODER, "model_type": "llama"},
         "vision_config": {**VISION, "model_type": "clip_vision_model"},
         "image_token_index": 500},
    ),
    "qwen2_vl": Tiny(
        "Qwen2VLConfig", "Qwen2VLForConditionalGeneration",
        {"text_config": {
            **DECODER,
            "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3],
            },
         },
         "vision_config": {
            "depth": L, "embed_dim": H, "hidden_size": H, "mlp_ratio": 2, "num_heads": 4,
            "patch_size": 8, "spatial_merge_size": 2, "temporal_patch_size": 2,
         },
         "image_token_id": 500, "video_token_id": 501, "vision_start_token_id": 502,
         "vision_end_token_id": 503},
    ),
    "idefics3": Tiny(
        "Idefics3Config", "Idefics3ForConditionalGeneration",
        {"text_config": {**DECODER, "model_type": "llama"}, "vision_config": VISION,
         "image_token_id": 500, "scale_factor": 2},
    ),
    # Mixtures of experts.
    "mixtral": _causal("Mixtral", {**DECODER, **SPARSE, "num_local_experts": 4}),
    "qwen3_moe": _causal("Qwen3Moe", {
        **WIDE_HEADS, **SPARSE, "num_experts": 4, "moe_intermediate_size": 64,
        "decoder_sparse_step": 1,
    }),
    "deepseek_v3": _causal("DeepseekV3", {
        "hidden_size": H, "intermediate_size": I, "moe_intermediate_size": 64, "vocab_size": V,
        "num_hidden_layers": L, "num_attention_heads": 4, "num_key_value_heads": 4,
        "n_shared_experts": 1, "n_routed_experts": 4, **SPARSE, "n_group": 2, "topk_group": 1,
        "first_k_dense_replace": 1, "kv_lora_rank": 64, "q_lora_rank": 64,
        "qk_rope_head_dim": 32, "qk_nope_head_dim": 32, "v_head_dim": 32,
        "max_position_embeddings": 128,
    }),
    "gpt_oss": _causal("GptOss", {**WIDE_HEADS, **SPARSE, "num_local_experts": 4}),
    "llama4_text": Tiny(
        "Llama4TextConfig", "Llama4ForCausalLM",
        {**WIDE_HEADS, **UNTIED, "intermediate_size_mlp": 128, "num_local_experts": 4,
         "num_experts_per_tok": 1, "interleave_moe_layer_step": 2},
    ),
    # Without attention.
    "mamba": _causal("Mamba", {
        "hidden_size": H, "vocab_size": V, "num_hidden_layers": L, "state_size": 16,
        "time_step_rank": 32, "pad_token_id": 0, **SPECIAL,
    }),
    "mamba2": _causal("Mamba2", {
        "hidden_size": H, "vocab_size": V, "num_hidden_layers": L, "num_heads": 8, "head_dim": 16,
        "n_groups": 1, "state_size": 16, "pad_token_id": 0, **SPECIAL,
    }),
    "rwkv": _causal("Rwkv", {
        "hidden_size": H, "vocab_size": V, "num_hidden_layers": L, "attention_hidden_size": H,
        "context_length": 64,
    }),
}  # fmt: skip

_EXPERTS = {**WIDE_HEADS, **SPARSE, "moe_intermediate_size": 64, **UNTIED}

MIXTURES: dict[str, Tiny] = {
    "qwen2_moe": _causal("Qwen2Moe", {
        **_EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 64,
    }),
    "glm4_moe": _causal("Glm4Moe", {
        **_EXPERTS, "n_routed_experts": 4, "n_group": 1, "topk_group": 1,
        "first_k_dense_replace": 1,
    }),
    "qwen3_next": _causal("Qwen3Next", {
        **_EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 64,
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16,
        "linear_value_head_dim": 16, "layer_types": ["linear_attention", "full_attention"],
    }),
}  # fmt: skip
"""More mixtures, for what is made for the loaders of experts in 4 bit alone."""


def inputs(takes: str) -> dict[str, torch.Tensor]:
    """The same ones every time."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 400, (1, 8), generator=generator)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    match takes:
        case "ids":
            return {"input_ids": ids}
        case "ids twice":
            return {"input_ids": ids, "decoder_input_ids": ids[:, :4]}
        case "ids and pixels":
            return {"input_ids": ids, "pixel_values": noise(1, 3, 32, 32)}
        case "pixels":
            return {"pixel_values": noise(1, 3, 32, 32)}
        case "sound":
            return {"input_features": noise(1, 16, 100), "decoder_input_ids": ids[:, :4]}
    raise KeyError(takes)
