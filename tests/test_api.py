"""The Python interface: the examples of docs/api.md, what it returns, what it costs to import."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import LLAMA, llama_tensors, nf4_ok, same_files, write_checkpoint_dir

import nf4cli
from nf4cli.errors import InputError, UsageError

PAGE = Path(__file__).parent.parent / "docs" / "api.md"


@pytest.fixture
def at_home(tmp_path, monkeypatch) -> Path:
    """The working directory, with a small Llama in `model`."""
    write_checkpoint_dir(tmp_path / "model", llama_tensors(), LLAMA)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_examples_of_the_page_run(at_home, capsys):
    examples = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    assert len(examples) >= 4
    for example in examples:
        exec(compile(example, str(PAGE), "exec"), {})
    out = capsys.readouterr().out
    assert "weights decoded" in out
    assert "bytes of model.layers.0" in out
    assert "quantized already" in out or "already" in out


def test_it_writes_what_the_command_writes(at_home):
    done = nf4cli.quantize("model", "by-api", nf4cli.QuantConfig(quant_type="fp4", blocksize=32))
    nf4_ok(
        "quantize", "model", "by-command", "--quant-type", "fp4", "--blocksize", "32", cwd=at_home
    )
    assert same_files(at_home / "by-api", at_home / "by-command")
    assert done.output == Path("by-api")
    assert done.published is None
    assert done.manifests[""].config.quant_type == "fp4"


def test_a_plan_writes_nothing_and_is_exact(at_home):
    plan = nf4cli.plan("model", "out")
    assert not (at_home / "out").exists()
    nf4cli.quantize("model", "out")
    made = sum(p.stat().st_size for p in (at_home / "out").glob("*.safetensors"))
    assert plan.shard_bytes == made


def test_what_is_wrong_is_found_not_raised(at_home):
    nf4cli.quantize("model", "out")
    file = next((at_home / "out").glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    found = nf4cli.verify("out", source="model")
    assert not found.ok
    assert found.own.findings


def test_errors_are_the_packages_own(at_home):
    with pytest.raises(InputError, match="does not exist"):
        nf4cli.quantize("nowhere", "out")
    with pytest.raises(UsageError, match="--blocksize 33"):
        nf4cli.quantize("model", "out", nf4cli.QuantConfig(blocksize=33))
    with pytest.raises(UsageError, match="needs --push-to"):
        nf4cli.quantize("model", "out", public=True)
    with pytest.raises(AttributeError, match="quantise"):
        _ = nf4cli.quantise


def test_a_listener_hears_stages_weights_and_files(at_home):
    heard: dict[str, list] = {"stage": [], "tensor": [], "file": []}

    class Ears(nf4cli.Listener):
        def stage(self, stage):
            heard["stage"].append((stage.label, stage.total))
            return super().stage(stage)

        def tensor(self, part, plan, result):
            heard["tensor"].append(plan.name)

        def file(self, part, name, size):
            heard["file"].append((name, size))

    done = nf4cli.quantize("model", "out", listener=Ears())
    assert heard["stage"] == [("quantizing", done.model.parts[""].work_bytes)]
    assert len(heard["tensor"]) == done.model.written
    assert heard["file"] == [
        (p.name, p.stat().st_size) for p in (at_home / "out").glob("*.safetensors")
    ]


def test_the_import_costs_no_numerical_library():
    code = (
        "import sys, nf4cli\n"
        "heavy = {'numpy', 'torch', 'safetensors', 'huggingface_hub', 'rich', 'typer'}\n"
        "sys.exit(f'{heavy & sys.modules.keys()}' if heavy & sys.modules.keys() else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
