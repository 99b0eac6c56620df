"""A resumed run equals an uninterrupted one; damaged checkpoints are found and not used."""

import json
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from lib.config.sections import HubConfig, flatten
from lib.config.train import TrainConfig
from lib.data.batching import BATCHES_PER_MEGABATCH
from lib.errors import UserError
from lib.run.checkpoint import list_checkpoints
from lib.run.record import compare_settings
from lib.run.resume import describe_promise, find_checkpoint
from tests.conftest import ROOT, WORKER_ENV, read_lines, results_of, sentences, write_csv
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
    again = call("train.py", *flags, "--epochs", 1)
    assert results_of(again) == results
    assert "finished" in again.stdout
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
