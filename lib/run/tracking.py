"""metrics.jsonl, and a tracker (W&B, SwanLab, TensorBoard, Trackio) that gets a copy and never stops the run."""

import contextlib
import importlib.util
import json
import logging
import os
import secrets
import shlex
import string
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS

from lib.config.cli import load_config
from lib.config.sections import CLASSIFICATION, MULTI_LABEL, REGRESSION
from lib.config.train import TrackingConfig, TrainConfig
from lib.data.load import Data
from lib.errors import UserError, first_line, redact, require
from lib.evaluation.predictions import Predictions
from lib.evaluation.report import worst_rows
from lib.evaluation.scores import LOWER_IS_BETTER
from lib.evaluation.scoring import Scored, prefix
from lib.evaluation.tables import MOST_CLASSES, NAME_WIDTH, confusion_table, label_table
from lib.run.record import LISTED, bounded
from lib.runtime.atomic import finite, write_atomically
from lib.runtime.git import git
from lib.runtime.lock import check_free
from lib.runtime.screen import shorten
from lib.runtime.signals import leave
from lib.runtime.startup import when_script_fails
from lib.runtime.variables import variables

logger = logging.getLogger(__name__)

WANDB_INIT_SECONDS = 20
WANDB_FINISH_SECONDS = 60
SEND_SECONDS = 120.0
"""How long eval.py waits for a tracker that has no limit of its own."""
TRACKED = "tracker.json"
"""The file in the folder of a run that names the tracker's run, also before there is a checkpoint."""
MOST_POINTS = 10_000
"""Points of a plot and rows of a table: W&B keeps no more."""
PROJECT = "finetune"
PROJECTS = {"wandb": ("WANDB_PROJECT",), "swanlab": ("SWANLAB_PROJECT_NAME", "SWANLAB_PROJ_NAME")}
"""Variables of a tracker that name the project; `--project` wins over them."""


def check_tracker(name: str) -> None:
    """Raise UserError if the tracker is not installed, which Accelerate would ignore, or W&B does not take its variables."""
    if name != "none" and importlib.util.find_spec(name) is None:
        raise UserError(f"--report_to {name}: not installed; run: pip install {name}, or use --report_to none")
    if name == "wandb" and (given := variables("WANDB_")):
        check_wandb_variables(given)


def check_wandb_variables(given: dict[str, str]) -> None:
    """Raise UserError for an environment variable whose value W&B does not take, such as WANDB_MODE=ofline."""
    import wandb
    from pydantic import ValidationError

    for name, value in given.items():
        try:
            wandb.Settings().update_from_env_vars({name: value})
        except Exception as error:  # pydantic's, or W&B's own
            reason = first_line(error)
            if isinstance(error, ValidationError):
                problem = error.errors()[0]
                expected = problem.get("ctx", {}).get("expected")
                reason = f"W&B takes {expected}" if expected else problem["msg"]
            shown = "***" if "KEY" in name or "TOKEN" in name else redact(repr(value))
            raise UserError(
                f"{name}={shown}: {reason}; correct the variable or unset it, or use --report_to none"
            ) from error


class RunLog:
    """Writes metrics.jsonl and calls the tracker, on the main process; on other processes every method does nothing.

    metrics.jsonl has one JSON object per line, flushed when written: `step`, `samples_seen`, `time` (seconds since 1970),
    then the values. If the tracker raises an error, it is reported once and the tracker is not called again.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        folder: Path,
        config: TrackingConfig,
        last_step: int = 0,
        run_id: str | None = None,
        anew: bool = False,
    ) -> None:
        """Deletes the lines after `last_step`.

        The tracker's run `run_id` is resumed, else the one that this experiment began in the folder, unless it starts `anew`.
        """
        self.accelerator, self.folder, self.config, self.run_id = accelerator, folder, config, run_id
        self.file: TextIO | None = None
        self.tracked_step = self.logged_step = 0
        self.is_cut = False
        if accelerator.is_main_process:
            if anew:
                (folder / TRACKED).unlink(missing_ok=True)
            self.logged_step = max((line["step"] for line in read_log(folder / "metrics.jsonl")), default=0)
            self.tracked_step = truncate_log(folder / "metrics.jsonl", last_step)
            self.file = (folder / "metrics.jsonl").open("a", encoding="utf-8")
        self.tracker = config.report_to if accelerator.is_main_process and config.report_to != "none" else None

    def start(self, settings: dict[str, Any], metrics: Sequence[str]) -> None:
        """Start the tracker's run with `settings`, which hold its name under run_name; a failure of the script ends it.

        Of long lists among them the tracker gets the number of entries only.
        """
        if self.tracker is None:
            return
        when_script_fails(self.close)
        settings = {name: bounded(value) for name, value in settings.items()}
        try:
            if self.tracker == "wandb":
                self.start_wandb(settings, metrics)
            else:
                plain = {k: v if isinstance(v, (int, float, bool)) else str(v) for k, v in settings.items()}
                name = settings["run_name"]
                kwargs: dict[str, Any] = {}
                if self.tracker == "trackio":
                    _, resumed = self.name_run(settings, name)  # by name alone it would begin a second one
                    kwargs = {"name": name, "group": group_name(name), "resume": "allow" if resumed else "never"}
                if self.tracker == "swanlab":
                    kwargs = self.swanlab_settings(settings)
                self.accelerator.init_trackers(self.project, config=plain, init_kwargs={self.tracker: kwargs})
        except Exception as error:  # a tracker must never stop a run
            self.give_up("start", error)

    @property
    def project(self) -> str:
        """`--project`, else that of the tracker's variables."""
        return self.config.project or project_of(str(self.tracker))

    def swanlab_settings(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Options of `swanlab.init`. What SwanLab's variables name wins over our defaults, and loses to flags."""
        given, mode = variables("SWANLAB_"), swanlab_mode()
        wanted, known = given.get("SWANLAB_RUN_ID") or self.run_id, bool(given.get("SWANLAB_RUN_ID") or self.run_id)
        fresh = "".join(secrets.choice(string.ascii_lowercase + string.digits) for _ in range(21))  # its form of an id
        self.run_id, _ = self.name_run(settings, wanted or fresh, known)
        logs = Path(given.get("SWANLAB_LOG_DIR") or self.folder / "swanlog")
        logs.mkdir(parents=True, exist_ok=True)
        if mode == "offline":
            logger.info("SwanLab is offline; to upload this run later: swanlab sync %s/run-*", shlex.quote(str(logs)))
        named = given.get("SWANLAB_EXPERIMENT_NAME") or given.get("SWANLAB_EXP_NAME")
        tags = list(self.config.tags) or list(filter(None, given.get("SWANLAB_TAGS", "").split(",")))
        return {
            "experiment_name": self.config.run_name or named or settings["run_name"],
            "description": self.config.notes or given.get("SWANLAB_DESCRIPTION"),
            "group": given.get("SWANLAB_GROUP") or group_name(settings["run_name"]),
            "job_type": given.get("SWANLAB_JOB_TYPE") or "train",
            "tags": tags or None,
            "logdir": str(logs),
            "mode": mode,
            "id": self.run_id,
            "resume": "allow",
        }

    def start_wandb(self, settings: dict[str, Any], metrics: Sequence[str]) -> None:
        import wandb

        mode = wandb_mode()
        given = variables("WANDB_")
        # Named by us, so that it stays one run when it cannot start online.
        wanted, known = given.get("WANDB_RUN_ID") or self.run_id, bool(given.get("WANDB_RUN_ID") or self.run_id)
        self.run_id, resumed = self.name_run(settings, wanted or secrets.token_hex(4), known)
        kwargs: dict[str, Any] = ({"resume": "allow"} if resumed else {}) | {
            "id": self.run_id,
            "name": self.config.run_name or given.get("WANDB_NAME") or settings["run_name"],
            "group": given.get("WANDB_RUN_GROUP") or group_name(settings["run_name"]),
            "job_type": given.get("WANDB_JOB_TYPE") or "train",
            "tags": list(self.config.tags) or list(filter(None, given.get("WANDB_TAGS", "").split(","))),
            "notes": self.config.notes or given.get("WANDB_NOTES"),
            "dir": given.get("WANDB_DIR") or str(self.folder),
            "mode": mode,
            "settings": wandb_settings(mode, self.folder),
        }
        try:
            self.accelerator.init_trackers(self.project, config=settings, init_kwargs={"wandb": kwargs})
        except Exception as error:
            if mode != "online":
                raise
            logger.warning("W&B did not start online (%s); continuing offline", first_line(error))
            wandb.teardown()
            self.accelerator.trackers.clear()  # else the one that failed would be started again
            mode = kwargs["mode"] = "offline"
            self.accelerator.init_trackers(self.project, config=settings, init_kwargs={"wandb": kwargs})
        run = self.accelerator.get_tracker("wandb", unwrap=True)
        run.define_metric("samples_seen")
        run.define_metric("*", step_metric="samples_seen")
        for name in ("loss", *metrics):
            best = "min" if name in LOWER_IS_BETTER else "max"
            run.define_metric(f"eval/{name}", step_metric="samples_seen", summary=best)
        if mode == "offline":
            tell_upload(run)

    def name_run(self, settings: dict[str, Any], wanted: str, known: bool = False) -> tuple[str, bool]:
        """The id of the tracker's run, and whether an earlier start began it; the id is on disk before the tracker has it.

        An id that is `known`, from a checkpoint, is kept; else that of the same experiment in this folder is found again:
        it was killed before its first checkpoint. Steps that it logged are not sent again, also where WANDB_RUN_ID names it.
        """
        file, marks = self.folder / TRACKED, {"tracker": self.tracker, "experiment": settings.get("run/experiment")}
        begun = read_object(file)
        found = begun.get("run_id") if marks.items() <= begun.items() else None
        if isinstance(found, str) and (not known or (found == wanted and self.run_id is None)):
            self.tracked_step = max(self.tracked_step, self.logged_step)
            return found, True
        write_atomically(file, json.dumps(marks | {"run_id": wanted, "project": self.project}) + "\n")
        return wanted, known

    def log(self, step: int, samples_seen: int, values: dict[str, float]) -> None:
        """Add a line; steps must not go back. Steps that the tracker got before an interruption are not sent again."""
        if self.file is None:
            return
        line = {"step": step, "samples_seen": samples_seen, "time": round(time.time(), 3)} | values
        try:
            self.file.write(json.dumps({key: finite(value) for key, value in line.items()}) + "\n")
            self.file.flush()
        except OSError as error:  # a full disk; what fits into the buffer of the file is written when there is room
            if not self.is_cut:
                logger.warning(
                    "metrics.jsonl cannot be written from step %d on: %s; the run goes on", step, first_line(error)
                )
            self.is_cut = True
        if self.tracker and step > self.tracked_step:
            try:
                self.accelerator.log({"samples_seen": samples_seen} | values, step=step)
            except Exception as error:
                self.give_up("log", error)

    def sync(self) -> None:
        """Flush metrics.jsonl to the disk, before a checkpoint counts on its lines."""
        if self.file is not None and not self.file.closed:
            try:
                os.fsync(self.file.fileno())
            except OSError as error:
                logger.warning("metrics.jsonl may lack lines after a power failure: %s", first_line(error))

    def finish(self, results: dict[str, Any], scored: dict[str, Scored], data: Data) -> None:
        """Send the results to the tracker, to W&B with a plot and the worst errors; end its run in bounded time.

        Beside results.json these are, from the reports, the 95 % intervals and the scores of each class or label.
        """
        if self.tracker is not None:
            try:
                everything = results | report_values(self.folder, scored)
                if self.tracker == "wandb":
                    self.log_report(results, scored, data)
                    self.accelerator.get_tracker("wandb", unwrap=True).summary.update(everything)
                else:
                    numbers = {key: value for key, value in everything.items() if is_score(key, value)}
                    # Names of classes and methods may hold characters that a tracker does not take: after the scores.
                    named = {key for key in numbers if key.startswith("baselines/") or key.count("/") > 2}
                    for keys in filter(None, (numbers.keys() - named, named)):
                        self.accelerator.log({key: numbers[key] for key in sorted(keys)}, step=results["steps"])
            except Exception as error:
                self.give_up("log the report", error)
        self.close()

    def close(self, failure: BaseException | None = None) -> None:
        """End the tracker's run in bounded time, after a failure with its first line; again, it does nothing."""
        if self.file is not None:
            with contextlib.suppress(OSError):  # it was said
                self.file.close()
        if self.tracker is None:
            return
        try:
            # Not `end_training`: it also ends the process group, which the other processes still wait in.
            for tracker in self.accelerator.trackers:
                if failure is not None and self.tracker == "wandb":
                    tracker.tracker.summary["run/failure"] = first_line(failure)
                    tracker.tracker.finish(exit_code=1)
                elif failure is not None and self.tracker == "swanlab":
                    tracker.tracker.finish(state="crashed", error=first_line(failure))
                else:
                    if failure is not None:
                        tracker.log({"run/failure": first_line(failure)}, step=max(self.logged_step, self.tracked_step))
                    tracker.finish()
        except Exception as error:
            self.give_up("finish", error)
        self.tracker = None

    def log_report(self, results: dict[str, Any], scored: dict[str, Scored], data: Data) -> None:
        import wandb

        run = self.accelerator.get_tracker("wandb", unwrap=True)
        logged: dict[str, Any] = {"samples_seen": results["samples_seen"]}
        for split, (_, predictions) in scored.items():
            columns, rows = worst_rows(predictions, data.texts[split], data.label_names)
            media = wandb_picture(predictions, data.label_names) | {"errors": wandb.Table(columns=columns, data=rows)}
            logged |= {key: value for key, value in results.items() if key.startswith(f"{prefix(split)}/")}
            logged |= {f"{prefix(split)}/{name}": item for name, item in media.items()}
        run.log(logged, step=results["steps"])
        if variables("WANDB_").get("WANDB_LOG_MODEL", "false").lower() in ("end", "checkpoint", "true", "1"):
            artifact = wandb.Artifact(f"model-{self.run_id}", "model", metadata=finite(results))
            artifact.add_dir(str(self.folder / "model"))
            run.log_artifact(artifact)

    def give_up(self, what: str, error: Exception) -> None:
        logger.warning(
            "%s could not %s (%s); the run continues, metrics.jsonl has everything",
            self.tracker,
            what,
            first_line(error),
        )
        self.tracker = None


def wandb_picture(predictions: Predictions, label_names: list[str]) -> dict[str, Any]:
    """W&B's plot of a split: a confusion matrix, a scatter plot of numbers, or a table of labels.

    A split of many classes has the pairs that were confused most instead, and of many rows some are left out.
    """
    import wandb

    if len(predictions.labels) > MOST_POINTS and predictions.problem_type == REGRESSION:
        predictions = predictions.take(np.linspace(0, len(predictions.labels) - 1, MOST_POINTS).astype(np.int64))
    if len(label_names) > MOST_CLASSES and predictions.problem_type == CLASSIFICATION:
        pairs = [list(row.values()) for row in confusion_table(predictions, label_names)[:MOST_POINTS]]
        return {"confusions": wandb.Table(columns=["gold", "predicted", "samples"], data=pairs)}
    gold, predicted = predictions.labels.tolist(), predictions.predicted.tolist()
    if predictions.problem_type == REGRESSION:
        points = wandb.Table(columns=["gold", "predicted"], data=list(map(list, zip(gold, predicted, strict=True))))
        return {"scatter": wandb.plot.scatter(points, "gold", "predicted", title="predicted over gold")}
    if predictions.problem_type == MULTI_LABEL:
        rows = label_table(predictions, label_names)
        return {"labels": wandb.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows])}
    matrix = wandb.plot.confusion_matrix(y_true=gold, preds=predicted, class_names=label_names)
    return {"confusion_matrix": matrix}


def is_score(key: str, value: Any) -> bool:
    """Whether a value of the results is one that every tracker can plot: a score, not a setting."""
    return "/" in key and not key.startswith("run/") and type(value) in (int, float)


def report_values(folder: Path, splits: Iterable[str]) -> dict[str, Any]:
    """What the reports of the splits have beside the scores: `test/accuracy/low` and `/high`, `test/classes/NAME/f1`.

    Of more than a hundred classes or labels nothing: report.json has them.
    """
    found: dict[str, Any] = {}
    for split in splits:
        path = folder / f"eval-{split}" / "report.json"
        report = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        for name, (low, high) in report.get("intervals_95", {}).items():
            found |= {f"{prefix(split)}/{name}/low": low, f"{prefix(split)}/{name}/high": high}
        for table, key in (("classes", "class"), ("labels", "label")):
            rows = report.get(table, [])
            for row in rows if len(rows) <= LISTED else ():
                named = f"{prefix(split)}/{table}/{shorten(row[key], NAME_WIDTH)}"
                found |= {f"{named}/{column}": value for column, value in row.items() if column != key}
    return found


def send_scores(folder: Path, name: str, scores: dict[str, float]) -> None:
    """Add scores of a finished run to its own run in the tracker, as `evals/{name}/{metric}`; nothing if it has none.

    A run that is trained at the moment gets none: two processes would write one run of the tracker. Neither does one whose
    tracker.json is of another experiment than its record.json. A tracker that fails is reported and stops nothing; if it
    does not answer, this process ends, with code 0. Stdout is left to eval.py.
    """
    values = {f"evals/{name}/{metric}": value for metric, value in scores.items()}
    tracker = "the tracker"
    late = f"the tracker did not answer within {SEND_SECONDS:g} seconds and may lack these scores; the report has them"
    backstop = threading.Timer(SEND_SECONDS, leave, (late, 0))
    backstop.daemon = True
    backstop.start()
    try:
        tracking = load_config(TrainConfig, folder / "config.yaml").tracking
        tracker = tracking.report_to
        begun = read_object(folder / TRACKED)
        project = tracking.project or (begun.get("project") or project_of(tracker))
        TrackingConfig(project=project)  # of a folder that may be a stranger's
        events = tracker == "tensorboard" and any((folder / project).glob("events.out.*"))
        if tracker == "none" or not (events or begun.get("tracker") == tracker):
            return
        check_free(folder)
        results, own = read_object(folder / "results.json"), read_object(folder / "record.json").get("experiment")
        require("steps" in results, f"{folder} is not finished")
        same = events or (own is not None and begun.get("experiment") == own)
        require(same, f"{folder / TRACKED} is not of the run in this folder")
        check_tracker(tracker)
        link = next((path for name in ("wandb", "swanlog", project) if (path := folder / name).is_symlink()), None)
        require(link is None, f"{link} is a link")
        with contextlib.redirect_stdout(sys.stderr):
            if tracker == "wandb":
                add_to_wandb(folder, project, begun["run_id"], values)
            else:
                add_to_tracker(folder, tracker, project, begun.get("run_id"), values, results["steps"])
    except Exception as error:
        logger.warning("%s did not get these scores (%s); the report has them", tracker, first_line(error))
    finally:
        backstop.cancel()


def add_to_tracker(folder: Path, tracker: str, project: str, run_id: Any, values: dict[str, Any], step: int) -> None:
    """Log values at a step of a run in SwanLab, TensorBoard or Trackio, which must be there."""
    kwargs: dict[str, Any] = {}
    if tracker == "trackio":
        kwargs = {"name": run_id, "resume": "must"}
    if tracker == "swanlab":
        logs, mode = folder / "swanlog", swanlab_mode()
        kwargs = {"id": run_id, "resume": "allow" if mode == "offline" else "must"}
        kwargs |= {"logdir": str(logs), "mode": mode}
    kind = LOGGER_TYPE_TO_CLASS[tracker]
    opened = kind(project, *([folder] if kind.requires_logging_directory else []), **kwargs)
    opened.start()
    opened.log(values, step=step)
    opened.finish()


def add_to_wandb(folder: Path, project: str, run_id: str, values: dict[str, Any]) -> None:
    """Add values to the summary of a run: on the server, or as another piece of it in `folder`.

    `wandb sync` uploads such a piece with the others.
    """
    import wandb

    mode: Any = wandb_mode()
    kwargs: dict[str, Any] = {
        "project": project,
        "id": run_id,
        "dir": variables("WANDB_").get("WANDB_DIR", str(folder)),
    }
    try:
        # Only a run that is there: the folder may be a stranger's.
        resume: Any = "must" if mode == "online" else "allow"
        run = wandb.init(**kwargs, mode=mode, resume=resume, settings=wandb_settings(mode, folder))
    except Exception as error:
        if mode != "online":
            raise
        logger.warning("W&B did not open the run (%s); its new scores are kept offline", first_line(error))
        wandb.teardown()
        mode = "offline"
        run = wandb.init(**kwargs, mode="offline", resume="allow", settings=wandb_settings(mode, folder))
    run.summary.update(values)
    if mode == "offline":
        tell_upload(run)
    run.finish()


def wandb_settings(mode: str, folder: Path) -> Any:
    """W&B's settings for each of our processes: quiet, and bounded in time."""
    import wandb

    return wandb.Settings(
        init_timeout=WANDB_INIT_SECONDS,
        finish_timeout=WANDB_FINISH_SECONDS,
        console="off",
        save_code=False,
        quiet=True,  # online, the addresses of the run remain
        silent=mode == "offline",  # `tell_upload` says how to upload the run
        **git_address(folder),
    )


def tell_upload(run: Any) -> None:
    """Say how to upload a run that W&B has offline: all its folders, one of each start and of each eval.py."""
    folders = shlex.quote(str(Path(run.dir).parents[1]))
    logger.info("W&B is offline; to upload this run later: wandb sync %s/offline-run-*-%s", folders, run.id)


def project_of(tracker: str) -> str:
    """The project that the tracker's variables name."""
    given = variables("")
    return next((given[name] for name in PROJECTS.get(tracker, ()) if given.get(name)), PROJECT)


def swanlab_mode() -> str:
    """SWANLAB_MODE if it is set, else cloud with a login and offline without one, so that SwanLab never prompts."""
    given = variables("SWANLAB_")
    home = Path(given.get("SWANLAB_ROOT") or given.get("SWANLAB_SAVE_DIR") or Path.home() / ".swanlab")
    logged_in = given.get("SWANLAB_API_KEY") or (home / ".netrc").is_file()
    return given.get("SWANLAB_MODE") or ("cloud" if logged_in else "offline")


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; torn and foreign ones are left out, and a file that cannot be read has none."""
    with contextlib.suppress(OSError):
        return [json.loads(line) for line in path.read_bytes().splitlines() if logged_step(line) is not None]
    return []


def truncate_log(path: Path, last_step: int) -> int:
    """Delete the lines after `last_step` and what is no line of a log; returns the last step that was there before.

    Blank, torn and foreign lines are deleted and told; the lines behind them stay.
    """
    if not path.exists():
        return 0
    content = path.read_bytes() if last_step else b""
    seen, kept, broken = 0, [], []
    lines = content.split(b"\n")
    for number, line in enumerate(lines, start=1):
        step = None if number == len(lines) else logged_step(line)  # without its end, the last one is torn
        if step is None:
            broken += [number] if line or number < len(lines) else []
            continue
        seen = step
        kept += [line + b"\n"] if step <= last_step else []
    if broken:
        named = f"lines {', '.join(map(str, broken[:5]))}{' …' if len(broken) > 5 else ''}"
        print(f"warning: {path}: {len(broken)} blank, torn or foreign lines were deleted ({named})", flush=True)
    rest = b"".join(kept)
    if content.startswith(rest):  # needs no room on the disk
        os.truncate(path, len(rest))
    else:
        write_atomically(path, rest)
    return seen


def logged_step(line: bytes) -> int | None:
    """The step of a line of metrics.jsonl; None if it is none."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    return step if type(step) is int else None


def wandb_mode() -> str:
    """WANDB_MODE if it is set, else online with a login and offline without one, so that W&B never prompts."""
    import wandb
    from requests.utils import get_netrc_auth

    settings = wandb.setup().settings
    if settings.mode != "online":
        return settings.mode
    logged_in = settings.api_key or settings.identity_token_file or get_netrc_auth(settings.base_url)
    return "online" if logged_in else "offline"


def git_address(folder: Path) -> dict[str, Any]:
    """W&B's setting for the address of the git remote, where that holds a token or a password: without it.

    W&B itself removes the password alone, and a token may stand before it.
    """
    import wandb

    settings = wandb.setup().settings
    address = settings.git_remote_url or git(folder, "config", "--get", f"remote.{settings.git_remote}.url") or ""
    return {} if redact(address) == address else {"git_remote_url": redact(address)}


def group_name(run_name: str) -> str:
    """The name without its seed: runs of a group differ only in the seed."""
    stem, _, seed = run_name.rpartition("-s")
    return stem if stem and seed.isdigit() else run_name
