"""Tell the parts of a diffusion model in a single file, in the layout of ComfyUI and Forge.

Such a file has no config.json.  Its programs tell from names which model it is, and its sizes from
the shapes of a few layers; a packed weight has lost its shape.  ComfyUI's model_detection.py was
read for them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_PREFIX = "model.diffusion_model."
"""What names of the denoiser begin with in a file that also has text encoders or a VAE."""
_FIRST = (
    "double_blocks.0.img_attn", "joint_blocks.0.context_block", "double_layers.0.attn",
    "input_blocks.0.0.",
)  # fmt: skip
"""What a name begins with in Flux, Stable Diffusion 3, AuraFlow and Stable Diffusion's UNets."""
_READ = re.compile(
    r"(img_in|txt_in|time_in|vector_in|guidance_in|final_layer|[xty]_embedder|context_embedder"
    r"|extra_embedder|cond_seq_linear|clip_txt_mapper|clip_mapper|label_emb|time_embed)\."
    r"|input_blocks\.\d+\.1\.transformer_blocks\.0\.attn2\.to_k\."
)
"""Matches the layers at both ends of a denoiser, and the one that tells the width of the text."""


def denoiser_of(names: Iterable[str]) -> str | None:
    """Return what the names of the denoiser's tensors begin with; "" where there is nothing else.

    Returns None if the tensors are not those of a diffusion model in a single file.
    """
    found = None
    for name in names:
        if name.startswith(_PREFIX):
            return _PREFIX
        if name.startswith(_FIRST):
            found = ""
    return found


def is_read(denoiser: str, name: str) -> bool:
    """Return whether programs read the shape of a denoiser's tensor."""
    return bool(_READ.match(name.removeprefix(denoiser)))
