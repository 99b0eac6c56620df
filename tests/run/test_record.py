"""The record of a run, and which settings make another experiment."""

import json
from pathlib import Path
from subprocess import CompletedProcess
from unittest import mock

import pytest
import torch
from accelerate import Accelerator

from lib.config.sections import DataConfig, ModelConfig, flatten
from lib.config.train import TrainConfig, TrainingConfig
from lib.run.record import LISTED, bounded, compare_settings, experiment_hash, run_name, run_record, version
from lib.run.tracking import RunLog
from tests.conftest import call_script, results_of, sentences, write_csv

SETTINGS = {"learning_rate": 1e-3, "logging_steps": 5, "num_train_epochs": 2.0, "text_columns": ("a", "b")}
SETTINGS |= {"run/data_fingerprint": "abc", "run/num_processes": 1, "run/version_torch": "2"}


def test_only_settings_that_change_the_result_make_another_experiment():
    same = SETTINGS | {"logging_steps": 9, "run/num_processes": 2, "text_columns": ["a", "b"]}
    assert compare_settings(SETTINGS, same) == []
    assert experiment_hash(SETTINGS) == experiment_hash(same)
    other = SETTINGS | {"learning_rate": 2e-3, "run/data_fingerprint": "xyz"}
    rate, data = compare_settings(SETTINGS, other)
    assert all(word in rate for word in ("learning_rate", "0.001", "0.002"))
    assert all(word in data for word in ("data_fingerprint", "abc", "xyz"))
    assert experiment_hash(SETTINGS) != experiment_hash(other)
    assert "learning rate of every step" in compare_settings(SETTINGS, SETTINGS | {"num_train_epochs": 3})[-1]


def test_option_newer_than_the_run_counts_as_its_default():
    now = json.loads(json.dumps(flatten(TrainConfig())))
    before = {name: value for name, value in now.items() if name != "compile"}
    assert compare_settings(before, now) == []
    (changed,) = compare_settings(before, now | {"compile": True})
    assert "compile" in changed


def test_other_order_of_batches_is_another_experiment():
    now = SETTINGS | {"run/batches_sorted_together": 100}
    assert compare_settings(now, now) == []
    (changed,) = compare_settings(SETTINGS, now)
    assert "batches_sorted_together" in changed


def test_record_names_devices_precision_and_versions():
    record = run_record(Accelerator(cpu=True))
    assert record["version_torch"] == torch.__version__
    assert (record["num_processes"], record["mixed_precision"]) == (1, "no")
    assert record["devices"][0].startswith("CPU, ")
    assert version("no-such-package") is None


# ---------------------------------------------------------------------------------------------------- what was resolved


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, roberta: Path) -> tuple[Path, CompletedProcess, dict]:
    """A run that had to guess and to count: its folder, what it printed, and what its tracker was told."""
    folder = tmp_path_factory.mktemp("a folder")
    flags: list = ["--model", roberta, "--report_to", "none", "--max_steps", 2, "--mixed_precision", "no"]
    for split, count in (("train", 60), ("validation", 30), ("test", 33)):
        rows = [
            (f"{text} {'plot ' * 80}" if n == 0 else text, label) for n, (text, label) in enumerate(sentences(count))
        ]
        flags += [f"--{split}_file", write_csv(folder / f"{split}.csv", rows, ("review", "category"))]
    with mock.patch.object(RunLog, "start") as start:
        done = call_script("train.py", *flags, "--output_dir", folder / "run", cwd=folder)
    return folder / "run", done, start.call_args.args[0]


RESOLVED = {
    "text_columns": ["review"],
    "label_columns": ["category"],
    "label_names": ["bad", "good", "mixed"],
    "problem_type": "single_label_classification",
    "max_length": 64,  # of the tokenizer; --max_length is 128
    "window_stride": None,
    "metrics": ["accuracy", "f1_macro"],
    "metric_for_best_model": "accuracy",
    "dataset": "train",
    "split_sizes": {"train": 60, "validation": 30, "test": 33},
}


def test_what_a_run_resolved_is_in_its_record_its_results_and_its_tracker(finished: tuple) -> None:
    folder, done, tracked = finished
    record = json.loads((folder / "record.json").read_text())
    results = results_of(done)
    for found in (record, *({name.removeprefix("run/"): v for name, v in d.items()} for d in (results, tracked))):
        assert {name: found[name] for name in RESOLVED} == RESOLVED
        assert found["class_counts"]["test"] == {"bad": 11, "good": 11, "mixed": 11}
        assert any("category" in note and "guessed" in note for note in found["notes"])
        assert any("60 train texts" in note or "64 tokens" in note for note in found["notes"])
        assert len(found["model_sha256"]) == 64
    assert record["best_step"] == results["best_step"]


def test_model_card_tells_columns_length_splits_and_notes_without_paths(finished: tuple) -> None:
    folder, _, _ = finished
    card = (folder / "model" / "README.md").read_text()
    for words in (
        "`review`",
        "`category`",
        "64 tokens",
        "| train | 60 | 20 | 20 | 20 |",
        "(guessed;",
        "weights sha256",
    ):
        assert words in card
    assert str(folder.parent) not in card


def test_start_block_and_last_lines_tell_what_is_read_and_what_comes_next(finished: tuple) -> None:
    folder, done, _ = finished
    lines = {line.split("  ")[0]: line for line in done.stdout.splitlines()}
    assert "review" in lines["columns"]
    assert "category" in lines["columns"]
    assert "64" in lines["length"]
    assert "accuracy" in lines["metrics"]
    commands = [line for line in done.stdout.splitlines() if f"'{folder}'" in line]  # quoted: the path has a space
    assert ["eval.py" in line or "predict.py" in line for line in commands] == [True, True]


def test_long_lists_are_counted_outside_the_record() -> None:
    names = {str(n): n for n in range(LISTED + 1)}
    for entries in (names, list(names), tuple(names)):
        assert f"{LISTED + 1}" in bounded(entries)
    assert f"{LISTED + 1}" in bounded({"train": names})["train"]
    assert bounded({"a": [1], "b": "c" * 1000}) == {"a": [1], "b": "c" * 1000}


def test_name_of_a_run_fits_a_folder_and_ends_with_how_it_was_trained():
    names = []
    for number in range(2):
        data = DataConfig(dataset=f"{'语料' * 40}{number}")
        names.append(run_name(TrainConfig(ModelConfig("m" * 150), data, training=TrainingConfig(seed=7))))
    assert all(len(name.encode()) <= 200 and name.endswith("-lr5e-05-bs32-ep3-s7") for name in names)
    assert names[0] != names[1]
    assert run_name(TrainConfig()) == "minilm-movie_reviews-lr5e-05-bs32-ep3-s42"
