"""Every defect of the catalogue is noticed, at the level that docs/verify.md says.

    pytest tests/proof/test_defects.py --update-verify-page

writes the table anew.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from defects import DEFECTS, Defect, Kit
from elsewhere import Elsewhere
from helpers import LLAMA, llama_tensors, nf4, nf4_ok, write_checkpoint_dir

from nf4cli import engines
from nf4cli.checkpoint.discovery import MANIFEST
from nf4cli.errors import InputError, Nf4Error
from nf4cli.planning.resources import Resources
from nf4cli.proof.verify import verify

PAGE = Path(__file__).parent.parent.parent / "docs" / "verify.md"
BEGIN, END = "<!-- table: begin -->\n", "<!-- table: end -->\n"
LEVELS = ("alone", "manifest", "source", "source without manifest")
IDS = [d.what for d in DEFECTS]
FOUND: dict[str, dict[str, str]] = {}
RESOURCES = Resources(workers=2, chunk=1 << 20, memory=0)
BY_COMMAND = (
    "one bit of a packed weight", "skip list without the head", "a shard truncated",
    "rope_theta edited; manifest forged",
)  # fmt: skip


def mixtral() -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    """The Llama of helpers.py with four experts a layer instead of its MLP."""
    generator = torch.Generator().manual_seed(5)
    tensors = {k: t for k, t in llama_tensors().items() if ".mlp." not in k}
    for layer in range(2):
        block = f"model.layers.{layer}.block_sparse_moe."
        tensors[block + "gate.weight"] = torch.randn(4, 64, generator=generator).bfloat16()
        for expert in range(4):
            for name, shape in (("w1", (128, 64)), ("w2", (64, 128)), ("w3", (128, 64))):
                value = (torch.randn(*shape, generator=generator) * 0.05).bfloat16()
                tensors[f"{block}experts.{expert}.{name}.weight"] = value
    settings = {"num_local_experts": 4, "num_experts_per_tok": 2}
    return tensors, {
        **LLAMA, "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], **settings
    }  # fmt: skip


@pytest.fixture(scope="session")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Kit:
    root = tmp_path_factory.mktemp("defects")

    def source(name: str, tensors: dict[str, torch.Tensor], config: dict) -> Path:
        path = write_checkpoint_dir(root / name, tensors, {**config, "rope_theta": 5e5})
        (path / "tokenizer.json").write_text("{}")
        return path

    def quantized(path: Path, name: str, *options: str) -> Path:
        nf4_ok("quantize", path, root / name, "-q", *options)
        return root / name

    tensors, wide = llama_tensors(), {**LLAMA, "vocab_size": 6000}
    for key in ("model.embed_tokens.weight", "lm_head.weight"):  # enough for two shards
        generator = torch.Generator().manual_seed(len(key))
        tensors[key] = (torch.randn(6000, 64, generator=generator) * 0.05).bfloat16()
    for key in tensors:
        if key.endswith("norm.weight"):  # no two alike, so that a swap is a change
            generator = torch.Generator().manual_seed(len(key))
            tensors[key] = (1 + torch.randn(64, generator=generator) / 10).bfloat16()
    llama = source("llama", tensors, wide)
    experts = source("mixtral", *mixtral())
    other = source(
        "llama-other",
        tensors | {k: t for k, t in llama_tensors(seed=9).items() if ".layers." in k},
        wide,
    )
    small = ("--max-shard-size", "1MB")
    return Kit(
        good={
            "nested": quantized(llama, "nested", *small),
            "plain": quantized(llama, "plain", "--no-double-quant"),
            "fp4": quantized(llama, "fp4", "--quant-type", "fp4"),
            "experts": quantized(experts, "experts", "--target", "vllm"),
            "stacks": quantized(experts, "stacks", "--target", "unsloth"),
        },
        other=quantized(other, "other", *small),
        half=quantized(llama, "half", "--keep", "model.layers.1.*", *small),
        kept_experts=quantized(experts, "kept", "--target", "unsloth", "--keep", "experts"),
        sources={
            "nested": llama,
            "plain": llama,
            "fp4": llama,
            "experts": experts,
            "stacks": experts,
        },
    )


def levels_of(root: Path, source: Path | None) -> str:
    """The levels whose findings condemn a checkpoint, "" for a good one."""
    try:
        report = verify(root, source, engines.load("cpu"), RESOURCES)
    except InputError:
        return "refused"
    return ", ".join(dict.fromkeys(f.level for f in report.findings))


def look(root: Path, source: Path) -> dict[str, str]:
    """`levels_of` for each of LEVELS."""
    found = {"manifest": levels_of(root, None), "source": levels_of(root, source)}
    (root / MANIFEST).unlink(missing_ok=True)
    found |= {"alone": levels_of(root, None), LEVELS[3]: levels_of(root, source)}
    return found


def damaged(defect: Defect, kit: Kit, place: Path) -> Path:
    """A damaged copy of the good output."""
    shutil.copytree(kit.good[defect.base], place)
    defect.damage(place, kit)
    return place


@pytest.mark.parametrize("base", ["nested", "plain", "fp4", "experts", "stacks"])
def test_the_good_outputs_are_good(kit, tmp_path, base):
    root = Path(shutil.copytree(kit.good[base], tmp_path / "copy"))
    assert set(look(root, kit.sources[base]).values()) == {""}


def test_so_are_those_that_kept_more(kit):
    assert levels_of(kit.half, kit.sources["nested"]) == ""
    assert levels_of(kit.kept_experts, kit.sources["experts"]) == ""


@pytest.mark.parametrize("defect", DEFECTS, ids=IDS)
def test_defect(defect, kit, tmp_path):
    found = look(damaged(defect, kit, tmp_path / "copy"), kit.sources[defect.base])
    FOUND[defect.what] = found
    assert found["source"]
    if defect.only_source:
        assert not found["manifest"]
    else:
        assert found["manifest"]
    if found["alone"]:
        assert found["manifest"], "what is seen without a manifest is seen with one"
        assert found["source without manifest"]


@pytest.mark.parametrize("defect", DEFECTS, ids=IDS)
def test_a_cluster_finds_the_same(defect, kit, tmp_path):
    """File by file, from pickled tasks, in any order."""
    root = damaged(defect, kit, tmp_path / "copy")
    engine = engines.load("cpu")
    for source in (None, kit.sources[defect.base]):

        def findings(cluster: Elsewhere | None, source: Path | None = source) -> object:
            try:
                report = verify(root, source, engine, RESOURCES, cluster=cluster)
            except Nf4Error as error:
                return str(error)
            return sorted((f.level, f.where, f.message) for f in report.findings)

        alone, many = findings(None), findings(Elsewhere())
        if isinstance(many, str) and source is not None:
            assert "prove it on one machine, without --ray" in many or many == alone
        else:
            assert many == alone


@pytest.mark.parametrize("what", BY_COMMAND)
def test_by_the_command_line(what, kit, tmp_path):
    defect = next(d for d in DEFECTS if d.what == what)
    root = damaged(defect, kit, tmp_path / "copy")
    done = nf4("verify", root, "--source", kit.sources[defect.base])
    assert done.returncode == 1
    assert "is NOT good" in done.stdout
    assert "Traceback" not in done.stderr
    assert (nf4("verify", root).returncode == 0) is defect.only_source


def test_the_catalogue():
    assert len(set(IDS)) == len(IDS)
    assert len(IDS) >= 40


def table() -> str:
    """The table of docs/verify.md, from what the tests of this run found."""
    lines = [
        "| defect | alone | with the manifest | with `--source` | `--source`, no manifest |",
        "|---|---|---|---|---|",
    ]
    for what in IDS:
        cells = [FOUND[what][level] or "no" for level in LEVELS]
        lines.append(f"| {what} | {' | '.join(cells)} |")
    counts = [sum(bool(FOUND[what][level]) for what in IDS) for level in LEVELS]
    lines.append(f"| **noticed, of {len(IDS)}** | {' | '.join(map(str, counts))} |")
    return "\n".join(lines) + "\n"


def test_the_table_is_what_was_found(request):
    """Last in this file: it needs what the tests above found."""
    if missing := [what for what in IDS if what not in FOUND]:
        pytest.skip(f"the table needs every defect's test to run, {len(missing)} did not")
    text = PAGE.read_text()
    before, rest = text.split(BEGIN)
    now, after = rest.split(END)
    if request.config.getoption("--update-verify-page"):
        PAGE.write_text(before + BEGIN + table() + END + after)
    else:
        assert now == table(), "run pytest tests/proof/test_defects.py --update-verify-page"
