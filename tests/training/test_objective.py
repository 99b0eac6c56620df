"""Losses and class weights equal those of scikit-learn and PyTorch, on any number of processes and micro-batches."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset, Features, List, Value
from sklearn.utils.class_weight import compute_class_weight
from torch.nn.functional import cross_entropy

from lib.config.sections import DataConfig, ModelConfig
from lib.config.train import ObjectiveConfig, TrainConfig
from lib.data.load import Data
from lib.data.loader import Share, build_collator
from lib.errors import UserError
from lib.model.load import build_model, load_tokenizer
from lib.training.objective import build_loss, build_objective, class_weights
from tests.conftest import Command, read_lines, results_of, sentences, write_csv
from tests.stepping import add_gradients, batches_of
from tests.tiny_models import NAMES

CLASSIFICATION = "single_label_classification"
LABELS = np.array([0] * 7 + [1] * 2 + [2] * 1)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_cross_entropy_with_smoothing_equals_that_of_pytorch_bit_by_bit(smoothing: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(50, 5, generator=generator), torch.randint(5, (50,), generator=generator)
    ours = build_loss(ObjectiveConfig(label_smoothing_factor=smoothing), CLASSIFICATION)(logits, labels)
    assert torch.equal(ours, cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing))


def data_of(labels: np.ndarray, names: list[str] = NAMES) -> Data:
    feature = Value("int64") if labels.ndim == 1 else List(Value("float32"))
    train = Dataset.from_dict({"labels": labels.tolist()}, features=Features({"labels": feature}))
    return Data("", {}, {"train": train}, {}, names, ("text",), ())


def test_balanced_weights_are_those_of_scikit_learn() -> None:
    wanted = compute_class_weight("balanced", classes=np.arange(3), y=LABELS)
    np.testing.assert_allclose(class_weights(["balanced"], LABELS, NAMES), wanted)
    np.testing.assert_allclose(wanted, [10 / 21, 10 / 6, 10 / 3])


def test_balanced_weights_add_up_to_the_same_for_every_class() -> None:
    objective = build_objective(ObjectiveConfig(class_weights=("balanced",)), data_of(LABELS))
    assert objective.weights is not None
    assert objective.weights.dtype == np.float32
    np.testing.assert_allclose([objective.weights[c == LABELS].sum() for c in range(3)], 10 / 3, rtol=1e-6)


def test_class_without_samples_does_not_change_balanced_weights() -> None:
    names = ["none", *NAMES]
    np.testing.assert_allclose(
        class_weights(["balanced"], LABELS + 1, names)[1:], class_weights(["balanced"], LABELS, NAMES)
    )


def test_class_weights_are_given_by_name_or_number_and_default_to_1() -> None:
    assert class_weights(["mixed=2.5", "0=4"], LABELS, NAMES).tolist() == [4, 1, 2.5]
    assert class_weights(["1=3"], LABELS, ["5", "1", "0"]).tolist() == [1, 3, 1]  # a name has precedence over a number
    assert class_weights(["a=b=3"], LABELS, ["a=b", "c", "d"]).tolist() == [3, 1, 1]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["awful=2"], "--class_weights awful=2.*not among.*bad, good, mixed"),
        (["3=2"], "--class_weights 3=2.*not among"),
        (["bad=2", "0=3"], "--class_weights 0=3.*twice"),
    ],
)
def test_weights_of_unknown_or_repeated_classes_are_refused(given: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_objective(ObjectiveConfig(class_weights=tuple(given)), data_of(LABELS))


def test_notes_name_class_weights_and_the_order_of_grades() -> None:
    objective = build_objective(ObjectiveConfig(loss="ordinal", class_weights=("good=2",)), data_of(LABELS))
    order, weights = objective.notes
    assert "bad < good < mixed" in order
    assert "bad 1, good 2, mixed 1" in weights


@pytest.mark.parametrize(
    "settings", [{"loss": "focal"}, {"loss": "ordinal"}, {"label_smoothing_factor": 0.1}, {"class_weights": ("0=2",)}]
)
def test_classification_objectives_are_refused_for_other_problem_types(settings: dict) -> None:
    data = dataclasses.replace(data_of(LABELS), problem_type="regression")
    with pytest.raises(UserError, match=r"--(loss|label|class).* is for data with one label per text"):
        build_objective(ObjectiveConfig(**settings), data)


SOFT = np.random.default_rng(0).dirichlet(np.ones(3), 12).astype(np.float32)


def soft_data(probabilities: np.ndarray = SOFT) -> Data:
    return dataclasses.replace(data_of(probabilities), soft_labels=("p",))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_loss_of_soft_labels_is_that_of_pytorch_bit_by_bit(smoothing: float) -> None:
    logits, wanted = torch.randn(12, 3, generator=torch.Generator().manual_seed(0)), torch.from_numpy(SOFT)
    ours = build_objective(ObjectiveConfig(label_smoothing_factor=smoothing), soft_data()).loss(logits, wanted)
    assert torch.equal(ours, cross_entropy(logits, wanted, reduction="none", label_smoothing=smoothing))


def test_class_weights_of_certain_probabilities_are_those_of_hard_labels() -> None:
    for given in (("balanced",), ("bad=2", "2=0.5")):
        hard = build_objective(ObjectiveConfig(class_weights=given), data_of(LABELS))
        soft = build_objective(ObjectiveConfig(class_weights=given), soft_data(np.eye(3, dtype=np.float32)[LABELS]))
        np.testing.assert_allclose(soft.weights, hard.weights, rtol=1e-6)
    weights = class_weights(["balanced"], SOFT, NAMES)
    np.testing.assert_allclose(weights, 12 / (3 * SOFT.sum(axis=0)), rtol=1e-6)
    objective = build_objective(ObjectiveConfig(class_weights=("balanced",)), soft_data())
    np.testing.assert_allclose(objective.weights, SOFT @ weights, rtol=1e-6)


@pytest.mark.parametrize("settings", [{"loss": "kl"}, {"distill_temperature": 2.0}])
def test_distillation_is_refused_where_the_labels_of_train_are_hard(settings: dict) -> None:
    flag = f"--{next(iter(settings))}"
    hard = np.eye(3, dtype=np.float32)[LABELS]
    multi = dataclasses.replace(soft_data(hard), problem_type="multi_label_classification")
    for data in (data_of(LABELS), dataclasses.replace(data_of(LABELS), soft_labels=("p",)), multi):
        with pytest.raises(UserError, match=flag):
            build_objective(ObjectiveConfig(**settings), data)
    with pytest.raises(UserError, match=f"{flag}.*--soft_labels"):
        TrainConfig(objective=ObjectiveConfig(**settings))


def test_what_is_not_defined_for_soft_labels_is_refused() -> None:
    with pytest.raises(UserError, match="--loss focal"):
        build_objective(ObjectiveConfig(loss="focal"), soft_data())
    for settings in ({"loss": "ordinal"}, {"label_smoothing_factor": 0.1}):
        with pytest.raises(UserError, match="--distill_temperature"):
            ObjectiveConfig(distill_temperature=2.0, **settings)
    with pytest.raises(UserError, match=r"--soft_labels.*regression"):
        DataConfig(soft_labels=("p",), problem_type="regression")


@pytest.mark.parametrize("micro_batch_size", [3, 12])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_weighted_step_has_the_gradient_of_pytorchs_weighted_mean(
    roberta_without_dropout: Path, micro_batch_size: int, world_size: int
) -> None:
    """The gradients of all processes are added up here, each from its share of the step."""
    accelerator, source = Accelerator(cpu=True), ModelConfig(model=str(roberta_without_dropout))
    tokenizer = load_tokenizer(source)
    torch.manual_seed(0)
    model, _ = build_model(source, NAMES, tokenizer)
    texts = [text for text, _ in sentences(12)]
    numbers = np.array([0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 2, 2])
    tokens = Dataset.from_dict({"input_ids": tokenizer(texts)["input_ids"], "labels": numbers.tolist()})
    weights = torch.tensor([0.5, 2.0, 7.0])
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    reference = cross_entropy(model(**batch).logits, torch.from_numpy(numbers), weight=weights)
    wanted = torch.autograd.grad(reference, list(model.parameters()), allow_unused=True)

    objective = build_objective(ObjectiveConfig(class_weights=("0=0.5", "1=2", "2=7")), data_of(numbers))
    collator = build_collator(tokenizer, "no", accelerator.device)
    total = 0.0
    for rank in range(world_size):
        share = Share(micro_batch_size, rank, world_size)
        batch = next(batches_of(tokens, collator, objective.weights).steps([np.arange(12)], share))
        total += add_gradients(model, batch, objective.loss) / batch.weight
    assert total == pytest.approx(reference.item(), abs=1e-6)
    for parameter, gradients in zip(model.parameters(), wanted, strict=True):
        if gradients is not None:
            torch.testing.assert_close(parameter.grad, gradients, atol=1e-6, rtol=1e-5)


def test_evaluation_reports_cross_entropy_for_any_training_loss(run: Command, roberta: Path, tmp_path: Path) -> None:
    flags = []
    for seed, role in enumerate(("train", "validation", "test")):
        flags += [f"--{role}_file", write_csv(tmp_path / f"{role}.csv", sentences(30, seed))]
    flags += ["--model", roberta, "--lr", "1e-2", "--max_steps", 6, "--logging_steps", 6, "--output_dir", "run"]
    flags += ["--loss", "focal", "--class_weights", "balanced", "--report_to", "none", "--mixed_precision", "no"]
    done = run("train.py", *flags)
    rows = read_lines(tmp_path / "run" / "eval-test" / "predictions.jsonl")
    cross_entropies = [-np.log(row["probabilities"][row["gold"]]) for row in rows]
    assert results_of(done)["test/loss"] == pytest.approx(np.mean(cross_entropies), rel=1e-4)
    assert "- class weights: bad 1, good 1, mixed 1" in done.stdout
    assert "| loss | focal |" in (tmp_path / "run" / "model" / "README.md").read_text()
    assert json.loads((tmp_path / "run" / "model" / "config.json").read_text())["problem_type"] == CLASSIFICATION
