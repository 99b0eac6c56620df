"""The laws of the design: what must be equal, whatever the processes, micro-batches and batch sizes."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import WORKER_ENV, Command, read_lines, results_of, sentences, write_csv

SIZES = range(1, 41)
WORKER = "tests/workers/world_size.py"


@pytest.fixture(scope="session")
def layouts(tmp_path_factory: pytest.TempPathFactory, roberta_without_dropout: Path) -> Path:
    return tmp_path_factory.mktemp("layouts")


@pytest.fixture
def train_layout(run: Command, layouts: Path, roberta_without_dropout: Path):
    """`train_layout(processes, micro_batch_size)`: results of the worker for every size, made once."""

    def call(processes: int, micro_batch_size: int) -> dict:
        path = layouts / f"results-{processes}-{micro_batch_size}.pt"
        if not path.exists():
            layout = (roberta_without_dropout, layouts, micro_batch_size, ",".join(map(str, SIZES)), "")
            run(WORKER, *layout, processes=processes, env=WORKER_ENV)
        results = torch.load(path)
        assert results.pop("world_size") == processes
        return {size: result for (_, size), result in results.items()}

    return call


@pytest.mark.parametrize(("processes", "micro_batch_size"), [(1, 4), (2, 8), (2, 3)])
def test_processes_and_micro_batches_change_nothing_for_any_data_size(train_layout, processes, micro_batch_size):
    reference, other = train_layout(1, 16), train_layout(processes, micro_batch_size)
    assert list(reference) == list(SIZES) == list(other)
    for size in SIZES:
        a, b = reference[size], other[size]
        assert a["samples"] == b["samples"] == 2 * size
        assert len(a["losses"]) == 2 * math.ceil(size / 16)
        assert a["rates"] == b["rates"]
        np.testing.assert_allclose(a["losses"], b["losses"], atol=1e-6, rtol=1e-6)
        np.testing.assert_allclose(a["norms"], b["norms"], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(a["weights"], b["weights"], atol=1e-6, rtol=0)


def train_flags(model: Path, folder: Path, name: str) -> list:
    train = write_csv(folder / "train.csv", sentences(37))
    validation = write_csv(folder / "validation.csv", sentences(13, seed=1))
    test = write_csv(folder / "test.csv", sentences(11, seed=2))
    flags = ["--model", model, "--train_file", train, "--validation_file", validation, "--test_file", test]
    flags += [
        "--lr",
        "1e-2",
        "--adam_epsilon",
        "1e-2",
        "--train_batch_size",
        "8",
        "--epochs",
        "2",
        "--logging_steps",
        "1",
    ]
    return [*flags, "--mixed_precision", "no", "--report_to", "none", "--run_name", name]


def test_the_script_gives_one_experiment_on_one_and_on_two_processes(run, roberta_without_dropout, tmp_path):
    flags = train_flags(roberta_without_dropout, tmp_path, "one")
    one = results_of(run("train.py", *flags))
    two = results_of(run("train.py", *flags, "--run_name", "two", "--per_device_train_batch_size", 3, processes=2))
    assert (one["run/num_processes"], two["run/num_processes"]) == (1, 2)
    for key, value in one.items():
        if key.split("/")[0] in ("eval", "test"):
            assert two[key] == pytest.approx(value, abs=1e-6)
    lines_one, lines_two = (read_lines(tmp_path / "outputs" / name / "metrics.jsonl") for name in ("one", "two"))
    assert [line["step"] for line in lines_one] == [line["step"] for line in lines_two] == list(range(1, 11))
    for a, b in zip(lines_one, lines_two, strict=True):
        assert a["train/learning_rate"] == b["train/learning_rate"]
        assert a["samples_seen"] == b["samples_seen"]
        assert a["train/loss"] == pytest.approx(b["train/loss"], abs=1e-6)
    weights = [load_file(tmp_path / "outputs" / name / "model" / "model.safetensors") for name in ("one", "two")]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weight, weights[1][name], atol=1e-6, rtol=0)


def test_equal_runs_are_equal_bit_by_bit_with_dropout(run, roberta, tmp_path):
    for name in ("first", "second"):
        run("train.py", *train_flags(roberta, tmp_path, name))
    files = [(tmp_path / "outputs" / name / "model" / "model.safetensors").read_bytes() for name in ("first", "second")]
    assert files[0] == files[1]


def test_an_extra_evaluation_changes_nothing(run, roberta, tmp_path):
    losses = {}
    for name, extra in (("seldom", []), ("often", ["--eval_steps", 1, "--metric_for_best_model", "loss"])):
        run("train.py", *train_flags(roberta, tmp_path, name), *extra)
        losses[name] = [line["train/loss"] for line in read_lines(tmp_path / "outputs" / name / "metrics.jsonl")]
    assert losses["seldom"] == losses["often"]


@pytest.mark.slow
def test_dropout_is_on_so_that_equality_means_something(run, roberta, roberta_without_dropout, tmp_path):
    losses = []
    for model in (roberta, roberta_without_dropout):
        run("train.py", *train_flags(model, tmp_path, model.name))
        losses.append([line["train/loss"] for line in read_lines(tmp_path / "outputs" / model.name / "metrics.jsonl")])
    assert losses[0] != losses[1]
