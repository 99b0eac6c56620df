"""The shape of the project: who imports whom, and who owns what."""

import ast
import dataclasses
import re
import subprocess
from pathlib import Path

import pytest

import lib
from lib.config.eval import EvalConfig, EvalModel
from lib.config.hub import COMMANDS
from lib.config.predict import PredictConfig
from lib.config.sections import flatten
from lib.config.train import TrainConfig
from tests.conftest import ROOT

MODULES = sorted(path for path in (ROOT / "lib").rglob("*.py") if path.name != "__init__.py")
SCRIPTS = [ROOT / "train.py", ROOT / "eval.py", ROOT / "predict.py", ROOT / "hub.py"]
SOURCES = [*MODULES, *SCRIPTS, *(ROOT / "benchmarks").glob("*.py")]

# Read by their role: `getattr(config, f"{role}_file")`.
FILE_OPTIONS = {"train_file", "validation_file", "test_file"}


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def imported(path: Path) -> set[str]:
    """Modules of lib that a file imports, wherever in it, in dots."""
    known = {name_of(module) for module in MODULES}
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & known


def wings() -> list[set[str]]:
    """The groups of wings in the line of lib/__init__.py, from left to right."""
    line = next(line for line in (lib.__doc__ or "").splitlines() if " > " in line)
    return [set(group.strip().split(", ")) for group in line.split(">")]


def test_a_wing_imports_only_wings_to_its_right():
    order = wings()
    place = {wing: index for index, group in enumerate(order) for wing in group}
    edges = {(name_of(path).split(".")[1], used.split(".")[1]) for path in MODULES for used in imported(path)}
    assert {wing for edge in edges for wing in edge} == set(place)
    assert all(place[wing] <= place[used] for wing, used in edges), sorted(edges)
    for group in order:
        assert len({edge for edge in edges if set(edge) == group and edge[0] != edge[1]}) < 2


def test_no_modules_import_each_other_in_a_circle():
    edges, done = {name_of(path): imported(path) for path in MODULES}, set()
    while len(done) < len(edges):
        ready = {name for name, uses in edges.items() if name not in done and uses <= done}
        assert ready, f"a circle among {sorted(set(edges) - done)}"
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
        (r"^\s*(import wandb|from wandb)", {"run/tracking.py"}),
        (r"\bAccelerator\([^)]", {"runtime/accelerator.py"}),
        (
            r"^\s*(import|from) (tyro|yaml)\b",
            {"config"},
        ),
        (r"\bload_dataset\(", {"data/sources.py"}),
        (r"\.(gather|gather_for_metrics|gather_object)\(", set()),
        (r"\bgather_object\(", {"inference/stream.py"}),
        (r"^\s*(import|from) onnx", {"inference/onnx_export.py"}),
        (r"^\s*(import|from) peft\b", {"model/adapters/peft_methods.py"}),
        (r"\bos\.environ|\bgetenv", {"runtime", "hub/endpoint.py"}),
        (r"torch\.distributed\.", {"runtime/processes.py"}),
    ],
)
def test_each_power_has_one_owner(pattern, owners):
    users = {path for path in [*MODULES, *SCRIPTS] if re.search(pattern, path.read_text(), re.MULTILINE)}
    owned = {path for owner in owners for path in MODULES if path.is_relative_to(ROOT / "lib" / owner)}
    assert users <= owned
    assert all(users & {path for path in MODULES if path.is_relative_to(ROOT / "lib" / owner)} for owner in owners)


def test_no_module_is_named_like_a_dependency_and_none_is_called_utils():
    names = {path.stem for path in MODULES}
    assert not names & {"utils", "helpers", "datasets", "evaluate", "transformers", "accelerate", "wandb", "torch"}


def test_git_does_not_ignore_the_library():
    done = subprocess.run(
        ["git", "check-ignore", "lib/config/sections.py"], cwd=ROOT, capture_output=True, timeout=30, check=False
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
    options = (
        set(flatten(TrainConfig())) | set(flatten(EvalConfig(model=EvalModel("m")))) | set(flatten(PredictConfig()))
    )
    options |= {field.name for kind in COMMANDS.values() for field in dataclasses.fields(kind)}
    code = "\n".join(path.read_text() for path in [*MODULES, *SCRIPTS])
    unused = {name for name in options if not re.search(rf"\.{name}\b", code) and name not in FILE_OPTIONS}
    assert len(options) > 40
    assert not unused
