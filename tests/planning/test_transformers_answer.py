"""The exact answer: what transformers itself says, without weights, network or foreign code."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from nf4cli.errors import InputError, MachineError
from nf4cli.planning import transformers_answer

FACTS = json.loads((Path(__file__).parent.parent / "goldens" / "architectures.json").read_text())
REMOTE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
Path({marker!r}).touch()
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""
AUTO_MAP = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}


def shapes(name: str) -> dict[str, tuple[int, ...]]:
    return {n: tuple(shape) for n, (_, shape) in FACTS[name]["source_tensors"].items()}


def ask(config, names, root="checkpoint", trust=False):
    return transformers_answer.ask_transformers(Path(root), config, names, trust)


def theirs(name: str, version: str) -> set[str]:
    """What the real flow quantized, as the reference has it."""
    key = (
        "quantized_by_transformers_4_57" if version[0] == "4" else "quantized_by_transformers_5_23"
    )
    found = set(FACTS[name][key])
    if version[0] != "4" and name == "dinov2_swiglu":
        # Saved under this name, but loaded by permuting it: see the rearranged ones.
        found = {n for n in found if not n.endswith("mlp.weights_in.weight")}
    if version[0] != "4" and name == "llava":
        # The reference lists the names that version 5 saves, the checkpoint those of version 4.
        found = {n.replace("vision_tower.", "vision_tower.vision_model.") for n in found}
    return found


@pytest.mark.parametrize("name", FACTS)
def test_what_transformers_quantizes(name):
    answer = ask(FACTS[name]["config"], shapes(name))
    assert answer.quantized == theirs(name, answer.version)
    assert not answer.quantized & answer.rearranged
    assert answer.quantized | answer.rearranged <= shapes(name).keys()


def test_rearranged_weights():
    if ask(FACTS["llama"]["config"], shapes("llama")).version[0] == "4":
        pytest.skip("transformers 4 rearranges nothing")
    swiglu = ask(FACTS["dinov2_swiglu"]["config"], shapes("dinov2_swiglu")).rearranged
    assert {n.split("layer.0.")[-1] for n in swiglu if ".0." in n} == {
        "mlp.weights_in.weight", "mlp.weights_in.bias",
    }  # fmt: skip
    experts = ask(FACTS["mixtral"]["config"], shapes("mixtral")).rearranged
    assert experts == {n for n in shapes("mixtral") if ".experts." in n}
    assert not ask(FACTS["llama"]["config"], shapes("llama")).rearranged


def test_what_a_module_is_called_in_the_model():
    answer = ask(FACTS["llava"]["config"], shapes("llava"))
    key = "language_model.model.layers.0.mlp.up_proj"
    assert answer.modules[key] == ("model.language_model.layers.0.mlp.up_proj",)
    assert not ask(FACTS["llama"]["config"], shapes("llama")).modules


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "bert_mlm", "opt"])
def test_names_without_the_base_prefix(name):
    prefix = {"gpt2": "transformer.", "bert_mlm": "bert."}.get(name, "model.")
    bare = {n.removeprefix(prefix): s for n, s in shapes(name).items() if n.startswith(prefix)}
    answer = ask(FACTS[name]["config"], bare)
    assert answer.quantized == {
        n.removeprefix(prefix) for n in theirs(name, answer.version) if n.startswith(prefix)
    }


def test_a_headed_checkpoint_for_the_base_model():
    config = {**FACTS["llama"]["config"], "architectures": ["LlamaModel"]}
    answer = ask(config, shapes("llama"))
    assert answer.quantized == theirs("llama", answer.version)


@pytest.mark.parametrize("architectures", [None, [], ["Gone"], [3], "LlamaForCausalLM", ["nn"]])
def test_architectures_that_say_nothing(architectures):
    config = {**FACTS["llama"]["config"], "architectures": architectures}
    answer = ask(config, shapes("llama"))
    assert answer.quantized == theirs("llama", answer.version)


def test_the_class_that_takes_the_most_tensors_is_meant():
    config = {**FACTS["bert_base"]["config"], "architectures": None}
    answer = ask(config, shapes("bert_base"))
    assert len(answer.quantized) >= 12


def test_how_a_config_is_loaded_does_not_matter():
    config = {
        **FACTS["llama"]["config"],
        "quantization_config": {"quant_method": "fp8"},
        "_attn_implementation": "flash_attention_2",
        "attn_implementation": "flash_attention_2",
    }
    answer = ask(config, shapes("llama"))
    assert answer.quantized == theirs("llama", answer.version)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama9"}, "model_type is 'llama9', none of the"),
        ({"model_type": ["llama"]}, r"model_type is \['llama'\]"),
        ({"model_type": None, "architectures": None}, "model_type is None"),
        ({"num_attention_heads": 0}, "cannot build the model that .*config.json describes"),
        ({"hidden_size": "wide"}, "cannot build the model that .*config.json describes"),
        ({"hidden_act": "none such"}, "cannot build the model that .*config.json describes"),
        ({"hidden_size": 128}, r"has shape \(64, 128\), but config.json describes a model with"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, expected at most"),
        ({"text_config": {"n_layers": 10**9}}, "n_layers is 1000000000, expected at most"),
    ],
)
def test_wrong_configs(change, message):
    with pytest.raises(InputError, match=message):
        ask({**FACTS["llama"]["config"], **change}, shapes("llama"))


def test_tensors_of_another_model():
    with pytest.raises(InputError, match=r"none of the .* has a place in LlamaForCausalLM"):
        ask(FACTS["llama"]["config"], {"unet.down.0.weight": (4, 4)})


def test_transformers_is_missing(monkeypatch):
    monkeypatch.setattr(transformers_answer, "find_spec", lambda name: None)
    assert not transformers_answer.available()
    with pytest.raises(MachineError, match=r"pip install 'nf4cli\[exact\]'"):
        ask(FACTS["llama"]["config"], shapes("llama"))


def test_looking_for_transformers_does_not_import_it():
    code = (
        "import sys; from nf4cli.planning.transformers_answer import available; "
        "assert available() in (True, False); "
        "assert not {'torch', 'transformers'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_network(monkeypatch):
    """A backbone that transformers would fetch: its config, or its weights."""

    def refuse(*arguments, **options):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    config = {"model_type": "dpt", "backbone": "nobody/nothing", "is_hybrid": False}
    with pytest.raises((InputError, MachineError)) as error:
        ask(config, {"x.weight": (4, 4)})
    assert "the network was asked" not in str(error.value)


@pytest.fixture
def remote(tmp_path, monkeypatch):
    """A checkpoint with its own code, which leaves a mark when it runs."""
    marker = tmp_path / "ran"
    root = tmp_path / "own_model"
    root.mkdir()
    (root / "modeling_own.py").write_text(REMOTE.format(marker=str(marker)))
    config = {**FACTS["llama"]["config"], "auto_map": AUTO_MAP, "architectures": ["OwnModel"]}
    from transformers import dynamic_module_utils

    cache = tmp_path / "modules"
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(cache))
    monkeypatch.setattr(sys, "path", list(sys.path))
    return root, marker, config


def test_foreign_code_does_not_run_untrusted(remote):
    root, marker, config = remote
    with pytest.raises(InputError, match=r"'own'.*its own code .*--trust-remote-code"):
        ask({**config, "model_type": "own"}, shapes("llama"), root)
    ask(config, shapes("llama"), root)  # a family that transformers has code of its own for
    assert not marker.exists()


def test_foreign_code_runs_when_trusted(remote):
    root, marker, config = remote
    answer = ask({**config, "model_type": "own"}, shapes("llama"), root, trust=True)
    assert marker.exists()
    assert answer.quantized == theirs("llama", answer.version)


def test_foreign_code_cannot_end_the_run_or_speak_for_it(remote, capsys):
    root, _, config = remote
    module = root / "modeling_own.py"
    module.write_text("print('hello')\nimport sys\nsys.exit(0)\n" + module.read_text())
    with pytest.raises(InputError, match="SystemExit"):
        ask({**config, "model_type": "own"}, shapes("llama"), root, trust=True)
    assert capsys.readouterr().out == ""


def test_foreign_code_that_is_not_there(remote):
    root, _, config = remote
    absent = {"AutoConfig": "gone.OwnConfig", "AutoModel": "gone.OwnModel"}
    with pytest.raises(InputError, match="gone"):
        ask({**config, "model_type": "own", "auto_map": absent}, shapes("llama"), root, trust=True)
    elsewhere = {"AutoConfig": "somebody/else--modeling_own.OwnConfig"}
    with pytest.raises(InputError):
        ask(
            {**config, "model_type": "own", "auto_map": elsewhere},
            shapes("llama"), root, trust=True,
        )  # fmt: skip
