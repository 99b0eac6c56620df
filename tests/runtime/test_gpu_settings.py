"""What is asked of PyTorch and cuBLAS on a GPU, as far as a machine without one can show it."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lib.errors import UserError
from lib.runtime import attention, determinism
from lib.runtime.accelerator import build_accelerator
from lib.runtime.attention import check_attention, choose_kernels, describe_attention, has_attention
from lib.runtime.determinism import demand, describe_determinism, request_determinism
from lib.runtime.device_options import DeviceOptions
from tests.conftest import Command, sentences, write_csv


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process that uses an H100 with both packages of FlashAttention."""
    for module in (attention, determinism):
        monkeypatch.setattr(module, "uses_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    everything = {name: (package, lambda: True, low) for name, (package, _, low) in attention.FLASH.items()}
    monkeypatch.setattr(attention, "FLASH", everything)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True


def test_cudnn_computes_no_attention_on_a_gpu() -> None:
    try:
        torch.backends.cuda.enable_cudnn_sdp(True)
        choose_kernels("cpu")
        assert torch.backends.cuda.cudnn_sdp_enabled()
        choose_kernels("cuda")
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert torch.backends.cuda.flash_sdp_enabled()
        assert torch.backends.cuda.mem_efficient_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)
    assert "not cuDNN" in describe_attention("sdpa", "cuda", cpu_kernels=True)


@pytest.mark.usefixtures("gpu")
def test_training_on_a_gpu_asks_for_deterministic_algorithms_unless_told_not_to() -> None:
    request_determinism(True)
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.is_deterministic_algorithms_warn_only_enabled()
    demand(strict=True)  # attention has deterministic gradients only without `warn_only`
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    demand(strict=False)
    assert torch.is_deterministic_algorithms_warn_only_enabled()
    assert not torch.utils.deterministic.fill_uninitialized_memory
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert "deterministic" in describe_determinism("cuda")
    request_determinism(False)  # of a second run in this process
    demand(strict=True)
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert "may differ" in describe_determinism("cuda")


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("flags", [[], ["--freeze", "backbone"], ["--freeze", "backbone", "--head_solver", "lbfgs"]])
def test_model_without_deterministic_algorithms_is_trained_to_the_end_and_says_so(
    flags: list[str], call: Command, roberta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it runs: with padding tried, frozen parts cached, in a step, in evaluation."""
    embed = torch.nn.Embedding.forward
    modes = []

    def scatter(layer: torch.nn.Embedding, tokens: torch.Tensor) -> torch.Tensor:
        modes.append(torch.are_deterministic_algorithms_enabled())
        torch.zeros(2).put_(torch.tensor([0]), torch.ones(1))  # has no deterministic algorithm on any device
        return embed(layer, tokens)

    monkeypatch.setattr(torch.nn.Embedding, "forward", scatter)
    write_csv(tmp_path / "train.csv", sentences(24))
    words = ["--model", roberta, "--train_file", "train.csv", "--report_to", "none", "--mixed_precision", "no", *flags]
    words += [] if "--head_solver" in flags else ["--max_steps", 2, "--bs", 8]
    done = call("train.py", *words, "--output_dir", "a")
    assert all(modes)
    if not flags:
        assert "equal runs may differ" in done.stderr
        assert "put_" in done.stderr
        modes.clear()
        call("train.py", *words, "--output_dir", "b", "--deterministic", False)
        assert not any(modes)


@pytest.mark.usefixtures("gpu")
def test_workspace_of_the_user_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    request_determinism(True)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


@pytest.mark.usefixtures("on_cpu")
def test_run_on_a_cpu_asks_for_nothing_and_promises_the_same() -> None:
    build_accelerator(DeviceOptions("no", deterministic=True))
    assert not torch.are_deterministic_algorithms_enabled()
    assert describe_determinism("cpu") == "equal bit by bit"


@pytest.mark.parametrize("name", ["flash_attention_2", "flash_attention_3"])
@pytest.mark.usefixtures("gpu")
def test_flash_attention_needs_a_gpu_its_package_and_half_precision(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_attention(name, "bf16")
    assert has_attention(name, "auto")
    with pytest.raises(UserError, match=rf"--attn_implementation {name}: .*mixed precision is no"):
        check_attention(name, "no")
    assert not has_attention(name, "no")
    package, _, low = attention.FLASH[name]
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
        with pytest.raises(UserError, match=r"compute capability \d\.0, this one has 7\.5"):
            check_attention(name, "fp16")
    with monkeypatch.context() as patch:
        patch.setitem(attention.FLASH, name, (package, lambda: False, low))
        with pytest.raises(UserError, match=f"package {package} is not installed"):
            check_attention(name, "bf16")
    monkeypatch.setattr(attention, "uses_gpu", lambda: False)
    with pytest.raises(UserError, match="needs a GPU"):
        check_attention(name, "bf16")


@pytest.mark.parametrize("name", ["auto", "sdpa", "eager"])
def test_other_implementations_run_everywhere(name: str) -> None:
    check_attention(name, "no")
    assert has_attention(name, "no")
