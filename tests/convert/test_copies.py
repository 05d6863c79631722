"""What an output copies beside its weights: what a model is made of, and never what is private."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import blake3
import pytest
import torch
from helpers import LLAMA, llama_tensors, nf4, nf4_ok, write_checkpoint_dir
from safetensors.torch import load_file, save_file

from nf4cli.checkpoint.discovery import MANIFEST, open_checkpoint
from nf4cli.checkpoint.model_files import is_of_model, matches, never_kind

PRIVATE = (
    ".env", ".env.local", "prod.env", ".netrc", ".git-credentials", "server.pem", "ssh.key",
    "id_rsa", "id_ed25519.pub", "credentials", "credentials.json", "token", "hf_token.txt",
    ".huggingface/token", "client_secret.json", "openai_api_key.txt",
    "run.log", "nohup.out", "trainer_state.json", "training_args.bin", "optimizer.pt",
    "optimizer.safetensors", "scheduler.pt", "rng_state_0.pth", "wandb-summary.json",
    "wandb/run-1/config.yaml", "runs/Jan01/events.out.tfevents.1.host.1.0", "logs/a.txt",
    "checkpoint-500/config.json", "global_step500/mp_rank_00_model_states.pt",
    "__pycache__/modeling.cpython-311.pyc", ".ipynb_checkpoints/config.json", ".git/config",
    "src/.env",
)  # fmt: skip
OF_MODELS = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.txt", "vocab.json", "merges.txt",
    "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "source.spm", "qwen.tiktoken",
    "tekken.json", "params.json", "normalizer.json", "bpe.codes", "entity_vocab.json",
    "vocab-src.json", "spm_char.model", "preprocessor_config.json", "processor_config.json",
    "video_preprocessor_config.json", "image_processor_config.json", "chat_template.jinja",
    "chat_template.json", "additional_chat_templates/rag.jinja", "SYSTEM_PROMPT.txt",
    "modules.json", "config_sentence_transformers.json", "sentence_bert_config.json",
    "sentence_xlm-roberta_config.json", "modeling_phi3.py", "configuration_deepseek.py",
    "LICENSE", "LICENSE.md", "LICENSE-MODEL", "Notice.txt", "NOTICE", "COPYING", "USE_POLICY.md",
    "Qwen LICENSE AGREEMENT", "model_index.json", "speaker_embeddings_path.json",
    "speaker_embeddings/v2/en_0_coarse_prompt.npy", "language_model/5gram.bin", "alphabet.json",
)  # fmt: skip
OTHERS = (
    "figures/a.png", "long.jpg", "train.jsonl", "data.parquet", "notes.txt", "train.py",
    "all_results.json", "report.pdf", "onnx/config.json", "original/params.json",
    "adapter_config.json", "adapter_model.safetensors", "deepspeed.json", "wandb.yaml",
)  # fmt: skip


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_checkpoint_dir(tmp_path / "src", llama_tensors(), LLAMA)


def fill(root: Path, *names: str, text: str = "{}") -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def files_in(root: Path) -> set[str]:
    return {p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()}


def listed(out: Path) -> set[str]:
    return {f["name"] for f in json.loads((out / MANIFEST).read_text())["output"]["files"]}


def test_names_of_published_models_and_of_private_files_are_told_apart():
    assert [name for name in OF_MODELS if not is_of_model(name)] == []
    assert [name for name in (*PRIVATE, *OTHERS) if is_of_model(name)] == []
    assert [name for name in (*OF_MODELS, *OTHERS) if never_kind(name)] == []
    assert [name for name in PRIVATE if not never_kind(name)] == []


def test_a_training_directory(source, tmp_path):
    """Nothing of it but the model is copied, and the summary says once what was left."""
    fill(source, *PRIVATE, *(n for n in OTHERS if not n.endswith(".safetensors")))
    shutil.copy(source / "model.safetensors", source / "checkpoint-500")
    fill(source, "LICENSE", "tokenizer.json", "vocab.txt")
    said = nf4_ok("quantize", source, tmp_path / "out")
    assert files_in(tmp_path / "out") == {
        "README.md", "LICENSE", "config.json", "model.safetensors", "tokenizer.json", "vocab.txt",
        MANIFEST,
    }  # fmt: skip
    assert said.count("note: not copied:") == 1
    for words in ("secrets (", ".env", "leftovers of training (", "checkpoint-500/", "figures/"):
        assert words in " ".join(said.split())
    nf4_ok("verify", tmp_path / "out", "--source", source)
    plan = json.loads(nf4_ok("quantize", source, tmp_path / "o2", "--plan", "--json"))
    assert {".env", "trainer_state.json", "figures/a.png"} <= {*plan["left_files"]}


def test_copy_adds_files_and_they_are_proved(source, tmp_path):
    fill(source, "figures/a.png", "figures/deep/b.png", "notes.txt", "colbert_linear.pt")
    out = tmp_path / "out"
    asked = ("--copy", "figures", "--copy", "*.txt", "--copy", "colbert_linear.pt")
    nf4_ok("quantize", source, out, *asked)
    added = {"figures/a.png", "figures/deep/b.png", "notes.txt", "colbert_linear.pt"}
    assert added <= listed(out)
    nf4_ok("verify", out, "--source", source)
    nf4_ok("quantize", source, out, *asked, "--resume")
    assert "it has a copy of" in nf4("quantize", source, out, "--resume").stderr
    nf4_ok("dequantize", out, tmp_path / "back")
    assert added <= files_in(tmp_path / "back")
    (source / "notes.txt").write_text("changed")
    assert "notes.txt is not the source's file" in nf4("verify", out, "--source", source).stdout


@pytest.mark.parametrize("name", PRIVATE)
def test_copy_never_takes_what_is_private(source, tmp_path, name):
    fill(source, name)
    done = nf4("quantize", source, tmp_path / "out", "--copy", name)
    assert done.returncode == 2
    assert name in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("nothing*", "matches no file"), ("**", ".env"), ("..", "matches no file"),
        ("README.md", "an output has its own"), ("adapter_*", "apply the adapter"),
        ("pytorch_model.bin", "for the model's weights"), ("link.txt", "leads out"),
    ],
)  # fmt: skip
def test_copy_refuses(source, tmp_path, pattern, words):
    fill(source, "README.md", "adapter_config.json", "pytorch_model.bin")
    if pattern == "**":
        fill(source, "a/.env")
    (tmp_path / "outside.txt").write_text("x")
    (source / "link.txt").symlink_to(tmp_path / "outside.txt")
    done = nf4("quantize", source, tmp_path / "out", "--copy", pattern)
    assert done.returncode == 2
    assert words in done.stderr or (pattern == "**" and "README.md" in done.stderr)
    assert not (tmp_path / "out").exists()


def test_patterns():
    assert matches("a/*.txt", "a/b.txt")
    assert not matches("*.txt", "a/b.txt")
    assert matches("**/*.txt", "a/c/b.txt")
    assert matches("a", "a/c/b.txt")
    assert not matches("*", ".env")
    assert matches(".e*", ".env")


def test_adapter_files_beside_a_merged_model(source, tmp_path):
    fill(source, "adapter_config.json", text='{"base_model_name_or_path": "nowhere"}')
    save_file(
        {"base_model.x.lora_A.weight": torch.ones(2, 2)}, source / "adapter_model.safetensors"
    )
    said = " ".join(nf4_ok("quantize", source, tmp_path / "out").split())
    assert "adapter_config.json and adapter_model.safetensors beside the model are" in said
    assert not any("adapter" in name for name in files_in(tmp_path / "out"))
    nf4_ok("quantize", source / "model.safetensors", tmp_path / "single")
    assert not any("adapter" in name for name in files_in(tmp_path / "single"))
    transformers = pytest.importorskip("transformers")
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_parts_beside_the_model_are_copied_and_recorded(source, tmp_path):
    own = load_file(source / "model.safetensors")
    parts = ("value_head.safetensors", "vision-lora/adapter_model.safetensors",
             "speech_tokenizer/model.safetensors", "adapter.fra.safetensors")  # fmt: skip
    again = ("consolidated.safetensors", "model.fp16.safetensors", "best/model.safetensors",
             "copy.safetensors", "onnx/weights.safetensors")  # fmt: skip
    for name in (*parts, *again):
        (source / name).parent.mkdir(exist_ok=True)
        head = {"v_head.summary.weight": torch.ones(1, 64)}
        if name == "adapter.fra.safetensors":  # replaces weights of the model
            head = {"lm_head.weight": own["lm_head.weight"]}
        save_file(head if name in parts else own, source / name)
    fill(source, "vision-lora/adapter_config.json", "speech_tokenizer/config.json")
    (source / "broken.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    out = tmp_path / "out"
    said = " ".join(nf4_ok("quantize", source, out).split())
    assert {*parts, "vision-lora/adapter_config.json", "speech_tokenizer/config.json"} <= listed(
        out
    )
    assert not {*again, "broken.safetensors"} & files_in(out)
    assert "lie beside the model and are copied byte for byte" in said
    assert "safetensors that cannot be read (broken.safetensors)" in said
    assert all((out / name).read_bytes() == (source / name).read_bytes() for name in parts)
    nf4_ok("verify", out, "--source", source)
    nf4_ok("dequantize", out, tmp_path / "back")
    assert {*parts} <= files_in(tmp_path / "back")
    save_file({"v_head.summary.weight": torch.zeros(1, 64)}, source / "value_head.safetensors")
    assert (
        "value_head.safetensors is not the source" in nf4("verify", out, "--source", source).stdout
    )


def test_pickles_beside_the_model_are_named(source, tmp_path):
    (source / "modules.json").write_text(json.dumps([{"path": ""}, {"path": "2_Dense"}]))
    fill(source, "colbert_linear.pt", "2_Dense/pytorch_model.bin", "pytorch_model.bin", "a.png")
    said = " ".join(nf4_ok("quantize", source, tmp_path / "out").split())
    assert "colbert_linear.pt beside the model is a pickle" in said
    assert "2_Dense/pytorch_model.bin is a pickle that sentence-transformers needs" in said
    assert "pytorch_model.bin)" in said
    assert not list((tmp_path / "out").rglob("*.bin"))


def test_the_code_that_auto_map_names_and_what_it_imports(source, tmp_path):
    config = json.loads((source / "config.json").read_text())
    fill(
        source, "train.py", "data/mel.json", "helper.py", "layers/norm.py", "tools/x.py", text="a=1"
    )
    (source / "modeling_x.py").write_text(
        "from .helper import a\nfrom .layers.norm import a\nPATH = 'data/mel.json'\n"
    )
    assert not {"helper.py", "train.py"} & {*open_checkpoint(source).extra_files}
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_x.Model"}
    (source / "config.json").write_text(json.dumps(config))
    for place in (source, source / "model.safetensors"):
        seen = open_checkpoint(place).extra_files
        assert {"modeling_x.py", "helper.py"} <= {*seen}
        assert "tools/x.py" not in seen
    assert {"layers/norm.py", "data/mel.json"} <= {*open_checkpoint(source).extra_files}


def record_in_manifest(out: Path, name: str) -> None:
    """Add a file to an output as an earlier version copied it."""
    data = b"{}"
    (out / name).parent.mkdir(parents=True, exist_ok=True)
    (out / name).write_bytes(data)
    document = json.loads((out / MANIFEST).read_text())
    digest = blake3.blake3(data).hexdigest()
    document["output"]["files"].append({"name": name, "size": len(data), "digest": digest})
    document["output"]["files"].sort(key=lambda file: file["name"])
    (out / MANIFEST).write_text(json.dumps(document, indent=1) + "\n")


def test_outputs_of_earlier_versions_are_still_good(source, tmp_path):
    """They copied everything but weights, and no parts."""
    out = tmp_path / "out"
    nf4_ok("quantize", source, out)
    old = (".env", "figures/a.png", "runs/a/x.txt", "trainer_state.json")
    fill(source, *old)
    for name in old:
        record_in_manifest(out, name)
    save_file({"v_head.weight": torch.ones(1)}, source / "value_head.safetensors")
    said = nf4_ok("verify", out, "--source", source)
    assert "value_head.safetensors of the source, which the output lacks" in " ".join(said.split())
    (source / "figures/a.png").write_text("other")
    assert "figures/a.png is not the source's file" in nf4("verify", out, "--source", source).stdout


def test_a_pipeline(pipe, tmp_path):
    fill(pipe, ".env", "runs/x.txt", "wandb/run/config.yaml", "checkpoint-5/config.json",
         "transformer/.env", "tokenizer/training.log", "vae/token", "LICENSE", "pipeline.py",
         "a.png", "transformer/notes.txt", "scheduler/odd.json")  # fmt: skip
    out = tmp_path / "out"
    nf4_ok("quantize", pipe, out, "--copy", "a.png", "--copy", "transformer/*.txt")
    here = files_in(out)
    assert {
        "LICENSE",
        "pipeline.py",
        "a.png",
        "transformer/notes.txt",
        "scheduler/odd.json",
    } <= here
    assert [name for name in here if never_kind(name)] == []
    nf4_ok("verify", out, "--source", pipe)
    nf4_ok("dequantize", out, tmp_path / "back")
    assert {"a.png", "transformer/notes.txt"} <= files_in(tmp_path / "back")
    done = nf4("quantize", pipe, tmp_path / "o2", "--copy", "vae/token")
    assert (done.returncode, "vae/token" in done.stderr) == (2, True)
    nf4_ok("quantize", pipe, out, "--copy", "a.png", "--copy", "transformer/*.txt", "--resume")
    assert nf4("quantize", pipe, out, "--resume").returncode == 2
