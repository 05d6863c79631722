"""Write the line of code, or the command, that loads an output."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import Any

from .auto_class import auto_class, needs_remote_code
from .card import VLLM_PLUGIN, Subject, diffusers_class
from .manifest import Manifest


def loading_call(
    place: str, parts: Mapping[str, Manifest], config: Mapping[str, Any]
) -> str | None:
    """Return the line that loads an output; None where no loader takes it.

    Args:
        place: path of the output, or its repository.
        parts, config: see `Subject`.
    """
    subject = Subject("", {}, parts, config, {})
    target = subject.first.config.target
    if not subject.library:
        return None
    remote = ", trust_remote_code=True" if needs_remote_code(config) else ""
    if target == "vllm":
        trusting = " --trust-remote-code" if remote else ""
        install = f"pip install --no-deps {VLLM_PLUGIN}"
        return f"vllm serve {shlex.quote(place)}{trusting}  # vLLM 0.28 and newer: {install}"
    quoted = json.dumps(place, ensure_ascii=False)
    if target == "unsloth":
        return f"FastLanguageModel.from_pretrained({quoted}, load_in_4bit=True{remote})"
    if subject.library == "diffusers":
        name, arguments = diffusers_class(subject)
        return f"{name}.from_pretrained({quoted}, {arguments})"
    if subject.library == "sentence-transformers":
        return f"SentenceTransformer({quoted}{remote})"
    name = auto_class(config, subject.first.tensors)
    return f"{name}.from_pretrained({quoted}{remote})"
