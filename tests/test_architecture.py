"""The shape of the project: who imports whom, who owns what, how large things are."""

import ast
import dataclasses
import re
import subprocess
from pathlib import Path

import pytest

import lib
from lib.config import flatten
from lib.eval_config import EvalConfig
from lib.hub_config import COMMANDS
from lib.predict_config import PredictConfig
from lib.train_config import TrainConfig
from tests.conftest import ROOT

MODULES = sorted(path for path in (ROOT / "lib").glob("*.py") if path.name != "__init__.py")
SCRIPTS = [ROOT / "train.py", ROOT / "eval.py", ROOT / "predict.py", ROOT / "hub.py"]
SOURCES = [*MODULES, *SCRIPTS, *(ROOT / "lib" / "metrics").glob("*/*.py"), *(ROOT / "benchmarks").glob("*.py")]


# Read by their role: `getattr(config, f"{role}_file")`.
FILE_OPTIONS = {"train_file", "validation_file", "test_file"}


def picture() -> dict[str, set[str]]:
    """The imports that the docstring of lib names: {module: modules it imports}."""
    known = {path.stem for path in MODULES}
    edges: dict[str, set[str]] = {}
    for line in (lib.__doc__ or "").splitlines():
        name, *uses = re.split(r"\s{2,}", line.strip())
        if line.startswith(" " * 12):  # goes on with the module of the line above
            name, uses = list(edges)[-1], [line]
        if name in known:
            edges.setdefault(name, set()).update(word for word in uses[0].split() if word in known)
    return edges


def siblings(path: Path) -> set[str]:
    """Modules of lib that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "lib":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lib."):
            found.add((node.module or "").split(".")[1])
    return found


def test_imports_are_those_of_the_picture():
    assert {path.stem: siblings(path) for path in MODULES} == picture()


def test_the_imports_have_no_cycle():
    edges, done = picture(), set()
    while len(done) < len(edges):
        ready = {name for name, uses in edges.items() if name not in done and uses <= done}
        assert ready, f"cycle among {set(edges) - done}"
        done |= ready


def test_the_library_imports_no_script():
    scripts = {path.stem for path in SCRIPTS}
    for path in MODULES:
        names = {
            alias.name
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Import)
            for alias in node.names
        }
        assert not names & scripts


@pytest.mark.parametrize(
    ("pattern", "owners"),
    [
        (r"^\s*(import wandb|from wandb)", {"tracking.py"}),
        (r"\bAccelerator\([^)]", {"runtime.py"}),
        (r"^\s*(import|from) (tyro|yaml)\b", {"config.py", "predict_config.py", "hub_config.py", "cli.py"}),
        (r"\bload_dataset\(", {"sources.py"}),
        (r"\.(gather|gather_for_metrics|gather_object)\(", set()),
        (r"\bgather_object\(", {"inference.py"}),
        (r"^\s*(import|from) onnx", {"onnx_export.py"}),
        (r"^\s*(import|from) peft\b", {"peft_methods.py"}),
        (r"\bos\.environ|\bgetenv", {"runtime.py", "endpoint.py"}),
        (r"torch\.distributed\.", {"processes.py"}),
    ],
)
def test_each_power_has_one_owner(pattern, owners):
    users = {path.name for path in [*MODULES, *SCRIPTS] if re.search(pattern, path.read_text(), re.MULTILINE)}
    assert users == owners


def test_train_py_can_be_read_in_one_sitting():
    assert len((ROOT / "train.py").read_text().splitlines()) < 120


def test_files_and_functions_stay_small():
    for path in SOURCES:
        text = path.read_text()
        assert len(text.splitlines()) <= 300, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and node.name != "main":
                assert node.end_lineno is not None
                assert node.end_lineno - node.lineno < 40, f"{path}: {node.name}"


def test_no_module_is_named_like_a_dependency_and_none_is_called_utils():
    names = {path.stem for path in MODULES}
    assert not names & {"utils", "helpers", "datasets", "evaluate", "transformers", "accelerate", "wandb", "torch"}


def test_git_does_not_ignore_the_library():
    done = subprocess.run(
        ["git", "check-ignore", "lib/config.py"], cwd=ROOT, capture_output=True, timeout=30, check=False
    )
    assert done.returncode == 1


def test_every_public_function_has_a_docstring_or_is_three_lines_long():
    for path in MODULES:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                short = (node.end_lineno or 0) - node.lineno <= 12
                assert ast.get_docstring(node) or short, f"{path.name}: {node.name}"


def test_every_option_is_used():
    """A flag that is parsed and never read is a silent lie."""
    options = set(flatten(TrainConfig())) | set(flatten(EvalConfig(model="m"))) | set(flatten(PredictConfig()))
    options |= {field.name for kind in COMMANDS.values() for field in dataclasses.fields(kind)}
    code = "\n".join(path.read_text() for path in [*MODULES, *SCRIPTS])
    unused = {name for name in options if not re.search(rf"\.{name}\b", code) and name not in FILE_OPTIONS}
    assert len(options) > 40
    assert not unused
