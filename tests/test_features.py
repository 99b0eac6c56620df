"""Training on what a frozen part gave once equals training through it, whatever the architecture."""

import dataclasses
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import nn

from lib import features
from lib.batching import build_collator
from lib.checkpoint import list_checkpoints
from lib.config import DataConfig, ModelConfig
from lib.data import load_data
from lib.evaluation import evaluate_split
from lib.features import cache_features
from lib.freezing import set_train_mode
from lib.losses import build_objective
from lib.modeling import build_model, load_tokenizer
from lib.optim import build_optimizer, build_scheduler
from lib.plan import State, all_windows, build_plan
from lib.runtime import seed_everything
from lib.train_config import OptimConfig, TrainConfig, TrainingConfig
from lib.training import optimizer_step
from tests.conftest import Command, read_lines, results_of, sentences, write_csv
from tests.resuming import TIMING, differences, run_flags, without
from tests.tiny_models import any_classifier

WHOLE = [
    "bert",
    "roberta",
    "distilbert",
    "deberta",
    "electra",
    "albert",
    "modernbert",
    "modernbert-mean",
    "gpt2",
    "llama",
]
LAYERED = ["bert", "roberta", "distilbert", "electra", "modernbert", "llama"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(features, "cache_folder", lambda: tmp_path / "features")
    return tmp_path / "features"


def settings(model: Path, tmp_path: Path, freeze: str, **training: Any) -> TrainConfig:
    counts = {"train": 21, "validation": 9, "test": 5}
    files = {f"{role}_file": str(write_csv(tmp_path / f"{role}.csv", sentences(n, n))) for role, n in counts.items()}
    return TrainConfig(
        model=ModelConfig(model=str(model), freeze=freeze),
        data=DataConfig(**files),
        optim=OptimConfig(learning_rate=1e-2, adam_epsilon=1e-2),
        training=TrainingConfig(train_batch_size=8, num_train_epochs=2, per_device_train_batch_size=3, **training),
        mixed_precision="no",
    )


def train(config: TrainConfig) -> SimpleNamespace:
    """The steps of train.py: what was lost and learnt, and the model."""
    accelerator = Accelerator(cpu=True, mixed_precision=config.mixed_precision)
    tokenizer = load_tokenizer(config.model)
    data = load_data(config.data, tokenizer)
    seed_everything(config.training.seed)
    model, _ = build_model(config.model, data.label_names, tokenizer)
    plan = build_plan(config.training, len(data.tokens["train"]), 1)
    objective = build_objective(config.objective, data)
    optimizer = build_optimizer(model, config.optim, accelerator.device)
    scheduler = build_scheduler(optimizer, config.optim, plan.total_steps, "accuracy")
    collator: Any = build_collator(tokenizer, "no", accelerator.device)
    model, optimizer = accelerator.prepare(model, optimizer)
    inputs, collator = cache_features(accelerator, model, config, data, collator)
    set_train_mode(model)
    state, losses, windows = (
        State(),
        [],
        list(all_windows(plan, config.training, inputs, collator, 0, 0, objective.weights)),
    )
    runs = count_runs(model)
    for window in windows:
        step = optimizer_step(accelerator, model, optimizer, scheduler, objective.loss, window, config.optim, 7, state)
        losses.append(torch.stack(step))
    scores, predictions = evaluate_split(accelerator, model, inputs, "test", collator, 4, ["accuracy"])
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return SimpleNamespace(losses=torch.stack(losses), weights=weights, scores=scores, logits=predictions.logits,
        model=model, inputs=inputs, is_cached=inputs is not data, runs=runs, windows=windows)  # fmt: skip


def count_runs(model: Any) -> list[int]:
    """Counts from now on how often the first attention of a model, which lies in what is frozen, is computed."""
    runs = [0]
    for name, module in model.named_modules():
        if isinstance(module, nn.Module) and name.rpartition(".")[2] in ("attention", "attn", "self_attn"):

            def count(*_: Any) -> None:
                runs[0] += 1

            module.register_forward_hook(count)
            return runs
    raise AssertionError("no attention")


def compare(config: TrainConfig, capsys: pytest.CaptureFixture) -> tuple[SimpleNamespace, str]:
    plain = train(dataclasses.replace(config, training=dataclasses.replace(config.training, no_cache_features=True)))
    capsys.readouterr()
    cached = train(config)
    torch.testing.assert_close(cached.losses, plain.losses, atol=1e-5, rtol=1e-5)
    for name, tensor in plain.weights.items():
        torch.testing.assert_close(cached.weights[name], tensor, atol=1e-4, rtol=1e-4, msg=name)
    np.testing.assert_allclose(cached.logits, plain.logits, atol=1e-4)
    assert cached.scores == pytest.approx(plain.scores, abs=1e-5)
    assert plain.runs[0] > 0
    assert not plain.is_cached
    assert not torch.equal(plain.losses[0], plain.losses[-1])
    return cached, capsys.readouterr().out


@pytest.mark.parametrize("name", WHOLE)
def test_training_a_head_on_what_the_backbone_gave_once_equals_training_through_it(name, tmp_path, capsys):
    cached, note = compare(settings(any_classifier(name, tmp_path / "model"), tmp_path, "backbone"), capsys)
    assert cached.is_cached, note
    assert cached.runs == [0]
    assert "train computed, validation computed, test computed" in note


@pytest.mark.parametrize("name", LAYERED)
def test_training_the_upper_layers_on_what_the_lower_gave_once_equals_training_through_them(name, tmp_path, capsys):
    cached, note = compare(settings(any_classifier(name, tmp_path / "model", 3), tmp_path, "2"), capsys)
    assert cached.is_cached, note
    assert cached.runs == [0]


def launch(
    run: Command, model: Path, tmp_path: Path, name: str, *extra: object, processes: int = 1
) -> tuple[Path, str]:
    """Folder and output of a run of train.py whose texts, steps and micro-batches are ragged."""
    flags = [*run_flags(tmp_path, model), "--freeze", "backbone", "--output_dir", tmp_path / name, *extra]
    env = {"HF_DATASETS_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    done = run("train.py", *flags, "--save_total_limit", 9, processes=processes, env=env)
    assert results_of(done)["run/num_processes"] == processes
    return tmp_path / name, done.stdout


def test_two_processes_share_the_work_and_a_resumed_run_finds_it_done(run, roberta_without_dropout, tmp_path):
    slow, _ = launch(run, roberta_without_dropout, tmp_path, "slow", "--no_cache_features")
    fast, said = launch(run, roberta_without_dropout, tmp_path, "fast", processes=2)
    assert "train computed, validation computed, test computed" in said
    for one, two in zip(*(read_lines(folder / "metrics.jsonl") for folder in (slow, fast)), strict=True):
        assert without(two, TIMING) == pytest.approx(without(one, TIMING), abs=1e-4)
    weights = [load_file(folder / "model" / "model.safetensors") for folder in (slow, fast)]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, atol=1e-4, rtol=1e-4)
    shutil.copytree(fast, tmp_path / "resumed")
    for path in list_checkpoints(tmp_path / "resumed" / "checkpoints"):
        if path.name != "step-3":
            shutil.rmtree(path)
    resumed, said = launch(run, roberta_without_dropout, tmp_path, "resumed", processes=2)
    assert "step-3" in said
    assert "train found, validation found, test found" in said
    assert differences(fast, resumed) == []
