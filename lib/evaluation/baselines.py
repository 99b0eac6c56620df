"""What simple methods score on the same split: the most frequent answer, and logistic regression on words and on vectors.

The vectors are those of the packaged MiniLM as it is, whatever model the run trains: they tell how far its texts are
solved without any training of a transformer, and they are the same for all runs on a data set.

A model that does not beat them is not worth its time. They take seconds, of large data half a minute, once for each data
set: how much they learn from is bounded.
"""

import contextlib
import hashlib
import json
import sys
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from transformers import AutoModel

from lib.config.sections import CLASSIFICATION, EVAL_SAMPLES, MULTI_LABEL, REGRESSION, ModelSource
from lib.data.batching import permutation
from lib.data.encoding import Encoder
from lib.data.load import Data
from lib.errors import first_line, printable
from lib.evaluation.batch_size import BatchSize
from lib.evaluation.linear import choose_best, fit_linear, predictions_of
from lib.evaluation.predictions import Predictions
from lib.evaluation.report import row_texts
from lib.evaluation.scores import LOWER_IS_BETTER, Metrics, compute_metrics
from lib.evaluation.tables import format_table
from lib.hub.endpoint import datasets_cache
from lib.model.load import load_tokenizer, load_trained
from lib.runtime.atomic import finite, write_atomically
from lib.runtime.cpu.tuning import use_all_cores
from lib.runtime.precision import DTYPES, resolve_precision

MAJORITY, TFIDF, FROZEN = "most frequent answer", "TF-IDF + logistic regression", "frozen MiniLM + logistic regression"
TFIDF_RIDGE, FROZEN_RIDGE = "TF-IDF + ridge regression", "frozen MiniLM + ridge regression"
"""What these are called where numbers are predicted."""

MOST_ROWS = 20_000
"""Training rows that TF-IDF learns from; of more, as many are drawn."""

MOST_CHARACTERS = 10_000_000
"""Of these rows together; of longer texts, fewer rows are drawn."""

MOST_OF_A_TEXT = 2_000
"""Characters that are read of each text: about as much as a model reads."""

MOST_FEATURES = 100_000
"""Words and pairs of words, the most frequent ones."""

MOST_OUTPUTS = 20
"""For more classes or labels there is no logistic regression: it would take minutes."""

FEWEST_ROWS = 100
"""For fewer training rows MiniLM is not loaded, which takes a second: what its 384 numbers would tell is chance."""

TOKENS_OF_A_TEXT = 64
"""Tokens that MiniLM reads of each text, or of each of a pair."""

MOST_TOKENS = 100_000
"""Of the training texts that MiniLM reads, about; of more, fewer rows are drawn."""

MOST_SCORED_TOKENS = {"cpu": 75_000, "cuda": 5_000_000}
"""Of a split that is scored, by device: where it has more, there are no frozen vectors, which would take minutes."""

BLOCK = 10_000
"""Rows whose features are in memory at once."""

PATIENCE_SECONDS = 5.0
"""After so long it is said what takes the time."""

WORDS_C = (1.0, 4.0, 16.0)
"""scikit-learn's C on TF-IDF, the inverse strength of regularization, of which validation chooses one."""

VERSION = 4
CPU = torch.device("cpu")


def compare_with_baselines(
    data: Data, split: str, scores: dict[str, float], metrics: Metrics, device: torch.device = CPU
) -> tuple[dict[str, dict[str, float]], str]:
    """What simple methods score on a split, by method and metric, and that beside the model's `scores` as text.

    Whatever goes wrong is said and ends no run, which is trained by then.
    """
    said = "scoring simple methods on the same split, to compare the model with them"
    timer = threading.Timer(PATIENCE_SECONDS, print, (said,), {"file": sys.stderr, "flush": True})
    timer.daemon = True
    timer.start()
    try:
        found = find_baselines(data, split, metrics, device)
    except Exception as error:
        return {}, f"simple methods were not scored: {printable(first_line(error))}"
    finally:
        timer.cancel()
    return found, format_baselines(found, scores, metrics)


def find_baselines(data: Data, split: str, metrics: Metrics, device: torch.device = CPU) -> dict[str, dict[str, float]]:
    """The scores of simple methods on a split, by method and metric; computed once for a data set, then read from disk.

    They learn from the train split, and what they choose they choose on validation. Only the frozen vectors are computed on
    `device`.
    """
    numbers, few = data.problem_type == REGRESSION, len(data.label_names) <= MOST_OUTPUTS
    with_vectors = few and len(data.texts["train"]) >= FEWEST_ROWS and few_tokens(data, split, device)
    made_by = [device.type, resolve_precision("auto")] if with_vectors else None
    asked = [data.fingerprint(), split, metrics.names, metrics.best, made_by, VERSION]
    key = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:24]
    path = datasets_cache() / "baselines" / f"{key}.json"
    with contextlib.suppress(OSError, ValueError, AttributeError):
        found = json.loads(path.read_text(encoding="utf-8"))
        return {name: {metric: float(value) for metric, value in scores.items()} for name, scores in found.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of scikit-learn: a label that all rows have, a fit that could go on
        scores = {MAJORITY: score(most_frequent(data, split), metrics)}
        if few:
            scores[TFIDF_RIDGE if numbers else TFIDF] = score(words_regression(data, split, metrics), metrics)
        if with_vectors:
            try:
                found = score(vectors_regression(data, split, metrics, device), metrics)
            except Exception as error:  # the model is not installed, or memory is short: the others are shown
                print(f"{FROZEN} was not scored: {printable(first_line(error))}", file=sys.stderr, flush=True)
                return scores
            scores[FROZEN_RIDGE if numbers else FROZEN] = found
    with contextlib.suppress(OSError):  # a cache that cannot be written costs the next run some seconds
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(finite(scores)))
    return scores


def score(predictions: Predictions, metrics: Metrics) -> dict[str, float]:
    found = compute_metrics(predictions, metrics.names)
    del found["loss"]  # of a method that does not minimize it
    return found


def most_frequent(data: Data, split: str) -> Predictions:
    """The most frequent class, the labels that most rows have, or the mean of the numbers, for every row."""
    train, gold = data.labels("train"), data.labels(split)
    if data.problem_type == REGRESSION:
        answer = train.mean(keepdims=True)
    elif data.problem_type == MULTI_LABEL:
        answer = log_odds(train.mean(axis=0))
    else:
        answer = np.bincount(train, minlength=len(data.label_names)).astype(np.float64)
    rows = np.tile(answer.astype(np.float32), (len(gold), 1))
    return predictions_of(rows, gold, data.problem_type)


def words_regression(data: Data, split: str, metrics: Metrics) -> Predictions:
    """Logistic regression, or ridge regression of numbers, on TF-IDF of words and pairs of words."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.multiclass import OneVsRestClassifier

    rows = permutation(len(data.texts["train"]), 0)[:MOST_ROWS]
    texts = plain_texts(data, "train", rows)
    texts = texts[: max(1, int(np.searchsorted(np.cumsum([len(text) for text in texts]), MOST_CHARACTERS, "right")))]
    labels = data.labels("train")[rows[: len(texts)]]
    between = sum(" " in text.strip() for text in texts) * 2 > len(texts)
    units: dict[str, Any] = {"ngram_range": (1, 2)} if between else {"analyzer": "char", "ngram_range": (1, 3)}
    vectorizer = TfidfVectorizer(
        min_df=1 if len(texts) < 1000 else 2, sublinear_tf=True, max_features=MOST_FEATURES, **units
    )
    try:
        vectors = vectorizer.fit_transform(texts)
    except ValueError:  # no word in any text
        return most_frequent(data, split)
    seen = np.unique(labels) if data.problem_type == CLASSIFICATION else None
    if seen is not None and len(seen) == 1:
        return most_frequent(data, split)

    def outputs(model: Any, given: Any) -> np.ndarray:
        if data.problem_type == REGRESSION:
            found = model.predict(given)[:, None]
        elif data.problem_type == MULTI_LABEL:
            found = log_odds(model.predict_proba(given))
        else:
            found = np.full((given.shape[0], len(data.label_names)), -1e4)
            found[:, seen] = np.log(np.clip(model.predict_proba(given), 1e-12, None))
        return found.astype(np.float32)

    def predictions(models: list[Any], part: str) -> list[Predictions]:
        """Those of each model; the features of a block of rows are made once for all."""
        blocks = [
            [outputs(model, given) for model in models] for given in map(vectorizer.transform, text_blocks(data, part))
        ]
        gold = data.labels(part)
        return [predictions_of(np.concatenate(found), gold, data.problem_type) for found in zip(*blocks, strict=True)]

    models = []
    for inverse in WORDS_C:
        # One class against the rest, by liblinear: a fifth of the time of all at once, and as good.
        model: Any = OneVsRestClassifier(LogisticRegression(C=inverse, solver="liblinear", random_state=0))
        if data.problem_type == REGRESSION:
            model = Ridge(alpha=1 / inverse)
        models.append(model.fit(vectors, labels.astype(np.float64 if data.problem_type == REGRESSION else np.int64)))
    number, _ = choose_best(predictions(models, "validation"), metrics.best)
    (chosen,) = predictions([models[number]], split)
    return chosen


def few_tokens(data: Data, split: str, device: torch.device) -> bool:
    """Whether MiniLM reads the splits that are scored in seconds; by the tokens of the run's own tokenizer, about as many."""
    limit = MOST_SCORED_TOKENS["cpu" if device.type == "cpu" else "cuda"]
    lengths = (data.lengths[name] for name in {split, "validation"})
    most = TOKENS_OF_A_TEXT * len(data.text_columns)
    return max(int(np.minimum(found, most).sum()) for found in lengths) <= limit


def vectors_regression(data: Data, split: str, metrics: Metrics, device: torch.device) -> Predictions:
    """Logistic regression, or ridge regression of numbers, on the mean of MiniLM's token vectors.

    Of a pair these are both vectors, their difference and their product, as in InferSent (Conneau et al. 2017).
    """
    rows = permutation(len(data.texts["train"]), 0)[:MOST_ROWS]
    lengths = np.minimum(data.lengths["train"][rows], TOKENS_OF_A_TEXT * len(data.text_columns))
    rows = rows[: max(1, int(np.searchsorted(np.cumsum(lengths), MOST_TOKENS, "right")))]
    parts = {"train": rows} | {name: np.arange(len(data.texts[name])) for name in {split, "validation"}}
    vectors = mean_vectors({name: data.texts[name].select(chosen) for name, chosen in parts.items()}, device)
    problem, labels = data.problem_type, data.labels("train")[rows]
    models = list(fit_linear(vectors["train"], labels, problem, len(data.label_names)))
    gold = data.labels("validation")
    found = [predictions_of(model(vectors["validation"]), gold, problem) for model in models]
    number, _ = choose_best(found, metrics.best)
    return predictions_of(models[number](vectors[split]), data.labels(split), problem)


@torch.inference_mode()
def mean_vectors(tables: dict[str, Any], device: torch.device) -> dict[str, np.ndarray]:
    """float32 (rows, size): the mean of the token vectors of each row's text, for each table of texts."""
    threads = torch.get_num_threads()
    use_all_cores()  # a run with a small head has one
    try:
        with torch.random.fork_rng(devices=[]):
            model = load_trained(ModelSource(), AutoModel, "model").to(device).eval()
        encoder = Encoder(load_tokenizer(ModelSource()), TOKENS_OF_A_TEXT)
        return {name: table_vectors(table, model, encoder, device) for name, table in tables.items()}
    finally:
        torch.set_num_threads(threads)


def table_vectors(table: Any, model: Any, encoder: Encoder, device: torch.device) -> np.ndarray:
    """float32 (rows, size): the mean of the token vectors of each text; of a pair, what `vectors_regression` says."""
    dtype, columns = DTYPES.get(resolve_precision("auto")), []
    for column in zip(*(text if isinstance(text, list) else [text] for text in row_texts(table)), strict=True):
        ids = encoder([[text[:MOST_OF_A_TEXT] for text in column]])["input_ids"]
        vectors = np.zeros((len(ids), model.config.hidden_size), dtype=np.float32)
        for rows in BatchSize(EVAL_SAMPLES).batches(np.array([len(tokens) for tokens in ids])):
            tokens = [torch.tensor(ids[row]) for row in rows]
            padded = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True).to(device)
            mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(t) for t in tokens], batch_first=True).to(device)
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                states = model(input_ids=padded, attention_mask=mask).last_hidden_state.float()
            vectors[rows] = ((states * mask[:, :, None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)).cpu().numpy()
        columns.append(vectors)
    first, *second = columns
    return np.hstack([first, *(np.hstack([other, abs(first - other), first * other]) for other in second)])


def text_blocks(data: Data, split: str) -> Iterator[list[str]]:
    """The texts of a split, a block of rows at a time."""
    size = len(data.texts[split])
    for start in range(0, size, BLOCK):
        yield plain_texts(data, split, np.arange(start, min(start + BLOCK, size)))


def plain_texts(data: Data, split: str, rows: np.ndarray) -> list[str]:
    """The beginning of the text of each row; of a pair, both in one."""
    found = row_texts(data.texts[split].select(rows))
    pairs = [text if isinstance(text, list) else [text] for text in found]
    return [" ".join(part[:MOST_OF_A_TEXT] for part in text) for text in pairs]


def log_odds(probabilities: np.ndarray) -> np.ndarray:
    clipped = np.clip(np.asarray(probabilities, dtype=np.float64), 1e-6, 1 - 1e-6)
    return np.log(clipped / (1 - clipped))


def format_baselines(baselines: dict[str, dict[str, float]], scores: dict[str, float], metrics: Metrics) -> str:
    """A table of the model beside the baselines, and a warning if one of them is better."""
    names = [name for name in metrics.names if name in scores]
    rows = [["simple methods on the same split", *names]]
    for method, found in [("this model", scores), *baselines.items()]:
        rows.append([method, *(f"{found[name]:.4f}" if name in found else "" for name in names)])
    chosen = names[0] if metrics.best == "loss" or metrics.best not in names else metrics.best
    sign = -1 if chosen in LOWER_IS_BETTER else 1
    better = [method for method, found in baselines.items() if sign * found.get(chosen, np.nan) > sign * scores[chosen]]
    notes = [
        f"warning: {method} has a better {chosen} than this model. Train longer, with another learning rate, or more layers; "
        "or use the simple method."
        for method in better
    ]
    return "\n".join([format_table(rows), *notes])
