"""transformers.Trainer on the same batches gives the losses and weights of train.py; where it does not, and why."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import train
from benchmarks.trainer import RecordingTrainer, build_trainer
from lib.config.cli import parse_cli
from lib.config.train import TrainConfig
from tests.conftest import read_lines, sentences, write_csv


@pytest.fixture
def flags(tmp_path: Path, roberta_without_dropout: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    for split, count in (("train", 37), ("validation", 13)):
        write_csv(tmp_path / f"{split}.csv", sentences(count, count))
    words = f"--model {roberta_without_dropout} --train_file train.csv --validation_file validation.csv --lr 1e-2"
    words += " --adam_epsilon 1e-2 --bs 8 --epochs 2 --logging_steps 1 --mixed_precision no --report_to none"
    return words.split()


def ours(flags: list[str]) -> tuple[list[float], dict[str, torch.Tensor]]:
    train.main(parse_cli(TrainConfig, [*flags, "--output_dir", "ours", "--metric_for_best_model", "loss"]))
    losses = [line["train/loss"] for line in read_lines(Path("ours/metrics.jsonl"))]
    return losses, load_file(next(Path("ours/checkpoints").glob("step-10")) / "model.safetensors")


def theirs(flags: list[str]) -> RecordingTrainer:
    trainer, _ = build_trainer(parse_cli(TrainConfig, [*flags, "--output_dir", "theirs"]), our_order=True)
    trainer.args.load_best_model_at_end = False
    trainer.train()
    return trainer


@pytest.mark.parametrize("strategy", ["random", "group_by_length"])
def test_trainer_on_our_batches_has_our_losses_and_weights(flags, strategy):
    flags = [*flags, "--train_sampling_strategy", strategy]
    losses, weights = ours(flags)
    trainer = theirs(flags)
    assert len(losses) == len(trainer.losses) == 10
    np.testing.assert_allclose(trainer.losses, losses, atol=2e-6, rtol=0)
    assert max(losses) - min(losses) > 0.01  # not a flat line
    for name, tensor in trainer.model.state_dict().items():
        torch.testing.assert_close(tensor, weights[name], atol=2e-6, rtol=0)


def test_its_own_batches_are_others(flags):
    losses, _ = ours(flags)
    trainer, _ = build_trainer(parse_cli(TrainConfig, [*flags, "--output_dir", "theirs"]))
    trainer.train()
    assert np.abs(np.array(trainer.losses) - losses).max() > 1e-3


def test_its_accumulation_is_a_mean_of_means_where_micro_batches_differ_in_size(flags):
    """37 samples in steps of 8 by 4: the last step is 4 + 1, whose single sample then weighs four times as much."""
    flags = [*flags, "--train_sampling_strategy", "random", "--per_device_train_batch_size", "4"]
    losses, _ = ours(flags)
    micro = np.array(theirs(flags).losses)
    assert len(micro) == 20
    steps = micro.reshape(10, 2).mean(axis=1)
    np.testing.assert_allclose(steps[:4], losses[:4], atol=2e-6, rtol=0)
    assert abs(steps[4] - losses[4]) > 1e-4
