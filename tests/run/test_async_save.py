"""Checkpoints that are written while training goes on: the same files, published or absent, and no error is lost."""

import dataclasses
import errno
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

import train
from lib.errors import UserError
from lib.run import best_model, checkpoint
from lib.run import run as run_module
from lib.run.checkpoint import Checkpointer, list_checkpoints
from lib.run.snapshot import Copies, Snapshot, storages
from lib.runtime import processes
from lib.runtime.atomic import find_damage
from lib.runtime.signals import REQUEST, Stopped
from lib.training.state import State
from tests.conftest import WORKER_ENV, results_of
from tests.resuming import build, checkpointer, differences, leftovers, play, run_flags
from tests.resuming import publish as publish_best


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Until it is set, no tensor of a checkpoint is written."""
    opened, write = threading.Event(), checkpoint.write_tensors

    def wait(*arguments: Any) -> None:
        assert opened.wait(60)
        write(*arguments)

    monkeypatch.setattr(checkpoint, "write_tensors", wait)
    monkeypatch.setattr("lib.runtime.background.POLL_SECONDS", 0.01)
    yield opened
    opened.set()


def saver(accelerator: Accelerator, roberta: Path, folder: Path, **settings: Any) -> Checkpointer:
    """A checkpointer that saves in the background."""
    folder.mkdir()
    made = checkpointer(accelerator, folder, build(roberta, seed=1))
    made.config = dataclasses.replace(made.config, **{"async_save": True} | settings)
    return made


def train_on(learner: Any) -> None:
    """Change whatever a step changes, and an evaluation."""
    for parameter in learner.inner_model.parameters():
        parameter.grad = torch.full_like(parameter, 2.0)
    learner.optimizer.step()
    learner.scheduler.step()
    learner.state.step, learner.state.ingredients = 9, [{"step": 9, "scores": {}}]
    for buffer in learner.inner_model.buffers():
        buffer.add_(1)


def content(folder: Path) -> dict[str, Any]:
    """The files of a checkpoint; of state.json all but the time."""
    files: dict[str, Any] = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "manifest.json"}
    files["state.json"] = json.loads(files["state.json"])
    del files["state.json"]["interval"]["seconds"]
    return files


@pytest.mark.parametrize("broken", [False, True])
def test_checkpoint_is_that_of_its_step_byte_by_byte_whatever_is_trained_while_it_is_written(
    accelerator: Accelerator,
    roberta: Path,
    tmp_path: Path,
    gate: threading.Event,
    monkeypatch: pytest.MonkeyPatch,
    broken: bool,
) -> None:
    if broken:
        monkeypatch.setattr(Snapshot, "copied", lambda self, _: self)
    later = saver(accelerator, roberta, tmp_path / "later")
    later.save("run-7")
    train_on(later.learner)
    assert not list_checkpoints(tmp_path / "later" / "checkpoints")
    assert later.last is None
    gate.set()
    later.wait()
    assert later.last == tmp_path / "later" / "checkpoints" / "step-3"
    assert find_damage(later.last) is None
    at_once = saver(accelerator, roberta, tmp_path / "at_once", async_save=False)
    at_once.save("run-7")
    assert at_once.last is not None
    assert (content(later.last) == content(at_once.last)) is not broken


def test_copies_share_memory_as_the_tensors_did_and_leave_those_of_others() -> None:
    base, other = torch.arange(6.0), torch.ones(2)
    before = {"a": base, "view": base.view(2, 3).T, "others": [other, torch.tensor(7)], "numbers": [1, 2]}
    copies = Copies({storage.data_ptr() for storage in storages([base])})
    after = copies.of(before)
    copies.wait()
    assert torch.equal(after["a"], base)
    assert torch.equal(after["view"], before["view"])  # type: ignore[arg-type]
    assert after["view"].stride() == before["view"].stride()  # type: ignore[union-attr]
    assert after["a"].untyped_storage().data_ptr() == after["view"].untyped_storage().data_ptr() != base.data_ptr()
    assert after["others"][0] is other
    assert after["numbers"] == [1, 2]
    assert after["numbers"] is not before["numbers"]


def test_second_save_waits_for_the_first_and_old_checkpoints_stay_until_then(
    accelerator: Accelerator, roberta: Path, tmp_path: Path, gate: threading.Event
) -> None:
    names = lambda: [path.name for path in list_checkpoints(tmp_path / "run" / "checkpoints")]  # noqa: E731
    one = saver(accelerator, roberta, tmp_path / "run", save_total_limit=1)
    gate.set()
    one.save(None)
    one.wait()
    gate.clear()
    one.learner.state.step = 4
    one.save(None)
    one.learner.state.step = 5
    second = threading.Thread(target=one.save, args=(None,))
    second.start()
    second.join(0.3)
    assert second.is_alive()
    assert names() == ["step-3"]
    assert one.last == tmp_path / "run" / "checkpoints" / "step-3"
    gate.set()
    second.join()
    one.wait()
    assert names() == ["step-5"]


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("a library's"), UserError("not whole")]
)
def test_error_of_the_disk_ends_the_run_with_the_words_of_a_save_that_waits(
    accelerator: Accelerator, roberta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: Any) -> None:
        raise error

    write, told = checkpoint.write_tensors, []
    monkeypatch.setattr(checkpoint, "write_tensors", fail)
    monkeypatch.setattr(
        checkpoint, "explain", lambda error, folder: str(error)
    )  # which names the free space of the moment
    for background in (False, True):
        one = saver(accelerator, roberta, tmp_path / str(background), async_save=background)
        if background:
            one.save(None)
            while not one.has_failed:
                time.sleep(0.01)
            with pytest.raises(Stopped):
                processes.agree_to_stop(accelerator, one.has_failed)
        with pytest.raises(UserError) as caught:
            one.save(None)
        told.append(str(caught.value))
        assert not list((tmp_path / str(background) / "checkpoints").iterdir())
    assert told[0] == told[1]
    assert "checkpoint of step 3" in told[0]
    monkeypatch.setattr(checkpoint, "write_tensors", write)
    one.save(None)  # it was told once
    one.wait()
    assert one.last is not None


def test_error_that_nobody_expected_is_raised_as_it_is(
    accelerator: Accelerator, roberta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "write_tensors", lambda *_: {}["missing"])
    one = saver(accelerator, roberta, tmp_path / "run")
    one.save(None)
    with pytest.raises(KeyError, match="missing"):
        one.wait()


def test_at_the_end_of_a_failed_run_a_checkpoint_is_finished_or_its_error_is_printed(
    accelerator: Accelerator,
    roberta: Path,
    tmp_path: Path,
    gate: threading.Event,
    capsys: pytest.CaptureFixture[str],
) -> None:
    one = saver(accelerator, roberta, tmp_path / "run")
    for step, folder in ((3, one.folder), (4, tmp_path / "gone")):
        gate.clear()
        one.learner.state.step = step
        one.save(None)
        one.folder.rename(folder)
        threading.Timer(0.1, gate.set).start()
        one.end()
        shown = capsys.readouterr().err
        assert "waiting for the checkpoint" in shown
        assert ("could not be saved" in shown) is (step == 4)
    assert [path.name for path in list_checkpoints(tmp_path / "gone" / "checkpoints")] == ["step-3"]


def test_error_that_ends_the_run_is_told_before_a_checkpoint_is_waited_for(
    accelerator: Accelerator,
    roberta: Path,
    tmp_path: Path,
    gate: threading.Event,
    capsys: pytest.CaptureFixture[str],
) -> None:
    lost = torch.distributed.DistBackendError("a connection")
    one = saver(accelerator, roberta, tmp_path / "run")
    for step, error, begin in ((3, ValueError("the cause\nand more"), "the cause; waiting"), (4, lost, "waiting")):
        gate.clear()
        one.learner.state.step = step
        one.save(None)
        threading.Timer(0.1, gate.set).start()
        with pytest.raises(type(error)):  # noqa: PT012
            try:
                raise error
            finally:
                one.end()
        assert capsys.readouterr().err.startswith(f"{begin} for the checkpoint that is being written ...\n")


def test_save_that_waits_is_progress_of_all_processes_while_one_of_them_writes(
    accelerator: Accelerator, roberta: Path, tmp_path: Path, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They ask each other all the time."""
    asked, lowest = threading.Event(), processes.lowest_of_each

    def ask(accelerator: Accelerator, values: list[int]) -> list[int]:
        if values == [0, 1]:
            asked.set()
        return lowest(accelerator, values)

    monkeypatch.setattr("lib.runtime.background.lowest_of_each", ask)
    one = saver(accelerator, roberta, tmp_path / "run", async_save=False)
    save = threading.Thread(target=one.save, args=(None,))
    save.start()
    heard = asked.wait(20)
    assert save.is_alive()
    gate.set()
    save.join()
    assert heard
    assert one.last == tmp_path / "run" / "checkpoints" / "step-3"


def test_best_model_is_flushed_while_processes_ask_each_other(
    accelerator: Accelerator, roberta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, publish = threading.Event(), best_model.publish_folder

    def late(*arguments: Any) -> None:
        assert asked.wait(20)
        publish(*arguments)

    monkeypatch.setattr(best_model, "publish_folder", late)
    monkeypatch.setattr("lib.runtime.background.POLL_SECONDS", 0.02)
    monkeypatch.setattr("lib.runtime.background.beat", lambda _: asked.set())
    publish_best(accelerator, build(roberta), roberta, tmp_path / "model")
    assert find_damage(tmp_path / "model") is None


def test_main_memory_that_is_too_short_for_the_copy_is_a_message_with_the_way_out(
    accelerator: Accelerator, roberta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(Copies, "copy", refuse)
    with pytest.raises(UserError, match="--async_save False"):
        saver(accelerator, roberta, tmp_path / "run").save(None)


# ------------------------------------------------------------------------------------------------ whole runs

SETTINGS = {
    "a checkpoint after each step": ["--save_steps", 1],
    "averaged": ["--save_steps", 2, "--metric_for_best_model", "loss", "--average_checkpoints", 3],
    "frozen": ["--freeze", "backbone", "--no_cache_features", "True", "--save_steps", 2],
}


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Writing takes longer than several steps."""
    write = checkpoint.write_tensors
    monkeypatch.setattr(checkpoint, "write_tensors", lambda *arguments: (time.sleep(0.3), write(*arguments)))
    monkeypatch.setattr("lib.runtime.background.POLL_SECONDS", 0.02)


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("name", SETTINGS)
def test_run_equals_one_whose_training_waits(call: Any, roberta: Path, tmp_path: Path, name: str) -> None:
    flags = [*run_flags(tmp_path, roberta), "--max_steps", 6, *SETTINGS[name]]
    for folder, background in (("one", True), ("two", False)):
        call("train.py", *flags, "--async_save", background, "--output_dir", folder)
    assert not differences(tmp_path / "one", tmp_path / "two")
    assert not leftovers(tmp_path / "one")


def test_checkpoint_has_the_best_model_of_its_step_though_a_better_one_follows_while_it_is_written(
    call: Any, roberta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published, write, publish = threading.Event(), checkpoint.write_tensors, run_module.publish_model

    def write_late(snapshot: Snapshot, folder: Path) -> None:
        if snapshot.state.step == 3:
            published.wait(1.0)  # which nobody sets as long as the better model waits for this checkpoint
        write(snapshot, folder)

    def publish_and_tell(*arguments: Any) -> None:
        publish(*arguments)
        if (tmp_path / "late" / "model").exists() and any(
            t.name == "checkpoint of step 3" for t in threading.enumerate()
        ):
            published.set()

    def always_better(self: State, scores: dict[str, float], metric: str) -> bool:
        self.best_step = self.step
        self.set_best(scores, metric)
        return True

    monkeypatch.setattr(State, "update_best", always_better)
    monkeypatch.setattr(checkpoint, "write_tensors", write_late)
    monkeypatch.setattr(run_module, "publish_model", publish_and_tell)
    flags = [*run_flags(tmp_path, roberta), "--max_steps", 4, "--save_steps", 3]
    flags[flags.index("--eval_steps") + 1], flags[flags.index("--save_total_limit") + 1] = 1, 9
    best = {}
    for name, background in (("late", True), ("at_once", False)):
        call("train.py", *flags, "--async_save", background, "--output_dir", name)
        best[name] = (tmp_path / name / "checkpoints" / "step-3" / "best" / "model.safetensors").read_bytes()
    assert best["late"] == best["at_once"] != (tmp_path / "late" / "model" / "model.safetensors").read_bytes()


@pytest.mark.usefixtures("slow")
def test_stop_and_error_while_a_checkpoint_is_written_leave_it_published(
    call: Any, roberta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stop adds that of its own step; an error ends the run, and neither leaves a thread."""
    flags = [*run_flags(tmp_path, roberta), "--save_steps", 2, "--save_total_limit", 3, "--async_save", "True"]
    step = train.train_step

    def interrupted(how: Callable[[], None]) -> Callable[..., None]:
        def train_step(learner: Any, *arguments: Any) -> None:
            step(learner, *arguments)
            if learner.state.step == 3:
                assert any(thread.name == "checkpoint of step 2" for thread in threading.enumerate())
                how()

        return train_step

    def fail() -> None:
        raise ValueError("a fault")

    for how, expected, names in (
        (lambda: setattr(REQUEST, "reason", "SIGTERM"), Stopped, ["step-3-pending", "step-2"]),
        (fail, ValueError, ["step-2"]),
    ):
        folder = tmp_path / expected.__name__
        monkeypatch.setattr(train, "train_step", interrupted(how))  # type: ignore[arg-type]
        with pytest.raises(expected):
            call("train.py", *flags, "--output_dir", folder)
        REQUEST.reason = ""
        assert [path.name for path in list_checkpoints(folder / "checkpoints")] == names
        assert not list((folder / "checkpoints").glob(".tmp-*"))
        assert not any(thread.name.startswith("checkpoint") for thread in threading.enumerate())


def test_disk_that_is_full_ends_the_run_by_code_2_soon_and_the_checkpoint_before_stays(
    run: Any, roberta: Path, tmp_path: Path
) -> None:
    flags = [*run_flags(tmp_path, roberta), "--async_save", "True", "--save_steps", 2, "--output_dir", "run"]
    run("train.py", *flags, "--pause_at_step", 2, code=75)
    done = run(
        "tests/workers/faulty.py", json.dumps({"file_bytes": 50_000, "sleep": 0.3}), *flags, code=2, env=WORKER_ENV
    )
    assert done.stderr.count("the checkpoint of step 4 could not be saved") == 1
    assert "Traceback" not in done.stderr
    assert "step 6" not in done.stderr
    assert [path.name for path in list_checkpoints(tmp_path / "run" / "checkpoints")] == ["step-2"]


@pytest.mark.slow
def test_disk_that_is_full_is_told_once_by_two_processes(run: Any, roberta: Path, tmp_path: Path) -> None:
    flags = [*run_flags(tmp_path, roberta), "--async_save", "True", "--save_steps", 2, "--output_dir", "run"]
    fault = json.dumps({"file_bytes": 50_000, "sleep": 0.3})
    done = run("tests/workers/faulty.py", fault, *flags, processes=2, code=1, env=WORKER_ENV)
    assert "2 (gloo, CPU)" in done.stdout
    assert done.stderr.count("error: the checkpoint of step 2 could not be saved") == 1
    assert 'train.py", line' not in done.stderr
    assert not list_checkpoints(tmp_path / "run" / "checkpoints")


@pytest.mark.slow
def test_process_whose_thread_fails_alone_ends_the_run_with_the_cause(run: Any, roberta: Path, tmp_path: Path) -> None:
    """The threads of the others wait for it."""
    flags = [*run_flags(tmp_path, roberta), "--async_save", "True", "--save_steps", 2, "--output_dir", "run"]
    fault = json.dumps({"parts": True, "part": "a fault of one thread", "rank": 1})
    options = {"processes": 2, "config": "fsdp2.yaml", "env": WORKER_ENV}
    done = run("tests/workers/faulty.py", fault, *flags, code=1, **options)
    assert "FSDP2: 2 shards" in done.stdout
    assert (
        done.stderr.count("error: process 1 of 2: the checkpoint of step 2 could not be saved: a fault of one thread")
        == 1
    )
    assert "made no progress" not in done.stderr
    assert not list_checkpoints(tmp_path / "run" / "checkpoints")


@pytest.mark.slow
def test_model_in_shards_has_the_checkpoints_of_a_save_that_waits(run: Any, roberta: Path, tmp_path: Path) -> None:
    flags = [*run_flags(tmp_path, roberta), "--max_steps", 6, "--save_steps", 1]
    for folder, background in (("one", True), ("two", False)):
        done = run(
            "train.py",
            *(*flags, "--async_save", background, "--output_dir", folder),
            processes=2,
            config="fsdp2.yaml",
        )
        assert "FSDP2: 2 shards" in done.stdout
    assert not differences(tmp_path / "one", tmp_path / "two")


def test_kill_at_any_write_of_the_thread_leaves_a_valid_checkpoint_and_a_best_model(run: Any, tmp_path: Path) -> None:
    left = results_of(run("tests/workers/killed_writes.py", tmp_path, "background", env=WORKER_ENV))
    assert left["kills"] > 60
    assert left["old"] > 10
    assert left["new"] > 10
    assert left["no checkpoint"] == left["no model"] == 0


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_stopped_and_resumed_equals_uninterrupted_bit_by_bit(
    run: Any, roberta: Path, tmp_path: Path, processes: int
) -> None:
    flags = ["--async_save", "True", "--save_steps", "1"]
    calls: list[dict[str, Any]] = [{"folder": "whole"}]
    for step in (2, 3, 7):
        calls += [
            {"folder": f"after-{step}", "stop": step, "flags": flags},
            {"folder": f"after-{step}", "flags": flags},
        ]
    play(run, tmp_path, roberta, calls, processes)
    for call in calls[1:]:
        assert not differences(tmp_path / "whole", tmp_path / call["folder"]), call["folder"]
