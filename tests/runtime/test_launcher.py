"""What the user told the launcher is told apart from what the launcher made up."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lib.runtime.launcher import find_launcher
from tests.conftest import ROOT

CHILD = "from lib.runtime.launcher import *; print(threads_are_chosen(), asks_for_gpu())"
LAUNCHER = """
import os, subprocess, sys
os.environ.setdefault("OMP_NUM_THREADS", "1")
if "ALONE" not in os.environ:
    os.environ[os.environ.get("MARK", "ACCELERATE_DYNAMO_USE_FULLGRAPH")] = "no"
between = ["sh", "-c", '"$@"; true', "sh"] if os.environ.get("BETWEEN") else []
subprocess.run([*between, sys.executable, "-c", os.environ["CHILD"]], check=True)
"""

pytestmark = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")


@pytest.fixture
def launch(tmp_path: Path):
    """`launch("--multi_gpu", OMP_NUM_THREADS="1")`: what a process finds out that such a launcher started."""

    def call(*flags: str, name: str = "accelerate", **variables: str) -> str:
        script = tmp_path / name
        script.write_text(LAUNCHER)
        plain = {
            name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "ACCELERATE_", "TORCHEL"))
        }
        environment = plain | {"CHILD": CHILD, "PYTHONPATH": str(ROOT)} | variables
        command = [sys.executable, script, *flags]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=60, check=True, env=environment, cwd=tmp_path
        )
        return done.stdout.strip()

    return call


def test_threads_that_the_launcher_made_up_are_not_a_choice(launch) -> None:
    assert launch("launch", "train.py") == "False None"
    assert launch(MARK="TORCHELASTIC_RUN_ID") == "False None"
    assert launch("launch", "train.py", BETWEEN="1") == "False None"


def test_threads_that_the_user_set_are_a_choice(launch) -> None:
    assert launch("launch", OMP_NUM_THREADS="1") == "True None"
    assert launch("launch", OMP_NUM_THREADS="1", BETWEEN="1") == "True None"
    assert launch("launch", "--num-cpu-threads-per-process", "1") == "True None"


def test_launcher_is_known_by_what_it_sets_not_by_its_name(launch) -> None:
    assert launch(name="notebook.py") == "False None"
    assert launch("--multi_gpu", name="notebook.py") == "False --multi_gpu"
    assert launch(name="accelerate", ALONE="1") == "True None"
    assert launch(name="accelerate", MARK="ACCELERATE_MIXED_PRECISION") == "True None"


def test_launcher_that_the_system_does_not_show_is_not_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "of a launcher")
    assert find_launcher(tmp_path) is None  # no /proc
    monkeypatch.setattr(os, "getppid", lambda: 0)
    assert find_launcher() is None  # the launcher is outside the container


@pytest.mark.parametrize(
    ("file", "found"), [("single_gpu", True), ("multi_gpu_fp16", True), ("cpu", False), ("cpu_bf16", False)]
)
def test_configuration_that_asks_for_gpus_is_found(launch, file: str, found: bool) -> None:
    path = str(ROOT / "accelerate_configs" / f"{file}.yaml")
    answer = f"--config_file {file}.yaml" if found else "None"
    assert launch("launch", "--config_file", path) == f"False {answer}"
    assert launch("launch", "--config_file", f"accelerate_configs/{file}.yaml", PWD=str(ROOT)) == f"False {answer}"
    assert launch("launch", "--config_file", path, "--cpu") == "False None"


def test_flags_that_ask_for_gpus_are_found(launch) -> None:
    assert launch("launch", "--multi_gpu") == "False --multi_gpu"
    assert launch("launch", "--gpu_ids=0,1") == "False --gpu_ids=0,1"
