"""Soft labels in train.py, eval.py and predict.py: what a teacher predicts is trained on as it is."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

from lib.config.sections import DataConfig, ModelConfig
from lib.data.load import load_data
from lib.model.load import load_tokenizer
from lib.run.checkpoint import list_checkpoints
from lib.runtime.signals import Stopped
from tests.conftest import Command, call_script, read_lines, results_of, sentences, write_csv
from tests.resuming import differences

NAMES = ["bad", "good", "mixed"]
SCORES = [f"{split}/{name}" for split in ("eval", "test") for name in ("loss", "accuracy", "f1_macro")]


def flags_of(folder: Path, model: Path, train: Path, *more: Any) -> list[Any]:
    """Flags of a run on `train`, with hard labels for validation and test."""
    flags = ["--model", model, "--train_file", train]
    for seed, (role, size) in enumerate([("validation", 13), ("test", 11)], 1):
        flags += [f"--{role}_file", write_csv(folder / f"{role}.csv", sentences(size, seed))]
    flags += ["--lr", "1e-2", "--bs", 8, "--epochs", 2, "--mixed_precision", "no", "--report_to", "none"]
    return [*flags, "--save_total_limit", 1, *more]


def last_weights(folder: Path) -> dict[str, torch.Tensor]:
    (checkpoint, *_) = list_checkpoints(folder / "checkpoints")
    return load_file(checkpoint / "model.safetensors")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory, roberta: Path) -> Path:
    """A folder with a teacher and what it predicted for other texts, as jsonl and csv."""
    folder = tmp_path_factory.mktemp("teacher")
    train = write_csv(folder / "train.csv", sentences(37))
    call_script("train.py", *flags_of(folder, roberta, train, "--output_dir", "teacher"), cwd=folder)
    texts = write_csv(folder / "new.csv", [(text,) for text, _ in sentences(29, 5)], ("text",))
    for kind in ("jsonl", "csv"):
        call_script("predict.py", "--model", "teacher", "--input", texts, "--output", f"out.{kind}", cwd=folder)
    return folder


def test_student_learns_what_the_teacher_predicts_as_it_is(teacher: Path, roberta: Path, call: Command) -> None:
    student = teacher / "student"
    flags = flags_of(teacher, roberta, teacher / "out.jsonl", "--soft_labels", "probabilities")
    done = call("train.py", *flags, "--output_dir", student)
    assert "soft labels of train: probabilities" in done.stdout
    data = [
        load_data(
            DataConfig(train_file=str(teacher / f"out.{kind}"), soft_labels=("probabilities",)),
            load_tokenizer(ModelConfig(str(roberta))),
        )
        for kind in ("jsonl", "csv")
    ]
    assert data[0].fingerprint() == data[1].fingerprint()
    config = json.loads((student / "model" / "config.json").read_text())
    assert list(config["label2id"]) == NAMES
    assert config["trained_on"]["soft_labels"] == ["probabilities"]
    record = json.loads((student / "record.json").read_text())
    predicted = [row["label"] for row in read_lines(teacher / "out.jsonl")]
    assert record["class_counts"]["train"] == {name: predicted.count(name) for name in NAMES}
    gold = [row["gold"] for row in read_lines(student / "eval-test" / "predictions.jsonl")]
    assert gold == [label for _, label in sentences(11, 2)]

    hard = results_of(call("eval.py", "--run", student, "--output_dir", "hard"))
    assert hard["test/loss"] == json.loads((student / "results.json").read_text())["test/loss"]
    soft = results_of(call("eval.py", "--model", student, "--test_file", teacher / "out.jsonl", "--output_dir", "soft"))
    rows, wanted = read_lines(call.keywords["cwd"] / "soft" / "predictions.jsonl"), read_lines(teacher / "out.jsonl")
    logits, target = (
        torch.tensor([[row["probabilities"][name] for name in NAMES] for row in given], dtype=torch.float64)
        for given in (rows, wanted)
    )
    scores = json.loads((call.keywords["cwd"] / "soft" / "report.json").read_text())["scores"]
    assert scores["loss"] == soft["test/loss"]
    at_temperature = scores.get("loss_at_temperature", scores["loss"])
    assert at_temperature == pytest.approx(cross_entropy(logits.log(), target).item(), abs=1e-4)
    assert soft["test/accuracy"] == pytest.approx(
        np.mean([row["predicted"] == given["label"] for row, given in zip(rows, wanted, strict=True)])
    )
    as_hard = call(
        *("eval.py", "--model", student, "--test_file", teacher / "out.jsonl", "--label_column", "label"),
        *("--output_dir", "as-hard"),
    )
    assert results_of(as_hard)["test/loss"] != soft["test/loss"]


def certain(folder: Path) -> tuple[Path, Path]:
    """Hard labels, and the same as probabilities of 0 and 1."""
    rows = sentences(37)
    hot = [(text, *(int(name == label) for name in NAMES)) for text, label in rows]
    return write_csv(folder / "hard.csv", rows), write_csv(folder / "soft.csv", hot, ("text", *NAMES))


@pytest.mark.parametrize("more", [(), pytest.param(("--freeze", "backbone"), marks=pytest.mark.slow)])
def test_certain_probabilities_train_as_hard_labels_do_bit_by_bit(
    more: tuple[str, ...], roberta: Path, tmp_path: Path, call: Command
) -> None:
    hard, soft = certain(tmp_path)
    call("train.py", *flags_of(tmp_path, roberta, hard, *more, "--output_dir", "hard"))
    call("train.py", *flags_of(tmp_path, roberta, soft, *more, "--soft_labels", *NAMES, "--output_dir", "soft"))
    assert {*differences(tmp_path / "hard", tmp_path / "soft")} <= {"results.json"}  # it names the columns
    hard_scores, soft_scores = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("hard", "soft"))
    assert {key: soft_scores[key] for key in SCORES} == {key: hard_scores[key] for key in SCORES}


def mixed(folder: Path) -> Path:
    rows = np.random.default_rng(0).dirichlet(np.ones(3), 37).tolist()
    table = [(text, *row) for (text, _), row in zip(sentences(37), rows, strict=True)]
    return write_csv(folder / "mixed.csv", table, ("text", *NAMES))


def test_paused_and_resumed_with_kl_equals_uninterrupted_and_the_weights_of_cross_entropy_bit_by_bit(
    roberta: Path, tmp_path: Path, call: Command
) -> None:
    flags = flags_of(tmp_path, roberta, mixed(tmp_path), "--soft_labels", *NAMES, "--distill_temperature", 2)
    call("train.py", *flags, "--output_dir", "plain")
    flags += ["--loss", "kl"]
    call("train.py", *flags, "--output_dir", "whole")
    with pytest.raises(Stopped):
        call("train.py", *flags, "--output_dir", "paused", "--pause_at_step", 3)
    call("train.py", *flags, "--output_dir", "paused")
    assert not differences(tmp_path / "whole", tmp_path / "paused")
    plain, kl = last_weights(tmp_path / "plain"), last_weights(tmp_path / "whole")
    assert all(torch.equal(weight, kl[name]) for name, weight in plain.items())


@pytest.mark.slow
def test_two_processes_train_on_soft_labels_as_one_does(
    roberta_without_dropout: Path, tmp_path: Path, run: Command
) -> None:
    flags = flags_of(
        tmp_path, roberta_without_dropout, mixed(tmp_path), "--soft_labels", *NAMES, "--adam_epsilon", "1e-2"
    )
    for processes in (1, 2):
        done = run("train.py", *flags, "--output_dir", f"on-{processes}", processes=processes)
        assert results_of(done)["run/num_processes"] == processes
    one = last_weights(tmp_path / "on-1")
    for key, weight in last_weights(tmp_path / "on-2").items():
        torch.testing.assert_close(weight, one[key], atol=1e-6, rtol=0)


def test_multi_label_probabilities_are_learned_and_scored_as_labels(
    roberta: Path, tmp_path: Path, call: Command
) -> None:
    rng = np.random.default_rng(0)
    rows = [(text, *rng.random(2).round(3)) for text, _ in sentences(37)]
    flags = flags_of(tmp_path, roberta, write_csv(tmp_path / "soft.csv", rows, ("text", "a", "b")))
    for role in ("validation", "test"):
        labels = [(text, "a" if row % 2 else "a|b") for row, (text, _) in enumerate(sentences(11, 3))]
        write_csv(tmp_path / f"{role}.csv", labels)
    flags += ["--soft_labels", "a", "b", "--problem_type", "multi_label_classification", "--loss", "kl"]
    call("train.py", *flags, "--output_dir", "run")
    gold = [row["gold"] for row in read_lines(tmp_path / "run" / "eval-test" / "predictions.jsonl")]
    assert gold[:2] == [["a", "b"], ["a"]]


@pytest.mark.slow
def test_validation_and_folds_are_taken_from_soft_labels(roberta: Path, tmp_path: Path, call: Command) -> None:
    flags = ["--model", roberta, "--train_file", mixed(tmp_path), "--soft_labels", *NAMES, "--max_steps", 1]
    flags += ["--mixed_precision", "no", "--report_to", "none", "--fold", "1/3", "--output_dir", "run"]
    done = call("train.py", *flags)
    assert "test/accuracy" in results_of(done)
    assert "fold 1/3" in done.stdout


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--soft_labels", "probabilities"], ["--soft_labels probabilities", "no split"]),
        (["--label_columns", *NAMES], ["hold 0 or 1", "--soft_labels bad good mixed"]),
        (["--soft_labels", "bad", "good"], ["row 1 of the train split", "multi_label_classification"]),
    ],
)
def test_wrong_use_is_refused_with_what_to_type(
    flags: list[str], words: list[str], roberta: Path, tmp_path: Path, call: Command
) -> None:
    done = call("train.py", "--model", roberta, "--train_file", mixed(tmp_path), *flags, code=2)
    for word in words:
        assert word in done.stderr
