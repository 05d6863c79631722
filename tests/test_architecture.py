"""The house's own rules: imports go one way, facts have one home, the main path is light."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "nf4cli"
FLOORS = (  # a module imports from floors below its own, or from its own floor
    ("__init__", "errors", "stopping", "fileio", "atomic_file", "components", "untrusted"),
    ("records", "codebook"),
    ("bnb_format", "engines", "reader"),
    ("float8", "skip_list", "meta_model"),
    (
        "selection",
        "source",
        "writer",
        "digest",
        "pipeline",
        "transfers",
        "output",
        "weights",
        "model_config",
        "keeping",
        "front_matter",
        "importance",
        "recipe",
        "texts",
    ),
    ("exact",),
    ("families",),
    ("packed", "report", "codes", "planned"),
    ("plan", "notes", "manifest", "journal"),
    (
        "limits",
        "items",
        "diffusion",
        "resume",
        "junit",
        "summary",
        "recording",
        "comparison",
        "recorded",
        "watch",
    ),
    ("card", "listed", "loading"),
    ("worker",),
    ("conversion", "inspection", "workspace", "written", "nonfinite", "hub"),
    ("foreign",),
    ("proof",),
    ("complete",),
    ("quantize", "verify", "dequantize"),
    ("sample", "remade"),
    ("assembly", "attest", "push", "trial", "calibration", "evaluation"),
    ("cli", "__main__"),
)
HEAVY = {"torch", "transformers", "diffusers", "cupy"}
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}


def module_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Top-level modules of the package that a file imports, anywhere in it."""
    found = set()
    depth = len(path.relative_to(PACKAGE).parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == depth:
            if node.module:
                found.add(node.module.split(".")[0])
            else:
                names = {alias.name for alias in node.names}
                found |= {n if n in FLOOR else "__init__" for n in names}
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: p.name)
def test_imports_go_down(path):
    own = module_of(path)
    for other in imports(path) - {own}:
        assert FLOOR[other] <= FLOOR[own], f"{own} imports {other}"


def test_no_import_cycles():
    graph = {}
    for path in PACKAGE.rglob("*.py"):
        graph.setdefault(module_of(path), set()).update(imports(path) - {module_of(path)})
    done: list[str] = []

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail, name))
        if name not in done:
            for other in sorted(graph.get(name, ())):
                visit(other, (*trail, name))
            done.append(name)

    for name in graph:
        visit(name, ())


def test_the_on_disk_format_has_one_home():
    for path in PACKAGE.rglob("*.py"):
        if path.name != "bnb_format.py":
            assert "bitsandbytes__" not in path.read_text(), path


def test_the_tables_are_typed_once():
    for path in (*PACKAGE.rglob("*.py"), *(ROOT / "cuda").iterdir()):
        if path.name != "codebook.py":
            assert not re.search(r"0\.6961928|0\.0795802|0\.00520833", path.read_text()), path


def test_only_their_own_engine_imports_heavy_libraries():
    for path in PACKAGE.rglob("*.py"):
        allowed = {
            "torch.py": {"torch"}, "cupy_device.py": {"cupy"}, "nvrtc.py": {"cupy"},
            "exact.py": {"torch", "transformers"},
            "meta_model.py": {"torch", "transformers"},
        }.get(path.name, set())  # fmt: skip
        if path.parent.name in ("calibration", "evaluation"):
            allowed = {"torch", "transformers"}
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            heavy = {n.split(".")[0] for n in names} & HEAVY
            assert heavy <= allowed, path


def test_no_code_comes_from_data():
    """No unpickling, no eval; the model's own code only through --trust-remote-code."""
    modules = {"pickle", "cPickle", "dill", "marshal", "shelve", "joblib", "runpy", "yaml"}
    calls = {"eval", "exec", "compile", "__import__", "system", "popen"}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [alias.name for alias in node.names]
                names.append((isinstance(node, ast.ImportFrom) and node.module) or "")
                allowed = {"yaml"} if path.name == "front_matter.py" else set()
                assert not {n.split(".")[0] for n in names} & modules - allowed, path
            if isinstance(node, ast.Name):
                assert node.id not in calls, f"{path}: {node.id}"
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                owner = node.func.value
                named = f"{owner.id}.{node.func.attr}" if isinstance(owner, ast.Name) else ""
                assert named not in {"os.system", "os.popen", "torch.load", "np.load"}, path
                if named.startswith("yaml."):  # strings, lists and mappings only
                    assert named == "yaml.safe_dump" or "yaml.BaseLoader" in ast.unparse(node)
            if isinstance(node, ast.Constant) and node.value == "trust_remote_code":
                assert path.name in ("exact.py", "meta_model.py"), path
        text = path.read_text()
        if "get_class_from_dynamic_module" in text:
            assert path.name == "meta_model.py"


def test_the_main_path_is_light(llama, llama_nf4, tmp_path):
    """quantize, verify, inspect and dequantize load neither torch nor transformers."""
    code = (
        "import sys\n"
        "from nf4cli.cli import app\n"
        "for line in sys.argv[1:]:\n"
        "    try: app(line.split())\n"
        "    except SystemExit as end: assert not end.code, line\n"
        f"heavy = {HEAVY | {'scipy', 'pandas'}} & sys.modules.keys()\n"
        "assert not heavy, heavy\n"
    )
    out = tmp_path / "out"
    commands = [
        f"quantize {llama} {out} -q",
        f"verify {out} --source {llama} -q",
        f"inspect {out}",
        f"dequantize {out} {tmp_path / 'back'} -q",
    ]
    subprocess.run([sys.executable, "-I", "-c", code, *commands], check=True, capture_output=True)


def test_help_is_light():
    """`nf4 --help` loads no numerical library: it has to be quick."""
    code = (
        "import sys\n"
        "from nf4cli.cli import app\n"
        "try: app(['--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'numpy', 'safetensors', 'blake3'} & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-I", "-c", code], check=True, capture_output=True)


def test_files_can_be_read_in_a_sitting():
    for path in (
        *PACKAGE.rglob("*.py"),
        *(ROOT / "cuda").iterdir(),
        *(ROOT / "tests").rglob("*.py"),
    ):
        assert len(path.read_text().splitlines()) <= 450, path
