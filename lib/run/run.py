"""A run as one object: folder, settings, log, checkpoints, best model, progress, results."""

import contextlib
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from lib.config.train import TrainConfig
from lib.data.load import Data
from lib.data.loader import Batches, lost_worker
from lib.data.trained_on import store_trained_on
from lib.errors import UserError, first_line, printable
from lib.evaluation.baselines import compare_with_baselines
from lib.evaluation.intervals import bootstrap_intervals
from lib.evaluation.report import write_report
from lib.evaluation.scores import Metrics
from lib.evaluation.scoring import Scored
from lib.model.card import write_model_card
from lib.model.sharding import is_sharded
from lib.model.source import LoadingInfo
from lib.model.weights import load_mean
from lib.run.best_model import publish_model, restore_model
from lib.run.checkpoint import LEARNED_UNDER, MEMORY, Checkpointer, read_best_steps, remove_checkpoints
from lib.run.introduction import describe_run
from lib.run.learning_curves import draw_learning_curves
from lib.run.ownership import check_run_folder
from lib.run.progress import Progress
from lib.run.record import run_folder, run_settings, trained_on, write_record
from lib.run.results import build_results, next_commands, write_results
from lib.run.resume import choose_checkpoint, find_results, open_folder
from lib.run.tracking import RunLog, check_tracker
from lib.runtime.atomic import explain
from lib.runtime.lock import NAME as LOCK
from lib.runtime.lock import FolderLock, check_free, locked_folder
from lib.runtime.processes import agree_to_stop, check_shared, check_time, finish
from lib.runtime.screen import json_line
from lib.runtime.signals import Stopped, deferring_signals
from lib.runtime.startup import when_script_fails
from lib.runtime.watchdog import watching
from lib.training.learner import Learner
from lib.training.state import State

Result = TypeVar("Result")


class Run:
    """One experiment on disk and on the screen; only the main process writes, and every process calls every method."""

    def __init__(self, config: TrainConfig, accelerator: Accelerator) -> None:
        """Writes nothing.

        Raises UserError if the tracker asked for is not installed or has a wrong setting in the environment, another process
        has the folder, or the run would replace files of somebody else in it; Stopped if a launcher started the run again
        after the end of `--max_minutes`.
        """
        self.config, self.accelerator, self.folder = config, accelerator, run_folder(config)
        self.lock: FolderLock | None = None
        self.results: dict[str, Any] = {}
        check_time(accelerator, config.training.max_minutes)
        self.on_first(self.check)

    def check(self) -> None:
        check_tracker(self.config.tracking.report_to)
        check_free(self.folder)
        check_run_folder(self.config, self.folder)

    def on_first(self, work: Callable[[], Result]) -> Result:
        """What `work` returns on the main process, on every process; so are its UserError, and errors of the disk as one."""
        outcome: list[Any] = [None, None]
        if self.accelerator.is_main_process:
            try:
                outcome = [work(), None]
            except UserError as error:
                outcome = [None, str(error)]
            except OSError as error:
                path, folder = Path(str(error.filename or self.folder)).absolute(), self.folder.absolute()
                ours = folder in (path, *path.parents)
                why = f"{folder} cannot be used: {explain(error, self.folder)}" if ours else first_line(error)
                outcome = [None, why]
        result, problem = broadcast_object_list(outcome)
        if problem is not None:
            raise UserError(problem)
        return result

    def is_finished(self, data: Data) -> bool:
        """Whether this run was finished before; its results are printed again, and the process group ends.

        Raises UserError if the run that was finished has other settings or data.
        """
        results = self.on_first(lambda: find_results(self.config, self.folder, data))
        if results is None:
            return False
        self.results = results
        self.on_first(self.remove_lock)
        if self.accelerator.is_main_process:
            again = "to train again: --resume_from_checkpoint never, or another --output_dir"
            print(f"{printable(str(self.folder))} holds this run, finished; {again}")
            print(json_line(results), flush=True)
        finish(self.accelerator)
        return True

    def remove_lock(self) -> None:
        """Remove the lock file of a process that was killed when it had written the results."""
        if (self.folder / LOCK).exists():
            lock = FolderLock(self.folder)
            lock.take()
            lock.release()

    def start(self, learner: Learner, batches: Batches, metrics: Metrics, weights: LoadingInfo) -> None:
        """Open and lock the folder, print the start block, load the checkpoint to resume from, start log and tracker.

        Raises UserError if the folder is in use or holds another experiment, or if the checkpoint that
        `--resume_from_checkpoint` asks for is missing or damaged.
        """
        accelerator, config, folder = self.accelerator, self.config, self.folder
        self.metrics = metrics
        self.settings = run_settings(config, learner, batches, metrics, weights)
        store_trained_on(learner.inner_model.config, trained_on(batches.data, metrics))
        check_shared(accelerator, folder, self.on_first(self.open))
        checkpoint = self.on_first(lambda: choose_checkpoint(config.training, folder, self.settings))
        self.on_first(lambda: write_record(folder, self.settings, {}))
        if accelerator.is_main_process:
            print(describe_run(config, self.settings, learner, batches, weights), flush=True)
        self.checkpointer = Checkpointer(folder, config.training, self.settings, learner)
        run_id = self.checkpointer.load(checkpoint) if checkpoint else None
        if is_sharded(learner.model):
            when_script_fails(self.checkpointer.note_smaller)
        smaller = self.on_first(self.checkpointer.read_smaller)
        self.checkpointer.use_smaller(smaller)
        for name, value in smaller.items() if accelerator.is_main_process else ():
            flag, unit = LEARNED_UNDER[name][0], "positions" if name == "micro_batch_positions" else "samples"
            print(
                f"out of memory before: at most {value:,} {unit} a forward, until another --{flag} is set", flush=True
            )
        anew = config.training.resume_from_checkpoint == "never"

        def open_log() -> None:
            self.log = RunLog(accelerator, folder, config.tracking, learner.state.last_logged, run_id, anew)

        self.on_first(open_log)
        if not accelerator.is_main_process:
            open_log()
        self.log.start(self.settings, metrics.names)

    def open(self) -> str:
        self.lock = open_folder(self.config, self.folder)
        when_script_fails(lambda _: self.release())
        return str(self.lock.owner["token"])

    def release(self) -> None:
        """Give the lock of the folder back, on the process that has it."""
        if self.lock:
            self.lock.release()

    @contextlib.contextmanager
    def guard(self, learner: Learner) -> Iterator[None]:
        """Within, a signal or the time limit ends in a checkpoint and a closed log, and a process that hangs is named.

        Raises UserError if a worker of a data loader is lost.
        """
        rank, training = self.accelerator.process_index, self.config.training
        self.progress = Progress(self.accelerator, learner.plan.total_steps, learner.state)
        learner.meter.start_clock()
        watched = watching(self.folder / "heartbeats", rank, training.ddp_timeout)
        with watched, deferring_signals(training.max_minutes):
            try:
                yield
                self.checkpointer.wait()
            except Stopped:
                self.save_checkpoint()
                self.checkpointer.wait()
                self.log.close()
                self.accelerator.wait_for_everyone()
                self.release()
                raise
            except Exception as error:
                if lost := lost_worker(error):
                    raise UserError(lost) from error
                raise
            finally:
                self.progress.close()
                self.checkpointer.end()
        if learner.state.step < learner.plan.total_steps:
            self.progress.write(
                f"stopped early at step {learner.state.step}: no better {learner.plan.best_metric} within "
                "--early_stopping_patience evaluations"
            )

    def log_values(self, state: State, values: dict[str, float]) -> None:
        """Write a line of metrics.jsonl, send it to the tracker, and print the scores of an evaluation."""
        scores = {name.removeprefix("eval/"): value for name, value in values.items() if name.startswith("eval/")}
        if scores:
            listed = "  ".join(f"{name} {value:.4f}" for name, value in scores.items())
            self.progress.write(f"step {state.step}, validation:  {listed}")
            if not math.isfinite(scores[self.metrics.best]) and math.isfinite(scores["loss"]):
                self.progress.write(
                    f"{self.metrics.best} is not defined for these predictions: where it is not, the loss chooses the model"
                )
        self.log.log(state.step, state.samples_seen, values)
        state.logged += 1

    def agree_to_stop(self) -> None:
        """Raise Stopped on every process if one was asked to stop, or a checkpoint could not be written; `guard` ends the run."""
        agree_to_stop(self.accelerator, self.checkpointer.has_failed)

    def save_checkpoint(self) -> None:
        self.log.sync()
        self.checkpointer.save(self.log.run_id)

    def save_best(self, learner: Learner, tokenizer: Any) -> None:
        """Export the model of this step to `model/`, replacing the best one so far.

        A checkpoint that is being written needs that one, and is waited for.
        """
        self.checkpointer.wait()
        self.on_first(self.checkpointer.check_folder)
        publish_model(self.accelerator, learner.model, tokenizer, self.folder / "model")

    def averages(self, learner: Learner) -> Iterator[list[int]]:
        """Means of kept weights, each loaded into the model and given as the steps it is the mean of; ask before the next.

        The greedy soup of Wortsman et al. (2022): the best weights, to which the others are added one by one in the order of
        their scores, and stay if the mean is better. None without `--average_checkpoints`.
        """
        state, metric = learner.state, self.metrics.best
        if not (self.config.training.average_checkpoints and state.best_step):
            return
        files = self.on_first(self.checkpointer.find_ingredients)
        if state.best_step not in files:
            self.progress.write(
                f"nothing is averaged: the weights of the best model, of step {state.best_step}, are not kept"
            )
            return
        state.averaged_steps = [state.best_step]
        for step in [step for step in files if step != state.best_step]:
            steps, before = [*state.averaged_steps, step], state.best_scores
            load_mean(learner.inner_model, [files[step] for step in steps])
            yield steps
            kept = state.averaged_steps == steps
            found = "  ".join(
                f"{name} {before[name]:.4f} -> {state.best_scores[name]:.4f}"
                for name in dict.fromkeys([metric, "loss"])
            )
            self.progress.write(
                f"mean of the weights of steps {', '.join(map(str, steps))}: "
                + (f"better on validation, {found}" if kept else f"not better on validation; step {step} is left out")
            )

    def load_best(self, learner: Learner) -> None:
        """Load the model that `save_best` exported. Raises UserError if there is none: no evaluation had a finite loss."""
        self.on_first(self.checkpointer.check_folder)
        is_mean = len(learner.state.averaged_steps) > 1  # which no checkpoint has
        checkpoints = () if is_mean else read_best_steps(self.folder / "checkpoints")
        restore_model(self.accelerator, learner.model, self.folder / "model", learner.state, checkpoints)

    def finish(self, learner: Learner, scored: dict[str, Scored], data: Data) -> dict[str, Any]:
        """Write reports, model card and results.json, then print them, results.json as the last line on stdout.

        Ends the process group; returns the results.
        """
        results = build_results(self.config, self.settings, learner, scored)
        shown, baselines = self.on_first(lambda: self.write_reports(results, scored, data, learner.state))
        results |= {
            f"baselines/{name}/{key}": value for name, found in baselines.items() for key, value in found.items()
        }
        self.log.finish(results, scored, data)
        shown += self.on_first(lambda: self.write_end(results))
        if self.accelerator.is_main_process:
            print("\n".join(shown), flush=True)
        self.release()
        finish(self.accelerator, learner.model, learner.optimizer)
        return results

    def write_reports(
        self, results: dict[str, Any], scored: dict[str, Scored], data: Data, state: State
    ) -> tuple[list[str], dict[str, dict[str, float]]]:
        """Write the reports, the curves, the model card and the record.

        Returns the reports as text, and what simple methods score on the same split.
        """
        self.checkpointer.check_folder()
        texts = []
        for split, result in scored.items():
            intervals = bootstrap_intervals(result.predictions, self.metrics.names)
            folder = self.folder / f"eval-{split}"
            with locked_folder(folder, wait=600):  # eval.py may be writing there
                texts.append(write_report(folder, split, result, intervals, data))
        split, (scores, _) = next(iter(scored.items()))
        baselines, text = compare_with_baselines(data, split, scores, self.metrics, self.accelerator.device)
        texts.append(text)
        texts += draw_learning_curves(self.folder, self.metrics.best, state.best_step)
        thresholds = next((p.thresholds for _, p in scored.values() if p.thresholds is not None), np.array([]))
        temperature = results.get("run/temperature")
        write_model_card(self.folder / "model", data.name, self.settings, results, thresholds.tolist(), temperature)
        named = dict(zip(data.label_names, thresholds.tolist(), strict=False))
        outcome = {"thresholds": named, "temperature": temperature, "best_step": state.best_step}
        outcome |= {"averaged_steps": state.averaged_steps} if state.averaged_steps else {}
        write_record(self.folder, self.settings, outcome)
        return texts, baselines

    def write_end(self, results: dict[str, Any]) -> list[str]:
        """Write results.json, by which a run is known to be finished; returns what is printed last."""
        texts = [next_commands(self.folder), write_results(self.folder, results)]
        shutil.rmtree(self.folder / MEMORY, ignore_errors=True)
        if self.config.training.save_total_limit == 0:
            remove_checkpoints(self.folder / "checkpoints")
        return texts
