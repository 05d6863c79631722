"""The house's own rules: imports go one way, facts have one home, the main path is light."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "nf4cli"
FILES = sorted(PACKAGE.rglob("*.py"))
# From top to bottom: a module imports from its own wing and from those below.  The wings of one
# line do not know of each other.
WINGS = (
    ("__main__",),
    ("cli",),
    ("pictures",),
    ("__init__",),  # offers what api has, loaded when it is asked for
    ("api",),
    ("quality", "hub", "proof", "loading", "cluster"),
    ("convert",),
    ("output",),
    ("planning",),
    ("checkpoint",),
    ("engines",),
    ("format",),
    (
        "errors",
        "callbacks",
        "threads",
        "stopping",
        "units",
        "version",
        "process_memory",
        "__init__",
    ),
)
FLOOR = {wing: floor for floor, wings in enumerate(reversed(WINGS)) for wing in wings}
HEAVY = {"torch", "transformers", "diffusers", "cupy"}
LONGEST = 60  # lines of a function


def name_of(path: Path) -> str:
    """`planning.plan` of nf4cli/planning/plan.py; a wing's __init__ is called like the wing."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in FILES}


@cache
def imports(path: Path) -> frozenset[str]:
    """The modules of the package that a file imports, anywhere in it, for its types as well."""
    here = (path.relative_to(PACKAGE).parent / "x").parts[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            start = here[: len(here) + 1 - node.level]
            base = ".".join([*start, *filter(None, [node.module])])
            for alias in node.names:
                whole = f"{base}.{alias.name}".lstrip(".")
                found.add(whole if whole in MODULES else base or "__init__")
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            module = getattr(node, "module", None) or ""
            names = [module, *(alias.name for alias in node.names)]
            assert not any(n.split(".")[0] == "nf4cli" for n in names), f"{path}: not relative"
    return frozenset(found - {name_of(path)})


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_go_down(path):
    own = name_of(path).split(".")[0]
    for other in imports(path):
        wing = other.split(".")[0]
        basics = FLOOR[own] == 0 == FLOOR[wing]  # held apart by the search for cycles alone
        assert wing == own or basics or FLOOR[wing] < FLOOR[own], f"{name_of(path)} imports {other}"


def test_no_import_cycles():
    """Not between wings, nor inside one; an import within a function counts as well."""
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail[trail.index(name) :], name))
        if name not in done:
            for other in sorted(imports(MODULES[name])):
                visit(other, (*trail, name))
            done.add(name)

    for name in MODULES:
        visit(name, ())


def length_of(function: ast.FunctionDef | ast.AsyncFunctionDef, options: bool) -> int:
    """Lines of a function, of a command without its signature, which is a list of options."""
    first = function.body[0].lineno if options else function.lineno
    return (function.end_lineno or first) - first + 1


def is_command(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether its parameters are options of the command line."""
    return "typer." in ast.unparse(function.args) or "Option" in ast.unparse(function.args)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_functions_can_be_read_at_a_glance(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = length_of(node, path.parent.name == "cli" and is_command(node))
            assert length <= LONGEST, f"{node.name} has {length} lines"


def test_no_module_of_tests_imports_another():
    """What two of them need lies in a helper beside them, a fixture in conftest.py."""
    for path in (ROOT / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = (
                [getattr(node, "module", None) or ""] if isinstance(node, ast.ImportFrom) else []
            )
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            assert not [n for n in names if n.split(".")[-1].startswith("test_")], path


def test_the_on_disk_format_has_one_home():
    for path in FILES:
        if path.name != "bnb_format.py":
            assert "bitsandbytes__" not in path.read_text(), path


def test_the_tables_are_typed_once():
    for path in (*FILES, *(ROOT / "cuda").iterdir()):
        if path.name != "codebook.py":
            assert not re.search(r"0\.6961928|0\.0795802|0\.00520833", path.read_text()), path


def test_only_their_own_engine_imports_heavy_libraries():
    for path in FILES:
        allowed = {
            "engines.torch": {"torch"}, "engines.cupy_device": {"cupy"}, "engines.nvrtc": {"cupy"},
            "planning.transformers_answer": {"torch", "transformers"},
            "planning.meta_model": {"torch", "transformers"},
            "loading.packed_stacks": {"torch", "transformers"},
            "loading.opening": {"transformers"},
        }.get(name_of(path), set())  # fmt: skip
        if name_of(path).startswith(("quality.calibration", "quality.evaluation")):
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
    for path in FILES:
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
                assert path.name in ("transformers_answer.py", "meta_model.py"), path
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
