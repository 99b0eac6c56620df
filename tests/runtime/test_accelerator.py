"""Launches that are not what the user asked for, trackers, and the devices and processes in words."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import lib.runtime.accelerator
from lib.errors import UserError
from lib.runtime.accelerator import build_accelerator, check_devices, describe_devices
from lib.runtime.cpu.kernels import use_cpu_kernels
from lib.runtime.device_options import DeviceOptions
from lib.runtime.processes import describe_processes

LAUNCH_VARIABLES = (
    "ACCELERATE_MIXED_PRECISION",
    "ACCELERATE_USE_CPU",
    "CUDA_VISIBLE_DEVICES",
    "LOCAL_WORLD_SIZE",
    "OMP_NUM_THREADS",
    "RANK",
    "WORLD_SIZE",
)


@pytest.fixture(autouse=True)
def _plain_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LAUNCH_VARIABLES:
        monkeypatch.delenv(name, raising=False)


def pretend_gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


@pytest.mark.parametrize("visible", ["0", "2,3", "GPU-8f7d"])
def test_missing_gpus_are_an_error(visible: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpus(monkeypatch, 0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(UserError, match=f"CUDA_VISIBLE_DEVICES={visible} "):
        check_devices()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    check_devices()


@pytest.mark.parametrize("visible", [None, "", "-1"])
def test_cpu_is_used_if_no_gpu_is_asked_for(visible: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpus(monkeypatch, 0)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    check_devices()


@pytest.mark.parametrize(("processes", "allowed"), [(1, True), (2, True), (3, False)])
def test_more_processes_than_gpus_are_an_error(processes: int, allowed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpus(monkeypatch, 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    if allowed:
        check_devices()
        return
    with pytest.raises(UserError, match=r"3 processes .* 2 GPUs are visible .*4,5.*--num_processes 2"):
        check_devices()


@pytest.mark.parametrize("visible", ["0,7", "0, 7", "0,1,2", "GPU-8f7d,GPU-11aa,GPU-2b2b"])
def test_gpus_that_the_driver_leaves_out_are_an_error(visible: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpus(monkeypatch, 1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(UserError, match=f"CUDA_VISIBLE_DEVICES={visible} names . GPUs, but PyTorch sees 1"):
        check_devices()


@pytest.mark.parametrize("visible", ["0", "3,-1,4", "0,"])
def test_one_gpu_that_is_named_is_no_error(visible: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpus(monkeypatch, 1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert check_devices() == []


def test_gpus_that_one_process_does_not_use_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpus(monkeypatch, 4)
    assert "4 GPUs are visible and one process uses one" in " ".join(check_devices())
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert check_devices() == []


def test_launch_for_gpus_without_one_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpus(monkeypatch, 0)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(lib.runtime.accelerator, "asks_for_gpu", lambda: "--config_file single_gpu.yaml")
    with pytest.raises(UserError, match=r"single_gpu\.yaml of the launcher asks for a GPU"):
        check_devices()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert check_devices() == []


@pytest.mark.usefixtures("on_cpu")
def test_processes_that_each_believe_to_be_alone_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    assert build_accelerator(DeviceOptions("no")).num_processes == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"2 processes were launched, .*\(CPU, .*--multi_gpu --num_processes 2"):
        build_accelerator(DeviceOptions("no"))


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("tracker", ["none", "wandb", "tensorboard", "trackio"])
def test_accelerator_takes_every_tracker(tracker: str, tmp_path: Path) -> None:
    pytest.importorskip(tracker if tracker != "none" else "torch")
    accelerator = build_accelerator(DeviceOptions("no"), tracker, tmp_path)
    assert [str(name) for name in accelerator.log_with] == ([] if tracker == "none" else [tracker])
    assert accelerator.gradient_accumulation_steps == 1


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("wanted", [True, False])
def test_cpu_kernels_are_on_unless_turned_off(wanted: bool) -> None:
    build_accelerator(DeviceOptions("no", cpu_kernels=wanted))
    torch.manual_seed(0)
    drawn = torch.empty(64).bernoulli_(0.5)
    use_cpu_kernels(False)
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.empty(64).bernoulli_(0.5)) != wanted


@pytest.mark.usefixtures("on_cpu")
def test_one_process_on_the_cpu_is_described_by_its_threads() -> None:
    accelerator = build_accelerator(DeviceOptions("no"))
    assert describe_devices(accelerator)[0].startswith(f"CPU, {torch.get_num_threads()} threads")
    assert describe_processes(accelerator) == "1"


@pytest.mark.parametrize(("rank", "processes"), [(0, 1), (1, 1), (0, 2), (1, 2)])
def test_process_asks_its_own_gpu_alone_for_its_free_memory(
    rank: int, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The question makes a context, which takes hundreds of MiB from the process whose GPU it is."""
    asked = []

    def mem_get_info(index: int) -> tuple[int, int]:
        asked.append(index)
        return 50 * 2**30, 80 * 2**30

    pretend_gpus(monkeypatch, 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    monkeypatch.setattr(torch.cuda, "mem_get_info", mem_get_info)
    card = SimpleNamespace(name="H100", total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    accelerator = SimpleNamespace(device=torch.device("cuda", rank), num_processes=processes)
    own, other = f"GPU {rank}: H100, 50 of 80 GiB free", f"GPU {1 - rank}: H100, 80 GiB"
    assert describe_devices(accelerator) == ([own] if processes == 1 else sorted([own, other]))
    assert asked == [rank]


@pytest.mark.parametrize(
    ("device", "backend", "words"), [("cpu", "gloo", "2 (gloo, CPU)"), ("cuda", "nccl", "2 (nccl, GPUs)")]
)
def test_processes_are_described_with_what_connects_them(
    device: str, backend: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.distributed, "get_backend", lambda: backend)
    accelerator = SimpleNamespace(num_processes=2, device=torch.device(device))
    assert describe_processes(accelerator) == words
