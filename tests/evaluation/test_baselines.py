"""Simple methods beside a model: equal to scikit-learn's, for every problem type, computed once for a data set."""

import time

import numpy as np
import pytest
import torch
from datasets import Dataset
from sklearn.dummy import DummyClassifier
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.metrics import accuracy_score, f1_score
from transformers import AutoModel

from lib.config.sections import CLASSIFICATION, MULTI_LABEL, REGRESSION, ModelSource
from lib.data.load import Data
from lib.errors import UserError
from lib.evaluation import baselines
from lib.evaluation.baselines import (
    FROZEN,
    FROZEN_RIDGE,
    MAJORITY,
    TFIDF,
    TFIDF_RIDGE,
    compare_with_baselines,
    find_baselines,
    format_baselines,
    mean_vectors,
)
from lib.evaluation.scores import Metrics
from lib.model.load import load_tokenizer, load_trained

WORDS = ("dull", "plain", "bright")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(baselines, "datasets_cache", lambda: tmp_path)
    monkeypatch.setattr(baselines, "FEWEST_ROWS", 10**9)  # MiniLM takes a second
    return tmp_path


@pytest.fixture
def with_vectors(monkeypatch):
    monkeypatch.setattr(baselines, "FEWEST_ROWS", 100)


def data_of(labels, texts, problem=CLASSIFICATION, names=WORDS):
    """Data whose splits have these labels and texts."""
    tables = {split: Dataset.from_dict({"text": found}) for split, found in texts.items()}
    tokens = {
        split: Dataset.from_dict({"input_ids": [[1]] * len(found), "labels": found}) for split, found in labels.items()
    }
    lengths = {split: np.ones(len(found), dtype=np.int64) for split, found in labels.items()}
    return Data("made", tables, tokens, lengths, list(names), ("text",), (), problem_type=problem)


def reviews(problem, separator=" "):
    """Rows whose word tells the class, the number or the labels."""
    rng = np.random.default_rng(0)
    labels, texts = {}, {}
    for split, size in (("train", 120), ("validation", 40), ("test", 40)):
        classes = rng.choice(3, size=size, p=[0.5, 0.3, 0.2])
        texts[split] = [separator.join((WORDS[c], f"film{i % 7}", "seen")) for i, c in enumerate(classes)]
        if problem == CLASSIFICATION:
            labels[split] = classes.tolist()
        elif problem == REGRESSION:
            labels[split] = (classes * 1.5).tolist()
        else:
            labels[split] = [[float(c > 0), float(c > 1), 1.0] for c in classes]
    return data_of(labels, texts, problem)


def test_most_frequent_class_scores_as_scikit_learns_dummy():
    data, metrics = reviews(CLASSIFICATION), Metrics(("accuracy", "f1_macro"), "accuracy")
    found = find_baselines(data, "test", metrics)[MAJORITY]
    dummy = DummyClassifier().fit(np.zeros((120, 1)), data.labels("train"))
    predicted, gold = dummy.predict(np.zeros((40, 1))), data.labels("test")
    expected = {"accuracy": accuracy_score(gold, predicted), "f1_macro": f1_score(gold, predicted, average="macro")}
    assert found == pytest.approx(expected)


@pytest.mark.parametrize(
    ("problem", "names", "poor"),
    [
        (CLASSIFICATION, ("accuracy",), 0.7),
        (REGRESSION, ("r2",), 0.1),
        (MULTI_LABEL, ("f1_macro", "average_precision"), 0.9),
    ],
)
def test_words_that_tell_the_label_are_learned_for_every_problem_type(problem, names, poor):
    found = find_baselines(reviews(problem), "test", Metrics(names, names[0]))
    method = TFIDF_RIDGE if problem == REGRESSION else TFIDF
    assert set(found) == {MAJORITY, method}
    assert found[method][names[0]] > 0.95
    assert found[MAJORITY][names[0]] < poor


@pytest.mark.parametrize(
    ("problem", "names"), [(CLASSIFICATION, ("accuracy",)), (REGRESSION, ("r2",)), (MULTI_LABEL, ("f1_macro",))]
)
def test_frozen_vectors_that_tell_the_label_are_learned_and_no_random_state_is_touched(problem, names, with_vectors):
    torch.manual_seed(3)
    np.random.seed(3)
    before, threads = (torch.get_rng_state(), np.random.get_state()[1].tolist()), torch.get_num_threads()
    found = find_baselines(reviews(problem), "test", Metrics(names, names[0]))
    assert found[FROZEN_RIDGE if problem == REGRESSION else FROZEN][names[0]] > 0.9
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]
    assert torch.get_num_threads() == threads


def test_frozen_vectors_are_means_over_the_tokens_and_a_pair_has_difference_and_product(monkeypatch):
    monkeypatch.setattr(baselines, "resolve_precision", lambda _: "no")
    texts = ["a dull film", "bright and quick, from the first scene to the last", ""]
    one = mean_vectors({"test": Dataset.from_dict({"text": texts})}, torch.device("cpu"))["test"]
    source = ModelSource()
    tokenizer, model = load_tokenizer(source), load_trained(source, AutoModel, "model").eval()
    for text, vector in zip(texts, one, strict=True):
        with torch.no_grad():
            states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        np.testing.assert_allclose(vector, states.mean(dim=0), atol=1e-4)
    table = Dataset.from_dict({"first": texts, "second": texts[::-1]})
    pair = mean_vectors({"test": table}, torch.device("cpu"))["test"]
    first, second = one, one[::-1]
    np.testing.assert_allclose(pair, np.hstack([first, second, abs(first - second), first * second]), atol=1e-4)


def test_without_minilm_or_with_too_many_tokens_the_other_methods_are_shown(monkeypatch, capsys, with_vectors):
    data, metrics = reviews(CLASSIFICATION), Metrics(("accuracy",), "accuracy")

    def missing(*_):
        raise UserError("its package is not installed")

    with monkeypatch.context() as patch:
        patch.setattr(baselines, "load_trained", missing)
        assert list(find_baselines(data, "test", metrics)) == [MAJORITY, TFIDF]
    assert "not installed" in capsys.readouterr().err
    monkeypatch.setattr(baselines, "mean_vectors", missing)
    monkeypatch.setattr(baselines, "MOST_SCORED_TOKENS", {"cpu": 39})
    assert list(find_baselines(data, "test", metrics)) == [MAJORITY, TFIDF]
    assert not capsys.readouterr().err


def test_text_without_spaces_is_read_by_characters():
    found = find_baselines(reviews(CLASSIFICATION, separator=""), "test", Metrics(("accuracy",), "accuracy"))
    assert found[TFIDF]["accuracy"] > 0.95


@pytest.mark.parametrize("texts", [["", "!!", "?"] * 4, ["a"] * 12])
def test_texts_that_tell_nothing_score_like_the_most_frequent_class(texts):
    labels = [0, 1, 0] * 4
    data = data_of(
        dict.fromkeys(("train", "validation", "test"), labels), dict.fromkeys(("train", "validation", "test"), texts)
    )
    found = find_baselines(data, "test", Metrics(("accuracy",), "accuracy"))
    assert found[MAJORITY]["accuracy"] == pytest.approx(2 / 3)
    assert found[TFIDF]["accuracy"] >= 2 / 3


def test_class_that_train_lacks_is_never_predicted_and_breaks_nothing():
    texts = {"train": ["dull film", "bright film"] * 4, "validation": ["dull", "bright"], "test": ["dull", "plain"]}
    labels = {"train": [0, 2] * 4, "validation": [0, 2], "test": [0, 1]}
    found = find_baselines(data_of(labels, texts), "test", Metrics(("accuracy",), "accuracy"))
    assert found[TFIDF]["accuracy"] == 0.5


def test_baselines_are_computed_once_for_a_data_set_and_anew_for_other_labels(monkeypatch):
    data, metrics, calls = reviews(CLASSIFICATION), Metrics(("accuracy",), "accuracy"), []
    real = baselines.words_regression
    monkeypatch.setattr(baselines, "words_regression", lambda *given: calls.append(1) or real(*given))
    first = find_baselines(data, "test", metrics)
    assert find_baselines(data, "test", metrics) == first
    assert len(calls) == 1
    other = {split: data.labels(split)[::-1].tolist() for split in data.tokens}
    changed = data_of(other, {split: list(data.texts[split]["text"]) for split in data.texts})
    assert find_baselines(changed, "test", metrics) != first
    assert len(calls) == 2


def test_frozen_vectors_are_computed_anew_for_another_device_or_precision(monkeypatch, with_vectors):
    data, metrics, made = reviews(CLASSIFICATION), Metrics(("accuracy",), "accuracy"), []
    few = {
        name: np.zeros((size, 2), dtype=np.float32) for name, size in (("train", 120), ("validation", 40), ("test", 40))
    }
    monkeypatch.setattr(baselines, "mean_vectors", lambda _, device: made.append(device.type) or few)
    for precision, device, count in (("no", "cpu", 1), ("bf16", "cpu", 2), ("bf16", "cuda", 3), ("bf16", "cpu", 3)):
        monkeypatch.setattr(baselines, "resolve_precision", lambda _, precision=precision: precision)
        assert FROZEN in find_baselines(data, "test", metrics, torch.device(device))
        assert len(made) == count


def test_number_of_threads_is_what_it_was_after_an_error(monkeypatch):
    threads = torch.get_num_threads()
    monkeypatch.setattr(baselines, "use_all_cores", lambda: torch.set_num_threads(threads + 1))
    monkeypatch.setattr(baselines, "load_trained", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        mean_vectors({}, torch.device("cpu"))
    found = torch.get_num_threads()
    torch.set_num_threads(threads)
    assert found == threads


def test_rows_are_read_once_a_block_at_a_time_and_not_to_their_end(cache, monkeypatch):
    data, metrics, read = reviews(CLASSIFICATION), Metrics(("accuracy",), "accuracy"), []
    whole = find_baselines(data, "test", metrics)
    texts = {split: [f"{text} {'x' * 5000}" for text in data.texts[split]["text"]] for split in data.texts}
    long = data_of({split: data.labels(split).tolist() for split in data.tokens}, texts)
    real = TfidfVectorizer.transform
    monkeypatch.setattr(TfidfVectorizer, "transform", lambda self, rows: read.append(rows) or real(self, rows))
    monkeypatch.setattr(baselines, "BLOCK", 15)
    monkeypatch.setattr(baselines, "datasets_cache", lambda: cache / "another")
    found = find_baselines(long, "test", metrics)
    assert list(map(len, read)) == [15, 15, 10] * 2
    assert max(len(text) for rows in read for text in rows) < 3000
    assert found[TFIDF]["accuracy"] == whole[TFIDF]["accuracy"]


def test_what_is_learned_from_is_bounded_and_nothing_is_said_of_quick_ones(monkeypatch, capsys):
    data, metrics, learned = reviews(CLASSIFICATION), Metrics(("accuracy",), "accuracy"), []
    real = TfidfVectorizer.fit_transform
    monkeypatch.setattr(
        TfidfVectorizer, "fit_transform", lambda self, rows: learned.append((self, rows)) or real(self, rows)
    )
    monkeypatch.setattr(baselines, "MOST_CHARACTERS", 1500)
    found, _ = compare_with_baselines(data, "test", {"accuracy": 0.5}, metrics)
    ((vectorizer, rows),) = learned
    assert 1000 < sum(map(len, rows)) <= 1500
    assert vectorizer.max_features
    assert found[TFIDF]["accuracy"] > 0.9
    assert not capsys.readouterr().err


def test_slow_simple_methods_are_told_and_broken_ones_end_no_run(monkeypatch, capsys):
    data, metrics = reviews(CLASSIFICATION), Metrics(("accuracy",), "accuracy")
    monkeypatch.setattr(baselines, "PATIENCE_SECONDS", 0.0)

    def broken(*_):
        time.sleep(0.5)
        raise MemoryError("no memory for \x1b[2J")

    monkeypatch.setattr(baselines, "words_regression", broken)
    found, text = compare_with_baselines(data, "test", {"accuracy": 0.5}, metrics)
    assert found == {}
    assert "memory" in text
    assert "\x1b" not in text
    assert "simple methods" in capsys.readouterr().err


def test_more_classes_than_it_has_time_for_have_the_most_frequent_answer_only():
    names = [f"class {number}" for number in range(21)]
    splits = ("train", "validation", "test")
    data = data_of({split: list(range(21)) for split in splits}, {split: list(names) for split in splits}, names=names)
    assert list(find_baselines(data, "test", Metrics(("accuracy",), "accuracy"))) == [MAJORITY]


def test_damaged_or_unwritable_cache_costs_the_time_only(cache, monkeypatch):
    data, metrics = reviews(CLASSIFICATION), Metrics(("accuracy",), "accuracy")
    first = find_baselines(data, "test", metrics)
    (path,) = (cache / "baselines").iterdir()
    path.write_text("[1")
    assert find_baselines(data, "test", metrics) == first
    monkeypatch.setattr(baselines, "datasets_cache", lambda: path)  # a file is no folder
    assert find_baselines(data, "test", metrics) == first


@pytest.mark.parametrize(
    ("metric", "model", "simple", "warned"),
    [("accuracy", 0.5, 0.6, True), ("accuracy", 0.7, 0.6, False), ("mse", 0.5, 0.6, False), ("mse", 0.7, 0.6, True)],
)
def test_model_that_a_simple_method_beats_is_told(metric, model, simple, warned):
    text = format_baselines({TFIDF: {metric: simple}}, {metric: model}, Metrics((metric,), metric))
    assert ("warning" in text) == warned
    assert f"{model:.4f}" in text
    assert f"{simple:.4f}" in text
