"""The line that loads an output: the class that has the head, for every model of transformers."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from forking import OF_LOADERS, command
from helpers import LLAMA, llama_tensors, nf4_ok, nightly_but, read_all, write_checkpoint_dir

from nf4cli.checkpoint.discovery import MANIFEST
from nf4cli.output.auto_class import auto_class, survey
from nf4cli.output.card import Subject, card
from nf4cli.output.load_line import loading_call
from nf4cli.output.manifest import Manifest

SECOND = Path(__file__).parents[2] / ".venv-transformers4" / "bin" / "python"
PYTHONS = {
    "5": sys.executable,
    "4": os.environ.get("NF4_TRANSFORMERS4_PYTHON") or str(SECOND),
}
TABLES = """
import json, warnings
warnings.filterwarnings("ignore")
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
import transformers
found = []
for name, auto in vars(modeling_auto).items():
    if name.startswith("AutoModel") and hasattr(auto, "_model_mapping"):
        mapping = auto._model_mapping
        for family, config in CONFIG_MAPPING_NAMES.items():
            class Asked: __name__ = config
            mapping._load_attr_from_module = lambda family, given: given
            try: given = mapping[Asked()]
            except KeyError: continue
            for model in [given] if isinstance(given, str) else given:
                if model: found.append([name, family, model])
print(json.dumps([transformers.__version__, found, sorted(transformers._class_to_module)]))
"""
"""Prints (version, [Auto class, family, model class] of every model, names of all classes), asked
of the Auto classes' own tables, without loading a model."""


@cache
def tables(major: str) -> tuple[str, set[tuple[str, str, str]], set[str]]:
    if not Path(PYTHONS[major]).exists():
        pytest.skip("no environment with transformers 4: scripts/test makes one")
    done = subprocess.run(
        [*command(Path(PYTHONS[major]), OF_LOADERS), "-c", TABLES],
        capture_output=True, text=True, check=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    version, found, classes = json.loads(done.stdout.splitlines()[-1])
    return version, {tuple(row) for row in found}, set(classes)


@pytest.mark.parametrize("major", nightly_but("5", "54"))
def test_every_class_of_transformers_is_loaded_by_a_class_that_gives_it(major):
    version, found, classes = tables(major)
    assert version in survey()["transformers"], "run scripts/survey_auto_classes.py"
    pairs = {(family, model) for _, family, model in found}
    assert len(pairs) > 1000
    wrong = []
    for family, model in sorted(pairs):
        line = auto_class({"model_type": family, "architectures": [model]})
        own = line == model and model in classes
        if not own and (line, family, model) not in found:
            wrong.append((family, model, line))
        if line == "AutoModel" and ("For" in model or "Head" in model):
            wrong.append((family, model, line))
    assert not wrong


@pytest.mark.parametrize("major", nightly_but("5", "54"))
def test_a_class_without_an_auto_class_is_loaded_by_its_name(major):
    classes = tables(major)[2]
    assert auto_class({"model_type": "gpt2", "architectures": ["GPT2DoubleHeadsModel"]}) == (
        "GPT2DoubleHeadsModel"
    )
    named = {n for n in survey()["others"] if auto_class({"model_type": "llama",
             "architectures": [n]}) == n}  # fmt: skip
    assert named == set(survey()["others"])
    assert len(named & classes) > 50


@pytest.mark.parametrize(
    ("family", "model", "says"),
    [
        ("llama", "LlamaForCausalLM", "AutoModelForCausalLM"),
        ("gpt2", "GPT2LMHeadModel", "AutoModelForCausalLM"),
        ("t5", "T5ForConditionalGeneration", "AutoModelForSeq2SeqLM"),
        ("bart", "BartForConditionalGeneration", "AutoModelForSeq2SeqLM"),
        ("whisper", "WhisperForConditionalGeneration", "AutoModelForSpeechSeq2Seq"),
        ("llava", "LlavaForConditionalGeneration", "AutoModelForImageTextToText"),
        ("qwen2_vl", "Qwen2VLForConditionalGeneration", "AutoModelForImageTextToText"),
        ("gemma3", "Gemma3ForConditionalGeneration", "AutoModelForImageTextToText"),
        ("gemma3_text", "Gemma3ForCausalLM", "AutoModelForCausalLM"),
        ("gemma3", "Gemma3ForCausalLM", "Gemma3ForCausalLM"),
        ("wav2vec2", "Wav2Vec2ForCTC", "AutoModelForCTC"),
        ("wav2vec2", "Wav2Vec2ForSequenceClassification", "AutoModelForAudioClassification"),
        ("vit", "ViTForImageClassification", "AutoModelForImageClassification"),
        ("bert", "BertForMaskedLM", "AutoModelForMaskedLM"),
        ("bert", "BertForSequenceClassification", "AutoModelForSequenceClassification"),
        ("bert", "BertForTokenClassification", "AutoModelForTokenClassification"),
        ("bert", "BertModel", "AutoModel"),
        ("clip", "CLIPModel", "AutoModel"),
        ("llama", "AModelOfTomorrowForCausalLM", "AutoModelForCausalLM"),
        ("tomorrow", "TomorrowForConditionalGeneration", "TomorrowForConditionalGeneration"),
        ("tomorrow", "TomorrowModel", "AutoModel"),
    ],
)
def test_tasks(family, model, says):
    assert auto_class({"model_type": family, "architectures": [model]}) == says


@pytest.mark.parametrize(
    ("config", "tensors", "says"),
    [
        ({"model_type": "llama"}, ["model.norm.weight"], "AutoModelForCausalLM"),  # tied
        ({"model_type": "llama"}, ["lm_head.weight", "model.norm.weight"], "AutoModelForCausalLM"),
        ({"model_type": "llama"}, ["norm.weight"], "AutoModel"),
        ({"model_type": "llama"}, ["score.weight"], "AutoModelForSequenceClassification"),
        ({"model_type": "t5"}, ["lm_head.weight"], "AutoModelForSeq2SeqLM"),
        ({"model_type": "bert"}, ["bert.pooler.dense.weight", "cls.predictions.bias"],
         "AutoModelForMaskedLM"),
        ({"model_type": "bert"}, ["encoder.layer.0.output.dense.weight"], "AutoModel"),
        ({"model_type": "llama", "architectures": ["MyOwnLlama"]}, ["lm_head.weight"],
         "AutoModelForCausalLM"),
        ({"model_type": ["x"], "architectures": [3]}, ["lm_head.weight"], "AutoModel"),
    ],
)  # fmt: skip
def test_a_class_that_config_json_does_not_name_is_told_by_the_head(config, tensors, says):
    assert auto_class(config, tensors) == says


@pytest.mark.parametrize(
    ("names", "auto_map", "says"),
    [
        (["ChatGLMModel"], {"AutoModel": "m.ChatGLMForConditionalGeneration",
                            "AutoModelForCausalLM": "m.ChatGLMForConditionalGeneration",
                            "AutoModelForSeq2SeqLM": "m.ChatGLMForConditionalGeneration"},
         "AutoModelForCausalLM"),
        (["QWenLMHeadModel"], {"AutoConfig": "c.C", "AutoModelForCausalLM": "m.QWenLMHeadModel"},
         "AutoModelForCausalLM"),
        (["NewModel"], {"AutoModel": "m.NewModel", "AutoModelForMaskedLM": "m.NewForMaskedLM",
                        "AutoModelForCausalLM": "m.NewLM"}, "AutoModel"),
        (["InternVLChatModel"], {"AutoModel": "m.InternVLChatModel",
                                 "AutoModelForCausalLM": "m.InternVLChatModel"},
         "AutoModelForCausalLM"),
        (["XForTokenClassification"], {"AutoModel": "org/code--m.XModel",
          "AutoModelForTokenClassification": "org/code--m.XForTokenClassification"},
         "AutoModelForTokenClassification"),
        (["QWenLMHeadModel"], {"AutoConfig": "c.C"}, "AutoModelForCausalLM"),
        (["X"], {"AutoModel; import os": "m.X", "AutoTokenizer": ["t.T", None]}, "AutoModel"),
    ],
)  # fmt: skip
def test_custom_code_is_taken_at_its_word(names, auto_map, says):
    assert auto_class({"model_type": "own", "architectures": names, "auto_map": auto_map}) == says


CODE = '''
import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class OwnConfig(PretrainedConfig):
    model_type = "own"

    def __init__(self, hidden_size=64, vocab_size=512, **others):
        super().__init__(**others)
        self.hidden_size, self.vocab_size = hidden_size, vocab_size


class OwnLM(PreTrainedModel):
    """Its name ends in nothing that says what it is."""

    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = torch.nn.Embedding(config.vocab_size, config.hidden_size)
        self.up = torch.nn.Linear(config.hidden_size, 128, bias=False)
        self.down = torch.nn.Linear(128, config.hidden_size, bias=False)
        self.lm_head = torch.nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids):
        hidden = self.embed(input_ids)
        return CausalLMOutput(logits=self.lm_head(hidden + self.down(self.up(hidden).relu())))
'''


def own_model(root: Path) -> Path:
    """A checkpoint that comes with code of its own."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"embed": (512, 64), "up": (128, 64), "down": (64, 128), "lm_head": (512, 64)}
    tensors = {
        f"{name}.weight": (torch.randn(*shape, generator=generator) * 0.1).bfloat16()
        for name, shape in shapes.items()
    }
    config = {
        "model_type": "own", "architectures": ["OwnLM"], "hidden_size": 64, "vocab_size": 512,
        "torch_dtype": "bfloat16", "tie_word_embeddings": False,
        "auto_map": {"AutoConfig": "modeling_own.OwnConfig",
                     "AutoModelForCausalLM": "modeling_own.OwnLM"},
    }  # fmt: skip
    write_checkpoint_dir(root, tensors, config)
    (root / "modeling_own.py").write_text(CODE)
    return root


def printed_line(text: str) -> str:
    (line,) = re.findall(r"^load    (.*)$", text, re.M)
    return line


def run_line(line: str, library: str, then: str, cwd: Path) -> str:
    """What Python prints that runs a line as a user would, and then other code with `model`."""
    name = line.partition(".")[0].partition("(")[0]
    program = (
        f"import transformers.dynamic_module_utils as used\n"
        f"used.HF_MODULES_CACHE = {str(cwd / 'modules')!r}\n"
        f"from {library} import {name}\nmodel = {line}\n{then}"
    )
    done = subprocess.run(
        [*command(Path(sys.executable), OF_LOADERS), "-c", program],
        capture_output=True, text=True, check=False, cwd=cwd,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.loaders
def test_the_line_and_the_card_of_a_model_with_code_of_its_own(tmp_path):
    text = nf4_ok("quantize", own_model(tmp_path / "own"), tmp_path / "out", "--trust-remote-code")
    line = printed_line(text)
    assert line.startswith("AutoModelForCausalLM.from_pretrained(")
    assert line.endswith("trust_remote_code=True)")
    then = """
import bitsandbytes, torch
packed = [n for n, m in model.named_modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
for name in packed: model.get_submodule(name).support_avx512bf16_for_cpu = False
out = model(torch.tensor([[1, 2, 3]])).logits
print(type(model).__name__, packed, bool(out.isfinite().all()), tuple(out.shape))
"""
    said = run_line(line, "transformers", then, tmp_path)
    assert said.splitlines()[-1] == "OwnLM ['up', 'down'] True (1, 3, 512)"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "AutoModelForCausalLM.from_pretrained(" in card
    assert 'device_map="auto", trust_remote_code=True)' in card


@pytest.mark.loaders
def test_the_line_of_a_model_for_sentence_transformers(tmp_path):
    from transformers import BertConfig, BertModel

    source = tmp_path / "source"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "sentence"]
    config = BertConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=1,
        num_attention_heads=4, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    BertModel(config).bfloat16().save_pretrained(source)
    (source / "vocab.txt").write_text("\n".join(words))
    (source / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    kinds = (("", "Transformer"), ("1_Pooling", "Pooling"))
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(kinds)
    ]
    (source / "modules.json").write_text(json.dumps(modules))
    (source / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 64, "pooling_mode_mean_tokens": True}
    (source / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    line = printed_line(nf4_ok("quantize", source, tmp_path / "out"))
    assert line.startswith("SentenceTransformer(")
    then = """
import bitsandbytes
packed = [m for m in model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
for module in packed: module.support_avx512bf16_for_cpu = False
print(len(packed), model.encode(["a sentence"]).shape)
"""
    said = run_line(line, "sentence_transformers", then, tmp_path)
    packed = sum(name.endswith(".absmax") for name in read_all(tmp_path / "out"))
    assert said.splitlines()[-1] == f"{packed} (1, 64)"


def test_the_line_for_vllm_names_the_plugin(tmp_path):
    source = write_checkpoint_dir(tmp_path / "src", llama_tensors(), LLAMA)
    line = printed_line(nf4_ok("quantize", source, tmp_path / "out", "--target", "vllm"))
    assert line.startswith(f"vllm serve {tmp_path / 'out'}  # ")
    assert line.endswith("pip install --no-deps vllm-bnb-plugin")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> Manifest:
    root = tmp_path_factory.mktemp("lines")
    nf4_ok("quantize", write_checkpoint_dir(root / "src", llama_tensors(), LLAMA), root / "out")
    return Manifest.from_file(root / "out" / MANIFEST)


OWN = {**LLAMA, "auto_map": {"AutoConfig": "c.C", "AutoModelForCausalLM": "m.LlamaForCausalLM"}}
FLUX = {"_class_name": "FluxTransformer2DModel", "_diffusers_version": "0.42.1"}


@pytest.mark.parametrize(
    ("config", "options", "says"),
    [
        (LLAMA, {}, 'AutoModelForCausalLM.from_pretrained("out")'),
        (OWN, {}, 'AutoModelForCausalLM.from_pretrained("out", trust_remote_code=True)'),
        (LLAMA, {"file": "modules.json"}, 'SentenceTransformer("out")'),
        (OWN, {"file": "modules.json"}, 'SentenceTransformer("out", trust_remote_code=True)'),
        (OWN, {"target": "vllm"}, "vllm serve out --trust-remote-code  # "),
        (OWN, {"target": "unsloth"},
         'FastLanguageModel.from_pretrained("out", load_in_4bit=True, trust_remote_code=True)'),
        (FLUX, {}, 'FluxTransformer2DModel.from_pretrained("out", torch_dtype=torch.bfloat16)'),
        ({**FLUX, "auto_map": {"AutoModel": "m.M"}}, {},
         'AutoModel.from_pretrained("out", torch_dtype=torch.bfloat16, trust_remote_code=True)'),
    ],
)  # fmt: skip
def test_lines_for_other_libraries(manifest, config, options, says):
    record = next(iter(manifest.output_files.values()))
    files = dict(manifest.output_files)
    if "file" in options:
        files[options["file"]] = record
    target = options.get("target", "transformers")
    changed = replace(manifest, config=replace(manifest.config, target=target), output_files=files)
    line = loading_call("out", {"": changed}, config)
    assert line is not None
    assert line.startswith(says) if target == "vllm" else line == says
    text = card(Subject("x", {}, {"": changed}, config, {"": "12ab"}))
    assert ("trust_remote_code=True" in text or "--trust-remote-code" in text) == (
        "auto_map" in config
    )
