"""Training on cached outputs of the frozen part equals training through it, for every architecture."""

import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import nn

from lib.config.sections import DataConfig, ModelConfig
from lib.config.train import OptimConfig, TrainConfig, TrainingConfig
from lib.model.load import build_model, load_tokenizer
from lib.model.source import model_identity
from lib.run.checkpoint import list_checkpoints
from lib.runtime.atomic import find_damage, remove_unused
from lib.training.frozen import features
from lib.training.frozen.feature_cache import load_features, model_digest, save_features
from lib.training.frozen.features import cache_features
from tests.conftest import Command, read_lines, results_of, sentences, write_csv
from tests.resuming import TIMING, differences, run_flags, without
from tests.stepping import METRICS, build_experiment
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
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(features, "cache_folder", lambda: tmp_path / "features")
    yield tmp_path / "features"
    AcceleratorState._reset_state(reset_partial_state=True)


def settings(model: Path, tmp_path: Path, freeze: str, **training: Any) -> TrainConfig:
    counts = {"train": 21, "validation": 9, "test": 5}
    files = {f"{role}_file": str(write_csv(tmp_path / f"{role}.csv", sentences(n, n))) for role, n in counts.items()}
    return TrainConfig(
        model=ModelConfig(model=str(model), freeze=freeze),
        data=DataConfig(**files),
        optim=OptimConfig(learning_rate=1e-2, adam_epsilon=1e-2),
        training=TrainingConfig(
            train_batch_size=8,
            num_train_epochs=2,
            per_device_train_batch_size=3,
            per_device_eval_batch_size=4,
            **training,
        ),
        mixed_precision="no",
    )


def train(config: TrainConfig) -> SimpleNamespace:
    """Train as train.py does: losses and gradient norms of the steps, weights, scores, and the model."""
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, mixed_precision=config.mixed_precision)
    experiment = build_experiment(config, accelerator)
    learner, plain = experiment.learner, experiment.batches
    cached = experiment.batches = cache_features(learner, plain, config.model, config.training)
    runs, losses = count_runs(learner.model), torch.tensor(experiment.train())
    scores, predictions = learner.evaluate(cached.split("test"), METRICS)
    weights = {name: tensor.clone() for name, tensor in learner.model.state_dict().items()}
    return SimpleNamespace(
        losses=losses,
        weights=weights,
        scores=scores,
        logits=predictions.logits,
        model=learner.model,
        is_cached=cached is not plain,
        runs=runs,
    )


def count_runs(model: Any) -> list[int]:
    """Count from now on how often the first attention of a model runs, which is in the frozen part."""
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
def test_head_trained_on_cached_features_equals_training_through_the_backbone(name, tmp_path, capsys):
    cached, note = compare(settings(any_classifier(name, tmp_path / "model"), tmp_path, "backbone"), capsys)
    assert cached.is_cached, note
    assert cached.runs == [0]
    assert "train computed, validation computed, test computed" in note


@pytest.mark.parametrize("name", LAYERED)
def test_layers_trained_on_cached_features_equal_training_through_the_frozen_ones(name, tmp_path, capsys):
    cached, note = compare(settings(any_classifier(name, tmp_path / "model", 3), tmp_path, "2"), capsys)
    assert cached.is_cached, note
    assert cached.runs == [0]


@pytest.mark.parametrize(
    ("name", "freeze", "reason"),
    [
        ("bart", "backbone", "more than one vector"),  # its head looks for the end token in the token ids
        ("gpt2", "2", "random numbers"),  # the dropout of its embeddings is active: it has no parameters
        ("deberta", "2", "something below it is trained"),  # position embeddings shared by all layers
    ],
)
def test_uncacheable_frozen_part_runs_every_step_and_is_reported(name, freeze, reason, tmp_path, capsys):
    model = any_classifier(name, tmp_path / "model", 3)
    plain = train(settings(model, tmp_path, freeze, no_cache_features=True))
    cached = train(settings(model, tmp_path, freeze))
    assert not cached.is_cached
    assert cached.runs[0] > plain.runs[0] / 2
    assert torch.equal(cached.losses, plain.losses)
    assert reason in capsys.readouterr().out


def test_features_larger_than_the_budget_are_not_cached(tmp_path, capsys, folder):
    cached = train(settings(any_classifier("bert", tmp_path / "model"), tmp_path, "1", feature_cache_gib=1e-6))
    assert not cached.is_cached
    assert "--feature_cache_gib allows 1e-06" in capsys.readouterr().out
    assert not folder.exists()


def test_damaged_file_is_noticed_and_computed_again(tmp_path, capsys, folder):
    config = settings(any_classifier("bert", tmp_path / "model"), tmp_path, "backbone")
    first = train(config)
    capsys.readouterr()
    files = sorted(folder.glob("*/features.safetensors"), key=lambda path: path.stat().st_size)
    assert len(files) == 3
    content = bytearray(files[-1].read_bytes())
    content[-3] ^= 1
    files[-1].write_bytes(content)
    again = train(config)
    said = capsys.readouterr().out
    assert "train computed instead of damaged ones (features.safetensors was changed" in said
    assert "validation found, test found" in said
    assert torch.equal(first.losses, again.losses)
    assert find_damage(files[-1].parent) is None


def test_features_depend_on_weights_tokens_and_precision(tmp_path, folder):
    model = any_classifier("bert", tmp_path / "model")
    config = settings(model, tmp_path, "backbone")
    for count, other in enumerate(
        [
            config,
            dataclasses.replace(config, training=dataclasses.replace(config.training, seed=1, train_batch_size=5)),
            dataclasses.replace(config, mixed_precision="bf16"),
            dataclasses.replace(config, data=dataclasses.replace(config.data, max_length=6)),
            settings(any_classifier("roberta", tmp_path / "other"), tmp_path, "backbone"),
        ]
    ):
        assert train(other).is_cached
        assert len(list(folder.glob("*/features.safetensors"))) == 3 * max(1, count)


def test_features_depend_on_the_code_that_a_model_brings(tmp_path, roberta):
    coded = tmp_path / "coded"
    shutil.copytree(roberta, coded)
    config = json.loads((coded / "config.json").read_text())
    names = {"AutoModelForSequenceClassification": "code.Model"}
    (coded / "config.json").write_text(json.dumps(config | {"auto_map": names}))
    source, digests, codes = ModelConfig(str(coded), trust_remote_code=True), [], []
    for comment in ("one", "two", "two"):
        lines = [
            "from transformers import RobertaForSequenceClassification as Base",
            "class Model(Base):",
            f"    '{comment}'",
        ]
        (coded / "code.py").write_text("\n".join(lines) + "\n")
        torch.manual_seed(0)
        model, _ = build_model(source, ["a", "b"], load_tokenizer(source))
        assert type(model).__module__.startswith("transformers_modules.")
        digests.append(model_digest(model.requires_grad_(False)))
        codes.append(model_identity(source)["code_sha256"])
    assert digests[0] != digests[1] == digests[2]
    assert codes[0] != codes[1] == codes[2]
    assert codes[0].keys() == {"code.py"}


def test_bf16_features_are_stored_as_bf16_and_give_the_losses_of_bf16(tmp_path, folder):
    config = settings(any_classifier("bert", tmp_path / "model"), tmp_path, "backbone")
    config = dataclasses.replace(config, mixed_precision="bf16")
    plain = train(dataclasses.replace(config, training=dataclasses.replace(config.training, no_cache_features=True)))
    cached = train(config)
    assert cached.is_cached
    kinds = {load_file(path)["features"].dtype for path in folder.glob("*/features.safetensors")}
    assert kinds == {torch.bfloat16}
    torch.testing.assert_close(cached.losses, plain.losses, atol=2e-2, rtol=2e-2)


def test_least_recently_used_features_are_deleted_first(tmp_path):
    for age, name in enumerate("abcd"):
        assert save_features(tmp_path / name, torch.zeros(1000), {}, 1e9) is None
        os.utime(tmp_path / name / "manifest.json", (1000 - age, 1000 - age))
    assert load_features(tmp_path / "d", (1000,), torch.float32) is not None  # used now
    assert load_features(tmp_path / "d", (999,), torch.float32) is None
    remove_unused(tmp_path, 10_000)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "d"]


def launch(
    run: Command, model: Path, tmp_path: Path, name: str, *extra: object, processes: int = 1
) -> tuple[Path, str]:
    """Folder and output of a run of train.py with texts, steps and micro-batches of unequal size."""
    flags = [*run_flags(tmp_path, model), "--freeze", "backbone", "--output_dir", tmp_path / name, *extra]
    env = {"HF_DATASETS_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    done = run("train.py", *flags, "--save_total_limit", 9, processes=processes, env=env)
    assert results_of(done)["run/num_processes"] == processes
    return tmp_path / name, done.stdout


@pytest.mark.slow
def test_two_processes_share_the_work_and_a_resumed_run_loads_the_features(run, roberta_without_dropout, tmp_path):
    slow, _ = launch(run, roberta_without_dropout, tmp_path, "slow", "--no_cache_features")
    fast, said = launch(run, roberta_without_dropout, tmp_path, "fast", processes=2)
    assert "train computed, validation computed, test computed" in said
    for one, two in zip(*(read_lines(folder / "metrics.jsonl") for folder in (slow, fast)), strict=True):
        assert without(two, TIMING) == pytest.approx(without(one, TIMING), abs=1e-4)
    weights = [load_file(folder / "model" / "model.safetensors") for folder in (slow, fast)]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, atol=1e-4, rtol=1e-4)
    shutil.copytree(fast, tmp_path / "resumed", ignore=shutil.ignore_patterns("results.json"))
    for path in list_checkpoints(tmp_path / "resumed" / "checkpoints"):
        if path.name != "step-3":
            shutil.rmtree(path)
    resumed, said = launch(run, roberta_without_dropout, tmp_path, "resumed", processes=2)
    assert "step-3" in said
    assert "train found, validation found, test found" in said
    assert differences(fast, resumed) == []


def test_features_are_computed_with_the_size_that_was_learned_and_what_they_learn_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CPU that is taken for a GPU, of a resumed run: its memory was too short for 60 positions, and is now for 30."""
    monkeypatch.setattr("lib.evaluation.batch_size.has_own_memory", lambda _: True)
    config = settings(any_classifier("roberta", tmp_path / "model"), tmp_path, "backbone")
    training = dataclasses.replace(config.training, per_device_eval_batch_size=None)
    config = dataclasses.replace(config, training=training)
    experiment = build_experiment(config, Accelerator(cpu=True))
    learner, sizes, compute = experiment.learner, [], features.StandIn.compute
    learner.state.eval_positions = 60

    def short_of_memory(stand_in: Any, batch: dict[str, torch.Tensor]) -> Any:
        sizes.append(batch["input_ids"].numel())
        if sizes[-1] > 30:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return compute(stand_in, batch)

    monkeypatch.setattr(features.StandIn, "compute", short_of_memory)
    assert cache_features(learner, experiment.batches, config.model, config.training) is not experiment.batches
    assert 30 < max(sizes) <= 60
    assert sum(size > 30 for size in sizes) == 1  # the later splits start with what the first one found
    assert learner.state.eval_positions == learner.eval_size.number <= 30
