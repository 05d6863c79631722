"""Sources whose weights are stored as codes: each output is that of the decoded checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from encoded_models import GPT_OSS, compressed_model, gpt_oss, weights
from helpers import INPUT, LLAMA, nf4_ok, read_all, refused, write_checkpoint_dir

INT4_32 = weights(4, "int", "group", group_size=32)
SCHEMES = {
    "int4 group": [INT4_32],
    "int4 group, zero points": [weights(4, "int", "group", group_size=16, symmetric=False)],
    "int4 channel": [weights(4, "int", "channel")],
    "int4 channel, zero points": [weights(4, "int", "channel", symmetric=False)],
    "int8 group": [weights(8, "int", "group", group_size=32)],
    "int8 channel": [weights(8, "int", "channel")],
    "int8 channel, zero points": [weights(8, "int", "channel", symmetric=False)],
    "int8 group, zero points": [weights(8, "int", "group", group_size=32, symmetric=False)],
    "nvfp4": [weights(4, "float", "tensor_group", group_size=16)],
    "mxfp4": [weights(4, "float", "group", group_size=32)],
    "mixed": [INT4_32, weights(4, "float", "tensor_group", group_size=16),
              weights(8, "int", "channel")],
}  # fmt: skip


def same_output(
    work: Path, decoded: dict[str, torch.Tensor], config: dict, source: str = "source"
) -> None:
    """The output of `source` is that of the decoded checkpoint, and is proved from the source."""
    write_checkpoint_dir(work / "plain", decoded, config)
    for name in (source, "plain"):
        nf4_ok("quantize", work / name, work / f"{name}-nf4", "--keep", "o_proj")
    ours, plain = read_all(work / f"{source}-nf4"), read_all(work / "plain-nf4")
    assert ours.keys() == plain.keys()
    for key in plain:
        assert torch.equal(ours[key], plain[key]), key
    configs = [json.loads((work / f"{n}-nf4" / "config.json").read_text()) for n in (source, "plain")]
    for made in configs:
        made["quantization_config"]["llm_int8_skip_modules"].sort()
    assert configs[0] == configs[1]
    assert "is good" in nf4_ok("verify", work / f"{source}-nf4", "--source", work / source)


def test_mxfp4_experts_decode_as_transformers_does(tmp_path):
    same_output(tmp_path, gpt_oss(tmp_path / "source"), GPT_OSS)
    shapes = {k: tuple(v.shape) for k, v in read_all(tmp_path / "source-nf4").items()}
    assert shapes["model.layers.0.mlp.experts.gate_up_proj"] == (3, 64, 192)
    assert shapes["model.layers.1.mlp.experts.down_proj"] == (3, 96, 64)


@pytest.mark.parametrize("name", SCHEMES)
def test_compressed_tensors_decode_as_the_library_does(name, tmp_path):
    same_output(tmp_path, compressed_model(tmp_path / "source", SCHEMES[name]), LLAMA)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_scales_of_another_dtype_than_the_models(dtype, tmp_path):
    """The library computes in the dtype of the scales, and its result is rounded once more."""
    same_output(tmp_path, compressed_model(tmp_path / "source", [INT4_32], dtype), LLAMA)
