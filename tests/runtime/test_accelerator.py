"""Seeds by address, precision by device, and launches that are not what was asked for."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.nn.functional import dropout

from lib.config.sections import ModelConfig
from lib.errors import UserError
from lib.run.record import run_record, version
from lib.runtime import accelerator as runtime
from lib.runtime import precision
from lib.runtime.accelerator import build_accelerator, check_devices
from lib.runtime.cpu import tuning
from lib.runtime.cpu.tuning import use_all_cores
from lib.runtime.precision import cpu_description, cpu_is_fast_at_bf16, resolve_precision, use_tf32
from lib.runtime.seeds import mix, seed_everything
from lib.runtime.startup import run_script
from tests.conftest import ROOT

AMX = "vendor_id : GenuineIntel\nflags : fpu avx512f avx512_bf16 amx_bf16 amx_tile"
INTEL_WITHOUT_AMX = "vendor_id : GenuineIntel\nflags : fpu avx512f avx512_bf16"
ZEN4 = "vendor_id : AuthenticAMD\nflags : fpu avx512f avx512_bf16"
ZEN2 = "vendor_id : AuthenticAMD\nflags : fpu avx2 fma"
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


def pretend_gpus(monkeypatch: pytest.MonkeyPatch, count: int, bf16: bool = True) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: bf16)


# ---------------------------------------------------------------------------------------------------- arithmetic

DECAY = """
import torch
from lib.runtime.accelerator import build_accelerator

build_accelerator("no")
moment = torch.full((1_000_000,), 1e-37)
for _ in range(30):
    moment.lerp_(torch.zeros(()), 0.1)  # as AdamW does
print(torch.get_num_threads(), moment.view(torch.int32).count_nonzero().item())
"""


def test_moments_of_words_long_unseen_end_at_zero_in_all_threads_instead_of_slowing_every_step() -> None:
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-c", DECAY]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, env=environment, cwd=ROOT)
    assert done.stdout.split() == ["2", "0"]


# ---------------------------------------------------------------------------------------------------- seeds


def test_mix_is_splitmix64() -> None:
    """The first output of the published generator for the states 0 and 1234567, less the lowest bit."""
    assert mix(0) == 0xE220A8397B1DCDAF >> 1
    assert mix(1234567) == 0x599ED017FB08FC85 >> 1


def test_mix_keeps_its_values() -> None:
    assert mix(42, 1, 0, 0) == 790956889137220401


def test_mix_tells_neighbouring_keys_and_their_order_apart() -> None:
    keys = [
        (seed, step, piece, rank) for seed in range(8) for step in range(8) for piece in range(4) for rank in range(4)
    ]
    assert len({mix(*key) for key in keys}) == len(keys)
    assert len({mix(1, 2), mix(2, 1), mix(3), mix(0, 3), mix(1, 2, 0)}) == 5


def test_mix_flips_half_of_the_bits_between_neighbours() -> None:
    flips = [(mix(seed, step) ^ mix(seed, step + 1)).bit_count() for seed in range(20) for step in range(20)]
    assert sum(flips) / len(flips) == pytest.approx(63 / 2, abs=1)
    assert all(0 <= mix(seed, 5) < 2**63 for seed in range(1000))


def dropped(*key: int) -> torch.Tensor:
    seed_everything(*key)
    return dropout(torch.ones(200), 0.5)


def test_equal_keys_give_equal_dropout_whatever_was_drawn_before() -> None:
    first = dropped(42, 3, 0, 1)
    torch.rand(17)
    assert torch.equal(dropped(42, 3, 0, 1), first)


@pytest.mark.parametrize("other", [(43, 3, 0, 1), (42, 4, 0, 1), (42, 3, 1, 1), (42, 3, 0, 0), (42, 3, 1, 0)])
def test_different_keys_give_different_dropout(other: tuple[int, ...]) -> None:
    assert not torch.equal(dropped(*other), dropped(42, 3, 0, 1))


# ---------------------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize(
    ("description", "fast"), [(AMX, True), (ZEN4, True), (INTEL_WITHOUT_AMX, False), (ZEN2, False), ("", False)]
)
def test_cpus_that_are_fast_at_bf16(description: str, fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cpu_is_fast_at_bf16(description) == fast
    pretend_gpus(monkeypatch, 0)
    monkeypatch.setattr(precision, "cpu_description", lambda: description)
    assert resolve_precision("auto") == ("bf16" if fast else "no")


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="needs /proc/cpuinfo")
def test_this_cpu_is_described_with_its_flags() -> None:
    description = cpu_description()
    assert description.count("processor\t") <= 1
    assert "\n" in description


@pytest.mark.parametrize(
    ("launcher", "bf16", "expected"),
    [("no", True, "bf16"), ("no", False, "no"), ("fp16", True, "fp16"), ("bf16", False, "bf16"), (None, True, "bf16")],
)
def test_auto_on_a_gpu_is_the_choice_of_the_launcher_else_what_is_fast(
    launcher: str | None, bf16: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_gpus(monkeypatch, 1, bf16)
    if launcher:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launcher)
    assert resolve_precision("auto") == expected


@pytest.mark.parametrize("choice", ["no", "bf16", "fp16"])
def test_a_precision_that_is_asked_for_overrides_the_launcher(choice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpus(monkeypatch, 1)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16" if choice == "no" else "no")
    assert resolve_precision(choice) == choice


@pytest.mark.parametrize("environment", [{}, {"ACCELERATE_USE_CPU": "true"}])
@pytest.mark.parametrize("choice", ["fp16", "auto"])
def test_fp16_without_a_gpu_is_refused(
    choice: str, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_gpus(monkeypatch, 1 if environment else 0)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="--mixed_precision fp16 needs a GPU; use --mixed_precision bf16 or no"):
        resolve_precision(choice)


# ---------------------------------------------------------------------------------------------------- launches


@pytest.mark.parametrize("visible", ["0", "2,3", "GPU-8f7d"])
def test_gpus_that_are_asked_for_and_not_there_are_an_error(visible: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpus(monkeypatch, 0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(UserError, match=f"CUDA_VISIBLE_DEVICES={visible} asks for GPUs, but PyTorch sees none"):
        check_devices()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    check_devices()


@pytest.mark.parametrize("visible", [None, "", "-1"])
def test_a_cpu_is_used_when_no_gpu_is_asked_for(visible: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
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


@pytest.fixture
def _keep_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("_keep_threads")
@pytest.mark.parametrize(
    ("processes", "setting", "threads"), [(1, None, 8), (2, None, 4), (16, None, 1), (2, "1", 4), (2, "3", 5)]
)
def test_processes_share_the_cores_unless_threads_are_set(
    processes: int, setting: str | None, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """5 stands for what the process had before."""
    torch.set_num_threads(5)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    if setting:
        monkeypatch.setenv("OMP_NUM_THREADS", setting)
    use_all_cores()
    assert torch.get_num_threads() == threads


@pytest.mark.usefixtures("_keep_threads")
@pytest.mark.parametrize(("products", "expected"), [(1, 1), (tuning.FEW_PRODUCTS, 1), (tuning.FEW_PRODUCTS + 1, 2)])
def test_steps_of_few_products_are_left_to_one_thread(products: int, expected: int) -> None:
    torch.set_num_threads(2)
    tuning.use_one_core_for(products)
    assert torch.get_num_threads() == expected


@pytest.mark.usefixtures("_keep_threads")
def test_processes_that_each_believe_to_be_alone_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "keep_freed_memory", lambda: None)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert build_accelerator("no").num_processes == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"2 processes were launched, but each believes it is alone \(CPU, "):
        build_accelerator("no")


@pytest.mark.usefixtures("_keep_threads")
@pytest.mark.parametrize("tracker", ["none", "wandb", "tensorboard", "trackio"])
def test_every_tracker_fits_the_accelerator(tracker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(tracker if tracker != "none" else "torch")
    monkeypatch.setattr(runtime, "keep_freed_memory", lambda: None)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    accelerator = build_accelerator("no", tracker, tmp_path)
    assert [str(name) for name in accelerator.log_with] == ([] if tracker == "none" else [tracker])
    assert accelerator.gradient_accumulation_steps == 1


@pytest.mark.usefixtures("_keep_threads")
def test_the_record_of_a_run_names_devices_precision_and_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "keep_freed_memory", lambda: None)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    record = run_record(build_accelerator("no"))
    assert record["version_torch"] == torch.__version__
    assert (record["num_processes"], record["mixed_precision"]) == (1, "no")
    assert record["devices"][0].startswith("CPU, ")
    assert version("no-such-package") is None


# ---------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(("rank", "said"), [(None, 1), ("0", 1), ("1", 0)])
def test_a_mistake_ends_every_process_with_code_2_and_is_told_once(
    rank: str | None, said: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def main(config: ModelConfig) -> None:
        raise UserError(f"no {config.model}")

    def leave(code: int) -> None:
        raise SystemExit(code)

    if rank:
        monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(SystemExit) as ended:
        run_script(main, ModelConfig(model="x"))
    assert ended.value.code == 2
    assert capsys.readouterr().err.count("error: no x\n") == said


def test_a_bug_keeps_its_trace() -> None:
    def main(_: ModelConfig) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_script(main, ModelConfig())


@pytest.mark.parametrize(
    ("device", "precision", "expected"),
    [("cuda", "bf16", "high"), ("cuda", "fp16", "high"), ("cuda", "no", "highest"), ("cpu", "bf16", "highest")],
)
def test_tf32_is_used_on_gpus_with_mixed_precision_alone(device: str, precision: str, expected: str) -> None:
    before = torch.get_float32_matmul_precision()
    try:
        use_tf32(device, precision)
        assert torch.get_float32_matmul_precision() == expected
    finally:
        torch.set_float32_matmul_precision(before)
