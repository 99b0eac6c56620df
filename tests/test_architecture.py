"""The shape of the project: which module may import which, and which module owns what."""

import ast
import configparser
import dataclasses
import importlib.metadata
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

LIB, TESTS = ROOT / "lib", ROOT / "tests"
MODULES = sorted(path for path in LIB.rglob("*.py") if path.name != "__init__.py")
SCRIPTS = [ROOT / name for name in ("train.py", "eval.py", "predict.py", "hub.py", "compare.py", "sweep.py")]
WINGS = {path.parent.name for path in LIB.glob("*/__init__.py")}

READ_BY_ROLE = {"train_file", "validation_file", "test_file"}
"""Options that the code reads as `getattr(config, f"{role}_file")`."""


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def imported(path: Path) -> set[str]:
    """Dotted names of all that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def edges() -> dict[str, set[str]]:
    """The modules of lib, each with those that it imports."""
    known = set(map(name_of, MODULES))
    return {name_of(path): imported(path) & known for path in MODULES}


def test_wing_imports_only_wings_to_its_right():
    line = next(line for line in (lib.__doc__ or "").splitlines() if " > " in line)
    order = [group.strip().split(", ") for group in line.split(">")]
    place = {wing: index for index, group in enumerate(order) for wing in group}
    used = {(name.split(".")[1], other.split(".")[1]) for name, others in edges().items() for other in others}
    assert set(place) == WINGS | {"errors"}
    assert [(wing, other) for wing, other in sorted(used) if place[wing] > place[other]] == []
    for group in order:  # of two wings side by side, one may import the other, not both
        assert len([edge for edge in used if edge[0] != edge[1] and {*edge} == {*group}]) < 2


def test_no_modules_import_each_other_in_a_circle():
    uses, done = edges(), set[str]()
    while len(done) < len(uses):
        ready = {name for name in uses if name not in done and uses[name] <= done}
        assert ready, f"a circle among {sorted(set(uses) - done)}"
        done |= ready


def test_library_imports_no_script():
    scripts = {path.stem for path in SCRIPTS}
    assert [name_of(path) for path in MODULES if imported(path) & scripts] == []


def test_test_imports_no_other_test():
    files = sorted(TESTS.rglob("*.py"))
    assert len(files) > 50
    for path in files:
        assert [name for name in imported(path) if re.match(r"tests\.(.*\.)?test_", name)] == [], path


def test_every_wing_has_its_folder_of_tests():
    assert {path.parent.name for path in TESTS.glob("*/test_*.py")} == WINGS
    assert {path.name for path in TESTS.iterdir() if path.is_dir()} <= WINGS | {"workers", "__pycache__"}


@pytest.mark.parametrize(
    ("pattern", "owners"),
    [
        (r"^\s*(import|from) wandb\b", {"run/tracking.py"}),
        (r"^\s*(import|from) (tyro|yaml)\b", {"config"}),
        (r"^\s*(import|from) onnx", {"inference/onnx_export.py"}),
        (r"^\s*(import|from) peft\b", {"model/adapters/peft_methods.py"}),
        (r"\bAccelerator\([^)]", {"runtime/accelerator.py"}),
        (r"\bos\.environ|\bgetenv", {"runtime", "hub/endpoint.py"}),
        (r"\bload_dataset\(", {"data/sources.py"}),
        (r"\baccelerator\.gather|\bgather_for_metrics\(|\bgather_object\(", {"inference/stream.py"}),
        # The store is opened before the group is made; PyTorch's FSDP2 acts on a model, by a mesh of processes, and its
        # format for what they write together is that of stored tensors.
        (
            r"\btorch\.distributed\.|^\s*(import|from) torch\.distributed\b",
            {"runtime/processes.py", "runtime/network.py", "model/sharding.py", "model/stored_tensors.py"},
        ),
    ],
)
def test_each_power_has_one_owner(pattern, owners):
    users = {path for path in [*MODULES, *SCRIPTS] if re.search(pattern, path.read_text(), re.MULTILINE)}
    owned = {owner: users & {path for path in MODULES if path.is_relative_to(LIB / owner)} for owner in owners}
    assert users == set().union(*owned.values())
    assert all(owned.values())


def test_init_file_holds_one_line_of_docstring_only():
    files = sorted(LIB.glob("*/**/__init__.py"))
    assert len(files) >= len(WINGS)
    for path in files:
        (docstring,) = ast.parse(path.read_text()).body
        assert isinstance(docstring, ast.Expr), path
        assert len(path.read_text().splitlines()) == 1, path


def test_module_has_no_name_of_a_dependency_and_is_not_called_utils():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    required = {re.match(r"[\w-]+", line)[0] for line in setup["options"]["install_requires"].split()}
    packages = importlib.metadata.packages_distributions().items()
    taken = {package for package, distributions in packages if required & {*distributions}}
    assert {"torch", "datasets", "evaluate", "sklearn", "yaml"} <= taken
    names = {part for path in MODULES for part in path.relative_to(LIB).with_suffix("").parts}
    assert names & {*taken, "utils", "helpers", "common", "misc"} == set()


def test_git_does_not_ignore_the_library():
    """The usual .gitignore for Python contains lib/."""
    command = ["git", "check-ignore", "lib/config/sections.py"]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, timeout=30, check=False).returncode == 1


def test_long_public_function_has_a_docstring():
    for path in MODULES:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                short = (node.end_lineno or 0) - node.lineno <= 12
                assert ast.get_docstring(node) or short, f"{path}: {node.name}"


def test_every_option_is_read():
    """A flag that is parsed and never read promises what does not happen."""
    configs = (TrainConfig(), EvalConfig(model=EvalModel("m")), PredictConfig())
    options = {name for config in configs for name in flatten(config)}
    options |= {field.name for kind in COMMANDS.values() for field in dataclasses.fields(kind)}
    code = "\n".join(path.read_text() for path in [*MODULES, *SCRIPTS])
    assert len(options) > 40
    assert {name for name in options - READ_BY_ROLE if not re.search(rf"\.{name}\b", code)} == set()
