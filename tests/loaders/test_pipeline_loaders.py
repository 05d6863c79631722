"""Real loading: diffusers reads our pipelines and agrees with its own bitsandbytes flow."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import nf4_ok, read_all
from safetensors.torch import load_file, save_file

from nf4cli.checkpoint.types import Checkpoint, Shard, TensorInfo
from nf4cli.format.config import QuantConfig
from nf4cli.planning.diffusers_rules import FP32_MODULES, converts
from nf4cli.planning.make_plan import make_plan
from nf4cli.planning.selection import module_path

pytestmark = pytest.mark.loaders

diffusers = pytest.importorskip("diffusers", reason="the pipeline tests need diffusers")
transformers = pytest.importorskip("transformers", reason="the pipeline tests need transformers")
bnb = pytest.importorskip("bitsandbytes", reason="the pipeline tests need bitsandbytes")

DTYPE = torch.bfloat16
NO_TOKENIZERS = {"tokenizer": None, "tokenizer_2": None}


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers asks for a GPU before it loads 4-bit weights; bitsandbytes needs none."""
    from diffusers.quantizers.bitsandbytes import BnB4BitDiffusersQuantizer as Quantizer

    monkeypatch.setattr(Quantizer, "validate_environment", lambda self, *_, **__: None)
    monkeypatch.setattr(Quantizer, "update_device_map", lambda self, m: m or {"": "cpu"})


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], list[str]]]:
    """Warnings of diffusers and transformers, since the last call."""
    libraries = (diffusers, transformers)

    def messages() -> list[str]:
        found = [r.getMessage() for r in caplog.records if r.levelname != "INFO"]
        caplog.clear()
        return found

    for library in libraries:
        library.utils.logging.enable_propagation()
    yield messages
    for library in libraries:
        library.utils.logging.disable_propagation()


def flux() -> Any:
    return diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=2, attention_head_dim=16,
        num_attention_heads=4, joint_attention_dim=32, pooled_projection_dim=64,
        axes_dims_rope=[4, 4, 8],
    )  # fmt: skip


def sd3() -> Any:
    return diffusers.SD3Transformer2DModel(
        sample_size=32, patch_size=1, in_channels=4, num_layers=2, attention_head_dim=16,
        num_attention_heads=4, joint_attention_dim=32, caption_projection_dim=64,
        pooled_projection_dim=64, out_channels=4, pos_embed_max_size=32,
    )  # fmt: skip


def unet() -> Any:
    return diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(32, 64),
        layers_per_block=1, cross_attention_dim=32, norm_num_groups=8, attention_head_dim=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip


def wan() -> Any:
    return diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=4, attention_head_dim=16, in_channels=4,
        out_channels=4, text_dim=32, freq_dim=32, ffn_dim=128, num_layers=2,
        cross_attn_norm=True, rope_max_seq_len=32,
    )  # fmt: skip


def hidream() -> Any:
    """A mixture of experts, whose router is no Linear."""
    return diffusers.HiDreamImageTransformer2DModel(
        patch_size=2, in_channels=4, out_channels=4, num_layers=1, num_single_layers=1,
        attention_head_dim=16, num_attention_heads=4, caption_channels=[32, 32], text_emb_dim=64,
        num_routed_experts=4, num_activated_experts=2, axes_dims_rope=(4, 6, 6),
        max_resolution=(32, 32), llama_layers=[0, 1],
    )  # fmt: skip


def clip() -> Any:
    config = transformers.CLIPTextConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        vocab_size=128, max_position_embeddings=77, projection_dim=64, bos_token_id=0,
        eos_token_id=2,
    )  # fmt: skip
    return transformers.CLIPTextModel(config)


def t5() -> Any:
    config = transformers.T5Config(
        d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=4, vocab_size=128
    )
    return transformers.T5EncoderModel(config)


def vae() -> Any:
    return diffusers.AutoencoderKL(
        in_channels=3, out_channels=3, block_out_channels=(4,), layers_per_block=1,
        latent_channels=1, norm_num_groups=1, use_quant_conv=False, use_post_quant_conv=False,
        shift_factor=0.06, scaling_factor=1.5,
    )  # fmt: skip


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5)).to(DTYPE)


def inputs(model: Any) -> dict[str, Any]:
    time = torch.tensor([3.0])
    match type(model).__name__:
        case "FluxTransformer2DModel":
            return {
                "hidden_states": noise(1, 16, 4), "encoder_hidden_states": noise(1, 8, 32),
                "pooled_projections": noise(1, 64), "timestep": time.to(DTYPE) / 1000,
                "img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(8, 3),
            }  # fmt: skip
        case "SD3Transformer2DModel":
            return {
                "hidden_states": noise(1, 4, 32, 32), "encoder_hidden_states": noise(1, 8, 32),
                "pooled_projections": noise(1, 64), "timestep": time,
            }  # fmt: skip
        case "UNet2DConditionModel":
            return {
                "sample": noise(1, 4, 8, 8), "timestep": time,
                "encoder_hidden_states": noise(1, 4, 32),
            }  # fmt: skip
        case "WanTransformer3DModel":
            return {
                "hidden_states": noise(1, 4, 1, 8, 8), "timestep": time,
                "encoder_hidden_states": noise(1, 8, 32),
            }  # fmt: skip
        case "HiDreamImageTransformer2DModel":
            return {
                "hidden_states": noise(1, 4, 8, 8), "timesteps": time,
                "encoder_hidden_states_t5": noise(1, 4, 32),
                "encoder_hidden_states_llama3": noise(2, 1, 4, 32), "pooled_embeds": noise(1, 64),
            }  # fmt: skip
    raise KeyError(type(model))


def linears(model: Any) -> dict[str, Any]:
    return {n: m for n, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit)}


def output_of(model: Any) -> torch.Tensor:
    for module in linears(model).values():
        module.support_avx512bf16_for_cpu = False  # that path repacks the weights, lossily
    with torch.no_grad():
        return model.eval()(**inputs(model))[0].float()


@pytest.mark.parametrize("make", [flux, sd3, unet, wan, hidream], ids=lambda f: f.__name__)
def test_diffusers_loads_a_component_as_its_own_flow_does(tmp_path, make, said):
    torch.manual_seed(0)
    model = make()
    cls = type(model)
    model.to(DTYPE).save_pretrained(tmp_path / "model")
    nf4_ok("quantize", tmp_path / "model", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    said()
    ours = cls.from_pretrained(tmp_path / "out", torch_dtype=DTYPE)
    assert not said()
    theirs = cls.from_pretrained(
        tmp_path / "model", torch_dtype=DTYPE,
        quantization_config=diffusers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=DTYPE, llm_int8_skip_modules=config["llm_int8_skip_modules"],
        ),
    )  # fmt: skip
    assert linears(ours).keys() == linears(theirs).keys()
    packed = {name.removesuffix(".weight.absmax") for name in read_all(tmp_path / "out")
              if name.endswith(".absmax") and not name.endswith("nested_absmax")}  # fmt: skip
    assert linears(ours).keys() == packed
    for name, module in linears(theirs).items():
        mine = linears(ours)[name]
        assert torch.equal(mine.weight.data, module.weight.data), name
        assert mine.compute_dtype == module.compute_dtype == DTYPE
    got, wanted = output_of(ours), output_of(theirs)
    assert torch.isfinite(got).all()
    assert (got - wanted).norm() <= 0.02 * wanted.norm()


def test_diffusers_loads_a_whole_pipeline(tmp_path, said):
    torch.manual_seed(0)
    parts = {
        "transformer": flux().to(DTYPE), "text_encoder": clip().to(DTYPE),
        "text_encoder_2": t5().to(DTYPE), "vae": vae().to(DTYPE),
    }  # fmt: skip
    pipeline = diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), **NO_TOKENIZERS, **parts
    )
    source, out = tmp_path / "pipe", tmp_path / "out"
    pipeline.save_pretrained(source)
    nf4_ok("quantize", source, out)
    nf4_ok("verify", out, "--source", source)
    said()
    loaded = diffusers.FluxPipeline.from_pretrained(out, torch_dtype=DTYPE, **NO_TOKENIZERS)
    assert not said()
    for name, module in linears(loaded.transformer).items():
        assert module.weight.quant_state is not None, name
    assert linears(loaded.text_encoder)
    assert linears(loaded.text_encoder_2)
    assert not linears(loaded.vae)
    for part in ("transformer", "text_encoder", "text_encoder_2"):
        for module in linears(getattr(loaded, part)).values():
            module.support_avx512bf16_for_cpu = False
    images = loaded(
        prompt_embeds=noise(1, 8, 32), pooled_prompt_embeds=noise(1, 64), height=16, width=16,
        num_inference_steps=2, output_type="pt", generator=torch.Generator().manual_seed(0),
    ).images  # fmt: skip
    assert torch.isfinite(images).all()
    with torch.no_grad():
        ids = torch.arange(3, 15)[None]
        for part in ("text_encoder", "text_encoder_2"):
            got = getattr(loaded, part)(ids).last_hidden_state.float()
            wanted = parts[part].eval()(ids).last_hidden_state.float()
            assert (got - wanted).norm() < 0.3 * wanted.norm()
    nf4_ok("dequantize", out, tmp_path / "back")
    back = diffusers.FluxPipeline.from_pretrained(
        tmp_path / "back", torch_dtype=DTYPE, **NO_TOKENIZERS
    )
    got, wanted = output_of(back.transformer), output_of(loaded.transformer)
    assert (got - wanted).norm() < 0.05 * wanted.norm()


def test_clip_under_the_names_that_published_pipelines_have(tmp_path):
    torch.manual_seed(0)
    model = clip().to(DTYPE)
    model.save_pretrained(tmp_path / "te")
    file = tmp_path / "te" / "model.safetensors"
    tensors = {f"text_model.{n.removeprefix('text_model.')}": t for n, t in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})
    nf4_ok("quantize", tmp_path / "te", tmp_path / "out")
    loaded, info = transformers.CLIPTextModel.from_pretrained(
        tmp_path / "out", dtype=DTYPE, output_loading_info=True
    )
    assert not any(info.values())
    assert len(linears(loaded)) == 12
    for module in linears(loaded).values():
        module.support_avx512bf16_for_cpu = False
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        got, wanted = (m(ids).last_hidden_state.float() for m in (loaded, model))
    assert (got - wanted).norm() < 0.3 * wanted.norm()


def test_a_shard_set_is_loaded(tmp_path):
    torch.manual_seed(0)
    model = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=2, attention_head_dim=64,
        num_attention_heads=8, joint_attention_dim=32, pooled_projection_dim=64,
        axes_dims_rope=[16, 24, 24],
    ).to(DTYPE)  # fmt: skip
    model.save_pretrained(tmp_path / "model", max_shard_size="5MB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    nf4_ok("quantize", tmp_path / "model", tmp_path / "out", "--max-shard-size", "2MB")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    loaded = type(model).from_pretrained(tmp_path / "out", torch_dtype=DTYPE)
    got, wanted = output_of(loaded), output_of(model)
    assert (got - wanted).norm() < 0.3 * wanted.norm()


def model_classes() -> dict[str, Any]:
    """Everything that nf4 would convert."""
    names = (name for name in dir(diffusers) if converts("x", "diffusers", name))
    found = {name: getattr(diffusers, name) for name in names}
    return {
        name: cls for name, cls in found.items()
        if isinstance(cls, type) and issubclass(cls, diffusers.ModelMixin)
    }  # fmt: skip


def test_the_table_of_float32_modules_is_diffusers_own():
    """What diffusers adds to every skip list has to be kept by us as well."""
    classes = model_classes()
    assert len(classes) > 50
    for name, cls in classes.items():
        wanted = getattr(cls, "_keep_in_fp32_modules", None) or ()
        assert set(wanted) <= set(FP32_MODULES.get(name, ())), name


@pytest.mark.long
def test_every_class_of_diffusers_is_packed_as_it_replaces(tmp_path):
    """On the meta device: what we pack is what diffusers holds in 4 bit, given our skip list."""
    checked = 0
    for name, cls in model_classes().items():
        try:
            with torch.device("meta"):
                model = cls()
        except Exception:  # not every class can be made without arguments
            continue
        plan = make_plan(as_checkpoint(model, tmp_path), QuantConfig())
        packed = {module_path(t.name) for t in plan.tensors if t.action == "quantize"}
        skip = plan.output_config["quantization_config"]["llm_int8_skip_modules"]
        skip = [*skip, *(cls._keep_in_fp32_modules or ())]
        replaced = {
            path for path, module in model.named_modules()
            if isinstance(module, torch.nn.Linear)
            and path.rpartition(".")[2] not in skip
            and not any(f"{key}." in path or key == path for key in skip)
        }  # fmt: skip
        assert packed == replaced, name
        checked += 1
    assert checked > 50


def as_checkpoint(model: Any, root: Path) -> Checkpoint:
    """A model without weights, as if it were stored: a plan needs headers only."""
    tensors, start = [], 8
    for name, tensor in model.state_dict().items():
        dtype = "BF16" if tensor.is_floating_point() else "I64"
        tensors.append(TensorInfo(name, dtype, tuple(tensor.shape), start))
        start = tensors[-1].stop
    shard = Shard(root / "diffusion_pytorch_model.safetensors", start, 8, tuple(tensors))
    config = {**model.config, "_class_name": type(model).__name__}
    return Checkpoint(
        root, "model", (shard,), {t.name: (shard, t) for t in tensors}, config, False, (), ()
    )
