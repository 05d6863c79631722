"""nf4 write-text: a model's own text, and what is calibrated by it."""

from __future__ import annotations

import json

import pytest
import text_models
import torch
import transformers
from helpers import nf4, nf4_ok
from tiny_models import V
from tokenizers.processors import TemplateProcessing

from nf4cli.api.writing import Writing, write
from nf4cli.checkpoint.discovery import IMPORTANCE
from nf4cli.checkpoint.importance_file import load


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return text_models.make("llama", tmp_path_factory.mktemp("write") / "model")


def lines(path):
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


def test_what_a_model_writes_calibrates_it(model, tmp_path):
    said = nf4_ok("write-text", model, "own.jsonl", "--tokens", "600", cwd=tmp_path)
    texts = lines(tmp_path / "own.jsonl")
    assert f"{len(texts)} documents in own.jsonl" in " ".join(said.split())
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    assert sum(len(tokenizer(t)["input_ids"]) for t in texts) > 500
    nf4_ok(
        "quantize", model, "out", "--calibration", "own.jsonl", "--method", "yaqa",
        "--calibration-tokens", "256", "--calibration-length", "32", cwd=tmp_path,
    )  # fmt: skip
    assert load(tmp_path / "out" / IMPORTANCE).about["tokens"] == 256
    nf4_ok("verify", "out", "--source", model, "--calibration", "own.jsonl", cwd=tmp_path)


def test_a_seed_gives_its_text(model, tmp_path):
    texts = {}
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        write(Writing(model, tmp_path / f"{name}.jsonl", 100, seed))
        texts[name] = lines(tmp_path / f"{name}.jsonl")
    assert texts["a"] == texts["b"] != texts["c"]


@pytest.mark.parametrize("before", [[], ["<unk>", "<s>"], ["<unk>"]])
def test_the_text_is_drawn_from_the_prediction(tmp_path, before):
    """A model that is sure of its next token writes that one, and ends where it says so.

    Args:
        before: tokens that the tokenizer puts before each text.
    """
    tokenizer = text_models.tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=" ".join([*before, "$A"]),
        special_tokens=[(name, tokenizer.convert_tokens_to_ids(name)) for name in set(before)],
    )
    config = transformers.LlamaConfig(
        vocab_size=V, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=4, eos_token_id=tokenizer.eos_token_id, tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    chain = {first: first + 1 for first in range(10, 15)} | {15: tokenizer.eos_token_id}
    chain[tokenizer.convert_tokens_to_ids((before or ["<s>"])[-1])] = 10
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.normal_(generator=torch.Generator().manual_seed(0))
        model.lm_head.weight.zero_()
        for token, following in chain.items():
            model.lm_head.weight[following] += 5 * model.model.embed_tokens.weight[token]
    root = tmp_path / "model"
    model.save_pretrained(root)
    tokenizer.save_pretrained(root)
    write(Writing(root, tmp_path / "own.jsonl", 50))
    expected = tokenizer.decode(list(range(10, 16)))
    assert set(lines(tmp_path / "own.jsonl")) == {expected}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("own.txt",), "own.txt is not named .jsonl"),
        (("own.jsonl", "--tokens", "0"), "--tokens 0 is below 1"),
        (("own.jsonl", "--seed", "-1"), "--seed -1 is not from 0"),
    ],
)
def test_what_cannot_be_written_is_refused(model, tmp_path, options, says):
    done = nf4("write-text", model, *options, cwd=tmp_path)
    assert done.returncode == 2
    assert says in " ".join(done.stderr.split())
    assert not list(tmp_path.iterdir())


def test_an_encoder_does_not_write(tmp_path):
    root = text_models.make("bert_mlm", tmp_path / "model")
    done = nf4("write-text", root, "own.jsonl", cwd=tmp_path)
    assert done.returncode == 2
    assert "which writes no text" in " ".join(done.stderr.split())
    assert not (tmp_path / "own.jsonl").exists()
