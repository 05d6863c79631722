"""Rules for diffusers: which components of a pipeline become 4-bit, and which of their modules stay
in floating point.

FP32_MODULES was compared with every model class of diffusers 0.42.1; a test compares it again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_DENOISER = re.compile(r"UNet|Transformer|ControlNet|DiT|Prior|UVit|DiffNeXt")
_NO_DENOISER = re.compile(r"Vae|VAE|Autoencoder|^Multi")
_TEXT_MODEL = re.compile(r"Text|T5Encoder|ForCausalLM|ForConditionalGeneration|LMHead")

FP32_MODULES: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(
        (
            "AnyFlowFARTransformer3DModel", "AnyFlowTransformer3DModel",
            "ChronoEditTransformer3DModel", "HeliosTransformer3DModel",
            "SkyReelsV2Transformer3DModel", "WanAnimateTransformer3DModel",
            "WanTransformer3DModel", "WanVACETransformer3DModel",
        ),
        (
            "time_embedder", "scale_shift_table", "norm1", "norm2", "norm3", "rope",
            "history_key_scale", "motion_synthesis_weight",
        ),
    ),
    "WanAnimate2Transformer3DModel": (
        "time_embedding", "time_projection", "scale_shift_table", "norm1", "norm2", "norm3",
        "modulation",
    ),
    **dict.fromkeys(
        ("Kandinsky5Transformer3DModel", "Kandinsky6Transformer3DModel",
         "Kandinsky6SRTransformer3DModel"),
        ("time_embeddings", "pooled_bias", "modulation", "visual_modulation", "text_modulation"),
    ),
    **dict.fromkeys(
        ("JoyImageEditTransformer3DModel", "JoyImageEditPlusTransformer3DModel"),
        ("time_embedder", "norm1", "norm2", "norm_out"),
    ),
    **dict.fromkeys(
        ("CosmosTransformer3DModel", "CosmosControlNetModel"), ("learnable_pos_embed",)
    ),
    "Cosmos3OmniTransformer": ("time_embedder",),
    "Flux3Transformer2DModel": ("norm_q", "norm_k"),
    "Krea2Transformer2DModel": ("norm", "norm1", "norm2", "norm_q", "norm_k"),
    "MiniMaxH3Transformer3DModel": (
        "proj_in", "audio_proj_in", "time_embedder", "proj_out", "audio_proj_out", "rope",
    ),
    "RFD4ProteinaTransformer": ("cond_factory", "norm", "ln_out"),
}  # fmt: skip
"""Model class -> its `_keep_in_fp32_modules`: diffusers neither packs nor casts these modules."""

NOT_LINEAR = frozenset(("motion_network", "feature_modules", "time_proj"))
"""Name parts of modules whose weight is a matrix, but that are no nn.Linear."""

EMBEDDERS = re.compile(r"embed|(^|_)emb$|encoding$")
"""Name parts of the layers that embed time, size, text and pixels.  They are small, and every other
layer depends on them."""


def converts(name: str, library: str, class_name: str) -> bool:
    """Return whether a component of model_index.json becomes 4-bit: denoisers and text encoders do.

    Args:
        name: its key, which is also its directory ("text_encoder_2").
        library, class_name: its value (["transformers", "T5EncoderModel"]).
    """
    if library == "diffusers":
        return bool(_DENOISER.search(class_name)) and not _NO_DENOISER.search(class_name)
    if library == "transformers":
        is_text_model = bool(_TEXT_MODEL.search(class_name)) or "text_encoder" in name
        return is_text_model and not re.search(r"Tokenizer|Processor", class_name)
    return False


def fp32_modules(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of the modules that diffusers keeps in float32.

    Args:
        config: config.json of a component.
    """
    return FP32_MODULES.get(str(config.get("_class_name")), ())
