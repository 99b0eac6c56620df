"""Regression and multi-label data in train.py, eval.py, predict.py, export, on two processes and after resuming."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from datasets import Dataset
from scipy import stats
from scipy.special import expit, logit
from sklearn.metrics import average_precision_score, f1_score, log_loss

from lib.config.sections import CLASSIFICATION, MULTI_LABEL, REGRESSION, ModelConfig
from lib.data.load import Data
from lib.data.loader import Batches, build_collator
from lib.evaluation.batch_size import BatchSize
from lib.evaluation.scoring import evaluate
from lib.model.load import build_model, load_tokenizer
from lib.model.losses import PLAIN
from tests.conftest import ROOT, WORKER_ENV, Command, call_script, read_lines, results_of, sentences
from tests.hub_layouts import environment
from tests.loopback_hub import loopback_hub
from tests.predicting import answers, load
from tests.resuming import differences

LABELS = ["bad", "good", "plot"]
TARGETS: dict[str, list[Any]] = {
    "regression": ["--label_column", "score"],
    "multi-label": ["--label_columns", *LABELS],
}
PICTURES = {"regression": "scatter.png", "multi-label": "precision_recall.png"}
KEYS = {"regression": ["pearson", "spearman", "mse"], "multi-label": ["average_precision", "f1_micro", "f1_macro"]}


def write_rows(path: Path, count: int, seed: int = 0) -> Path:
    """Reviews as csv, with a score and three labels that follow from their words."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "score", *LABELS])
        for text, _ in sentences(count, seed):
            words = set(text.split())
            labels = [
                bool(words & {"dull", "bad", "awful"}),
                bool(words & {"good", "great", "fine"}),
                bool(words & {"plot"}),
            ]
            score = 2.5 + 1.25 * labels[1] - 1.25 * labels[0] + 0.25 * ("very" in words)
            writer.writerow([text, score, *map(int, labels)])
    return path


def flags_of(folder: Path, model: Path, name: str, *more: Any) -> list[Any]:
    files = {
        role: write_rows(folder / f"{role}.csv", n, n) for role, n in (("train", 96), ("validation", 37), ("test", 31))
    }
    flags = [item for role, path in files.items() for item in (f"--{role}_file", path)]
    flags += ["--text_columns", "text", *TARGETS[name], "--model", model, "--output_dir", folder / "run"]
    return [*flags, "--lr", "1e-2", "--bs", 8, "--epochs", 2, "--mixed_precision", "no", *more]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, roberta_without_dropout: Path) -> dict[str, tuple]:
    """A finished run of each problem, with W&B offline: name of the problem, folder, what the run printed."""
    found = {}
    for name in TARGETS:
        folder = tmp_path_factory.mktemp(name)
        done = call_script("train.py", *flags_of(folder, roberta_without_dropout, name), cwd=folder)
        found[name] = (name, folder / "run", done)
    return found


@pytest.fixture(params=TARGETS)
def finished(request: pytest.FixtureRequest, runs: dict[str, tuple]) -> tuple:
    return runs[request.param]


# ---------------------------------------------------------------------------------------------------- one run


def test_scores_equal_those_of_the_reference_libraries(finished: tuple) -> None:
    name, folder, done = finished
    results = results_of(done)
    assert results == json.loads((folder / "results.json").read_text())
    assert {f"{split}/{key}" for split in ("eval", "test") for key in ("loss", *KEYS[name])} <= set(results)
    rows = read_lines(folder / "eval-test" / "predictions.jsonl")
    assert len(rows) == 31
    if name == "regression":
        gold, predicted = (np.array([row[key] for row in rows]) for key in ("gold", "predicted"))
        expected = {
            "pearson": stats.pearsonr(gold, predicted).statistic,
            "mse": np.mean((gold - predicted) ** 2),
            "loss": np.mean((gold - predicted) ** 2),
        }
    else:
        hot = {
            key: np.array([[label in row[key] for label in LABELS] for row in rows]) for key in ("gold", "predicted")
        }
        probabilities = np.array([[row["probabilities"][label] for label in LABELS] for row in rows])
        of_gold = np.where(hot["gold"], probabilities, 1 - probabilities)
        expected = {
            "average_precision": average_precision_score(hot["gold"], probabilities, average="macro"),
            "f1_micro": f1_score(hot["gold"], hot["predicted"], average="micro"),
            "f1_macro": f1_score(hot["gold"], hot["predicted"], average="macro"),
        }
        report = json.loads((folder / "eval-test" / "report.json").read_text())
        assert report["scores"]["loss_at_temperature"] == pytest.approx(-np.log(of_gold).mean(), abs=1e-4)
        logits = logit(probabilities) * report["temperature"]
        expected["loss"] = log_loss(hot["gold"].ravel(), expit(logits).ravel())
    for key, value in expected.items():
        assert results[f"test/{key}"] == pytest.approx(value, abs=1e-4), key


def test_report_has_intervals_tables_and_plot(finished: tuple) -> None:
    name, folder, done = finished
    record = json.loads((folder / "eval-test" / "report.json").read_text())
    assert set(record["intervals_95"]) == {"loss", *KEYS[name]}
    for key, (low, high) in record["intervals_95"].items():
        assert low <= record["scores"][key] <= high, key
    assert (folder / "eval-test" / PICTURES[name]).read_bytes().startswith(b"\x89PNG")
    if name == "regression":
        assert sum(row["samples"] for row in record["ranges"]) == 31
    else:
        assert [row["label"] for row in record["labels"]] == LABELS
        assert "best F1 on validation" in done.stdout
        assert "(multi-label)" in done.stdout


def test_exported_model_and_its_card_name_the_problem_type(finished: tuple) -> None:
    name, folder, done = finished
    config = json.loads((folder / "model" / "config.json").read_text())
    card = (folder / "model" / "README.md").read_text()
    if name == "regression":
        assert (config["problem_type"], list(config["id2label"].values())) == (REGRESSION, ["score"])
        assert "thresholds" not in config
        assert "mean squared error" in card
        assert "cross_entropy" not in card
    else:
        assert (config["problem_type"], list(config["id2label"].values())) == (MULTI_LABEL, LABELS)
        shown = json.loads((folder / "eval-test" / "report.json").read_text())["labels"]
        assert config["thresholds"] == [row["threshold"] for row in shown]
        assert all(f"{threshold:.4f}" in card for threshold in config["thresholds"])
    assert "could not" not in done.stderr  # W&B took scores, plot and errors
    assert list(folder.glob("wandb/offline-run-*"))


def test_eval_on_two_processes_gives_the_numbers_of_training(
    runs: dict[str, tuple], run: Command, tmp_path: Path
) -> None:
    flags = ["--per_device_eval_batch_size", "5"]
    plan = [
        ["eval.py", "--run", str(folder), "--output_dir", str(folder / "again"), *flags]
        for _, folder, _ in runs.values()
    ]
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    run("tests/workers/several.py", tmp_path / "plan.json", processes=2, env=WORKER_ENV)
    for name, folder, done in runs.values():
        scored, results = json.loads((folder / "again" / "results.json").read_text()), results_of(done)
        assert scored["run/num_processes"] == 2
        for key in ("loss", *KEYS[name]):
            assert scored[f"test/{key}"] == pytest.approx(results[f"test/{key}"], abs=1e-6)
        assert (folder / "again" / PICTURES[name]).is_file()
        reports = [json.loads((folder / part / "report.json").read_text()) for part in ("again", "eval-test")]
        assert reports[0].get("temperature") == reports[1].get("temperature")
        assert ("temperature" in reports[0]) == (name == "multi-label")
        rows = [read_lines(folder / part / "predictions.jsonl") for part in ("again", "eval-test")]
        for one, other in zip(*rows, strict=True):
            assert one.get("probabilities") == pytest.approx(other.get("probabilities"), abs=2e-6)


def test_predict_gives_the_answers_of_eval(finished: tuple) -> None:
    name, folder, _ = finished
    rows = read_lines(folder / "eval-test" / "predictions.jsonl")
    found = answers(*(row["text"] for row in rows), "--model", folder)
    for answer, row in zip(found, rows, strict=True):
        if name == "regression":
            assert set(answer) == {"id", "text", "score"}
            assert answer["score"] == pytest.approx(row["predicted"], abs=1e-5)
        else:
            assert sorted(answer["labels"]) == row["predicted"]
            assert answer["probabilities"] == pytest.approx(row["probabilities"], abs=1e-5)
    if name != "regression":
        logits = answers(*(row["text"] for row in rows), "--model", folder, "--function_to_apply", "none")
        assert [row["labels"] for row in logits] == [row["labels"] for row in found]
        assert len({tuple(row["labels"]) for row in found}) > 1


def test_onnx_export_gives_the_same_numbers(finished: tuple, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="the onnx extra is not installed")
    from lib.inference.onnx_export import export_onnx

    name, folder, _ = finished
    task = load("--model", folder, "--export_onnx", tmp_path / "onnx")
    assert export_onnx(task.model, task.tokenizer, tmp_path / "onnx") < 1e-5
    exported = json.loads((tmp_path / "onnx" / "config.json").read_text())
    assert ("thresholds" in exported) == (name == "multi-label")


# ---------------------------------------------------------------------------------------------------- laws


@pytest.mark.parametrize("problem", [CLASSIFICATION, REGRESSION, MULTI_LABEL])
def test_mean_loss_equals_that_of_transformers(roberta_without_dropout: Path, problem: str) -> None:
    source = ModelConfig(model=str(roberta_without_dropout))
    tokenizer = load_tokenizer(source)
    names = ["stars"] if problem == REGRESSION else ["a", "b", "c"]
    model = build_model(source, names, tokenizer, problem)[0]
    batch = tokenizer([text for text, _ in sentences(7)], padding=True, return_tensors="pt")
    rng = np.random.default_rng(0)
    labels = {
        CLASSIFICATION: torch.tensor(rng.integers(3, size=7)),
        REGRESSION: torch.tensor(rng.normal(size=7), dtype=torch.float32),
        MULTI_LABEL: torch.tensor(rng.integers(2, size=(7, 3)), dtype=torch.float32),
    }[problem]
    output = model(**batch, labels=labels)
    ours = PLAIN[problem](output.logits, labels)
    assert ours.shape == (7,)
    assert ours.mean().item() == pytest.approx(output.loss.item(), rel=1e-6)


def test_test_labels_change_no_threshold_score_or_prediction(call: Command, roberta: Path, tmp_path: Path) -> None:
    found = []
    for name in ("given", "inverted"):
        folder = tmp_path / name
        folder.mkdir()
        flags = flags_of(folder, roberta, "multi-label", "--epochs", 1, "--report_to", "none")
        if name == "inverted":
            text = (folder / "test.csv").read_text()
            rows = [line.rsplit(",", 3) for line in text.splitlines()]
            rows = [rows[0], *([row[0], *("10"[int(cell)] for cell in row[1:])] for row in rows[1:])]
            (folder / "test.csv").write_text("\n".join(map(",".join, rows)) + "\n")
        call("train.py", *flags)
        config = json.loads((folder / "run" / "model" / "config.json").read_text())
        rows = read_lines(folder / "run" / "eval-test" / "predictions.jsonl")
        results = json.loads((folder / "run" / "results.json").read_text())
        scores = {key: value for key, value in results.items() if key.startswith("eval/")}
        found.append((config["thresholds"], scores, [row["predicted"] for row in rows], [row["gold"] for row in rows]))
    assert found[0][:3] == found[1][:3]
    assert found[0][3] != found[1][3]


def test_only_the_tuned_split_changes_the_thresholds(roberta: Path) -> None:
    source = ModelConfig(model=str(roberta))
    tokenizer = load_tokenizer(source)
    model = build_model(source, LABELS, tokenizer, MULTI_LABEL)[0]
    ids = tokenizer([text for text, _ in sentences(20)])["input_ids"]
    labels = np.random.default_rng(0).integers(2, size=(20, 3)).astype(float).tolist()
    tokens = Dataset.from_dict({"input_ids": ids, "labels": labels})
    lengths = np.array(list(map(len, ids)))
    other = tokens.remove_columns("labels").add_column("labels", [[1 - cell for cell in row] for row in labels])
    splits, sizes = {"validation": tokens, "test": other}, {"validation": lengths, "test": lengths}
    data = Data("", {}, splits, sizes, LABELS, (), (), MULTI_LABEL)
    collator = build_collator(tokenizer, "no", torch.device("cpu"))

    def score(split: str, tune: bool = False) -> Any:
        batches = Batches(data, collator)
        return evaluate(
            Accelerator(cpu=True), model, batches.split(split), [], BatchSize(8), tune
        ).predictions.thresholds

    assert score("test") is None
    tuned = score("validation", tune=True)
    assert model.config.thresholds == tuned.tolist()
    assert score("test").tolist() == score("validation").tolist() == tuned.tolist()
    assert score("test", tune=True).tolist() != tuned.tolist()


@pytest.mark.slow
def test_resumed_run_on_two_processes_equals_an_uninterrupted_one(run: Command, roberta: Path, tmp_path: Path) -> None:
    calls: list[dict[str, Any]] = []
    for name in TARGETS:
        folder = tmp_path / name
        folder.mkdir()
        flags = list(
            map(str, flags_of(folder, roberta, name, "--eval_steps", 5, "--max_steps", 9, "--report_to", "none"))
        )
        calls += [{"folder": str(folder / "whole"), "flags": flags}]
        calls += [{"folder": str(folder / "parts"), "flags": flags, **stop} for stop in ({"stop": 6}, {})]
    (tmp_path / "plan.json").write_text(json.dumps(calls))
    run("tests/workers/interrupted.py", tmp_path / "plan.json", processes=2, env=WORKER_ENV, timeout=200)
    for name in TARGETS:
        folder = tmp_path / name
        assert json.loads((folder / "whole" / "results.json").read_text())["run/num_processes"] == 2
        assert differences(folder / "whole", folder / "parts") == []
        configs = [json.loads((folder / part / "model" / "config.json").read_text()) for part in ("whole", "parts")]
        assert configs[0] == configs[1]
        assert ("calibration_temperature" in configs[0]) == (name == "multi-label")


# ---------------------------------------------------------------------------------------------------- GLUE


def write_glue(folder: Path) -> None:
    """Small mrpc, mnli and stsb, stored as nyu-mll/glue is: parquet files by configuration, test without labels."""
    from datasets import ClassLabel, Features, Value

    pairs = {
        "mrpc": ("sentence1", "sentence2", ClassLabel(names=["not_equivalent", "equivalent"])),
        "mnli": ("premise", "hypothesis", ClassLabel(names=["entailment", "neutral", "contradiction"])),
        "stsb": ("sentence1", "sentence2", Value("float32")),
    }
    sizes = {"train": 40, "validation": 16, "test": 8}
    configs = []
    for name, (first, second, label) in pairs.items():
        kinds = (
            {"validation": ("_matched", "_mismatched"), "test": ("_matched", "_mismatched")} if name == "mnli" else {}
        )
        splits = {f"{role}{kind}": n for role, n in sizes.items() for kind in kinds.get(role, ("",))}
        for seed, (split, count) in enumerate(splits.items()):
            hidden = split.startswith("test")
            rows = list(zip(sentences(count, 2 * seed), sentences(count, 2 * seed + 1), strict=True))
            known = [float(i % 11) / 2 if name == "stsb" else i % len(label.names) for i in range(count)]
            columns = {first: [a[0] for a, _ in rows], second: [b[0] for _, b in rows]}
            columns |= {"label": [-1] * count if hidden else known, "idx": list(range(count))}
            features = Features(
                {first: Value("string"), second: Value("string"), "label": label, "idx": Value("int32")}
            )
            path = folder / name / f"{split}-00000-of-00001.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            Dataset.from_dict(columns, features=features).to_parquet(path)
        files = [{"split": split, "path": f"{name}/{split}-*"} for split in splits]
        configs.append({"config_name": name, "data_files": files})
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': configs})}---\n")


@pytest.fixture
def glue(tmp_path: Path, roberta: Path) -> Path:
    import shutil

    write_glue(tmp_path / "hub" / "datasets" / "nyu-mll" / "glue")
    shutil.copytree(roberta, tmp_path / "hub" / "models" / "roberta-base")
    return tmp_path / "hub"


@pytest.mark.parametrize(
    ("flags", "keys"),
    [
        (["--config", ROOT / "recipes/mrpc.yaml"], ["accuracy", "f1"]),
        pytest.param(["--config", ROOT / "recipes/stsb.yaml"], ["pearson", "spearman", "mse"], marks=pytest.mark.slow),
        (["--model", "roberta-base", "--dataset", "mnli"], ["accuracy"]),
    ],
    ids=["mrpc", "stsb", "mnli"],
)
def test_glue_task_runs_under_its_hub_name(
    run: Command, glue: Path, tmp_path: Path, flags: list[Any], keys: list[str]
) -> None:
    more = ["--epochs", 1, "--report_to", "none", "--run_name", "run"]
    with loopback_hub(glue) as (endpoint, requests):
        done = run("train.py", *flags, *more, env=environment(endpoint, tmp_path))
    results, folder = results_of(done), tmp_path / "outputs" / "run"
    assert results["samples_seen"] == 40
    assert {f"eval/{key}" for key in keys} <= set(results)
    assert not any(key.startswith("test") for key in results)
    assert isinstance(read_lines(folder / "eval-validation" / "predictions.jsonl")[0]["text"], list)
    if "mnli" not in flags:
        assert "the test split has no labels" in done.stdout
        return
    assert results["validation_matched/accuracy"] == results["eval/accuracy"]
    other = read_lines(folder / "eval-validation_mismatched" / "predictions.jsonl")
    assert results["validation_mismatched/accuracy"] == np.mean([row["gold"] == row["predicted"] for row in other])
    assert "validation_mismatched (16 samples)" in done.stdout
    assert "validation_mismatched" in (folder / "model" / "README.md").read_text()
    assert not any("/mrpc/" in path for path in requests if "/resolve/" in path)
