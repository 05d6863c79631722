"""nf4cli.load: every output in its own library, and experts in 4 bit in stock transformers."""

from __future__ import annotations

import gc
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import encoded_models
import pytest
import torch
from helpers import LLAMA, llama_tensors, nf4_ok, read_all, write_checkpoint_dir
from safetensors.torch import save_file
from text_models import make
from tiny_models import MODELS

import nf4cli
from nf4cli.errors import InputError, MachineError, UsageError
from nf4cli.planning import stacks

pytestmark = pytest.mark.loaders

transformers = pytest.importorskip("transformers", reason="the loader tests need transformers")
bnb = pytest.importorskip("bitsandbytes", reason="the loader tests need bitsandbytes")
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

STACKED = (
    "qwen3_moe", "mixtral", "deepseek_v3", "glm4_moe", "qwen2_moe", "qwen3_next", "gpt_oss",
)  # fmt: skip
IDS = torch.tensor([[1] + [(i * 37 + 11) % 500 + 3 for i in range(15)]])


def logits_of(model: Any) -> torch.Tensor:
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False  # that path repacks the weights, lossily
    with torch.no_grad():
        return model(IDS).logits.float()


def parametrized(model: Any) -> dict[str, torch.Tensor]:
    """The decoded value of every parameter that is held packed, by its name."""
    return {
        f"{path}.{name}": getattr(module, name)
        for path, module in model.named_modules()
        for name in getattr(module, "parametrizations", {})
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Callable[..., tuple[Path, Path]]:
    """(the source, its output) by family and target, each made once."""
    found: dict[tuple[str, str], tuple[Path, Path]] = {}

    def of(name: str, target: str = "unsloth") -> tuple[Path, Path]:
        if (name, target) not in found:
            root = tmp_path_factory.mktemp(name)
            source = make(name, root / "src", torch.bfloat16)
            nf4_ok("quantize", source, root / "out", "--target", target, "-q")
            found[name, target] = source, root / "out"
        return found[name, target]

    return of


@pytest.mark.parametrize(
    ("name", "target"),
    [
        *((name, "unsloth") for name in (*STACKED, "llama4_text", "llama")),
        ("qwen3_moe", "vllm"), ("mixtral", "vllm"), ("qwen3_moe", "transformers"),
    ],
)  # fmt: skip
def test_it_computes_what_the_decoded_model_does(made, tmp_path, name, target):
    """What is packed as matrices, for vLLM and of gpt-oss, is put together."""
    _, out = made(name, target)
    model = nf4cli.load(out)
    nf4_ok("dequantize", out, tmp_path / "back")
    decoded, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "back", dtype=torch.bfloat16, output_loading_info=True
    )
    assert not any(info.values()), info
    parameters = dict(decoded.named_parameters())
    packed = parametrized(model)
    assert bool(packed) == (name in STACKED and target != "transformers")
    for key, value in packed.items():
        assert torch.equal(value, parameters[key]), key
    assert torch.equal(logits_of(model), decoded(IDS).logits.float())
    assert model.config.quantization_config.quant_method == "bitsandbytes"
    assert [m for m in model.modules() if isinstance(m, bnb.nn.Linear4bit)]


def test_gpt_oss_that_was_stored_in_mxfp4(tmp_path):
    """It is the model that transformers decodes, with experts in 4 bit."""
    decoded = encoded_models.gpt_oss(tmp_path / "src", middle=64)
    nf4_ok("quantize", tmp_path / "src", tmp_path / "out", "--target", "unsloth")
    packed = parametrized(nf4cli.load(tmp_path / "out"))
    assert len(packed) == 2 * 2
    for key, value in packed.items():
        scale = decoded[key].abs().amax()
        assert (value - decoded[key]).abs().max() < 0.25 * scale, key
        assert value.shape == decoded[key].shape
    nf4_ok("dequantize", tmp_path / "out", tmp_path / "back")
    back = read_all(tmp_path / "back")
    assert all(torch.equal(value, back[key]) for key, value in packed.items())


def test_experts_are_never_held_in_16_bits(made):
    """Neither after loading nor after a forward; a layer's are decoded while it runs."""
    _, out = made("qwen3_moe")
    model = nf4cli.load(out)
    logits_of(model)
    experts = model.model.layers[0].mlp.experts
    held = sum(t.nbytes for t in (*experts.parameters(), *experts.buffers()))
    elements = sum(value.numel() for value in parametrized(experts).values())
    assert 8 * held == 4 * elements
    assert not torch.nn.utils.parametrize._cache


def test_loading_never_holds_more_than_a_layer_in_16_bits(tmp_path):
    """What the process has at its most, against what the same model in 16 bits takes."""

    def of_process(what: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(what))

    config = transformers.Qwen3MoeConfig(
        **{**MODELS["qwen3_moe"].arguments, "hidden_size": 256, "moe_intermediate_size": 256,
           "num_experts": 64, "num_hidden_layers": 4},
    )  # fmt: skip
    transformers.Qwen3MoeForCausalLM(config).bfloat16().save_pretrained(tmp_path / "src")
    nf4_ok("quantize", tmp_path / "src", tmp_path / "out", "--target", "unsloth", "-q")

    def measured(load: Callable[[], Any]) -> tuple[int, int]:
        """Bytes more than before: at the most while loading, and while running."""
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # forgets the most that there was
        before = of_process("VmRSS")
        model = load()
        loaded = of_process("VmHWM") - before
        logits_of(model)
        return loaded, of_process("VmHWM") - before

    sizes = [(tmp_path / n / "model.safetensors").stat().st_size for n in ("src", "out")]
    layer = 3 * 64 * 256 * 256 * 2
    auto = transformers.AutoModelForCausalLM
    loaded, running = measured(lambda: nf4cli.load(tmp_path / "out"))
    full, _ = measured(lambda: auto.from_pretrained(tmp_path / "src", dtype=torch.bfloat16))
    slack = 10_000_000
    assert sizes[1] < 0.3 * sizes[0]
    assert loaded < 2 * sizes[1] + slack
    assert running < 2 * sizes[1] + 2 * layer + slack
    assert full > sizes[0]
    assert running < full / 2


@pytest.mark.parametrize(
    ("name", "target"), [("mixtral", "unsloth"), ("gpt_oss", "unsloth"), ("mixtral", "vllm")]
)
def test_saved_and_loaded_again_it_is_the_same(made, tmp_path, name, target):
    """What was put together is saved as stacks."""
    _, out = made(name, target)
    model = nf4cli.load(out)
    model.save_pretrained(tmp_path / "saved")
    assert "nf4cli" not in (tmp_path / "saved" / "config.json").read_text()
    saved, written = read_all(tmp_path / "saved"), read_all(out)
    if (name, target) == ("mixtral", "unsloth"):
        assert saved.keys() == written.keys()
        same = [n for n in written if "quant_state" not in n]
        assert all(torch.equal(saved[n], written[n]) for n in same)
    assert torch.equal(logits_of(nf4cli.load(tmp_path / "saved")), logits_of(model))
    assert "is good" in nf4_ok("verify", tmp_path / "saved")


def test_a_lora_adapter_on_the_attention_learns(made):
    peft = pytest.importorskip("peft")
    _, out = made("qwen3_moe")
    model = nf4cli.load(out)
    logits_of(model)
    before = {name: value.clone() for name, value in parametrized(model).items()}
    adapted = peft.get_peft_model(
        model,
        peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=4, task_type="CAUSAL_LM"),
    )
    trained = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    adapted.train()
    losses = []
    for _ in range(4):
        loss = adapted(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    assert all(torch.equal(value, before[n]) for n, value in parametrized(model).items())


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_stack_of_any_size_is_decoded_in_slices(nested, dtype):
    """Slices of a few blocks, as a GPU needs them from 2**31 weights on."""
    from nf4cli.loading.packed_stacks import decoded

    stack = torch.randn(5, 32, 48).to(getattr(torch, dtype))
    packed, state = bnb.functional.quantize_4bit(
        stack, blocksize=64, quant_type="nf4", compress_statistics=nested
    )
    whole = decoded(packed, state)
    assert whole.shape == stack.shape
    assert (whole.float() - stack.float()).abs().max() < 0.6
    for most in (65, 1000, 4097):
        assert torch.equal(decoded(packed, state, most), whole)


def test_options_go_to_the_library(made):
    _, out = made("qwen3_moe")
    model = nf4cli.load(out, attn_implementation="eager", device_map="cpu")
    assert model.config._attn_implementation == "eager"
    bare = nf4cli.load(out, class_name="AutoModel")
    assert type(bare).__name__ == "Qwen3MoeModel"
    assert len(parametrized(bare)) == 4
    before = parametrized(model)
    restored = model.dequantize()
    parameters = dict(restored.named_parameters())
    assert all(torch.equal(parameters[name], value) for name, value in before.items())
    assert not parametrized(restored)
    assert not [m for m in restored.modules() if isinstance(m, bnb.nn.Linear4bit)]


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"config": {}}, UsageError, "config cannot be given"),
        ({"class_name": "AutoModelForNothing"}, UsageError, "AutoModelForNothing"),
        ({"attn_implementation": "none"}, InputError, "cannot be loaded: "),
        ({"device_map": {"": "cuda:7"}}, (InputError, MachineError), "cannot be loaded: "),
    ],
)
def test_options_that_make_no_sense(made, options, error, says):
    _, out = made("qwen3_moe")
    with pytest.raises(error, match=says):
        nf4cli.load(out, **options)


def test_what_stock_transformers_does_not_hold_is_refused(made, tmp_path, monkeypatch):
    source, out = made("qwen3_moe")
    _, matrices = made("qwen3_moe", "vllm")
    with monkeypatch.context() as patch:
        patch.setattr(stacks, "FAMILIES", {})
        with pytest.raises(InputError, match=r"experts\.\d\..*nf4 dequantize"):
            nf4cli.load(matrices)
    half = shutil.copytree(matrices, tmp_path / "half")
    kept = {n: t for n, t in read_all(matrices).items() if ".experts.2.up_proj." not in n}
    save_file(kept, half / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"experts\.2\.up_proj\.weight is missing"):
        nf4cli.load(half)
    with pytest.raises(InputError, match="no bitsandbytes 4-bit weight"):
        nf4cli.load(source)
    shutil.copytree(out, tmp_path / "other")
    config = json.loads((out / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(
        json.dumps({**config, "moe_intermediate_size": 32})
    )
    with pytest.raises(InputError, match=r"down_proj is a packed stack.*\[4, 64, 32\] there"):
        nf4cli.load(tmp_path / "other")
    (tmp_path / "other" / "config.json").unlink()
    with pytest.raises(InputError, match=r"no config\.json"):
        nf4cli.load(tmp_path / "other")
    with pytest.raises(InputError, match="absent"):
        nf4cli.load(tmp_path / "absent")


def test_a_library_that_is_missing_is_named(made, monkeypatch):
    _, out = made("qwen3_moe")
    monkeypatch.setitem(sys.modules, "bitsandbytes.nn.parametrize", None)
    with pytest.raises(MachineError, match=r"bitsandbytes.*nf4cli\[load\]"):
        nf4cli.load(out)


def test_a_transformers_that_is_too_old_is_named(made, monkeypatch):
    _, out = made("qwen3_moe")
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "5.9.1")
    with pytest.raises(MachineError, match=r"transformers 5\.9\.1 is too old.*5\.17"):
        nf4cli.load(out)


def test_a_model_that_holds_no_experts_is_loaded_as_ever(tmp_path):
    source = write_checkpoint_dir(tmp_path / "src", llama_tensors(), LLAMA)
    nf4_ok("quantize", source, tmp_path / "out", "-q")
    assert type(nf4cli.load(tmp_path / "out")).__name__ == "LlamaForCausalLM"
