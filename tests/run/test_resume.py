"""A resumed run equals an uninterrupted one; damaged checkpoints are found and not used."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from lib.config.sections import HubConfig, flatten
from lib.config.train import TrainConfig
from lib.data.batching import BATCHES_PER_MEGABATCH
from lib.errors import UserError
from lib.run.checkpoint import list_checkpoints
from lib.run.record import compare_settings
from lib.run.resume import describe_promise, find_checkpoint
from lib.runtime.lock import FolderLock
from tests.conftest import ROOT, WORKER_ENV, call_script, read_lines, results_of, sentences, tiny_roberta, write_csv
from tests.resuming import differences, make_checkpoints, play

LAST = 10
SETTINGS = {"run/num_processes": 1, "run/version_torch": "2"}


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_stopped_after_any_step_and_resumed_equals_uninterrupted_bit_by_bit(run, roberta, tmp_path, processes):
    calls: list[dict[str, Any]] = [{"folder": "whole"}]
    for step in range(1, LAST + 1):
        calls += [{"folder": f"after-{step}", "stop": step}, {"folder": f"after-{step}"}]
    for step in (3, LAST):
        calls += [{"folder": f"in-{step}", "stop": step, "during": "evaluation"}, {"folder": f"in-{step}"}]
    for broken in ("order", "dropout"):
        calls += [{"folder": broken, "stop": 4}, {"folder": broken, "broken": broken}]
    play(run, tmp_path, roberta, calls, processes)
    state = json.loads((list_checkpoints(tmp_path / "whole" / "checkpoints")[0] / "state.json").read_text())
    assert state["settings"]["run/num_processes"] == processes
    assert state["settings"]["run/batches_sorted_together"] == BATCHES_PER_MEGABATCH
    for call in calls[1:]:
        found = differences(tmp_path / "whole", tmp_path / call["folder"])
        if call["folder"] in ("order", "dropout"):  # broken on purpose: the comparison must notice
            assert "model.safetensors" in found
        else:
            assert not found, call["folder"]
    steps = [line["step"] for line in read_lines(tmp_path / "after-5" / "metrics.jsonl")]
    assert steps == [2, 3, 4, 6, 8, 9, 10]


def test_run_resumes_through_another_mirror():
    """The source of files does not change their content."""
    there = flatten(HubConfig())
    now = flatten(HubConfig("https://hf-mirror.com", 20, True, True))
    assert there.keys() == {key for key in now if there[key] != now[key]}
    assert compare_settings(there, now) == []


@pytest.mark.parametrize("flags", [["--lr_scheduler_type", "reduce_lr_on_plateau"], ["--freeze", "backbone"]])
def test_metric_schedules_and_frozen_layers_resume_bit_by_bit(run, roberta, tmp_path, flags):
    calls: list[dict[str, Any]] = [{"folder": "whole", "flags": flags}]
    calls += [{"folder": "b", "stop": 7, "flags": flags}, {"folder": "b", "flags": flags}]
    play(run, tmp_path, roberta, calls, 1)
    assert not differences(tmp_path / "whole", tmp_path / "b")


def test_run_resumes_with_the_same_samples_on_another_number_of_processes(run, roberta_without_dropout, tmp_path):
    flags = ["--adam_epsilon", "1e-2"]
    start = [{"folder": "whole"}, {"folder": "more", "stop": 5}]
    play(run, tmp_path, roberta_without_dropout, [call | {"flags": flags} for call in start], 1)
    two = [{"folder": "more", "flags": flags}, {"folder": "fewer", "stop": 5, "flags": flags}]
    play(run, tmp_path, roberta_without_dropout, two, 2)
    play(run, tmp_path, roberta_without_dropout, [{"folder": "fewer", "flags": flags}], 1)
    whole = read_lines(tmp_path / "whole" / "metrics.jsonl")
    for name in ("more", "fewer"):
        lines = read_lines(tmp_path / name / "metrics.jsonl")
        assert [line["step"] for line in lines] == [line["step"] for line in whole]
        for a, b in zip(whole, lines, strict=True):
            assert (a["samples_seen"], a["train/learning_rate"]) == (b["samples_seen"], b["train/learning_rate"])
            np.testing.assert_allclose(b["train/loss"], a["train/loss"], atol=1e-6, rtol=1e-6)


def test_kill_at_any_write_leaves_a_valid_checkpoint_and_a_best_model(run, tmp_path):
    left = results_of(run("tests/workers/killed_writes.py", tmp_path, env=WORKER_ENV))
    assert left["kills"] > 60
    assert left["old"] > 10
    assert left["new"] > 10
    assert left["no checkpoint"] == left["no model"] == 0


def test_kills_would_notice_a_save_that_deletes_the_old_checkpoint_first(run, tmp_path):
    assert results_of(run("tests/workers/killed_writes.py", tmp_path, "broken", env=WORKER_ENV))["no checkpoint"] > 10


def test_damaged_checkpoint_is_named_and_the_previous_one_is_used(tmp_path, capsys):
    make_checkpoints(tmp_path, "step-1", "step-2")
    (tmp_path / "step-2" / "model.safetensors").write_text("step-3")
    assert find_checkpoint("auto", tmp_path) == tmp_path / "step-1"
    warning = capsys.readouterr().out
    assert str(tmp_path / "step-2") in warning
    assert "model.safetensors was changed" in warning


def test_resume_from_checkpoint_accepts_auto_must_never_and_folders(tmp_path):
    checkpoints = tmp_path / "run" / "checkpoints"
    assert find_checkpoint("auto", checkpoints) is None
    with pytest.raises(UserError, match="--resume_from_checkpoint must"):
        find_checkpoint("must", checkpoints)
    make_checkpoints(checkpoints, "step-1", "step-2")
    assert find_checkpoint(str(checkpoints / "step-1"), tmp_path / "other") == checkpoints / "step-1"
    assert find_checkpoint(str(tmp_path / "run"), tmp_path / "other") == checkpoints / "step-2"
    (checkpoints / "step-1" / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"step-1.*model\.safetensors is missing"):
        find_checkpoint(str(checkpoints / "step-1"), tmp_path / "other")
    with pytest.raises(UserError, match=r"nowhere.*manifest\.json is missing"):
        find_checkpoint(str(tmp_path / "nowhere"), tmp_path / "other")
    assert find_checkpoint("never", checkpoints) is None
    assert not checkpoints.exists()


def test_promise_of_a_resumed_run_names_what_differs():
    assert "bit by bit" in describe_promise(SETTINGS, dict(SETTINGS), [])
    assert "num_processes 1 -> 2" in describe_promise(SETTINGS, SETTINGS | {"run/num_processes": 2}, [])
    assert "version_torch 2 -> 3" in describe_promise(SETTINGS, SETTINGS | {"run/version_torch": "3"}, [])


def test_run_may_resume_with_other_cpu_kernels_but_not_bit_by_bit():
    now = flatten(TrainConfig())
    other = now | {"cpu_kernels": False}
    before_the_option = {name: value for name, value in now.items() if name != "cpu_kernels"}
    assert compare_settings(now, other) == []
    assert "bit by bit" in describe_promise(before_the_option, now, [])
    assert "cpu_kernels True -> False" in describe_promise(now, other, [])


def test_finished_run_stays_as_it_is_without_checkpoints_and_under_other_settings(call, roberta, tmp_path):
    train = write_csv(tmp_path / "train.csv", sentences(24))
    flags = ["--model", roberta, "--train_file", train, "--report_to", "none", "--mixed_precision", "no"]
    flags += ["--output_dir", "run", "--save_total_limit", 0, "--save_steps", 1]
    results = results_of(call("train.py", *flags, "--epochs", 1))
    assert not (tmp_path / "run/checkpoints").exists()
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    owner = FolderLock(tmp_path).owner | {"pid": 2**22 + 1}  # a process that was killed after its last file
    (tmp_path / "run" / ".lock").write_text(json.dumps(owner))
    again = call("train.py", *flags, "--epochs", 1)
    assert results_of(again) == results
    assert "finished" in again.stdout
    assert not (tmp_path / "run" / ".lock").exists()
    for change, word in (
        ("--lr=1", "learning_rate"),
        ("--epochs=2", "no checkpoint"),
        ("--epochs=0.5", "num_train_epochs"),
    ):
        refused = call("train.py", *flags, "--epochs", 1, change, "--allow_changes", code=2).stderr
        assert "finished run with other settings" in refused
        assert word in refused
    write_csv(train, sentences(25))
    assert "data_fingerprint" in call("train.py", *flags, "--epochs", 1, code=2).stderr
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before
    anew = call("train.py", *flags, "--epochs", 1, "--resume_from_checkpoint", "never")
    assert "finished" not in anew.stdout
    assert results_of(anew)["run/data_fingerprint"] != results["run/data_fingerprint"]


def test_start_in_a_folder_in_use_is_refused_and_writes_nothing(call, roberta, tmp_path, monkeypatch):
    """Also where the other process came between the first look and the first write."""
    flags = ["--model", roberta, "--train_file", write_csv(tmp_path / "train.csv", sentences(24)), "--max_steps", 1]
    flags += ["--report_to", "none", "--mixed_precision", "no", "--output_dir", "run"]
    code = f"from lib.runtime.lock import *; FolderLock(Path({str(tmp_path / 'run')!r})).take(); print(flush=True); input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, text=True, **pipes) as owner:
        owner.stdout.readline()
        for late in (False, True):
            if late:
                monkeypatch.setattr("lib.run.run.check_free", lambda folder: None)
            assert f"in use by process {owner.pid} " in call("train.py", *flags, code=2).stderr
        assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
        owner.kill()


# ---------------------------------------------------------------------------------------------------- what a run began with


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model, the data and the finished run of an adapter, whose base is in none of its checkpoints."""
    folder = tmp_path_factory.mktemp("finished")
    tiny_roberta(folder / "model")
    for seed, split in enumerate(("train", "validation", "test")):
        write_csv(folder / f"{split}.csv", sentences(24, seed))
    call_script("train.py", *LORA, cwd=folder)
    return folder


LORA = [
    "--model",
    "model",
    "--adapter",
    "lora",
    "--output_dir",
    "run",
    "--report_to",
    "none",
    "--mixed_precision",
    "no",
]
LORA += ["--train_file", "train.csv", "--validation_file", "validation.csv", "--test_file", "test.csv"]
LORA += ["--bs", "8", "--max_steps", "4", "--save_steps", "2", "--logging_steps", "1"]


def copy_of(finished: Path, place: Path, stopped: bool = True) -> Path:
    """A folder in `place` with the run, its model and its data; if it was `stopped`, it has checkpoints and no results."""
    folder = shutil.copytree(finished, place / ("stopped" if stopped else "finished"))
    if stopped:
        (folder / "run" / "results.json").unlink()
    return folder


def rewrite(path: Path, change: Callable[[Path], Any]) -> None:
    """Change a file and put its time of modification back; its size stays the same too."""
    before = path.stat()
    change(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size


def change_weights(path: Path) -> None:
    tensors = load_file(path)
    tensors["embeddings.word_embeddings.weight"][9] += 1
    save_file(tensors, path, {"format": "pt"})


def change_text(before: bytes, after: bytes) -> Callable[[Path], Any]:
    return lambda path: path.write_bytes(path.read_bytes().replace(before, after, 1))


def swap_labels(path: Path) -> None:
    """Give the first row the label of the second one, and the other way round."""
    head, first, second, *rest = path.read_bytes().splitlines(keepends=True)
    (one, comma, a), (two, _, b) = (line.rpartition(b",") for line in (first, second))
    path.write_bytes(b"".join([head, one + comma + b, two + comma + a, *rest]))


CHANGES: dict[str, tuple[str, Callable[[Path], Any], list[str]]] = {
    "weights": ("model/model.safetensors", change_weights, ["the weights of --model model"]),
    "dropout": (
        "model/config.json",
        change_text(b'prob": 0.1', b'prob": 0.3'),
        ["dropout_prob in config.json", "0.1", "0.3"],
    ),
    # A word that is in no text: the token ids stay the same, but the tokenizer is saved with the model.
    "tokenizer": (
        "model/tokenizer.json",
        change_text(b'"63"', b'"sx"'),
        ["the tokenizer of --model model", "tokenizer.json"],
    ),
    "labels": ("test.csv", swap_labels, ["data_fingerprint"]),
}
"""By name: a file, how it is changed, and what a refusal says."""


def test_run_whose_base_weights_dropout_tokenizer_and_labels_changed_under_old_dates_does_not_resume(
    run, finished, tmp_path
):
    folder = copy_of(finished, tmp_path)
    for name, change, _ in CHANGES.values():
        rewrite(folder / name, change)
    refused = run("train.py", *LORA, code=2, cwd=folder).stderr
    for _, _, words in CHANGES.values():
        assert all(word in refused for word in words), words
    assert "--allow_changes" in refused
    assert "Traceback" not in refused


@pytest.mark.parametrize("what", CHANGES)
def test_each_change_of_what_a_run_began_with_is_named_whether_it_was_stopped_or_finished(
    call, finished, tmp_path, what
):
    name, change, words = CHANGES[what]
    for stopped in (True, False):
        folder = copy_of(finished, tmp_path, stopped)
        rewrite(folder / name, change)
        refused = call("train.py", *LORA, code=2, cwd=folder).stderr
        assert all(word in refused for word in words), refused
        others = [word for other, (_, _, (word, *_)) in CHANGES.items() if other != what]
        assert not any(word in refused for word in others), refused


def test_resume_does_not_promise_all_where_lines_of_the_log_are_gone(run, finished, tmp_path):
    folder = copy_of(finished, tmp_path)
    log = folder / "run" / "metrics.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join([lines[0], *lines[3:]]))
    printed = run("train.py", *LORA, cwd=folder).stdout
    assert "metrics.jsonl lacks 2 of the 4 steps" in printed
    assert "never stopped" not in printed


def test_run_goes_on_bit_by_bit_with_its_model_in_another_place(call, finished, tmp_path):
    moved = ["--model", "elsewhere", *LORA[2:]]
    for stopped in (True, False):
        folder = copy_of(finished, tmp_path, stopped)
        (folder / "model").rename(folder / "elsewhere")
        assert ("bit by bit" if stopped else "finished") in call("train.py", *moved, cwd=folder).stdout
    change_text(b"0.1", b"0.2")(folder / "elsewhere" / "config.json")
    refused = call("train.py", *moved, code=2, cwd=folder).stderr
    assert "model: model there, elsewhere now" in refused
    assert "dropout" in refused


def test_checkpoint_that_does_not_know_the_files_of_its_model_resumes_and_claims_less():
    now = flatten(TrainConfig()) | {f"run/{name}": {} for name in ("model_config", "tokenizer_sha256")}
    now |= {"run/model_sha256": "a1"}
    assert compare_settings(flatten(TrainConfig()), now) == []
    assert "bit by bit, if" in describe_promise(flatten(TrainConfig()), now, [])
    assert "bit by bit, if" not in describe_promise(now, now, [])


def test_moved_branch_of_a_model_is_refused_with_its_commits_only_where_the_weights_are_others():
    before = flatten(TrainConfig()) | {f"run/{name}": {} for name in ("model_config", "tokenizer_sha256")}
    before |= {"model": "user/tiny", "run/model_sha256": "a1 b2", "run/model_commit": "1" * 40}
    now = before | {"run/model_commit": "2" * 40}
    assert compare_settings(before, now) == []
    (line,) = compare_settings(before, now | {"run/model_sha256": "a1 c3"})
    assert all(word in line for word in ("1" * 40, "2" * 40, f"--model_revision {'1' * 40}", "user/tiny"))
