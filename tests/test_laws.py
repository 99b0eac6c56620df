"""The laws of the design: what is equal for any number of processes, micro-batch size and data size."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import WORKER_ENV, Command, read_lines, results_of, sentences, write_csv

SIZES = range(1, 41)
MICRO_BATCHES = {1: (16, 4), 2: (8, 3), 3: (4,)}
"""Micro-batch sizes by the number of processes; steps are of 16 samples."""

OBJECTIVES = [
    "--loss focal --class_weights balanced",
    "--loss ordinal --max_length 8 --window_stride 2",
    "--class_weights bad=4 mixed=0.5 --layerwise_lr_decay 0.5 --head_learning_rate 2e-2",
]
TARGETS = ["--label_column score", "--label_columns bad good plot"]
QUANTIZED = [f"--adapter lora --load_in {bits}" for bits in ("4bit", "8bit")]
VARIANTS = [*OBJECTIVES, *TARGETS, "--adapter bottleneck", *QUANTIZED]
VARIANT_SIZES = (1, 5, 19)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("laws")


@pytest.fixture
def train_sizes(run: Command, folder: Path, roberta_without_dropout: Path):
    """`train_sizes(2)[micro_batch_size]`: what two processes learn from data of each size; trained once."""

    def call(processes: int) -> dict[int, dict]:
        path = folder / f"results-{processes}-16.pt"
        sizes = MICRO_BATCHES[processes]
        flags = {f"--per_device_train_batch_size {size}": size for size in sizes}
        if not path.exists():
            layout = (roberta_without_dropout, folder, 16, ",".join(map(str, SIZES)), *flags)
            run("tests/workers/world_size.py", *layout, processes=processes, env=WORKER_ENV)
        results = torch.load(path)
        assert results.pop("world_size") == processes
        return {flags[name]: {n: results[name, n] for n in SIZES} for name in flags}

    return call


@pytest.mark.parametrize(
    ("processes", "micro_batch_size"), [(1, 4), (2, 8), (2, 3), pytest.param(3, 4, marks=pytest.mark.slow)]
)
def test_processes_and_micro_batches_change_nothing_for_any_data_size(train_sizes, processes, micro_batch_size):
    reference, other = train_sizes(1)[16], train_sizes(processes)[micro_batch_size]
    for size in SIZES:
        a, b = reference[size], other[size]
        assert a["samples"] == b["samples"] == 2 * size
        assert len(a["losses"]) == 2 * math.ceil(size / 16)
        assert a["rates"] == b["rates"]
        np.testing.assert_allclose(a["losses"], b["losses"], atol=1e-6, rtol=1e-6)
        np.testing.assert_allclose(a["norms"], b["norms"], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(a["weights"], b["weights"], atol=1e-6, rtol=0)


def test_processes_and_micro_batches_change_nothing_for_any_objective(run, roberta_without_dropout, tmp_path):
    found = []
    for processes, micro_batch_size in ((None, 16), (2, 3)):
        layout = (roberta_without_dropout, tmp_path, micro_batch_size, ",".join(map(str, VARIANT_SIZES)), *VARIANTS)
        run("tests/workers/world_size.py", *layout, processes=processes, env=WORKER_ENV)
        found.append(torch.load(tmp_path / f"results-{processes or 1}-{micro_batch_size}.pt"))
    one, two = found
    assert [results.pop("world_size") for results in found] == [1, 2]
    assert list(one) == list(two) == [(flags, size) for flags in VARIANTS for size in VARIANT_SIZES]
    for key in one:
        rtol = 1e-6 if key[0] in TARGETS else 0
        np.testing.assert_allclose(one[key]["losses"], two[key]["losses"], atol=1e-6, rtol=rtol, err_msg=str(key))
        torch.testing.assert_close(one[key]["weights"], two[key]["weights"], atol=1e-6, rtol=0)
    assert len({tuple(one[flags, 19]["losses"]) for flags in VARIANTS}) == len(VARIANTS)
    for flags in VARIANTS:  # the weights follow the data
        assert not torch.equal(one[flags, 5]["weights"], one[flags, 19]["weights"])


def train_flags(model: Path, folder: Path, name: str) -> list:
    flags: list = ["--model", model, "--run_name", name]
    for seed, (split, count) in enumerate((("train", 37), ("validation", 13), ("test", 11))):
        flags += [f"--{split}_file", write_csv(folder / f"{split}.csv", sentences(count, seed))]
    flags += ["--lr", "1e-2", "--adam_epsilon", "1e-2", "--bs", 8, "--epochs", 2, "--logging_steps", 1]
    return [*flags, "--mixed_precision", "no", "--report_to", "none"]


def losses_of(folder: Path) -> list[float]:
    return [line["train/loss"] for line in read_lines(folder / "metrics.jsonl")]


def test_script_gives_the_same_experiment_on_one_and_two_processes(run, call, roberta_without_dropout, tmp_path):
    flags = train_flags(roberta_without_dropout, tmp_path, "one")
    one = results_of(call("train.py", *flags))
    more = ["--run_name", "two", "--per_device_train_batch_size", 3, "--report_to", "wandb"]
    two = results_of(run("train.py", *flags, *more, processes=2))
    assert (one["run/num_processes"], two["run/num_processes"]) == (1, 2)
    for key, value in one.items():
        if key.split("/")[0] in ("eval", "test"):
            assert two[key] == pytest.approx(value, abs=1e-6)
    folders = [tmp_path / "outputs" / name for name in ("one", "two")]
    lines_one, lines_two = (read_lines(folder / "metrics.jsonl") for folder in folders)
    assert [line["step"] for line in lines_one] == [line["step"] for line in lines_two] == list(range(1, 11))
    for a, b in zip(lines_one, lines_two, strict=True):
        assert a["train/learning_rate"] == b["train/learning_rate"]
        assert a["samples_seen"] == b["samples_seen"]
        assert a["train/loss"] == pytest.approx(b["train/loss"], abs=1e-6)
    weights = [load_file(folder / "model" / "model.safetensors") for folder in folders]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weight, weights[1][name], atol=1e-6, rtol=0)
    assert len(list(folders[1].glob("wandb/offline-run-*"))) == 1  # two processes are one run of the tracker


def test_equal_runs_with_dropout_are_bitwise_equal(run, roberta, tmp_path):
    for name in ("first", "second"):
        run("train.py", *train_flags(roberta, tmp_path, name))
    files = [(tmp_path / "outputs" / name / "model" / "model.safetensors").read_bytes() for name in ("first", "second")]
    assert files[0] == files[1]


def test_more_evaluations_change_no_loss(call, roberta, tmp_path):
    for name, extra in (("seldom", []), ("often", ["--eval_steps", 1, "--metric_for_best_model", "loss"])):
        call("train.py", *train_flags(roberta, tmp_path, name), *extra)
    assert losses_of(tmp_path / "outputs" / "seldom") == losses_of(tmp_path / "outputs" / "often")


def test_dropout_changes_the_losses(call, roberta, roberta_without_dropout, tmp_path):
    """Else the equalities above would say little."""
    for model in (roberta, roberta_without_dropout):
        call("train.py", *train_flags(model, tmp_path, model.name))
    assert losses_of(tmp_path / "outputs" / roberta.name) != losses_of(
        tmp_path / "outputs" / roberta_without_dropout.name
    )
