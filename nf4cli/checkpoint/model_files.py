"""Say what a model is made of: which files an output copies, leaves, and never takes.

The tables here are the only place where that is decided by a file's name.  A name is a path
relative to the model's directory, with "/" between its parts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import NamedTuple

from ..errors import UsageError


class Kind(NamedTuple):
    """A kind of files.

    Attributes:
        words: what messages call it, in the plural.
        files: patterns of the last part of a path, in lower case.
        directories: patterns of the other parts; a match makes everything below of this kind.
    """

    words: str
    files: tuple[str, ...]
    directories: tuple[str, ...] = ()


MADE_OF = (
    Kind("configuration", (
        "config.json", "generation_config.json", "configuration.json", "configuration_*.json",
        "model_index.json", "scheduler_config.json", "open_clip_config.json", "router_config.json",
        "modules.json", "config_sentence_transformers.json", "sentence_*_config.json",
        "params.json", "artifact.metadata",
        "id2label.json", "label2id.json", "labels.txt", "labels.json", "label_map.json",
    )),
    Kind("tokenizer", (
        "tokenizer*", "*.tokenizer", "vocab*", "*vocab.json", "*vocab.txt", "*.vocab",
        "merges.txt", "merges-*.txt", "*.model", "*.spm", "spiece*", "sentencepiece*",
        "*.tiktoken", "*.bpe", "bpe.codes", "bpe.vocab", "*.codes", "dict.txt", "dict.*.txt",
        "tekken.json", "special_tokens*.json", "added_tokens*.json", "normalizer.json",
        "emoji.json", "word_shape.json", "word_pronunciation.json", "alphabet.json",
        "artists.json", "genres.json", "lyrics.json",
    )),
    Kind("processor", (
        "preprocessor_config.json", "processor_config.json", "*processor_config.json",
        "image_processor*.json", "video_processor*.json", "feature_extractor*.json",
        "speaker_embeddings_path.json",
    ), ("speaker_embeddings",)),
    Kind("chat templates and prompts", (
        "*.jinja", "chat_template*", "system_prompt*", "*_system_prompt.txt",
    )),
    Kind("custom code", (
        "configuration_*.py", "modeling_*.py", "tokenization_*.py", "processing_*.py",
        "image_processing_*.py", "video_processing_*.py", "feature_extraction_*.py",
        "handler.py", "requirements.txt",
    )),
    Kind("licence and notices", (
        "*license*", "*licence*", "*notice*", "copying*", "copyright*", "patents*", "authors*",
        "*use_policy*", "*use-policy*", "terms_of_use*", "model_card.*", "modelcard.*",
        "citation.cff", "code_of_conduct.md", "security.md",
    )),
)  # fmt: skip
"""What an output copies, wherever it lies in the model's own directory or in that of a part."""

DECODER = "language_model"
"""Directory of the n-gram model that a speech processor decodes with; its *.bin is KenLM's."""
_OF_DECODER = ("attrs.json", "unigrams.txt", "*.bin", "*.arpa")

NEVER = (
    Kind("secrets", (
        ".env", ".env.*", "*.env", ".envrc", ".netrc", "_netrc", ".git-credentials", ".gitconfig",
        ".npmrc", ".pypirc", ".htpasswd", ".boto", ".s3cfg", ".pgpass", ".dockercfg",
        "*.pem", "*.key", "*.p12", "*.pfx", "*.jks", "*.keystore", "*.kdbx", "*.ppk",
        "id_rsa*", "id_dsa*", "id_ecdsa*", "id_ed25519*", "authorized_keys*", "known_hosts*",
        "credentials*", "*_credentials*", "*-credentials*", "*credential*.json", "client_secret*",
        "secret", "secret.*", "secrets", "secrets.*", "*_secret.*", "*_secrets.*", "*-secret.*",
        "*service_account*.json", "*service-account*.json", "kubeconfig*",
        "token", "token.txt", "token.json", "tokens.env", "stored_tokens", "hf_token*",
        ".hf_token*",
        "*_token", "*_token.txt", "access_token*", "auth_token*", "api_token*",
        "*api_key*", "*apikey*", "*api-key*", "*password*", ".*_history",
    ), (".ssh", ".aws", ".gnupg", ".kube", ".docker", ".azure", ".config", ".huggingface",
        ".gcloud", ".secrets", "secrets", "credentials")),
    Kind("logs and leftovers of training", (
        "*.log", "*.log.*", "nohup.out", "slurm-*", "events.out.tfevents*", "*.tfevents*",
        "wandb-*", "trainer_state.json", "training_args.bin", "training_args.json",
        "optimizer.*", "optimizer_*", "optim_*.pt", "*_optim_states.pt", "*_model_states.pt",
        "scheduler.pt", "scheduler.bin", "scaler.pt", "rng_state*", "random_states_*",
        "zero_to_fp32.py", "zero_pp_rank_*", "latest", "latest_checkpointed_iteration.txt",
        "*.pyc", "*.swp", ".ds_store", "*.partial",
    ), ("wandb", "runs", "logs", "log", "checkpoint-*", "tmp-checkpoint-*", "global_step*",
        "mlruns", "lightning_logs", "tensorboard", "tb_logs", "swanlog", "__pycache__",
        "pytorch_model_fsdp_*", "optimizer_*", ".*")),
)  # fmt: skip
"""What is never copied and never published, whatever is asked for."""

SAME_WEIGHTS = (
    "model.*", "model-*", "pytorch_model*", "diffusion_pytorch_model*", "tf_model*", "flax_model*",
    "rust_model*", "keras_*", "open_clip*", "consolidated*", "model_state*", "saved_model*",
    "*.gguf", "*.ggml", "*.onnx", "*.onnx_data", "*.onnx.data", "*.tflite", "*.mlmodel",
    "*.mlpackage", "*.ot", "*.msgpack", "*.h5", "*.index.json", "*.index.*.json",
)  # fmt: skip
"""Names under which a model's directory holds the model's own weights once more."""
OTHER_FORMATS = (
    "onnx*", "openvino*", "gguf*", "ggml*", "original", "metal", "coreml*", "*.mlpackage",
    "tflite*", "tensorrt*", "mlx*", "saved_model*", "flax*", "tf*", "ctranslate2*", "awq*",
    "gptq*", "exl2*",
)  # fmt: skip
"""Directories that hold the model's own weights once more."""
PICKLES = ("*.bin", "*.pth", "*.pt", "*.ckpt", "*.pkl", "*.pickle")
_ADAPTER = ("adapter_config.json", "adapter_model.*", "adapter_model-*")
_DIFFERENT_PARTS = ("adapter.*.safetensors",)
"""Weights that replace some of the model's own, under their names: MMS has them for languages."""
_CODE = (".py", ".cpp", ".cu", ".cuh", ".h", ".hpp")
_RELATIVE_IMPORT = re.compile(
    r"^\s*(?:from\s+\.+(\w+)|import_module\(\s*['\"]\.(\w+))", re.MULTILINE
)


def is_like(name: str, patterns: Iterable[str]) -> bool:
    """Return whether the last part of a path matches a pattern, in any case of letters."""
    last = name.rpartition("/")[2].lower()
    return any(fnmatchcase(last, pattern) for pattern in patterns)


def _lies_in(name: str, patterns: Collection[str]) -> bool:
    """Return whether a directory above a file matches one of the patterns."""
    directories = name.lower().split("/")[:-1]
    return any(fnmatchcase(d, pattern) for d in directories for pattern in patterns)


def never_kind(name: str) -> str | None:
    """Return what a file seems to be that is never copied or published, in words; else None."""
    for kind in NEVER:
        if is_like(name, kind.files) or _lies_in(name, kind.directories):
            return kind.words
    return None


def is_adapter(name: str) -> bool:
    """Return whether a file is that of a PEFT adapter, which a loader would apply to the model.

    In a directory of its own it is a part that the model's code asks for by its name.
    """
    return "/" not in name and is_like(name, _ADAPTER)


def is_decoder(name: str) -> bool:
    """Return whether a file is of the n-gram model that a speech processor decodes with."""
    return name.split("/")[-2:-1] == [DECODER] and is_like(name, _OF_DECODER)


def is_of_model(name: str) -> bool:
    """Return whether a file without weights belongs to a model, by its name alone."""
    if never_kind(name) or is_adapter(name) or _lies_in(name, OTHER_FORMATS):
        return False
    of_kind = (is_like(name, k.files) or _lies_in(name, k.directories) for k in MADE_OF)
    return any(of_kind) or is_decoder(name) or is_like(name, _ADAPTER[:1])


def is_same_weights(name: str) -> bool:
    """Return whether a file, by its name, has the model's own weights once more.

    In a directory of its own, model.safetensors is that directory's.
    """
    if is_like(name, _DIFFERENT_PARTS):
        return False
    return _lies_in(name, OTHER_FORMATS) or ("/" not in name and is_like(name, SAME_WEIGHTS))


def may_be_part(name: str) -> bool:
    """Return whether a safetensors file that is no shard may be a part beside the model."""
    return (
        name.endswith(".safetensors")
        and not never_kind(name)
        and not is_adapter(name)
        and not is_same_weights(name)
    )


def repeats(name: str, part: Mapping[str, object], model: Mapping[str, object]) -> bool:
    """Return whether a part holds the model's own weights once more, by its tensors.

    Args:
        name: of the part's file.
        part, model: shapes of the tensors, by name.
    """
    if is_like(name, _DIFFERENT_PARTS):
        return False
    same = sum(model.get(tensor) == shape for tensor, shape in part.items())
    common = len(part.keys() & model.keys())
    return 2 * same > len(part) or 2 * common > len(model)


class Code(NamedTuple):
    """The custom code of a model.

    Attributes:
        packages: first parts of the names that the code imports relatively.
        text: all of it.
    """

    packages: frozenset[str]
    text: str

    @staticmethod
    def of(sources: Collection[str]) -> Code:
        """Return the code whose files have these contents; of none it is empty, and takes none."""
        text = "\n".join(sources)
        imports = (first or second for first, second in _RELATIVE_IMPORT.findall(text))
        return Code(frozenset(imports), text)

    def takes(self, name: str) -> bool:
        """Return whether the model's code imports a file, or names it in a string."""
        if not self.text or never_kind(name):
            return False
        directory, _, last = name.rpartition("/")
        if last.endswith(_CODE) and (not directory or directory.split("/")[0] in self.packages):
            return True
        return re.search(rf"['\"/]{re.escape(last)}['\"]", self.text) is not None


def has_code(config: Mapping[str, object]) -> bool:
    """Return whether a configuration names code that comes with the model."""
    return bool(config.get("auto_map"))


def matches(pattern: str, name: str) -> bool:
    """Return whether a pattern of --copy matches a file, or a directory above it.

    `*` stands for anything within one part of a path but a leading dot; `**` for any parts.
    """
    return _match(pattern.strip("/").removeprefix("./").split("/"), name.split("/"))


def _match(patterns: list[str], parts: list[str]) -> bool:
    if not patterns:
        return True  # a directory above it
    if not parts:
        return False
    if patterns[0] == "**":
        return _match(patterns[1:], parts) or _match(patterns, parts[1:])
    if parts[0].startswith(".") and not patterns[0].startswith("."):
        return False
    return fnmatchcase(parts[0], patterns[0]) and _match(patterns[1:], parts[1:])


def chosen_files(
    patterns: Iterable[str], names: Collection[str], where: str, refused: Callable[[str], str]
) -> set[str]:
    """Return the files that --copy adds to an output.

    Args:
        patterns: as the user gives them.
        names: the files of the source that may be copied.
        where: the source as messages call it.
        refused: returns why a file cannot be copied all the same, "" if it can.

    Raises:
        UsageError: a pattern matches nothing, or a file that is not copied whatever is asked for.
    """
    chosen: set[str] = set()
    for pattern in patterns:
        matched = sorted(name for name in names if matches(pattern, name))
        if not matched or not any(pattern.strip("/.")):
            raise UsageError(
                f"--copy {pattern!r} matches no file of {where}: give a path or a pattern relative "
                "to it, such as 'assets/*.json'"
            )
        for name in matched:
            kind = never_kind(name)
            why = f"it is one of the {kind}, which are never copied" if kind else refused(name)
            if why:
                raise UsageError(
                    f"--copy {pattern!r} matches {name}: {why}. Give a pattern without it"
                )
        chosen.update(matched)
    return chosen
