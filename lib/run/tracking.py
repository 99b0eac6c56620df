"""metrics.jsonl, the truth about a run, and W&B or another tracker of Accelerate, a copy that may fail without harm."""

import importlib.util
import json
import logging
import secrets
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from accelerate import Accelerator

from lib.config.sections import MULTI_LABEL, REGRESSION
from lib.config.train import TrackingConfig
from lib.data.load import Data
from lib.errors import UserError
from lib.evaluation.predictions import Predictions
from lib.evaluation.report import worst_rows
from lib.evaluation.scores import LOWER_IS_BETTER
from lib.evaluation.scoring import Scored, prefix
from lib.evaluation.tables import label_table
from lib.runtime.atomic import finite

logger = logging.getLogger(__name__)

WANDB_INIT_SECONDS = 20
WANDB_FINISH_SECONDS = 60


def check_tracker(name: str) -> None:
    """Raise UserError when the tracker asked for is not installed; Accelerate would drop it in silence."""
    package = {"wandb": "wandb", "tensorboard": "tensorboard", "trackio": "trackio"}.get(name)
    if package and importlib.util.find_spec(package) is None:
        raise UserError(f"--report_to {name}: not installed; run: pip install {package}, or use --report_to none")


class RunLog:
    """Writes what a run logs, on the main process; on the others every call does nothing.

    metrics.jsonl gets one object a line, flushed as it is written: `step`, `samples_seen`, `time` (seconds since 1970),
    then the values. Whatever the tracker raises is reported once, and the tracker is then left alone.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        folder: Path,
        config: TrackingConfig,
        last_step: int = 0,
        run_id: str | None = None,
    ) -> None:
        """Lines after `last_step` are taken back, and the tracker's run `run_id` goes on where it was."""
        self.accelerator, self.folder, self.config, self.run_id = accelerator, folder, config, run_id
        self.file: TextIO | None = None
        self.tracked_step = 0
        if accelerator.is_main_process:
            self.tracked_step = take_back(folder / "metrics.jsonl", last_step)
            self.file = (folder / "metrics.jsonl").open("a", encoding="utf-8")
        self.tracker = config.report_to if accelerator.is_main_process and config.report_to != "none" else None

    def start(self, settings: dict[str, Any], metrics: Sequence[str]) -> None:
        """Start the tracker's run; `settings` is what runs are compared by, with the name under run_name."""
        if self.tracker is None:
            return
        try:
            if self.tracker == "wandb":
                self.start_wandb(settings, metrics)
            else:
                plain = {k: v if isinstance(v, (int, float, bool)) else str(v) for k, v in settings.items()}
                name = settings["run_name"]
                kwargs = {"trackio": {"name": name, "group": group_name(name)}} if self.tracker == "trackio" else {}
                self.accelerator.init_trackers(self.config.project, config=plain, init_kwargs=kwargs)
        except Exception as error:  # a tracker must never stop a run
            self.give_up("start", error)

    def start_wandb(self, settings: dict[str, Any], metrics: Sequence[str]) -> None:
        import wandb

        mode = wandb_mode()
        resume = {"resume": "allow"} if self.run_id else {}
        # Named by us, so that it stays one run when it cannot start online.
        self.run_id = self.run_id or secrets.token_hex(4)
        kwargs: dict[str, Any] = resume | {
            "id": self.run_id,
            "name": settings["run_name"],
            "group": group_name(settings["run_name"]),
            "job_type": "train",
            "tags": list(self.config.tags),
            "notes": self.config.notes,
            "dir": str(self.folder),
            "mode": mode,
            "settings": wandb.Settings(
                init_timeout=WANDB_INIT_SECONDS, finish_timeout=WANDB_FINISH_SECONDS, console="off", save_code=False
            ),
        }
        try:
            self.accelerator.init_trackers(self.config.project, config=settings, init_kwargs={"wandb": kwargs})
        except Exception as error:
            if mode != "online":
                raise
            logger.warning("W&B did not start online (%s); going on offline", first_line(error))
            wandb.teardown()
            self.accelerator.trackers.clear()  # else the one that failed would be started again
            mode = kwargs["mode"] = "offline"
            self.accelerator.init_trackers(self.config.project, config=settings, init_kwargs={"wandb": kwargs})
        run = self.accelerator.get_tracker("wandb", unwrap=True)
        run.define_metric("samples_seen")
        run.define_metric("*", step_metric="samples_seen")
        for name in ("loss", *metrics):
            best = "min" if name in LOWER_IS_BETTER else "max"
            run.define_metric(f"eval/{name}", step_metric="samples_seen", summary=best)
        if mode == "offline":
            logger.info("W&B is offline; to upload this run later: wandb sync %s", Path(run.dir).parent)

    def log(self, step: int, samples_seen: int, values: dict[str, float]) -> None:
        """Add a line; steps must not go back. What the tracker got before an interruption it does not get again."""
        if self.file is None:
            return
        line = {"step": step, "samples_seen": samples_seen, "time": round(time.time(), 3)} | values
        self.file.write(json.dumps({key: finite(value) for key, value in line.items()}) + "\n")
        self.file.flush()
        if self.tracker and step > self.tracked_step:
            try:
                self.accelerator.log({"samples_seen": samples_seen} | values, step=step)
            except Exception as error:
                self.give_up("log", error)

    def finish(self, results: dict[str, Any], scored: dict[str, Scored], data: Data) -> None:
        """Give W&B the final numbers, a picture and the worst errors; end the tracker's run in bounded time."""
        if self.tracker == "wandb":
            try:
                self.log_report(results, scored, data)
            except Exception as error:
                self.give_up("log the report", error)
        self.close()

    def close(self) -> None:
        """End the tracker's run in bounded time."""
        if self.file is not None:
            self.file.close()
        if self.tracker is None:
            return
        try:
            # Not `end_training`: it also ends the process group, which the other processes still wait in.
            for tracker in self.accelerator.trackers:
                tracker.finish()
        except Exception as error:
            self.give_up("finish", error)

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
        run.summary.update(results)

    def give_up(self, what: str, error: Exception) -> None:
        logger.warning(
            "%s could not %s (%s); the run goes on, metrics.jsonl has everything", self.tracker, what, first_line(error)
        )
        self.tracker = None


def wandb_picture(predictions: Predictions, label_names: list[str]) -> dict[str, Any]:
    """What W&B draws: a confusion matrix, predicted over gold numbers, or the table of the labels."""
    import wandb

    gold, predicted = predictions.labels.tolist(), predictions.predicted.tolist()
    if predictions.problem_type == REGRESSION:
        points = wandb.Table(columns=["gold", "predicted"], data=list(map(list, zip(gold, predicted, strict=True))))
        return {"scatter": wandb.plot.scatter(points, "gold", "predicted", title="predicted over gold")}
    if predictions.problem_type == MULTI_LABEL:
        rows = label_table(predictions, label_names)
        return {"labels": wandb.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows])}
    matrix = wandb.plot.confusion_matrix(y_true=gold, preds=predicted, class_names=label_names)
    return {"confusion_matrix": matrix}


def take_back(path: Path, last_step: int) -> int:
    """Cut the lines after `last_step` off, and a torn one; return the last step that was there before."""
    seen = end = 0
    if last_step and path.exists():
        for line in path.read_bytes().splitlines(keepends=True):
            if not line.endswith(b"\n"):
                break
            seen = json.loads(line)["step"]
            end += len(line) if seen <= last_step else 0
    with path.open("ab") as file:
        file.truncate(end)
    return seen


def wandb_mode() -> str:
    """W&B's own mode where it is set (WANDB_MODE), else online with a login and offline without, instead of a prompt."""
    import wandb
    from requests.utils import get_netrc_auth

    settings = wandb.setup().settings
    if settings.mode != "online":
        return settings.mode
    logged_in = settings.api_key or settings.identity_token_file or get_netrc_auth(settings.base_url)
    return "online" if logged_in else "offline"


def group_name(run_name: str) -> str:
    """The name without its seed: runs of a group differ by seed alone."""
    stem, _, seed = run_name.rpartition("-s")
    return stem if stem and seed.isdigit() else run_name


def first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
