"""The model card: metadata that a hostile source cannot bend, text that is right for the model."""

from __future__ import annotations

import re
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from helpers import LLAMA, llama_tensors, nf4_ok, write_checkpoint_dir
from markdown_it import MarkdownIt

from nf4cli.checkpoint.discovery import MANIFEST
from nf4cli.format.config import QuantConfig
from nf4cli.output.card import HERE, Subject, card
from nf4cli.output.front_matter import format_metadata, parse_metadata, read_metadata
from nf4cli.output.manifest import Manifest

THEIRS = """---
license: other
license_name: llama3
license_link: LICENSE
language:
- en
- no
- 'de'
pipeline_tag: text-generation
tags: [chat, 4-bit]
datasets:
- org/set
base_model: somebody/else
model-index:
- name: x
  results: []
---
# Theirs
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    root = write_checkpoint_dir(tmp_path_factory.mktemp("card") / "llama", llama_tensors(), LLAMA)
    (root / "README.md").write_text(THEIRS)
    (root / "tokenizer_config.json").write_text("{}")
    return root


@pytest.fixture(scope="module")
def out(source) -> Path:
    nf4_ok("quantize", source, source.parent / "out", "--keep", "down_proj")
    return source.parent / "out"


@pytest.fixture(scope="module")
def subject(out) -> Subject:
    return Subject("llama", {}, {"": Manifest.from_file(out / MANIFEST)}, LLAMA, {"": "12ab"})


def head_of(text: str) -> dict:
    match = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    assert match is not None
    return yaml.safe_load(match[1])


def test_metadata_is_carried_over(out):
    assert head_of((out / "README.md").read_text()) == {
        "library_name": "transformers", "pipeline_tag": "text-generation", "license": "other",
        "license_name": "llama3", "license_link": "LICENSE", "language": ["en", "no", "de"],
        "datasets": ["org/set"], "tags": ["chat", "4-bit", "bitsandbytes", "nf4", "nf4cli"],
    }  # fmt: skip


def test_the_same_run_writes_the_same_card(source, out, tmp_path):
    nf4_ok("quantize", source, tmp_path / "again", "--keep", "down_proj", "--engine", "torch")
    assert (tmp_path / "again" / "README.md").read_bytes() == (out / "README.md").read_bytes()


def test_an_edited_card_stays(source, out, tmp_path):
    """A run that finds its output finished touches nothing of it."""
    shutil.copytree(out, tmp_path / "out")
    (tmp_path / "out" / "README.md").write_text("mine")
    nf4_ok("quantize", source, tmp_path / "out", "--keep", "down_proj", "--resume")
    assert (tmp_path / "out" / "README.md").read_text() == "mine"


def test_dequantize_has_no_card_of_the_4_bit_model(out, tmp_path):
    nf4_ok("dequantize", out, tmp_path / "back")
    assert not (tmp_path / "back" / "README.md").exists()


def test_the_command_in_the_card_makes_it_again(source, out, tmp_path):
    """The last line of the card, run beside the source."""
    command = re.findall(r"^nf4 (quantize .*)$", (out / "README.md").read_text(), re.M)[-1]
    nf4_ok(*command.split(), tmp_path / "again", cwd=source.parent)
    for name in (MANIFEST, "model.safetensors", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (out / name).read_bytes()


def test_base_of_the_hub(subject):
    commit = "0123456789" * 4
    manifest = replace(subject.parts[""], source_repo="org/base", source_commit=commit)
    text = card(replace(subject, parts={"": manifest}))
    assert head_of(text)["base_model"] == "org/base"
    assert head_of(text)["base_model_relation"] == "quantized"
    assert f"nf4 verify {HERE} --source org/base@{commit}" in text
    assert f"nf4 quantize org/base@{commit} " in text
    hostile = replace(manifest, source_repo="a b; rm -rf ~ #")
    assert "rm -rf" not in re.sub(
        r"<code>.*?</code>", "", card(replace(subject, parts={"": hostile}))
    )


def test_the_card_names_what_packed_experts_were_checked_with(subject):
    config = replace(subject.parts[""].config, target="unsloth")
    manifest = replace(subject.parts[""], config=config)
    assert "5.17.0" not in card(replace(subject, parts={"": manifest}))
    manifest = replace(manifest, config=replace(config, expert_layout="stacks"))
    said = card(replace(subject, parts={"": manifest}))
    assert "unsloth_zoo 2026.10.9 over transformers 5.17.0" in said
    assert f'nf4cli.load("{HERE}"' in said
    assert "--expert-layout" not in said


@pytest.mark.parametrize(
    ("config", "target", "says"),
    [
        (LLAMA, "transformers", "AutoModelForCausalLM.from_pretrained"),
        (LLAMA, "vllm", f"vllm serve {HERE}"),
        (LLAMA, "vllm", "pip install --no-deps vllm-bnb-plugin"),
        (LLAMA, "vllm", "vLLM refuses tensor parallelism"),
        (LLAMA, "vllm", "--pipeline-parallel-size"),
        (LLAMA, "unsloth", "FastLanguageModel"),
        ({"architectures": ["LlavaForConditionalGeneration"]}, "transformers",
         "import AutoTokenizer, LlavaForConditionalGeneration"),
        ({"architectures": ["BertForSequenceClassification"]}, "transformers",
         "AutoModelForSequenceClassification"),
        ({"architectures": ["BertModel"]}, "transformers", "AutoModel.from_pretrained"),
        ({"architectures": ["XForCausalLM"], "auto_map": {}}, "transformers",
         "trust_remote_code=True"),
        ({"architectures": ["os;import os#ForCausalLM"]}, "transformers", "AutoModel.from_pre"),
        ({"architectures": 3}, "transformers", "AutoModel.from_pretrained"),
        ({"_class_name": "FluxTransformer2DModel", "_diffusers_version": "1"}, "transformers",
         "from diffusers import FluxTransformer2DModel"),
    ],
)  # fmt: skip
def test_how_to_load_it(subject, config, target, says):
    manifest = subject.parts[""]
    manifest = replace(manifest, config=replace(manifest.config, target=target))
    text = card(replace(subject, parts={"": manifest}, config=config))
    assert says in text
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        compile(block, "card", "exec")
    assert ("peft" in text) == (says.startswith("AutoModelForCausalLM") or "auto_map" in config)


def test_a_checkpoint_without_a_config_says_no_loader(subject):
    text = card(replace(subject, config={}))
    assert "Loading" not in text
    assert "library_name" not in head_of(text)


def test_a_pipeline(tmp_path, subject):
    parts = {"transformer": subject.parts[""], "text_encoder": subject.parts[""]}
    index = {"transformer": ["diffusers", "FluxTransformer2DModel"],
             "text_encoder_2": ["transformers", "T5EncoderModel"]}  # fmt: skip
    text = card(Subject("flux", {}, parts, index, dict.fromkeys(parts, "12ab")))
    assert head_of(text)["library_name"] == "diffusers"
    assert "DiffusionPipeline.from_pretrained" in text
    assert "### transformer" in text
    command = re.findall(r"^nf4 quantize .*$", text, re.M)[-1]
    assert "--keep transformer.down_proj --keep text_encoder_2" in command
    assert f"transformer/{MANIFEST}" in text.replace("&#95;", "_")


HOSTILE = {
    "aliases": "a: &a [x,x]\ntags: [*a, *a]\nlicense: mit",
    "aliases inside of a field": "tags: [&a [x,x], *a]\nlicense: mit",
    "merge keys": "tags:\n  x: &x {a: b}\n  y: {<<: *x}\nlicense: mit",
    "tags of Python": "tags: !!python/object/apply:os.system [echo]\nlicense: mit",
    "depth": "tags: " + "[" * 7000 + "\nlicense: mit",
    "wrong types": "tags: {a: b}\nlanguage: 3\nlicense_name: [a, b]\nlicense: mit",
    "no YAML": "tags: [a\nlicense: mit",
    "a long string": f"tags: [{'x' * 400}]\nlicense: mit",
    "control characters": 'tags: ["a\\nb", "\\u202e", "\\x1b[2J"]\nlicense: mit',
    "a field twice": "license: mit\nlicense: other",
    "other fields": "extra_gated_prompt: |\n  text\nlicense: mit\nbase_model: x/y",
    "many tags": "license: mit\ntags:\n" + "".join(f"- t{i}\n" for i in range(100_000)),
    "one long line": "license: mit\ntags: [" + "x, " * 1_000_000,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_metadata(name):
    started = time.perf_counter()
    found = parse_metadata(HOSTILE[name])
    assert time.perf_counter() - started < 2
    assert found["license"] == "mit"
    assert len(found.pop("tags", [])) <= 100
    assert found.keys() <= {"license", "language"}
    assert head_of(format_metadata(found)) == found


def test_cards_that_are_none(tmp_path):
    for content in (
        b"",
        b"# no head",
        b"---\nlicense: mit\n",
        b"---\nlicense: mit\n---x",
        b"\xff" * 99,
    ):
        (tmp_path / "README.md").write_bytes(content)
        assert read_metadata(tmp_path) == {}
    with (tmp_path / "README.md").open("wb") as file:
        file.write(b"---\nlicense: mit\n---\n" + b"x" * 10_000_000)
    assert read_metadata(tmp_path) == {"license": "mit"}
    (tmp_path / "README.md").write_bytes(b"\xef\xbb\xbf---\r\nlicense: mit\r\n---\r\n")
    assert read_metadata(tmp_path) == {"license": "mit"}
    (tmp_path / "README.md").unlink()
    (tmp_path / "model").mkdir()
    (tmp_path / "README.md").write_text("---\nlicense: secret\n---\n")
    (tmp_path / "model" / "README.md").symlink_to(tmp_path / "README.md")
    assert read_metadata(tmp_path / "model") == {}


def test_hostile_names_are_text(subject):
    """Whatever a source calls its tensors, the page has our elements only."""
    evil = "<img src=x onerror=alert(1)>|`]($(x)) \u202e &lt; ```\n# h"
    manifest = subject.parts[""]
    tensors = {f"{evil}{name}": replace(record, reason=evil, output_file=record.output_file)
               for name, record in manifest.tensors.items()}  # fmt: skip
    config = replace(QuantConfig(), keep=(evil, "'; rm -rf /"))
    parts = {"": replace(manifest, tensors=tensors, config=config)}
    text = card(Subject(evil, {"tags": ["<b>"]}, parts, LLAMA, {"": "12ab"}))
    html = (
        MarkdownIt("commonmark", {"html": True}).enable("table").render(text.split("---\n", 2)[2])
    )
    found = set(re.findall(r"<(\w+)", html))
    assert found <= {"h1", "h2", "p", "pre", "code", "table", "thead", "tbody", "tr", "th", "td"}
    assert "\u202e" not in html
    assert html.count("<h1") == 1
