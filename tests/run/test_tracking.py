"""metrics.jsonl is complete whatever the tracker does; a run has one tracker run, also when it resumes."""

import contextlib
import importlib.util
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from datasets import Dataset

from lib.config.train import TrackingConfig
from lib.data.load import Data
from lib.errors import UserError, first_line
from lib.evaluation.predictions import Predictions
from lib.run.checkpoint import Checkpointer
from lib.run.tracking import RunLog, check_tracker, git_address, group_name, truncate_log, wandb_mode, wandb_picture
from lib.runtime import startup
from tests.conftest import ROOT, Command, read_lines, sentences, write_csv
from tests.evaluation.samples import class_predictions, label_predictions, number_predictions
from tests.wandb_files import wandb_records

SETTINGS = {"run_name": "minilm-s7", "learning_rate": 1e-4, "model": None, "run/devices": ["CPU"]}
PREDICTIONS = Predictions(np.eye(2, dtype=np.float32), np.array([0, 1]), np.zeros(2, dtype=np.float32))
SCORED = {"test": ({"accuracy": 1.0}, PREDICTIONS)}
DATA = Data("x", {"test": Dataset.from_dict({"text": ["a", "b"]})}, {}, {}, ["bad", "good"], ("text",), ())
RESULTS = {"test/accuracy": 1.0, "steps": 3, "samples_seen": 24}


class FakeTracker(GeneralTracker):
    """Records its calls; raises in the method `fails_at`."""

    name, requires_logging_directory, main_process_only = "fake", False, False

    def __init__(self, fails_at: str | None = None) -> None:
        super().__init__(_blank=True)
        self.fails_at, self.calls = fails_at, []

    def note(self, what: str, *values: Any) -> None:
        self.calls.append((what, *values))
        if what == self.fails_at:
            raise RuntimeError(f"no {what}\nwith a long explanation")

    @property
    def tracker(self) -> None:
        return None

    def start(self) -> None:
        self.note("start")

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.note("settings", values)

    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        self.note("log", step, values)

    def finish(self) -> None:
        self.note("finish")


def tracked(tracker: FakeTracker) -> Accelerator:
    accelerator = Accelerator(cpu=True)
    accelerator.log_with = [tracker]
    return accelerator


def open_log(folder: Path, accelerator: Accelerator | None = None, report_to: str = "none") -> RunLog:
    return RunLog(accelerator or Accelerator(cpu=True), folder, TrackingConfig(report_to=report_to))


def log_run(folder: Path, tracker: FakeTracker) -> None:
    """A run of three steps, logged to `tracker`."""
    log = open_log(folder, tracked(tracker), "tensorboard")
    log.start(SETTINGS, ["accuracy"])
    for step in (1, 2, 3):
        log.log(step, 8 * step, {"train/loss": 1 / step})
    log.finish(RESULTS, SCORED, DATA)


# ---------------------------------------------------------------------------------------------------- trackers


def test_tracker_gets_everything_once(tmp_path: Path) -> None:
    tracker = FakeTracker()
    log_run(tmp_path, tracker)
    assert [call[0] for call in tracker.calls] == ["start", "settings", "log", "log", "log", "log", "finish"]
    assert tracker.calls[5] == ("log", 3, {"test/accuracy": 1.0})
    assert tracker.calls[2] == ("log", 1, {"samples_seen": 8, "train/loss": 1.0})
    assert tracker.calls[1][1]["learning_rate"] == 1e-4
    assert all(isinstance(value, (int, float, str)) for value in tracker.calls[1][1].values())


@pytest.mark.parametrize("fails_at", ["start", "settings", "log", "finish"])
def test_failing_tracker_never_stops_a_run(tmp_path: Path, fails_at: str, caplog: pytest.LogCaptureFixture) -> None:
    tracker = FakeTracker(fails_at)
    with caplog.at_level(logging.WARNING):
        log_run(tmp_path, tracker)
    assert [row["step"] for row in read_lines(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    assert tracker.calls[-1][0] == fails_at
    warnings = [record.getMessage() for record in caplog.records if record.name == "lib.run.tracking"]
    assert len(warnings) == 1
    assert f"(no {fails_at})" in warnings[0]


@pytest.mark.parametrize("method", ["init_trackers", "log"])
def test_failing_init_trackers_never_stops_a_run(tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("unplugged")

    monkeypatch.setattr(Accelerator, method, fail)
    log_run(tmp_path, FakeTracker())
    assert len(read_lines(tmp_path / "metrics.jsonl")) == 3


def test_closing_the_tracker_keeps_the_process_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other processes still wait for this one in the group."""
    ended: list[bool] = []
    monkeypatch.setattr("accelerate.state.PartialState.destroy_process_group", lambda *_: ended.append(True))
    tracker = FakeTracker()
    log_run(tmp_path, tracker)
    assert tracker.calls[-1] == ("finish",)
    assert ended == []


def test_without_a_tracker_none_is_called(tmp_path: Path) -> None:
    tracker = FakeTracker()
    log = open_log(tmp_path, tracked(tracker), "none")
    log.start(SETTINGS, [])
    log.log(1, 8, {})
    log.finish(RESULTS, SCORED, DATA)
    assert tracker.calls == []
    assert len(read_lines(tmp_path / "metrics.jsonl")) == 1


def test_only_the_main_process_writes(tmp_path: Path) -> None:
    log = open_log(tmp_path, SimpleNamespace(is_main_process=False), "wandb")
    log.start(SETTINGS, [])
    log.log(1, 8, {})
    log.finish(RESULTS, SCORED, DATA)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["wandb", "swanlab", "tensorboard", "trackio"])
def test_missing_tracker_package_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)
    with pytest.raises(UserError, match=f"--report_to {name}.*pip install {name}"):
        check_tracker(name)
    check_tracker("none")


def test_installed_tracker_is_accepted() -> None:
    check_tracker("wandb")


# ---------------------------------------------------------------------------------------------------- metrics.jsonl


def refuse_constant(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


def test_line_begins_with_step_samples_and_time_and_keeps_the_order_of_values(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    log.log(2, 16, {"z": 1.5, "a": 2})
    (row,) = read_lines(tmp_path / "metrics.jsonl")
    assert abs(time.time() - row["time"]) < 60
    assert list(row.items()) == [("step", 2), ("samples_seen", 16), ("time", row["time"]), ("z", 1.5), ("a", 2)]
    log.finish({}, SCORED, DATA)


def test_line_is_on_disk_before_the_run_ends(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    for step in (1, 2, 3):
        log.log(step, 8 * step, {"train/loss": 0.5})
        assert len(read_lines(tmp_path / "metrics.jsonl")) == step
    log.finish({}, SCORED, DATA)


def test_numbers_that_are_not_finite_are_strict_json(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    log.log(1, 8, {"nan": float("nan"), "up": float("inf"), "down": float("-inf"), "fine": 1e-9})
    log.finish({}, SCORED, DATA)
    row = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse_constant)
    assert (row["nan"], row["up"], row["down"], row["fine"]) == ("NaN", "Infinity", "-Infinity", 1e-9)


# ---------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("minilm-sst5-lr5e-05-bs32-ep3-s42", "minilm-sst5-lr5e-05-bs32-ep3"),
        ("mine-s1", "mine"),
        ("my-sweep", "my-sweep"),
        ("run-small", "run-small"),
        ("-s1", "-s1"),
        ("plain", "plain"),
    ],
)
def test_group_is_the_name_without_its_seed(name: str, group: str) -> None:
    assert group_name(name) == group


@pytest.mark.parametrize(("message", "line"), [("\n one\ntwo", "one"), ("", "ValueError")])
def test_error_is_reported_by_its_first_line(message: str, line: str) -> None:
    assert first_line(ValueError(message)) == line


# ---------------------------------------------------------------------------------------------------- W&B


@pytest.fixture
def alone(tmp_path: Path) -> Callable[..., str]:
    """Run code in a process with an empty home and no W&B settings but those given; returns what it prints."""

    def call(code: str, **environment: str) -> str:
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB", "NETRC"))}
        home = tmp_path / "home"
        home.mkdir()
        places = {"HOME": str(home), "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
        command = [sys.executable, "-c", code]
        everything = inherited | places | environment
        done = subprocess.run(command, env=everything, cwd=tmp_path, capture_output=True, text=True, timeout=100)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return call


ASK_MODES = """
import os, wandb
from lib.run.tracking import wandb_mode

for environment in ({}, {"WANDB_API_KEY": "0" * 40}, {"WANDB_API_KEY": "0" * 40, "WANDB_MODE": "disabled"}):
    os.environ.update(environment)
    print(wandb_mode())
    wandb.teardown()
"""


def test_wandb_is_online_with_a_login_and_offline_without(alone: Callable[..., str]) -> None:
    assert alone(ASK_MODES).split() == ["offline", "online", "disabled"]


def test_wandb_mode_of_the_environment_wins() -> None:
    assert wandb_mode() == os.environ["WANDB_MODE"] == "offline"


@pytest.mark.parametrize("login", ["ghp_" + "a1" * 12, "Tok3n:x-oauth-basic", "user:pass/word"])
def test_wandb_gets_the_address_of_the_git_remote_without_a_login(login: str, tmp_path: Path) -> None:
    subprocess.run(["git", "init", "-q", tmp_path], check=True, timeout=60)
    assert git_address(tmp_path) == {}
    for remote, kept in (("https://host.org/a/b", {}), (f"https://{login}@host.org/a/b", "https://***@host.org/a/b")):
        subprocess.run(["git", "-C", tmp_path, "config", "remote.origin.url", remote], check=True, timeout=60)
        assert git_address(tmp_path) == ({"git_remote_url": kept} if kept else {})


FALL_BACK = """
import pathlib, wandb
from accelerate import Accelerator
from lib.config.train import TrackingConfig
from lib.run.tracking import RunLog

init, modes = wandb.init, []

def init_without_server(**settings):
    modes.append(settings["mode"])
    if settings["mode"] == "online":
        raise wandb.errors.CommError("no server")
    return init(**settings)

wandb.init = init_without_server
log = RunLog(Accelerator(cpu=True, log_with="wandb"), pathlib.Path(), TrackingConfig(report_to="wandb"))
log.start({"run_name": "mine-s1"}, ["accuracy"])
log.log(1, 8, {"train/loss": 0.5})
print(*modes, log.tracker, wandb.run.name, wandb.run.group)
wandb.finish()
"""


def test_wandb_that_cannot_start_online_continues_offline(alone: Callable[..., str], tmp_path: Path) -> None:
    printed = alone(FALL_BACK, WANDB_API_KEY="0" * 40, WANDB_SILENT="true")
    assert printed.splitlines()[-1] == "online offline wandb mine-s1 mine"
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


NAMES = """
import json, pathlib, sys, wandb
from accelerate import Accelerator
from lib.config.train import TrackingConfig
from lib.run.tracking import RunLog

options = json.loads(sys.stdin.read() or "{}")
log = RunLog(Accelerator(cpu=True, log_with="wandb"), pathlib.Path(), TrackingConfig(report_to="wandb", **options))
log.start({"run_name": "mine-s1"}, ["accuracy"])
run = wandb.run
found = [run.name, run.group, run.project, run.settings.run_job_type, sorted(run.tags), run.notes, run.id]
print(json.dumps([*found, len(list(pathlib.Path("elsewhere").glob("wandb/offline-run-*")))]))
wandb.finish()
"""
LAB = {"WANDB_NAME": "theirs", "WANDB_RUN_GROUP": "all", "WANDB_PROJECT": "lab", "WANDB_JOB_TYPE": "sweep"}
LAB |= {"WANDB_TAGS": "b,a", "WANDB_NOTES": "why", "WANDB_RUN_ID": "abc123", "WANDB_DIR": "elsewhere"}


@pytest.mark.parametrize(
    ("options", "variables", "expected"),
    [
        ({}, LAB, ["theirs", "all", "lab", "sweep", ["a", "b"], "why", "abc123", 1]),
        pytest.param(
            {"run_name": "own", "project": "mine", "tags": ["c"], "notes": "because"},
            LAB,
            ["own", "all", "mine", "sweep", ["c"], "because", "abc123", 1],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"project": "finetune"},  # as without a variable, and yet it was asked for
            LAB,
            ["theirs", "all", "finetune", "sweep", ["a", "b"], "why", "abc123", 1],
            marks=pytest.mark.slow,
        ),
        pytest.param({}, {}, ["mine-s1", "mine", "finetune", "train", [], None, None, 0], marks=pytest.mark.slow),
    ],
)
def test_wandb_variables_of_a_lab_win_over_defaults_and_lose_to_options(
    alone: Callable[..., str], tmp_path: Path, options: dict[str, Any], variables: dict[str, str], expected: list[Any]
) -> None:
    (tmp_path / "elsewhere").mkdir()
    code = NAMES.replace('sys.stdin.read() or "{}"', repr(json.dumps(options)))
    found = json.loads(alone(code, WANDB_MODE="offline", WANDB_SILENT="true", **variables).splitlines()[-1])
    assert found == [*expected[:6], expected[6] or found[6], expected[7]]


def test_lines_after_the_checkpoint_and_incomplete_ones_are_deleted(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step}) + "\n" for step in (2, 4, 6)]
    path.write_text("".join(lines) + '{"step": 8, "tra')
    assert truncate_log(path, 4) == 6
    assert path.read_text() == "".join(lines[:2])
    assert truncate_log(path, 0) == 0
    assert path.read_text() == ""
    assert truncate_log(tmp_path / "none.jsonl", 4) == 0


def test_blank_torn_and_foreign_lines_are_told_and_lose_no_line_behind_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "metrics.jsonl"
    good = [json.dumps({"step": step, "samples_seen": step}).encode() for step in (1, 2, 3)]
    torn = [b"", b'{"step": 2, "sam', b"\0" * 64, b"null", b'"a note"', b'{"step": "x"}', b"\xff"]
    path.write_bytes(b"\n".join([good[0], *torn, good[1], good[2], b'{"step": 4']))
    assert truncate_log(path, 2) == 3
    assert path.read_bytes() == b"".join(line + b"\n" for line in good[:2])
    told = capsys.readouterr().out
    assert str(path) in told
    assert "8 blank, torn or foreign lines" in told
    assert truncate_log(path, 2) == 2
    assert not capsys.readouterr().out


def test_log_is_on_the_disk_before_the_checkpoint_that_counts_on_it(
    call: Any, roberta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, write, fsync, synced = [], Checkpointer.write, os.fsync, []

    def note(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def save(self: Checkpointer, *arguments: Any) -> None:
        seen.append(any(name.endswith("metrics.jsonl") for name in synced))
        write(self, *arguments)
        synced.clear()

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(Checkpointer, "write", save)
    train = write_csv(tmp_path / "train.csv", sentences(12))
    flags = ["--model", roberta, "--train_file", train, "--report_to", "none", "--output_dir", "run", "--max_steps", 2]
    call("train.py", *flags, "--save_steps", 1)
    assert seen == [True, True]


def test_steps_sent_before_an_interruption_are_not_sent_again(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps({"step": step}) + "\n" for step in (2, 4, 6)))
    tracker = FakeTracker()
    accelerator = Accelerator(cpu=True)
    accelerator.trackers = [tracker]
    log = RunLog(accelerator, tmp_path, TrackingConfig(report_to="tensorboard"), last_step=4)
    for step in (6, 8):
        log.log(step, step, {"train/loss": 1.0})
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == [2, 4, 6, 8]
    assert [call[1] for call in tracker.calls if call[0] == "log"] == [8]


RESUME = """
import pathlib, sys
from accelerate import Accelerator
from lib.config.train import TrackingConfig
from lib.run.tracking import RunLog

for last_step, steps in ((0, (2, 4, 6)), (4, (6, 8))):
    log = RunLog(
        Accelerator(cpu=True, log_with="wandb"), pathlib.Path(), TrackingConfig(report_to="wandb"), last_step,
        log.run_id if last_step else None,
    )
    log.start({"run_name": "mine-s1"}, ["accuracy"])
    for step in steps:
        log.log(step, 8 * step, {"train/loss": 1.0 / step})
    log.close()
    print(log.run_id)
"""


def test_resumed_run_is_the_same_wandb_run_and_no_step_goes_back(alone: Callable[..., str], tmp_path: Path) -> None:
    first, second = alone(RESUME, WANDB_SILENT="true").splitlines()[-2:]
    assert first == second
    files = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns)
    assert {path.name for path in files} == {f"run-{first}.wandb"}
    assert [steps_of(path) for path in files] == [[2, 4, 6], [8]]


START_AGAIN = """
import pathlib, sys
from accelerate import Accelerator
from lib.config.train import TrackingConfig
from lib.run.tracking import RunLog

tracking = TrackingConfig(report_to=sys.argv[1] if len(sys.argv) > 1 else "wandb")
for experiment, steps, anew in (("a", (1, 2), False), ("a", (1, 2, 3), False), ("b", (1,), False), ("b", (1,), True)):
    log = RunLog(Accelerator(cpu=True, log_with="wandb"), pathlib.Path(), tracking, anew=anew)
    log.start({"run_name": "mine-s1", "run/experiment": experiment}, ["accuracy"])
    for step in steps:
        log.log(step, 8 * step, {"train/loss": 1.0 / step})
    log.close()
    print(log.run_id)
"""


@pytest.mark.slow
def test_start_before_the_first_checkpoint_is_the_same_wandb_run_unless_the_experiment_is_another_or_anew(
    alone: Callable[..., str], tmp_path: Path
) -> None:
    first, second, other, anew = alone(START_AGAIN, WANDB_SILENT="true").splitlines()[-4:]
    assert first == second
    assert len({first, other, anew}) == 3
    files = sorted(tmp_path.glob(f"wandb/offline-run-*/run-{first}.wandb"), key=lambda path: path.stat().st_mtime_ns)
    assert [steps_of(path) for path in files] == [[1, 2], [3]]
    assert read_lines(tmp_path / "metrics.jsonl")[-1]["step"] == 1


def test_run_that_is_killed_before_its_first_checkpoint_and_started_again_is_one_wandb_run(
    roberta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = write_csv(tmp_path / "train.csv", sentences(48))
    flags = ["--model", roberta, "--train_file", train, "--output_dir", "out", "--max_steps", 100_000]
    flags += ["--eval_steps", 100_000, "--logging_steps", 1, "--mixed_precision", "no"]
    monkeypatch.delenv("WANDB_SERVICE", raising=False)
    ids = []
    for _ in range(2):
        (tmp_path / "out" / "metrics.jsonl").unlink(missing_ok=True)
        command = [sys.executable, ROOT / "train.py", *map(str, flags)]
        environment = os.environ | {"ACCELERATE_USE_CPU": "true"}
        with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL) as process:
            try:
                log, limit = tmp_path / "out" / "metrics.jsonl", time.monotonic() + 100
                while not (log.is_file() and log.stat().st_size) and process.poll() is None:
                    assert time.monotonic() < limit
                    time.sleep(0.1)
            finally:
                process.kill()
        assert not (tmp_path / "out" / "checkpoints").exists()
        ids.append({path.name[-8:] for path in (tmp_path / "out" / "wandb").glob("offline-run-*")})
    assert len(ids[0]) == 1
    assert ids[1] == ids[0]


@pytest.mark.parametrize(
    ("name", "value", "known"), [("WANDB_MODE", "ofline", "'offline'"), ("WANDB_CONSOLE", "of", "'off'")]
)
def test_misspelt_variable_of_wandb_is_refused_with_its_values(
    call: Command, roberta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str, known: str
) -> None:
    monkeypatch.setenv(name, value)
    train = write_csv(tmp_path / "train.csv", sentences(24))
    flags = ["--model", roberta, "--train_file", train, "--max_steps", 1, "--mixed_precision", "no"]
    refused = call("train.py", *flags, code=2).stderr
    assert all(word in refused for word in (name, value, known, "--report_to none"))
    assert not (tmp_path / "outputs").exists()
    check_tracker("none")


@pytest.mark.parametrize("mode", ["online", "offline", "dryrun", "disabled"])
def test_modes_of_wandb_are_accepted(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", mode)
    check_tracker("wandb")


def steps_of(path: Path) -> list[int]:
    """The steps in a W&B file, in its order."""
    steps = []
    for record in wandb_records(path):
        if record.WhichOneof("record_type") == "history":
            values = {item.key or item.nested_key[0]: item.value_json for item in record.history.item}
            steps.append(int(values.get("_step", record.history.step.num)))
    return steps


def exit_codes(path: Path) -> list[int]:
    return [record.exit.exit_code for record in wandb_records(path) if record.WhichOneof("record_type") == "exit"]


def failure_of(path: Path) -> str:
    """The failure in the summary of a W&B file."""
    updates = [record.summary.update for record in wandb_records(path) if record.WhichOneof("record_type") == "summary"]
    return next(item.value_json for items in updates for item in items if "run/failure" in (item.key, *item.nested_key))


@pytest.mark.parametrize("processes", [None, 2])
def test_run_that_ends_by_an_error_closes_its_tracker_with_the_failure_and_all_lines(
    run: Command, roberta: Path, tmp_path: Path, processes: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = write_csv(tmp_path / "train.csv", sentences(48))
    flags = ["--model", roberta, "--train_file", train, "--output_dir", "out", "--train_batch_size", 8]
    flags += ["--max_steps", 9]
    flags += ["--learning_rate", 1000, "--weight_decay", 1000, "--logging_steps", 1, "--mixed_precision", "no"]
    monkeypatch.delenv("WANDB_SERVICE", raising=False)  # that of the tests, which outlives the run
    done = run("train.py", *flags, processes=processes, code=1 if processes else 2)
    assert "not finite" in done.stderr
    lines = read_lines(tmp_path / "out" / "metrics.jsonl")
    (path,) = (tmp_path / "out").glob("wandb/offline-run-*/*.wandb")
    assert steps_of(path) == [line["step"] for line in lines] != []
    assert exit_codes(path) == [1]
    assert "not finite" in failure_of(path)


def test_run_that_ends_well_closes_its_tracker_with_code_0(alone: Callable[..., str], tmp_path: Path) -> None:
    alone(RESUME, WANDB_SILENT="true")
    assert [exit_codes(path) for path in tmp_path.glob("wandb/offline-run-*/*.wandb")] == [[0], [0]]


@pytest.mark.parametrize("error", [UserError("full"), RuntimeError("out of memory"), KeyboardInterrupt()])
def test_failure_of_a_script_closes_the_tracker_once(
    tmp_path: Path, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(startup, "AT_FAILURE", [])
    monkeypatch.setattr(startup.REQUEST, "ending", False)
    monkeypatch.setattr(os, "_exit", lambda code: None)
    tracker = FakeTracker()

    def main(_: object) -> None:
        log = open_log(tmp_path, tracked(tracker), "tensorboard")
        log.start(SETTINGS, ["accuracy"])
        log.log(1, 8, {"train/loss": 0.5})
        raise error

    with contextlib.suppress(RuntimeError, KeyboardInterrupt):
        startup.run_script(main, None)
    assert [call[0] for call in tracker.calls] == ["start", "settings", "log", "log", "finish"]
    assert "run/failure" in tracker.calls[3][2]
    assert len(read_lines(tmp_path / "metrics.jsonl")) == 1


def test_tracker_gets_the_number_of_thousands_of_classes(tmp_path: Path) -> None:
    tracker = FakeTracker()
    log = open_log(tmp_path, tracked(tracker), "tensorboard")
    log.start(SETTINGS | {"run/label_names": [f"class {number}" for number in range(5000)]}, ["accuracy"])
    assert "5,000 entries" in tracker.calls[1][1]["run/label_names"]


@pytest.mark.parametrize(
    ("predictions", "key"),
    [(class_predictions(9000, 500), "confusions"), (label_predictions(50, 300), "labels")],
    ids=["classes", "labels"],
)
def test_wandb_gets_a_bounded_table_of_many_classes(predictions: Predictions, key: str) -> None:
    media = wandb_picture(predictions, [f"class {number}" for number in range(predictions.logits.shape[1])])
    assert list(media) == [key]
    assert 100 < len(media[key].data) <= 10_000


def test_wandb_gets_a_bounded_plot_of_many_numbers() -> None:
    plot = wandb_picture(number_predictions(12_000), ["stars"])["scatter"]
    assert len(plot.table.data) == 10_000


def test_variable_that_wandb_refuses_with_an_error_of_its_own_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_PROJECT", "team/proj")
    with pytest.raises(UserError, match=r"WANDB_PROJECT='team/proj'.*--report_to none"):
        check_tracker("wandb")


def test_steps_of_a_run_that_a_variable_names_are_not_sent_again_before_its_first_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    settings = {"run/experiment": "a"}
    log = RunLog(Accelerator(cpu=True), tmp_path, TrackingConfig(report_to="wandb"))
    assert log.name_run(settings, "given", known=True) == ("given", True)
    assert log.tracked_step == 0
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    again = RunLog(Accelerator(cpu=True), tmp_path, TrackingConfig(report_to="wandb"))
    assert again.name_run(settings, "given", known=True) == ("given", True)
    assert again.tracked_step == 2
    assert again.name_run(settings, "other", known=True) == ("other", True)
