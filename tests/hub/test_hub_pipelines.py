"""Pipelines from a Hub and to one: within a bound on the disk, file by file, resumable."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest
import torch
from helpers import nf4_ok, same_files
from hub_server.faults import Fault
from hub_server.fixtures import Watch
from safetensors.torch import save_file

LOCAL = ("--digest", "sha256", "--max-shard-size", "1MB")
PUSH = ("--push-to", "me/flux-nf4", "--max-shard-size", "1MB")


def weights(count: int, name: str, seed: int) -> dict[str, torch.Tensor]:
    """Matrices of 1 MB."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name.format(i): torch.randn(1024, 512, generator=generator).bfloat16() for i in range(count)
    }


@pytest.fixture(scope="module")
def flux(tmp_path_factory) -> Path:
    """A pipeline of about 10 MB: a denoiser in 5 files, a text encoder, and an autoencoder."""
    root = tmp_path_factory.mktemp("flux") / "flux"
    denoiser = root / "transformer"
    denoiser.mkdir(parents=True)
    tensors = weights(5, "transformer_blocks.{}.ff.net.0.proj.weight", 1)
    names = [f"diffusion_pytorch_model-{i + 1:05d}-of-00005.safetensors" for i in range(5)]
    for file, (name, tensor) in zip(names, tensors.items(), strict=True):
        save_file({name: tensor}, denoiser / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": dict(zip(tensors, names, strict=True))}
    (denoiser / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    (denoiser / "config.json").write_text('{"_class_name": "FluxTransformer2DModel"}')
    encoder = root / "text_encoder"
    encoder.mkdir()
    save_file(
        weights(2, "text_model.encoder.layers.{}.mlp.fc1.weight", 2),
        encoder / "model.safetensors", {"format": "pt"},
    )  # fmt: skip
    clip = {"model_type": "clip_text_model", "vocab_size": 100, "hidden_size": 512}
    (encoder / "config.json").write_text(json.dumps(clip))
    vae = root / "vae"
    vae.mkdir()
    save_file(
        weights(2, "decoder.{}.weight", 3), vae / "diffusion_pytorch_model.safetensors",
        {"format": "pt"},
    )  # fmt: skip
    (vae / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    whole = {
        "_class_name": "FluxPipeline",
        "transformer": ["diffusers", "FluxTransformer2DModel"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (root / "model_index.json").write_text(json.dumps(whole))
    return root


@pytest.fixture(scope="module")
def expected(flux, tmp_path_factory) -> Path:
    """The same converted from the disk."""
    output = tmp_path_factory.mktemp("expected") / "flux-nf4"
    nf4_ok("quantize", flux, output, *LOCAL)
    return output


@pytest.fixture
def hub_with_flux(hub, flux):
    hub.add("org/flux", flux)
    return hub


def smallest(nf4_hub, key: str) -> int:
    """The bound that --plan gives for the pipeline."""
    plan = nf4_hub.ok("quantize", "org/flux", "--plan", "--json", "--max-shard-size", "1MB")
    return json.loads(plan)["hub"][key]


def require_same_weights(hub, expected: Path) -> None:
    """Weight files are published as a conversion on the disk writes them; no file is missing."""
    head = hub.store.repos["me/flux-nf4"].head
    names = {p.relative_to(expected).as_posix() for p in expected.rglob("*") if p.is_file()}
    assert head.keys() == names
    for name in names:
        if name.endswith(".safetensors"):
            assert head[name].place.read_bytes() == (expected / name).read_bytes()


def test_within_the_smallest_bound(nf4_hub, hub_with_flux, expected):
    limit = smallest(nf4_hub, "smallest_disk_bytes")
    with Watch(nf4_hub.work) as watch:
        nf4_hub.ok("quantize", "org/flux", "out", "--disk", limit, "--max-shard-size", "1MB")
    assert watch.most <= limit
    assert not list((nf4_hub.home / "hub").rglob("*.safetensors")), "nothing came to the cache"
    manifests = ("nf4_manifest.json", "nf4_pipeline.json", "README.md")  # they name the commit
    assert same_files(nf4_hub.work / "out", expected, but=manifests)
    nf4_hub.ok("verify", "out", "--source", "org/flux")


def test_one_byte_less_is_refused(nf4_hub, hub_with_flux):
    limit = smallest(nf4_hub, "smallest_disk_bytes")
    nf4_hub.fails(
        2, "quantize", "org/flux", "out", "--disk", limit - 1, "--max-shard-size", "1MB",
        says=("is too little for flux",),
    )  # fmt: skip
    assert not list(nf4_hub.work.iterdir())


@pytest.mark.parametrize("bounded", [True, False])
def test_files_leave_the_disk_as_they_are_uploaded(nf4_hub, hub_with_flux, expected, bounded):
    options = ()
    limit = smallest(nf4_hub, "smallest_disk_bytes_when_pushed")
    if bounded:
        options = ("--disk", str(limit))
    with Watch(nf4_hub.work) as watch:
        nf4_hub.ok("quantize", "org/flux", *PUSH, *options)
    if bounded:
        assert watch.most <= limit < sum(p.stat().st_size for p in expected.rglob("*"))
    assert not list(nf4_hub.work.iterdir())
    require_same_weights(hub_with_flux, expected)
    assert len(hub_with_flux.store.repos["me/flux-nf4"].commits) == 2


def test_a_local_pipeline_is_pushed_without_staying(nf4_hub, hub, flux, expected):
    nf4_hub.ok("quantize", flux, *PUSH)
    assert not list(nf4_hub.work.iterdir())
    require_same_weights(hub, expected)


def test_what_is_pushed_and_stays_is_hashed_once(nf4_hub, hub, flux, expected):
    nf4_hub.ok("quantize", flux, "out", *PUSH)
    require_same_weights(hub, expected)
    assert same_files(nf4_hub.work / "out", expected)


@pytest.mark.parametrize("where", [r"PUT /upload", r"GET /files/.*vae", r"POST .*/commit/main"])
def test_a_stopped_run_goes_on(nf4_hub, hub_with_flux, expected, where):
    limit = smallest(nf4_hub, "smallest_disk_bytes_when_pushed")
    command = ("quantize", "org/flux", *PUSH, "--disk", str(limit))
    hub_with_flux.faults.add(Fault(where, after=1 if "PUT" in where else 0, stall=30))
    process = nf4_hub.start(*command)
    nf4_hub.wait_for_fault(process)
    process.send_signal(signal.SIGTERM)
    started = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert time.monotonic() - started < 5
    hub_with_flux.faults.clear()
    nf4_hub.ok(*command, "--resume")
    require_same_weights(hub_with_flux, expected)
    assert not list(nf4_hub.work.iterdir())
    again = nf4_hub(*command, "--resume")
    assert again.returncode == 0, again.stderr
    assert "me/flux-nf4 has this already" in again.stderr
