"""CPU kernels give the same experiment as PyTorch's own functions, and one option turns them off."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn.modules import module as torch_modules
from transformers import AutoModelForSequenceClassification
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import AttentionInterface

from lib.runtime.cpu.kernels import use_cpu_kernels
from tests.conftest import Command, read_lines, sentences, write_csv


@pytest.mark.slow
def test_train_py_gives_the_same_experiment_with_and_without_kernels(
    run: Command, roberta_without_dropout: Path, tmp_path: Path
) -> None:
    flags = ["--model", roberta_without_dropout, "--train_file", write_csv(tmp_path / "train.csv", sentences(40))]
    flags += ["--lr", "1e-2", "--adam_epsilon", "1e-2", "--bs", 8, "--epochs", 2, "--logging_steps", 1]
    flags += ["--mixed_precision", "no", "--report_to", "none"]
    for name, wanted in (("ours", "True"), ("pytorch", "False")):
        run("train.py", *flags, "--run_name", name, "--cpu_kernels", wanted)
    ours, pytorch = (read_lines(tmp_path / "outputs" / name / "metrics.jsonl") for name in ("ours", "pytorch"))
    assert len(ours) == len(pytorch) >= 8
    losses = [[line["train/loss"] for line in lines] for lines in (ours, pytorch)]
    np.testing.assert_allclose(*losses, rtol=1e-6, atol=1e-6)
    assert losses[0] != losses[1], "the option changed nothing"
    weights = [load_file(tmp_path / "outputs" / name / "model" / "model.safetensors") for name in ("ours", "pytorch")]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weight, weights[1][name], atol=1e-6, rtol=0)


@pytest.mark.usefixtures("no_kernels")
def test_bf16_training_stays_within_its_rounding(roberta_without_dropout: Path) -> None:
    """Losses with our kernels are no further from those of float32 than PyTorch's."""

    def losses(kernels: bool, mixed: bool) -> np.ndarray:
        use_cpu_kernels(kernels)
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_pretrained(roberta_without_dropout, num_labels=3).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        found = []
        for step in range(10):
            ids = torch.randint(5, 40, (8, 12), generator=torch.Generator().manual_seed(step))
            with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
                loss = model(input_ids=ids, labels=ids[:, 0] % 3).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        return np.array(found)

    exact, ours, pytorch = losses(False, mixed=False), losses(True, mixed=True), losses(False, mixed=True)
    assert not np.array_equal(ours, pytorch)
    assert np.abs(ours - exact).max() < 2 * np.abs(pytorch - exact).max() + 1e-3


@pytest.mark.usefixtures("no_kernels")
def test_switching_off_restores_the_originals() -> None:
    def state() -> tuple:
        torch.manual_seed(0)
        drawn = tuple(torch.empty(64).bernoulli_(0.5).tolist())
        return drawn, AttentionInterface()["sdpa"], len(torch_modules._global_forward_pre_hooks)

    before = state()
    use_cpu_kernels()
    use_cpu_kernels()  # twice is once
    drawn, attention, hooks = state()
    assert drawn != before[0]
    assert attention is not sdpa_attention_forward
    assert hooks == before[2] + 1
    use_cpu_kernels(False)
    assert state() == before
