"""The numbers that end a run: reports, results.json, the model card."""

import json
import shlex
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from lib.config.eval import EvalConfig
from lib.config.train import TrainConfig
from lib.data.catalog import ROLES, catalog_entry, own_files
from lib.data.load import Data
from lib.errors import printable
from lib.evaluation.intervals import bootstrap_intervals
from lib.evaluation.plots import picture_names
from lib.evaluation.report import write_report
from lib.evaluation.scores import Metrics
from lib.evaluation.scoring import Scored, prefix
from lib.model.source import model_origin
from lib.run.finished import TrainedModel, eval_folder
from lib.run.introduction import describe_columns, describe_length
from lib.run.record import bounded, describe_data
from lib.runtime.accelerator import describe_devices, peak_memory_gib
from lib.runtime.atomic import finite, write_atomically
from lib.runtime.screen import json_line
from lib.training.learner import Learner
from lib.training.state import State

REPEATED = (
    *("run/data_fingerprint", "run/trainable_parameters", "run/parameters"),
    *("run/model_source", "run/model_commit", "run/model_sha256"),
    *("run/dataset", "run/text_columns", "run/label_columns", "run/label_names", "run/problem_type"),
    *("run/max_length", "run/window_stride", "run/metrics", "run/metric_for_best_model"),
    *("run/split_sizes", "run/class_counts", "run/notes"),
)
"""What the run found out about data and model, and decided, that results.json repeats from record.json."""


def final_splits(data: Data) -> list[str]:
    """Splits the best model is scored on: test, or validation if there is none, and further validation sets."""
    return ["test" if "test" in data.tokens else "validation", *(split for split in data.tokens if split not in ROLES)]


def build_results(
    config: TrainConfig, settings: dict[str, Any], learner: Learner, scored: dict[str, Scored]
) -> dict[str, Any]:
    """The content of results.json: `split/metric`, steps and samples, and under `run/` the environment."""
    accelerator, state = learner.accelerator, learner.state
    by_split = {"validation": state.best_scores} | {split: scores for split, (scores, _) in scored.items()}
    entry = catalog_entry(config.data)
    if entry and entry.further_validation:  # several, so that each has its own name as well
        by_split[entry.validation] = state.best_scores
    flat = {f"{prefix(part)}/{name}": value for part, values in by_split.items() for name, value in values.items()}
    thresholds = next((p.thresholds for _, p in scored.values() if p.thresholds is not None), None)
    temperature = next((p.temperature for _, p in scored.values() if p.temperature is not None), None)
    tuned = {} if thresholds is None else dict(zip(settings["run/label_names"], thresholds.tolist(), strict=True))
    return flat | {
        **({"chosen_by": "loss"} if state.best_metric is None else {}),  # its metric was not defined
        "best_step": state.best_step,
        **describe_average(state),
        "steps": state.step,
        "samples_seen": state.samples_seen,
        "train_seconds": round(state.train_seconds, 2),
        "samples_per_second": round(state.samples_seen / state.train_seconds, 1),
        "run/num_processes": accelerator.num_processes,
        "run/mixed_precision": accelerator.mixed_precision,
        **({"run/eval_positions": size.number} if (size := learner.eval_size).unit == "positions" else {}),
        "run/device": settings["run/devices"][0],
        "run/peak_memory_gib": round(peak_memory_gib(accelerator), 2),
        **{name: bounded(settings[name]) for name in REPEATED if name in settings},
        **({"run/thresholds": bounded(tuned)} if tuned else {}),
        **({"run/temperature": temperature} if temperature is not None else {}),
    }


def describe_average(state: State) -> dict[str, Any]:
    """The steps whose weights the best model is the mean of, and the validation scores of the best of them alone.

    Empty where means were not looked for.
    """
    alone = [item["scores"] for item in state.ingredients if item["step"] == state.best_step]
    if not state.averaged_steps:
        return {}
    return {"averaged_steps": state.averaged_steps} | {f"before_averaging/{k}": v for k, v in alone[0].items()}


def next_commands(folder: Path) -> str:
    """The commands that score a finished run on other data and use it on new texts."""
    run = printable(shlex.quote(str(folder)))
    return (
        f"score it on other data:  python eval.py --run {run} --test_file FILE\n"
        f"use it on new texts:     python predict.py --model {run} --input FILE"
    )


def write_results(folder: Path, results: dict[str, Any]) -> str:
    """Save results.json; returns its content as one line of JSON."""
    results = finite(results)
    write_atomically(folder / "results.json", json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    return json_line(results)


def report_evaluation(
    accelerator: Accelerator, config: EvalConfig, trained: TrainedModel, data: Data, metrics: Metrics, scored: Scored
) -> str:
    """Write report, predictions and results.json of eval.py; returns what it prints, results.json as the last line."""
    folder, (scores, predictions) = eval_folder(config), scored
    intervals = bootstrap_intervals(predictions, metrics.names, config.bootstrap_samples, config.seed)
    report = write_report(folder, config.split, scored, intervals, data)
    results = {f"{prefix(config.split)}/{name}": value for name, value in scores.items()} | {
        "model": config.source.model,
        "dataset": data.name,
        "samples": len(data.tokens[config.split]),
        "seconds": round(predictions.seconds, 3),
        "run/num_processes": accelerator.num_processes,
        "run/mixed_precision": accelerator.mixed_precision,
        "run/device": describe_devices(accelerator)[0],
        "run/peak_memory_gib": round(peak_memory_gib(accelerator), 2),
        **{f"run/{name}": bounded(value) for name, value in describe_data(data, metrics).items()},
        **{f"run/{name}": value for name, value in model_origin(trained.source).items()},
    }
    files = ["report.json", "predictions.jsonl", *picture_names(data.problem_type, len(data.label_names))]
    written = f"\nwritten to {printable(str(folder))}: {', '.join(files)}"
    notes = [f"columns: {describe_columns(data)}", f"length: {describe_length(data)}", *data.notes]
    if predictions.batch_size is not None and predictions.batch_size.unit == "positions":
        notes.append(f"evaluated in {predictions.batch_size}: of other sizes, logits may differ in the last digits")
    length = trained.trained_on.max_length
    if length not in (None, data.max_length):
        notes.append(f"warning: in its training, the model read at most {length:,} tokens")
    named = config.data.dataset or own_files(config.data)
    if config.run_folder is None and not named and trained.trained_on.dataset not in (None, data.name):
        notes.append(
            f"warning: no data is named, so {data.name} is scored; the model was trained on {trained.trained_on.dataset}"
        )
    return "\n".join([*(f"- {printable(note)}" for note in notes), report, written, write_results(folder, results)])
