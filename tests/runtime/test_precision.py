"""The precision by device and launcher, and weights cast once instead of in every forward."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from lib.errors import UserError
from lib.runtime import precision
from lib.runtime.precision import (
    cast_weights,
    cpu_description,
    cpu_is_fast_at_bf16,
    describe_precision,
    resolve_precision,
    use_tf32,
)

AMX = "vendor_id : GenuineIntel\nflags : fpu avx512f avx512_bf16 amx_bf16 amx_tile"
INTEL_WITHOUT_AMX = "vendor_id : GenuineIntel\nflags : fpu avx512f avx512_bf16"
ZEN4 = "vendor_id : AuthenticAMD\nflags : fpu avx512f avx512_bf16"
ZEN2 = "vendor_id : AuthenticAMD\nflags : fpu avx2 fma"


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_CPU"):
        monkeypatch.delenv(name, raising=False)


def pretend_gpu(monkeypatch: pytest.MonkeyPatch, visible: bool, *capabilities: tuple[int, int]) -> None:
    capabilities = capabilities or ((9, 0),)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: visible)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=0: capabilities[index])
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: capabilities[0] >= (8, 0))


# ---------------------------------------------------------------------------------------------------- which one


@pytest.mark.parametrize(
    ("description", "fast"), [(AMX, True), (ZEN4, True), (INTEL_WITHOUT_AMX, False), (ZEN2, False), ("", False)]
)
def test_auto_on_a_cpu_is_bf16_where_the_cpu_is_fast_at_it(
    description: str, fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cpu_is_fast_at_bf16(description) == fast
    pretend_gpu(monkeypatch, False)
    monkeypatch.setattr(precision, "cpu_description", lambda: description)
    assert resolve_precision("auto") == ("bf16" if fast else "no")


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="needs /proc/cpuinfo")
def test_this_cpu_is_described_with_its_flags() -> None:
    description = cpu_description()
    assert description.count("processor\t") <= 1
    assert "\n" in description


@pytest.mark.parametrize(
    ("launcher", "capability", "expected"),
    [
        ("no", (9, 0), "bf16"),
        ("no", (8, 6), "bf16"),
        ("no", (7, 5), "fp16"),  # T4: bf16 is emulated
        ("no", (7, 0), "fp16"),  # V100
        ("no", (6, 1), "no"),
        ("fp16", (9, 0), "fp16"),
        ("bf16", (7, 0), "bf16"),
        (None, (8, 0), "bf16"),
    ],
)
def test_auto_on_a_gpu_is_the_choice_of_the_launcher_else_what_is_fast(
    launcher: str | None, capability: tuple[int, int], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_gpu(monkeypatch, True, capability)
    if launcher:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launcher)
    assert resolve_precision("auto") == expected


@pytest.mark.parametrize(("processes", "expected"), [(1, "bf16"), (2, "fp16")])
def test_processes_on_different_gpus_agree_on_what_all_are_fast_at(
    processes: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_gpu(monkeypatch, True, (8, 0), (7, 0))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert resolve_precision("auto") == expected


@pytest.mark.parametrize("choice", ["no", "bf16", "fp16"])
def test_explicit_precision_overrides_the_launcher(choice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpu(monkeypatch, True)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16" if choice == "no" else "no")
    assert resolve_precision(choice) == choice


@pytest.mark.parametrize("use_cpu", [False, True])
@pytest.mark.parametrize("choice", ["fp16", "auto"])
def test_fp16_without_a_gpu_is_refused(choice: str, use_cpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpu(monkeypatch, use_cpu)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    if use_cpu:
        monkeypatch.setitem(os.environ, "ACCELERATE_USE_CPU", "true")
    with pytest.raises(UserError, match=r"--mixed_precision fp16.* needs a GPU"):
        resolve_precision(choice)


@pytest.mark.parametrize(
    ("device", "precision", "expected", "words"),
    [
        ("cuda", "bf16", "high", "TF32"),
        ("cuda", "fp16", "high", "TF32"),
        ("cuda", "no", "highest", "all float32"),
        ("cpu", "bf16", "highest", "other products float32"),
    ],
)
def test_tf32_is_used_on_gpus_with_mixed_precision_only(device: str, precision: str, expected: str, words: str) -> None:
    before = torch.get_float32_matmul_precision()
    try:
        use_tf32(device, precision)
        assert torch.get_float32_matmul_precision() == expected
        assert words in describe_precision(precision)
    finally:
        torch.set_float32_matmul_precision(before)


# ---------------------------------------------------------------------------------------------------- weights

INPUTS = [{"input_ids": torch.randint(5, 30, (2, n), generator=torch.Generator().manual_seed(n))} for n in (3, 7, 4)]


@pytest.fixture(params=["bert", "deberta-v2", "modernbert", "gpt2"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 36}
    sizes = {"n_embd": 24, "n_layer": 2, "n_head": 2} if request.param == "gpt2" else sizes
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
    config = AutoConfig.for_model(request.param, vocab_size=40, num_labels=3, **ids, **sizes)
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(config).eval()


@torch.inference_mode()
def all_logits(model: torch.nn.Module, mixed: bool = False) -> Iterator[np.ndarray]:
    """Logits of each batch; each forward has its own autocast, as with Accelerate."""
    for batch in INPUTS:
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            yield model(**batch).logits.float().numpy()


def test_logits_with_cast_weights_are_those_of_autocast_bit_by_bit(model: PreTrainedModel) -> None:
    plain, autocast = list(all_logits(model)), list(all_logits(model, mixed=True))
    with cast_weights(model, "bf16"):
        linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
        assert {layer.weight.dtype for layer in linear} == {torch.bfloat16}
        cast = list(all_logits(model, mixed=True))
    for a, b, c in zip(plain, autocast, cast, strict=True):
        np.testing.assert_array_equal(b, c)
        assert not np.array_equal(a, b), "autocast was off"


def test_parameters_are_the_same_objects_afterwards_also_after_an_error(model: PreTrainedModel) -> None:
    before = {name: (id(p), p.dtype, p.requires_grad) for name, p in model.named_parameters()}
    within: set[torch.dtype] = set()
    hook = model.register_forward_pre_hook(lambda *_: within.update(p.dtype for p in model.parameters()))
    with pytest.raises(ValueError, match="input_ids"), cast_weights(model, "bf16"):
        model(input_ids=None)
    hook.remove()
    assert within == {torch.float32, torch.bfloat16}
    assert {name: (id(p), p.dtype, p.requires_grad) for name, p in model.named_parameters()} == before


def test_weights_shared_between_layers_stay_shared() -> None:
    first, second = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
    second.weight = first.weight
    with cast_weights(torch.nn.Sequential(first, second), "bf16"):
        assert first.weight is second.weight
        assert first.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("precision", ["no", "fp8"])
def test_nothing_is_cast_without_mixed_precision(roberta: Path, precision: str) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(roberta)
    with cast_weights(model, precision):
        assert {p.dtype for p in model.parameters()} == {torch.float32}
