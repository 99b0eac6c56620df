"""The loss scale of fp16: steps whose gradients overflow under it."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

import train
from lib.data.loader import MicroBatch
from lib.training.learner import Learner
from tests.conftest import read_lines, sentences, write_csv

OVERFLOWS = (1, 3)
"""Steps, counted from 0, whose gradient overflows."""


@pytest.fixture
def scaled(monkeypatch: pytest.MonkeyPatch) -> None:
    """train.py with the loss scale of fp16, in float32 on a CPU, and a gradient that overflows at two steps."""

    def build_accelerator(*arguments: Any, **options: Any) -> Accelerator:
        accelerator = real_accelerator(*arguments, **options)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        return accelerator

    def forward_backward(learner: Learner, micro_batch: MicroBatch, step_weight: float) -> torch.Tensor:
        loss = real_forward_backward(learner, micro_batch, step_weight)
        if learner.state.step in OVERFLOWS:
            next(p.grad for p in learner.model.parameters() if p.grad is not None).fill_(float("inf"))
        return loss

    real_accelerator, real_forward_backward = train.build_accelerator, train.forward_backward
    monkeypatch.setattr(train, "build_accelerator", build_accelerator)
    monkeypatch.setattr(train, "forward_backward", forward_backward)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def test_step_whose_gradient_overflows_in_fp16_is_skipped_and_the_run_goes_on(scaled, roberta, tmp_path, call) -> None:
    write_csv(tmp_path / "train.csv", sentences(96))
    flags = ("--model", roberta, "--train_file", "train.csv", "--max_steps", 6, "--bs", 8, "--lr", 0.01)
    flags += (
        "--report_to",
        "none",
        "--mixed_precision",
        "no",
        "--logging_steps",
        1,
        "--save_steps",
        2,
        "--eval_steps",
        6,
    )
    call("train.py", *flags, "--output_dir", "a", "--save_total_limit", 9)
    lines = [line for line in read_lines(tmp_path / "a" / "metrics.jsonl") if "train/loss" in line]
    norms = [line["train/grad_norm"] for line in lines]
    assert [index for index, norm in enumerate(norms) if norm == 0.0] == list(OVERFLOWS)
    rates = [line["train/learning_rate"] for line in lines]
    assert all(rates[step + 1] == rates[step] for step in OVERFLOWS)  # the schedule waits for steps that are made
    assert len(set(rates)) == 6 - len(OVERFLOWS)

    # Resumed after the first overflow: equal bit by bit, the loss scale included.
    (tmp_path / "b" / "checkpoints").mkdir(parents=True)
    shutil.copytree(tmp_path / "a" / "checkpoints" / "step-2", tmp_path / "b" / "checkpoints" / "step-2")
    call("train.py", *flags, "--output_dir", "b")
    first, second = weights_of(tmp_path / "a"), weights_of(tmp_path / "b")
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_loss_scale_of_fp16_changes_no_weight_where_nothing_overflows(
    scaled, roberta, tmp_path, call, monkeypatch
) -> None:
    write_csv(tmp_path / "train.csv", sentences(48))
    flags = ("--model", roberta, "--train_file", "train.csv", "--max_steps", 3, "--bs", 8, "--report_to", "none")
    flags += ("--adam_epsilon", 1e-3)  # else Adam makes steps of gradients that are rounding errors
    monkeypatch.setattr(f"{__name__}.OVERFLOWS", ())
    call("train.py", *flags, "--mixed_precision", "no", "--output_dir", "scaled")
    monkeypatch.undo()
    call("train.py", *flags, "--mixed_precision", "no", "--output_dir", "plain")
    first, second = weights_of(tmp_path / "scaled"), weights_of(tmp_path / "plain")
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], rtol=0, atol=1e-6)


def test_overflow_at_every_step_ends_the_run_with_the_step_and_the_precision(
    scaled, roberta, tmp_path, call, monkeypatch
):
    write_csv(tmp_path / "train.csv", sentences(48))
    monkeypatch.setattr(f"{__name__}.OVERFLOWS", range(1000))
    flags = ("--model", roberta, "--train_file", "train.csv", "--epochs", 20, "--bs", 8, "--report_to", "none")
    done = call("train.py", *flags, "--mixed_precision", "no", "--output_dir", "a", code=2)
    assert "not finite" in done.stderr
    assert "--mixed_precision" in done.stderr
