"""Threads and denormals on a CPU."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lib.runtime.cpu import tuning
from lib.runtime.cpu.tuning import FEW_PRODUCTS, allowed_cores, cgroup_limits, use_all_cores, use_one_core_for
from lib.runtime.launcher import MARKS
from tests.conftest import ROOT


@pytest.fixture(autouse=True)
def _keep_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("processes", "setting", "threads"), [(1, None, 8), (2, None, 4), (16, None, 1), (1, "1", 5), (2, "3", 5)]
)
def test_processes_share_the_cores_unless_threads_are_set(
    processes: int, setting: str | None, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """5 stands for what the process had before."""
    torch.set_num_threads(5)
    monkeypatch.setattr(tuning, "allowed_cores", lambda: 8)
    for name in MARKS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    monkeypatch.setenv("OMP_NUM_THREADS", setting or "")
    if not setting:
        monkeypatch.delenv("OMP_NUM_THREADS")
    use_all_cores()
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(
    ("groups", "files", "limits"),
    [
        ("0::/", {"sys/fs/cgroup/cpu.max": "150000 100000"}, [1.5]),
        ("0::/", {"sys/fs/cgroup/cpu.max": "max 100000"}, []),
        ("0::/a/b", {"sys/fs/cgroup/a/cpu.max": "200000 100000", "sys/fs/cgroup/a/b/cpu.max": "max 100000"}, [2.0]),
        ("3:cpu,cpuacct:/x", {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "300000"}, [3.0]),
        ("3:cpu,cpuacct:/x", {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1"}, []),
        ("3:memory:/x", {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "300000"}, []),
    ],
)
def test_limits_of_control_groups_are_read(
    groups: str, files: dict[str, str], limits: list[float], tmp_path: Path
) -> None:
    files = files | {"proc/self/cgroup": groups + "\n", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"}
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert list(cgroup_limits(tmp_path)) == limits


@pytest.mark.parametrize(("limits", "cores"), [([], 8), ([2.5], 3), ([0.5], 1), ([16.0, 4.0], 4)])
def test_affinity_and_control_groups_limit_the_cores(
    limits: list[float], cores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(tuning, "cgroup_limits", lambda: iter(limits))
    assert allowed_cores() == cores


@pytest.mark.parametrize(("products", "expected"), [(1, 1), (FEW_PRODUCTS, 1), (FEW_PRODUCTS + 1, 2)])
def test_steps_of_few_products_use_one_thread(products: int, expected: int) -> None:
    torch.set_num_threads(2)
    use_one_core_for(products)
    assert torch.get_num_threads() == expected


DECAY = """
import torch
from lib.runtime.accelerator import build_accelerator
from lib.runtime.device_options import DeviceOptions

build_accelerator(DeviceOptions("no"))
moment = torch.full((1_000_000,), 1e-37)
for _ in range(30):
    moment.lerp_(torch.zeros(()), 0.1)  # as AdamW does
print(torch.get_num_threads(), moment.view(torch.int32).count_nonzero().item())
"""


def test_denormal_moments_are_flushed_to_zero_in_all_threads() -> None:
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-c", DECAY]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, env=environment, cwd=ROOT)
    assert done.stdout.split() == ["2", "0"]
