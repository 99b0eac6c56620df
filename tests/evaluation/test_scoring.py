"""Every sample is predicted once, in input order, and no batching changes a number."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import nn
from transformers import PreTrainedModel

from lib.config.sections import CLASSIFICATION, MULTI_LABEL, ModelConfig
from lib.data.load import Data
from lib.data.loader import Batches, Collator, Split, build_collator
from lib.evaluation import scoring
from lib.evaluation.batch_size import BatchSize
from lib.evaluation.calibration import cross_entropy
from lib.evaluation.predictions import Predictions
from lib.evaluation.scoring import check_counts, evaluate, predict
from lib.model.layers import set_train_mode
from lib.model.load import build_model, load_tokenizer
from lib.runtime.launch_checks import Sharding
from lib.runtime.memory import StartAgain
from tests.conftest import sentences

NAMES = ["bad", "good", "mixed"]
SIZE = 9


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


@pytest.fixture(scope="module")
def parts(roberta: Path) -> tuple[PreTrainedModel, Dataset, np.ndarray, Collator]:
    """Model, tokens, lengths and collator; weights are large, so that logits tell texts apart."""
    config = ModelConfig(model=str(roberta))
    tokenizer = load_tokenizer(config)
    torch.manual_seed(0)
    model, _ = build_model(config, NAMES, tokenizer)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.5)
    texts, labels = zip(*sentences(SIZE), strict=True)
    ids = tokenizer(list(texts))["input_ids"]
    tokens = Dataset.from_dict({"input_ids": ids, "labels": [NAMES.index(label) for label in labels]})
    lengths = np.array([len(row) for row in ids])
    assert len(set(lengths)) > 3
    return model, tokens, lengths, build_collator(tokenizer, "no", torch.device("cpu"))


def predict_all(accelerator: Accelerator, parts: tuple, batch_size: int) -> Predictions:
    model, tokens, lengths, collator = parts
    return predict(
        accelerator, model, Split("test", tokens, lengths, collator, len(NAMES), CLASSIFICATION), BatchSize(batch_size)
    )


@pytest.fixture(scope="module")
def single_logits(parts: tuple[PreTrainedModel, Dataset, np.ndarray, Collator]) -> np.ndarray:
    """Logits of each text on its own, by the model alone."""
    model, tokens, _, _ = parts
    model.eval()
    with torch.inference_mode():
        return torch.cat([model(input_ids=torch.tensor([ids])).logits for ids in tokens["input_ids"]]).numpy()


@pytest.mark.parametrize("batch_size", range(1, SIZE + 2))
def test_logits_are_those_of_single_texts_for_any_batch_size(
    accelerator: Accelerator, parts: tuple, single_logits: np.ndarray, batch_size: int
) -> None:
    predictions = predict_all(accelerator, parts, batch_size)
    np.testing.assert_allclose(predictions.logits, single_logits, rtol=0, atol=1e-5)
    assert predictions.labels.tolist() == parts[1]["labels"][:]
    assert np.ptp(single_logits, axis=0).min() > 0.1


@pytest.mark.parametrize("way", ["unpadded", "packed"])
def test_mask_of_tokens_is_kept_where_evaluation_reads_it(
    way: str, accelerator: Accelerator, parts: tuple, monkeypatch: Any
) -> None:
    model, tokens, lengths, collator = parts
    split = Split("test", tokens, lengths, collator, len(NAMES), CLASSIFICATION, **{way: True})
    given: list[Any] = []

    def share_batches(*arguments: Any) -> bool:
        given.append(arguments[5])
        return True

    monkeypatch.setattr(scoring, "share_batches", share_batches)
    scoring.predict_table(accelerator, model, split, [])
    scoring.predict_table(accelerator, model, dataclasses.replace(split, **{way: False}), [])
    assert given == [None, model]


def test_losses_are_the_cross_entropy_of_each_sample(accelerator: Accelerator, parts: tuple) -> None:
    predictions = predict_all(accelerator, parts, 4)
    of_gold = predictions.probabilities[np.arange(SIZE), predictions.labels]
    np.testing.assert_allclose(predictions.losses, -np.log(of_gold), atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 4, SIZE, SIZE + 1])
def test_model_runs_once_per_batch(accelerator: Accelerator, parts: tuple, batch_size: int) -> None:
    model, _, lengths, _ = parts
    sizes: list[int] = []
    hook = model.register_forward_hook(lambda _, __, output: sizes.append(len(output.logits)))
    predict_all(accelerator, parts, batch_size)
    hook.remove()
    assert sizes == [len(batch) for batch in BatchSize(batch_size).batches(lengths)]


def test_size_after_out_of_memory_in_shards_is_half_of_the_size_that_was_set(
    accelerator: Accelerator, parts: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch of short texts holds more samples than that size."""
    model, tokens, _, collator = parts
    lengths = np.array([64, *[8] * (SIZE - 1)])
    assert max(map(len, BatchSize(2).batches(lengths))) > 4

    def no_memory(*_: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(scoring, "read_sharding", lambda: Sharding(2))
    monkeypatch.setattr(scoring, "predict_batch", no_memory)
    with pytest.raises(StartAgain, match="--per_device_eval_batch_size") as error:
        predict(accelerator, model, Split("test", tokens, lengths, collator, len(NAMES), CLASSIFICATION), BatchSize(2))
    assert (error.value.name, error.value.value) == ("eval_batch_size", 1)


def test_each_module_gets_its_mode_back(accelerator: Accelerator, parts: tuple) -> None:
    model = parts[0]
    model.base_model.requires_grad_(False)
    set_train_mode(model)
    before = {name: module.training for name, module in model.named_modules()}
    modes_within: set[bool] = set()
    hook = model.register_forward_hook(lambda *_: modes_within.update(module.training for module in model.modules()))
    predict_all(accelerator, parts, 4)
    hook.remove()
    model.requires_grad_(True)
    assert set(before.values()) == {True, False}
    assert modes_within == {False}
    assert {name: module.training for name, module in model.named_modules()} == before


def test_prediction_draws_no_random_numbers(accelerator: Accelerator, parts: tuple) -> None:
    before = torch.get_rng_state()
    predict_all(accelerator, parts, 4)
    assert torch.equal(torch.get_rng_state(), before)


def test_padding_does_not_change_logits(parts: tuple, single_logits: np.ndarray) -> None:
    model, tokens, lengths, collator = parts
    model.eval()
    batch = collator([tokens[index] for index in range(SIZE)])
    batch.pop("labels")
    assert batch["input_ids"].shape[1] == lengths.max()
    with torch.inference_mode():
        np.testing.assert_allclose(model(**batch).logits.numpy(), single_logits, rtol=0, atol=1e-5)
        without_mask = model(input_ids=batch["input_ids"], attention_mask=torch.ones_like(batch["input_ids"]))
    assert np.abs(without_mask.logits.numpy() - single_logits).max() > 0.1


def test_fixed_shapes_do_not_change_predictions(accelerator: Accelerator, parts: tuple, roberta: Path) -> None:
    """Every batch as long as --max_length asks, the short one at the end included, which only has fewer rows."""
    model, tokens, lengths, _ = parts
    fixed = build_collator(load_tokenizer(ModelConfig(str(roberta))), "no", torch.device("cpu"), 40)
    shapes = []
    hook = model.register_forward_pre_hook(
        lambda _, __, inputs: shapes.append(inputs["input_ids"].shape), with_kwargs=True
    )
    padded = predict_all(accelerator, (model, tokens, np.full_like(lengths, 40), fixed), 4)
    hook.remove()
    assert {tuple(shape) for shape in shapes} == {(4, 40)} | ({(SIZE % 4, 40)} if SIZE % 4 else set())
    np.testing.assert_allclose(padded.logits, predict_all(accelerator, parts, 4).logits, rtol=0, atol=1e-5)


def test_evaluate_scores_the_split_asked_for(accelerator: Accelerator, parts: tuple) -> None:
    model, tokens, lengths, collator = parts
    half = {"validation": tokens.select(range(4)), "test": tokens}
    data = Data("made up", {}, half, {"validation": lengths[:4], "test": lengths}, NAMES, ("text",), ())
    scores, predictions = evaluate(
        accelerator, model, Batches(data, collator).split("validation"), ["accuracy"], BatchSize(3)
    )
    assert len(predictions.labels) == 4
    assert scores["accuracy"] == (predictions.predicted == predictions.labels).mean()
    assert scores["loss"] == pytest.approx(predictions.losses.mean())


@pytest.mark.parametrize("problem", [CLASSIFICATION, MULTI_LABEL])
def test_soft_labels_are_kept_and_their_loss_is_no_worse_at_the_stored_temperature(
    accelerator: Accelerator, parts: tuple, problem: str
) -> None:
    model, tokens, lengths, collator = parts
    soft = np.random.default_rng(0).dirichlet(np.ones(3), SIZE).astype(np.float32).tolist()
    certain = (np.eye(3)[tokens["labels"][:]] if problem == MULTI_LABEL else np.array(tokens["labels"][:])).tolist()
    for labels in (soft, certain):
        given = tokens.remove_columns("labels").add_column("labels", labels)
        split = Split("validation", given, lengths, collator, 3, problem)
        scores, predictions = evaluate(accelerator, model, split, [], BatchSize(3), tune_thresholds_first=True)
        bare, tuned = cross_entropy(predictions.uncalibrated), cross_entropy(predictions)
        assert bare == pytest.approx(scores["loss"], rel=1e-5)
        assert tuned <= bare
        if labels is soft:
            assert predictions.targets == pytest.approx(np.array(soft))
            assert predictions.labels.shape == ((SIZE,) if problem == CLASSIFICATION else (SIZE, 3))
        else:
            assert predictions.targets is None
    for key in ("thresholds", "calibration_temperature"):
        vars(model.config).pop(key, None)


def test_temperature_and_thresholds_are_those_of_the_main_process(
    accelerator: Accelerator, parts: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process on another kind of CPU may fit slightly other ones."""
    model, tokens, lengths, collator = parts
    labels = np.random.default_rng(0).integers(2, size=(SIZE, 3)).astype(float).tolist()
    given = tokens.remove_columns("labels").add_column("labels", labels)
    split = Split("validation", given, lengths, collator, 3, MULTI_LABEL)
    sent = []
    monkeypatch.setattr("lib.evaluation.scoring.broadcast_object_list", lambda found: sent.extend(found) or found)
    main = evaluate(accelerator, model, split, ["f1_micro"], BatchSize(3), tune_thresholds_first=True)
    configs = [dict(vars(model.config))]
    for key in ("thresholds", "calibration_temperature"):
        vars(model.config).pop(key)
    monkeypatch.setattr(Accelerator, "is_main_process", False)
    monkeypatch.setattr("lib.evaluation.scoring.broadcast_object_list", lambda _: sent)
    for name in ("fit_temperature", "tune_thresholds", "compute_metrics"):
        monkeypatch.setattr(f"lib.evaluation.scoring.{name}", None)
    other = evaluate(accelerator, model, split, ["f1_micro"], BatchSize(3), tune_thresholds_first=True)
    assert [*configs, dict(vars(model.config))] == [*configs, *configs]
    assert other.scores == main.scores
    assert other.predictions.temperature == main.predictions.temperature != 1
    assert np.array_equal(other.predictions.thresholds, main.predictions.thresholds)
    for key in ("thresholds", "calibration_temperature"):
        vars(model.config).pop(key)


class Echo(nn.Module):
    """Logits that name the first token, to see where each prediction ends up."""

    def forward(self, input_ids: torch.Tensor, **_: torch.Tensor) -> object:
        first = input_ids[:, :1].float()
        return type("Output", (), {"logits": torch.cat([first, -first], dim=1)})()


@pytest.mark.parametrize("size", [1, 2, 13, 40])
def test_predictions_stand_in_input_order_for_any_size(accelerator: Accelerator, parts: tuple, size: int) -> None:
    lengths = np.random.default_rng(size).integers(1, 6, size)
    ids = [[number] * int(length) for number, length in enumerate(lengths)]
    tokens = Dataset.from_dict({"input_ids": ids, "labels": [0] * size})
    predictions = predict(
        accelerator, Echo(), Split("test", tokens, lengths, parts[3], 2, CLASSIFICATION), BatchSize(4)
    )
    assert predictions.logits[:, 0].tolist() == list(range(size))


# ---------------------------------------------------------------------------------------------------- counts


def test_complete_counts_pass() -> None:
    check_counts(np.ones(5))


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ([1, 0, 1, 0], r"2 samples missing \(first \[1, 3\]\), 0 counted"),
        ([1, 2, 1, 1], r"0 samples missing \(first \[\]\), 1 counted more than once \(first \[1\]\)"),
        ([2, 0], r"1 samples missing \(first \[1\]\), 1 counted more than once \(first \[0\]\)"),
    ],
)
def test_missing_and_double_samples_are_an_error(counts: list[int], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        check_counts(np.array(counts))


@pytest.mark.parametrize("order", [[0, 1, 2], [0, 0, 1, 2, 3]])
def test_batches_that_drop_or_repeat_samples_are_an_error(
    accelerator: Accelerator, parts: tuple, order: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokens, lengths, collator = parts
    monkeypatch.setattr("lib.evaluation.scoring.split_batches", lambda *_: [np.array(order)])
    with pytest.raises(RuntimeError, match="evaluation is not complete"):
        predict_all(accelerator, (model, tokens.select(range(4)), lengths[:4], collator), 4)


# ---------------------------------------------------------------------------------------------------- probabilities


def test_probabilities_sum_to_1_and_survive_large_logits() -> None:
    logits = np.array([[1000, 0, -1000], [0.5, 0.5, 0.5], [-3e38, -3e38, -3e38]], dtype=np.float32)
    predictions = Predictions(logits, np.zeros(3, dtype=np.int64), np.zeros(3, dtype=np.float32))
    np.testing.assert_allclose(predictions.probabilities.sum(axis=1), 1)
    np.testing.assert_allclose(predictions.probabilities[0], [1, 0, 0])
    np.testing.assert_allclose(predictions.probabilities[1], 1 / 3)
    assert predictions.predicted.tolist() == [0, 0, 0]
