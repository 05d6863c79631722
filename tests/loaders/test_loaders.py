"""Real loading: transformers, bitsandbytes and peft read our output and agree with their own.

The oracle is the flow a user has without us: from_pretrained(BitsAndBytesConfig) on the same
source.
"""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import nf4_ok, read_all

import nf4cli
from nf4cli.format.config import ModuleFormat, QuantConfig

pytestmark = pytest.mark.loaders

transformers = pytest.importorskip("transformers", reason="the loader tests need transformers")
bnb = pytest.importorskip("bitsandbytes", reason="the loader tests need bitsandbytes")
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


def tiny(name: str) -> tuple[Any, Any]:
    """(a small random model of real structure, its Auto class)"""
    torch.manual_seed(0)
    t = transformers
    match name:
        case "llama":
            config = t.LlamaConfig(
                hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, vocab_size=512, max_position_embeddings=128,
                tie_word_embeddings=False,
            )  # fmt: skip
            return t.LlamaForCausalLM(config), t.AutoModelForCausalLM
        case "gpt2":
            config = t.GPT2Config(n_embd=128, n_layer=2, n_head=4, vocab_size=512, n_positions=128)
            return t.GPT2LMHeadModel(config), t.AutoModelForCausalLM
        case "t5":
            config = t.T5Config(
                d_model=128, d_kv=32, d_ff=256, num_layers=2, num_decoder_layers=2, num_heads=4,
                vocab_size=512, decoder_start_token_id=0,
            )  # fmt: skip
            return t.T5ForConditionalGeneration(config), t.AutoModelForSeq2SeqLM
        case "bert" | "bert_cls":
            config = t.BertConfig(
                hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
                vocab_size=512, num_labels=3,
            )  # fmt: skip
            if name == "bert":
                return t.BertForMaskedLM(config), t.AutoModelForMaskedLM
            return t.BertForSequenceClassification(config), t.AutoModelForSequenceClassification
    raise KeyError(name)


def inputs(model: Any) -> dict[str, torch.Tensor]:
    ids = torch.randint(5, 400, (2, 12), generator=torch.Generator().manual_seed(1))
    both = model.config.is_encoder_decoder
    return {"input_ids": ids, **({"decoder_input_ids": ids[:, :6]} if both else {})}


def linears(model: Any) -> dict[str, Any]:
    return {n: m for n, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit)}


def output_of(model: Any) -> torch.Tensor:
    for module in linears(model).values():
        module.support_avx512bf16_for_cpu = False  # that path repacks the weights, lossily
    with torch.no_grad():
        out = model(**inputs(model))
    return (out.logits if "logits" in out else out.last_hidden_state).float()


def real_flow(auto: Any, source: Path, dtype: torch.dtype, quant_type: str = "nf4") -> Any:
    return auto.from_pretrained(
        source, dtype=dtype,
        quantization_config=transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=quant_type, bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        ),
    )  # fmt: skip


def load_clean(auto: Any, path: Path) -> Any:
    model, info = auto.from_pretrained(path, output_loading_info=True)
    assert not info["missing_keys"], info
    assert not info["unexpected_keys"], info
    assert not info["mismatched_keys"], info
    stateless = [n for n, m in linears(model).items() if m.weight.quant_state is None]
    assert not stateless
    return model


def check_against_real_flow(auto: Any, source: Path, ours_path: Path, dtype: torch.dtype) -> Any:
    full = auto.from_pretrained(source, dtype=dtype)
    expected_full = output_of(full)
    del full
    real = real_flow(auto, source, dtype)
    ours = load_clean(auto, ours_path)
    real_linears, our_linears = linears(real), linears(ours)
    assert our_linears.keys() == real_linears.keys()
    assert our_linears
    differing = total = 0
    for name, module in our_linears.items():
        theirs = real_linears[name].weight
        assert torch.equal(module.weight.data.reshape(-1), theirs.data.reshape(-1)), name
        assert module.weight.quant_state.shape == theirs.quant_state.shape, name
        assert module.weight.quant_state.dtype == theirs.quant_state.dtype, name
        codes, their_codes = module.weight.quant_state.absmax, theirs.quant_state.absmax
        # bitsandbytes' native CPU kernel looks codes up in 65,536 bins, so that a few of them
        # are not the nearest; never by more than a step of the map.
        table = module.weight.quant_state.state2.code
        apart = (table[codes.int()] - table[their_codes.int()]).abs().max()
        assert apart <= torch.diff(table).max() * 1.01, name
        differing += int((codes != their_codes).sum())
        total += codes.numel()
    assert differing <= 0.01 * total
    real_out, our_out = output_of(real), output_of(ours)
    quantization_error = (real_out - expected_full).norm()
    assert quantization_error > 0
    assert (our_out - real_out).norm() < 0.25 * quantization_error
    # With those codes exchanged, nothing at all is left between the two models.
    for name, module in real_linears.items():
        module.weight.quant_state = our_linears[name].weight.quant_state
    assert torch.equal(output_of(real), our_out)
    return ours


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bert"])
def test_tiny_models_equal_the_real_flow(name, tmp_path):
    model, auto = tiny(name)
    source = tmp_path / name
    model.to(torch.bfloat16).save_pretrained(source)
    nf4_ok("quantize", source, tmp_path / "out")
    nf4_ok("verify", tmp_path / "out", "--source", source)
    ours = check_against_real_flow(auto, source, tmp_path / "out", torch.bfloat16)
    if name != "bert":
        generated = ours.generate(
            input_ids=inputs(ours)["input_ids"], max_new_tokens=4, do_sample=False
        )
        assert generated.shape[1] >= 4


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_dequantized_models_load_and_equal_what_bitsandbytes_decodes(name, tmp_path):
    model, auto = tiny(name)
    source, packed, back = tmp_path / "source", tmp_path / "packed", tmp_path / "back"
    model.to(torch.bfloat16).save_pretrained(source)
    nf4_ok("quantize", source, packed)
    nf4_ok("dequantize", packed, back)
    original, restored = read_all(source), read_all(back)
    assert {k: (v.dtype, v.shape) for k, v in restored.items()} == {
        k: (v.dtype, v.shape) for k, v in original.items()
    }
    ours, info = auto.from_pretrained(back, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not linears(ours)
    real = real_flow(auto, source, torch.bfloat16)
    plain = dict(ours.named_modules())
    for module_name, module in linears(real).items():
        decoded = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        weight = plain[module_name].weight.detach()
        if type(plain[module_name]).__name__ == "Conv1D":
            weight = weight.T
        torch.testing.assert_close(weight, decoded, rtol=0.02, atol=1e-3)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("storage", ["uint8", "bfloat16", "float32"])
def test_transformers_own_output_is_read(quant_type, double_quant, storage, tmp_path):
    """dequantize, inspect and verify work on checkpoints that nf4 did not write."""
    model, auto = tiny("llama")
    source, theirs = tmp_path / "source", tmp_path / "theirs"
    model.to(torch.bfloat16).save_pretrained(source)
    quantized = auto.from_pretrained(
        source, dtype=torch.bfloat16,
        quantization_config=transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=quant_type, bnb_4bit_quant_storage=storage,
            bnb_4bit_use_double_quant=double_quant, bnb_4bit_compute_dtype=torch.bfloat16,
        ),
    )  # fmt: skip
    quantized.save_pretrained(theirs)
    nf4_ok("dequantize", theirs, tmp_path / "back")
    restored = read_all(tmp_path / "back")
    for name, module in linears(quantized).items():
        decoded = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        assert torch.equal(restored[f"{name}.weight"], decoded), name
    assert quant_type in nf4_ok("inspect", theirs)
    assert "theirs is good" in nf4_ok("verify", theirs)
    assert "codes, by value" in nf4_ok("inspect", theirs, "model.layers.0.mlp.up_proj")
    assert read_all(source).keys() == restored.keys()


def test_a_classification_head_stays_in_full_precision(tmp_path):
    model, auto = tiny("bert_cls")
    model.to(torch.bfloat16).save_pretrained(tmp_path / "source")
    nf4_ok("quantize", tmp_path / "source", tmp_path / "out")
    loaded = load_clean(auto, tmp_path / "out")
    assert type(loaded.classifier) is torch.nn.Linear
    assert torch.isfinite(output_of(loaded)).all()


def test_every_option_loads(tmp_path):
    model, auto = tiny("llama")
    source = tmp_path / "source"
    model.to(torch.float16).save_pretrained(source)
    for i, options in enumerate((
        ("--quant-type", "fp4"), ("--no-double-quant",), ("--blocksize", "256"),
        ("--quant-storage", "bfloat16", "--dtype", "bfloat16"), ("--max-shard-size", "1MB"),
        ("--keep", "down_proj", "--keep", "layers.0"), ("--compute-dtype", "float32"),
        ("--dtype", "float32"),
    )):  # fmt: skip
        out = tmp_path / str(i)
        nf4_ok("quantize", source, out, *options)
        loaded = load_clean(auto, out)
        assert torch.isfinite(output_of(loaded)).all(), options
        if "--keep" in options:
            names = set(linears(loaded))
            assert "model.layers.1.mlp.up_proj" in names
            assert not any("down_proj" in n or "layers.0." in n for n in names)


def test_minilm_equals_the_real_flow(minilm, tmp_path):
    out = tmp_path / "minilm"
    nf4_ok("quantize", minilm, out)
    nf4_ok("verify", out, "--source", minilm)
    check_against_real_flow(transformers.AutoModel, minilm, out, torch.float32)
    assert (out / "1_Pooling" / "config.json").is_file()


@pytest.mark.long
def test_smollm2_equals_the_real_flow_generates_and_trains(smollm, tmp_path):
    import peft

    out = tmp_path / "smollm-nf4"
    nf4_ok("quantize", smollm, out)
    nf4_ok("verify", out, "--source", smollm)
    auto = transformers.AutoModelForCausalLM
    model = check_against_real_flow(auto, smollm, out, torch.bfloat16)
    gc.collect()
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    text = tokenizer.decode(model.generate(**prompt, max_new_tokens=8, do_sample=False)[0])
    assert "Paris" in text
    model = peft.prepare_model_for_kbit_training(model)
    model = peft.get_peft_model(
        model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    )
    loss = model(**prompt, labels=prompt["input_ids"]).loss
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert gradients
    assert all(g is not None and torch.isfinite(g).all() for g in gradients)
    assert any(g.abs().max() > 0 for g in gradients)


def test_modules_of_several_formats_load_and_decode(tmp_path):
    model, auto = tiny("llama")
    model.to(torch.bfloat16).save_pretrained(tmp_path / "model")
    formats = (
        ModuleFormat(32, False, ("q_proj", "0.mlp")),
        ModuleFormat(128, True, ("k_proj", "1.mlp.down_proj")),
        ModuleFormat(64, False, ("o_proj",)),
    )
    config = QuantConfig(formats=formats, keep=("1.self_attn.v_proj",))
    nf4cli.quantize(tmp_path / "model", tmp_path / "out", config)
    nf4_ok("dequantize", tmp_path / "out", tmp_path / "back")
    back = read_all(tmp_path / "back")
    loaded = load_clean(auto, tmp_path / "out")
    found = set()
    for name, module in linears(loaded).items():
        state = module.weight.quant_state
        found.add((state.blocksize, state.nested))
        decoded = bnb.functional.dequantize_4bit(module.weight.data, state)
        assert torch.equal(decoded, back[f"{name}.weight"]), name
    assert found == {(32, False), (128, True), (64, False), (64, True)}
    ordinary = auto.from_pretrained(tmp_path / "back")
    difference = (output_of(loaded) - output_of(ordinary)).norm() / output_of(ordinary).norm()
    assert difference < 0.02
