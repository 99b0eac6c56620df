"""Temperature and thresholds from training to eval.py and predict.py: the same probabilities and answers in all of them."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.special import expit, softmax

from lib.config.sections import CLASSIFICATION, MULTI_LABEL, ModelConfig
from lib.evaluation.calibration import KEY, fit_temperature
from lib.evaluation.predictions import Predictions
from lib.evaluation.thresholds import tune_thresholds
from lib.model.load import build_model, load_tokenizer
from tests.conftest import call_script, read_lines, sentences, tiny_roberta, write_csv
from tests.predicting import answers

NAMES = ["bad", "good", "mixed"]
KINDS: dict[str, list[Any]] = {
    "two": ["--label_column", "rest", "--threshold", "tuned"],
    "three": ["--label_column", "label"],
    "several": ["--label_columns", *NAMES],
}


def write_rows(path: Path, count: int, seed: int) -> Path:
    """Three classes, two of them as one, and three labels; one row in five has the answers of another."""
    given = sentences(count, seed)
    rows = []
    for index, (text, label) in enumerate(given):
        said = given[index - 1][1] if index % 5 == 0 else label
        hot = [int(name == said or index % 7 == place) for place, name in enumerate(NAMES)]
        rows.append((text, said, "good" if said == "good" else "other", *hot))
    return write_csv(path, rows, ("text", "label", "rest", *NAMES))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("probabilities")
    for role, count, seed in (("train", 96, 0), ("validation", 60, 1), ("test", 30, 2)):
        write_rows(found / f"{role}.csv", count, seed)
    tiny_roberta(found / "base", dropout=0.0, initializer_range=0.3)
    return found


def train(folder: Path, name: str, *more: Any, code: int = 0) -> Any:
    flags = [item for role in ("train", "validation", "test") for item in (f"--{role}_file", folder / f"{role}.csv")]
    flags += ["--text_columns", "text", "--model", folder / "base", "--lr", "1e-2", "--bs", 8, "--epochs", 2]
    flags += ["--report_to", "none", "--mixed_precision", "no", "--output_dir", folder / name]
    return call_script("train.py", *flags, *more, cwd=folder, code=code)


@pytest.fixture(scope="module", params=KINDS)
def run(request: pytest.FixtureRequest, folder: Path) -> Path:
    train(folder, request.param, *KINDS[request.param])
    return folder / request.param


def config_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "model" / "config.json").read_text())


def table(rows: list[dict[str, Any]], key: str) -> np.ndarray:
    return np.array([list(row[key].values()) for row in rows])


def texts(folder: Path, split: str) -> tuple[list[str], list[dict[str, str]]]:
    with (folder / f"{split}.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [row["text"] for row in rows], rows


def test_probabilities_are_those_at_the_stored_temperature_in_every_script(run: Path) -> None:
    temperature = config_of(run)[KEY]
    assert abs(temperature - 1) > 0.01
    rows = read_lines(run / "eval-test" / "predictions.jsonl")
    given = [row["text"] for row in rows]
    found, bare = answers(*given, "--model", run), answers(*given, "--model", run, "--function_to_apply", "none")
    logits = table(bare, "logits") / temperature
    wanted = expit(logits) if run.name == "several" else softmax(logits, axis=1)
    for scored in (rows, found):
        assert table(scored, "probabilities") == pytest.approx(wanted, abs=1e-5)
    for row, one, other in zip(rows, found, bare, strict=True):
        answer = one.get("label", one.get("labels"))
        assert answer == other.get("label", other.get("labels"))
        assert (sorted(answer) if isinstance(answer, list) else answer) == row["predicted"]


def test_temperature_and_thresholds_are_those_of_the_best_model_on_validation(run: Path, folder: Path) -> None:
    config = config_of(run)
    names = list(config["id2label"].values())
    given, rows = texts(folder, "validation")
    logits = table(answers(*given, "--model", run, "--function_to_apply", "none"), "logits").astype(np.float32)
    column = {"two": "rest", "three": "label"}.get(run.name)
    gold = np.array([names.index(row[column]) if column else [int(row[name]) for name in names] for row in rows])
    problem = CLASSIFICATION if column else MULTI_LABEL
    made = Predictions(logits, gold, np.zeros(len(gold)), problem_type=problem)
    assert config[KEY] == pytest.approx(fit_temperature(made), rel=1e-3)
    record, results = (json.loads((run / name).read_text()) for name in ("record.json", "results.json"))
    assert config[KEY] == record["temperature"] == results["run/temperature"]
    assert f"{config[KEY]:.4f}" in (run / "model" / "README.md").read_text()
    assert ("thresholds" in config) == (run.name != "three")
    if run.name != "three":
        at_best = Predictions(logits, gold, np.zeros(len(gold)), problem_type=problem, temperature=config[KEY])
        assert config["thresholds"] == pytest.approx(tune_thresholds(at_best), abs=1e-4)


def test_no_label_is_given_exactly_below_the_probability(run: Path, folder: Path) -> None:
    given, _ = texts(folder, "test")
    if run.name == "several":
        flags = [given[0], "--model", run, "--abstain_below", 0.5]
        done = call_script("predict.py", *flags, cwd=folder, code=2)
        assert done.returncode == 2
        return
    every = answers(*given, "--model", run)
    chances = sorted(row["probabilities"][row["label"]] for row in every)
    least = (chances[14] + chances[15]) / 2
    flags = ["--model", run, "--abstain_below", least]
    kept = answers(*given, *flags)
    for before, row in zip(every, kept, strict=True):
        assert row["probabilities"] == before["probabilities"]
        sure = row["probabilities"][before["label"]] >= least
        assert row["label"] == (before["label"] if sure else None)
    assert sum(row["label"] is None for row in kept) == 15
    flags += ["--input", folder / "test.csv", "--text_columns", "text", "--mixed_precision", "no"]
    for name in ("rows.csv", "rows.jsonl"):
        call_script("predict.py", *flags, "--output", name, cwd=folder)
    with (folder / "rows.csv").open(newline="") as file:
        assert [row["label"] for row in csv.DictReader(file)] == [row["label"] or "" for row in kept]
    assert [row["label"] for row in read_lines(folder / "rows.jsonl")] == [row["label"] for row in kept]


def test_threshold_of_the_user_decides_in_eval_and_predict(run: Path, folder: Path) -> None:
    config = config_of(run)
    names, given = list(config["id2label"].values()), texts(folder, "test")[0]
    second = sorted(row["probabilities"][names[1]] for row in answers(*given, "--model", run))
    least = (second[0] + second[1]) / 2
    flags = {"two": ["--threshold", f"{names[1]}={least}"], "several": ["--threshold", "0.4", "mixed=0.25"]}
    scoring = ["--run", run, "--bootstrap_samples", 2, "--mixed_precision", "no"]
    if run.name == "three":
        for script, rest in (("eval.py", scoring), ("predict.py", [given[0], "--model", run])):
            call_script(script, *rest, "--threshold", "0.3", cwd=folder, code=2)
        return
    before = {path: path.read_bytes() for path in run.glob("eval-test/*")}
    said = call_script("eval.py", *scoring, *flags[run.name], cwd=folder).stdout
    assert "--threshold" in said
    assert before == {path: path.read_bytes() for path in run.glob("eval-test/*")}
    (own,) = run.glob("eval-test-threshold*")
    rows = read_lines(own / "predictions.jsonl")
    found = answers(*given, "--model", run, *flags[run.name])
    limits = [1 - least, least] if run.name == "two" else [0.4, 0.4, 0.25]
    changed = 0
    for row, one in zip(rows, found, strict=True):
        chosen = [name for name, limit in zip(names, limits, strict=True) if one["probabilities"][name] >= limit]
        if run.name == "two":
            assert one["label"] == row["predicted"] == chosen[-1]
            changed += chosen[-1] != max(one["probabilities"], key=lambda name: one["probabilities"][name])
        else:
            assert sorted(one["labels"]) == row["predicted"] == chosen
            changed += chosen != [name for name in names if one["probabilities"][name] >= 0.5]
    assert changed
    for script, rest in (("eval.py", scoring), ("predict.py", [given[0], "--model", run])):
        call_script(script, *rest, "--threshold", "nosuch=0.3", cwd=folder, code=2)
    assert config_of(run) == config


def test_other_function_is_that_of_the_bare_logits(folder: Path) -> None:
    if not (folder / "three").exists():
        train(folder, "three", *KINDS["three"])
    given = texts(folder, "test")[0]
    bare = table(answers(*given, "--model", folder / "three", "--function_to_apply", "none"), "logits")
    other = table(answers(*given, "--model", folder / "three", "--function_to_apply", "sigmoid"), "probabilities")
    assert other == pytest.approx(expit(bare), abs=1e-5)
    usual, named = (
        table(answers(*given, "--model", folder / "three", *flags), "probabilities")
        for flags in ([], ["--function_to_apply", "softmax"])
    )
    assert np.array_equal(usual, named)
    # A model that is trained again begins without what was fitted to its former labels.
    source = ModelConfig(str(folder / "three" / "model"))
    assert not hasattr(build_model(source, NAMES, load_tokenizer(source))[0].config, KEY)


@pytest.mark.parametrize("name", ["three", "several"])
def test_tuned_threshold_is_refused_where_there_are_no_two_classes(name: str, folder: Path) -> None:
    train(folder, f"{name}-tuned", *KINDS[name], "--threshold", "tuned", code=2)
    assert not (folder / f"{name}-tuned").exists()
