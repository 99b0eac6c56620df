"""eval.py's scores are added to the run's own run in its tracker; SwanLab gets runs as the other trackers do."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS

from lib.config.cli import dump_config, parse
from lib.config.train import TrainConfig
from lib.errors import UserError
from lib.run.tracking import send_scores
from tests.conftest import ROOT, Command, results_of, sentences, write_csv
from tests.wandb_files import wandb_records

SWANLAB = """
import json, os, sys

config = {}


def note(what, *values):
    with open(os.environ["CALLS"], "a") as file:
        file.write(json.dumps([what, *values]) + "\\n")


class Run:
    def log(self, values, step=None):
        note("log", step, values)

    def finish(self, **how):
        note("finish", how)


def init(**settings):
    note("init", settings)
    return Run()
"""


def finished_run(folder: Path, tracker: str, *flags: str, **begun: str) -> Path:
    """What is left of a run that was tracked."""
    folder.mkdir(exist_ok=True)
    config = parse(TrainConfig, ["--report_to", tracker, *flags])
    (folder / "config.yaml").write_text(dump_config(config))
    (folder / "results.json").write_text('{"steps": 12}')
    (folder / "record.json").write_text('{"experiment": "a"}')
    if begun:
        (folder / "tracker.json").write_text(
            json.dumps({"tracker": tracker, "run_id": "abc", "experiment": "a"} | begun)
        )
    return folder


class Recorder:
    """A class of trackers that notes its calls; `fails` in `start`."""

    requires_logging_directory = False

    def __init__(self, fails: bool = False) -> None:
        self.calls: list[Any] = []
        self.fails = fails

    def __call__(self, project: str, **settings: Any) -> "Recorder":
        self.calls.append((project, settings))
        return self

    def start(self) -> None:
        if self.fails:
            raise ConnectionError("unplugged")

    def log(self, values: dict[str, Any], step: int) -> None:
        self.calls.append((step, values))

    def finish(self) -> None:
        self.calls.append("finish")


def test_scores_of_eval_are_added_to_the_run_in_its_tracker_and_replace_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = Recorder()
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "trackio", tracker)
    send_scores(finished_run(tmp_path, "trackio", project="lab"), "other-test", {"accuracy": 0.5})
    opened = ("lab", {"name": "abc", "resume": "must"})
    assert tracker.calls == [opened, (12, {"evals/other-test/accuracy": 0.5}), "finish"]


@pytest.mark.parametrize(("tracker", "begun"), [("none", {"run_id": "abc"}), ("trackio", {}), ("tensorboard", {})])
def test_run_that_was_not_tracked_is_not_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tracker: str, begun: dict[str, str], caplog: Any
) -> None:
    recorder = Recorder()
    for name in ("trackio", "tensorboard"):
        monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, name, recorder)
    send_scores(finished_run(tmp_path, tracker, **begun), "test", {"accuracy": 0.5})
    assert recorder.calls == []
    assert not caplog.records


def test_run_that_is_still_trained_is_not_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "trackio", recorder := Recorder())
    folder = finished_run(tmp_path, "trackio", project="lab")
    owner = "import pathlib, sys; from lib.runtime.lock import FolderLock; FolderLock(pathlib.Path(sys.argv[1])).take()"
    command = [sys.executable, "-c", owner + "; print(1, flush=True); input()", str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT) as training:
        assert training.stdout is not None
        training.stdout.readline()
        send_scores(folder, "test", {"accuracy": 0.5})  # for longer: there are results of before
        training.communicate(b"\n", timeout=60)
    (folder / "results.json").unlink()
    send_scores(folder, "test", {"accuracy": 0.5})
    assert recorder.calls == []
    assert "not finished" in caplog.text
    assert len(caplog.records) == 2


HANGING = """
import pathlib, time
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from lib.run import tracking


class Hanging:
    requires_logging_directory = False

    def __init__(self, project, **settings):
        print("project of the tracker")
        time.sleep(300)


LOGGER_TYPE_TO_CLASS["trackio"], tracking.SEND_SECONDS = Hanging, 0.5
tracking.send_scores(pathlib.Path("run"), "test", {"accuracy": 0.25})
"""


def test_tracker_that_does_not_answer_is_not_waited_for(tmp_path: Path) -> None:
    finished_run(tmp_path / "run", "trackio", project="lab")
    done = in_process(tmp_path, HANGING)
    assert "did not answer" in done.stderr
    assert done.stdout == ""  # it is for the results of eval.py


def test_tracker_that_fails_stops_no_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "trackio", Recorder(fails=True))
    send_scores(finished_run(tmp_path, "trackio", project="lab"), "test", {"accuracy": 0.5})
    assert "unplugged" in caplog.text


def test_eval_adds_its_scores_to_the_events_of_tensorboard_unless_told_not_to(
    call: Command, roberta: Path, tmp_path: Path
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train, other = (write_csv(tmp_path / f"{name}.csv", sentences(24, seed)) for seed, name in enumerate("ab"))
    flags = ["--model", roberta, "--train_file", train, "--test_file", other, "--max_steps", 2]
    call("train.py", *flags, "--output_dir", "run", "--report_to", "tensorboard", "--mixed_precision", "no")
    call("eval.py", "--run", "run", "--split", "validation", "--report_to", "none")
    found = results_of(call("eval.py", "--run", "run", "--split", "test"))
    values: dict[str, float] = {}
    for folder in {path.parent for path in (tmp_path / "run").rglob("events.out.*")}:
        events = EventAccumulator(str(folder)).Reload()
        values |= {tag: events.Scalars(tag)[-1].value for tag in events.Tags()["scalars"]}
    assert values["evals/test/accuracy"] == pytest.approx(found["test/accuracy"])
    assert not [tag for tag in values if tag.startswith("evals/validation")]
    assert {"test/accuracy", "test/accuracy/low", "test/classes/bad/f1"} <= values.keys()
    assert [tag for tag in values if tag.startswith("baselines/")]


def in_process(folder: Path, code: str, **environment: str) -> subprocess.CompletedProcess:
    """Run code in a process without anybody's login."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB", "SWANLAB"))}
    own = {"HOME": str(folder), "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)} | environment
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=inherited | own,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done


WANDB = """
import logging, pathlib, sys
from lib.run.tracking import send_scores

logging.basicConfig(level=logging.INFO, stream=sys.stderr)
send_scores(pathlib.Path("run"), "test", {"accuracy": 0.25})
"""


def test_scores_of_eval_are_another_piece_of_an_offline_wandb_run(tmp_path: Path) -> None:
    finished_run(tmp_path / "run", "wandb", project="lab", run_id="abcd1234")
    in_process(tmp_path, WANDB, WANDB_MODE="offline")
    (path,) = (tmp_path / "run" / "wandb").glob("offline-run-*-abcd1234/run-abcd1234.wandb")
    summary, projects, history = {}, set(), 0
    for record in wandb_records(path):
        for item in record.summary.update:
            summary["/".join([item.key] if item.key else item.nested_key)] = json.loads(item.value_json)
        projects |= {record.run.project} - {""}
        history += record.WhichOneof("record_type") == "history"
    assert summary["evals/test/accuracy"] == 0.25
    assert projects == {"lab"}
    assert history == 0  # no line of the run's own is replaced


TRAIN = """
import pathlib
from accelerate import Accelerator
from lib.config.train import TrackingConfig
from lib.run.tracking import RunLog, send_scores

folder, tracking = pathlib.Path("run"), TrackingConfig(report_to="swanlab", tags=("a",))
for last_step, steps in ((0, (1, 2)), (1, (2, 3))):
    log = RunLog(Accelerator(cpu=True, log_with="swanlab"), folder, tracking, last_step, log.run_id if last_step else None)
    log.start({"run_name": "mine-s1", "run/experiment": "a"}, ["accuracy"])
    for step in steps:
        log.log(step, 8 * step, {"train/loss": 0.5})
    log.close(ValueError("out of memory") if last_step else None)
send_scores(folder, "test", {"accuracy": 0.25})
"""


def test_swanlab_gets_one_run_also_after_a_resume_and_the_scores_of_eval(tmp_path: Path) -> None:
    """SwanLab itself is not among the packages of the tests: a module in its place notes what it is asked for."""
    (tmp_path / "fake" / "swanlab").mkdir(parents=True)
    (tmp_path / "fake" / "swanlab" / "__init__.py").write_text(SWANLAB)
    (tmp_path / "fake" / "swanlab-9.dist-info").mkdir()
    (tmp_path / "fake" / "swanlab-9.dist-info" / "METADATA").write_text("Name: swanlab\nVersion: 9\n")
    finished_run(tmp_path / "run", "swanlab")
    path = f"{ROOT}:{tmp_path / 'fake'}"
    in_process(tmp_path, TRAIN, PYTHONPATH=path, CALLS=str(tmp_path / "calls"), SWANLAB_PROJ_NAME="lab")
    calls = [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]
    starts = [call[1] for call in calls if call[0] == "init"]
    assert [start["project"] for start in starts] == ["lab"] * 3
    assert len({start["id"] for start in starts}) == 1
    assert len(starts[0]["id"]) == 21
    assert [start["mode"] for start in starts] == ["offline"] * 3  # nobody is logged in, and nobody is asked
    assert (starts[0]["experiment_name"], starts[0]["group"], starts[0]["tags"]) == ("mine-s1", "mine", ["a"])
    logged = [(call[1], call[2]) for call in calls if call[0] == "log"]
    assert [step for step, _ in logged[:3]] == [1, 2, 3]
    assert logged[3][1] == {"evals/test/accuracy": 0.25}
    assert ["finish", {"state": "crashed", "error": "out of memory"}] in calls


def test_folder_of_a_stranger_has_nothing_written_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "trackio", recorder := Recorder())
    send_scores(finished_run(tmp_path / "run", "trackio", project="../elsewhere"), "test", {"accuracy": 0.5})
    folder = finished_run(tmp_path / "run", "trackio", project="lab")
    (folder / "wandb").symlink_to(tmp_path)
    send_scores(folder, "test", {"accuracy": 0.5})
    assert "is a link" in caplog.text
    (folder / "wandb").unlink()
    (folder / "tracker.json").write_text('{"tracker": "trackio", "run_id": "abc", "experiment": "another"}')
    send_scores(folder, "test", {"accuracy": 0.5})
    assert "is not of the run" in caplog.text
    assert recorder.calls == []


@pytest.mark.parametrize("project", [".", ".."])
def test_project_that_is_a_place_among_folders_is_refused(project: str) -> None:
    with pytest.raises(UserError, match="--project"):
        parse(TrainConfig, ["--project", project])
