"""Write the line of code, or the command, that loads an output."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import Any

from .card import Subject, auto_class, diffusers_class
from .manifest import Manifest


def loading_call(
    place: str, parts: Mapping[str, Manifest], config: Mapping[str, Any]
) -> str | None:
    """Return the line that loads an output; None where no loader takes it.

    Args:
        place: path of the output, or its repository.
        parts, config: see `Subject`.
    """
    subject = Subject("", {}, parts, config)
    target = subject.first.config.target
    if not subject.library:
        return None
    if target == "vllm":
        return f"vllm serve {shlex.quote(place)}"
    quoted = json.dumps(place, ensure_ascii=False)
    if target == "unsloth":
        return f"FastLanguageModel.from_pretrained({quoted}, load_in_4bit=True)"
    if subject.library == "diffusers":
        name, dtype = diffusers_class(subject)
        return f"{name}.from_pretrained({quoted}, torch_dtype=torch.{dtype})"
    if subject.library == "sentence-transformers":
        return f"SentenceTransformer({quoted})"
    remote = ", trust_remote_code=True" if "auto_map" in config else ""
    return f"{auto_class(config)}.from_pretrained({quoted}{remote})"
