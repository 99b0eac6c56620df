"""The numbers that end a run: reports, results.json, the model card."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator

from lib.config.eval import EvalConfig
from lib.config.train import TrainConfig
from lib.data.catalog import catalog_source
from lib.data.load import Data
from lib.data.sources import ROLES
from lib.evaluation.report import write_report
from lib.evaluation.scoring import Scored, prefix
from lib.model.card import write_model_card
from lib.runtime.accelerator import describe_devices, peak_memory_gib
from lib.runtime.atomic import finite
from lib.training.state import State

ORIGIN = (
    *("run/data_fingerprint", "run/trainable_parameters", "run/parameters"),
    *("run/model_source", "run/model_commit", "run/model_sha256"),
)
"""Facts about data and model that results repeat."""


def describe_scores(heading: str, scores: dict[str, float]) -> str:
    return "  ".join([heading, *(f"{name} {value:.4f}" for name, value in scores.items())])


def final_splits(data: Data) -> list[str]:
    """What the best model is scored on: test, or validation where there is none, and further validation sets."""
    return ["test" if "test" in data.tokens else "validation", *(split for split in data.tokens if split not in ROLES)]


def build_results(
    accelerator: Accelerator, config: TrainConfig, state: State, settings: dict[str, Any], scored: dict[str, Scored]
) -> dict[str, Any]:
    """The numbers of a finished run, flat: `split/metric`, steps and samples, and under `run/` what made them."""
    by_split = {"validation": state.best_scores} | {split: scores for split, (scores, _) in scored.items()}
    source = catalog_source(config.data)
    if source and source.further_validation:  # several, so that each has its own name as well
        by_split[source.validation] = state.best_scores
    flat = {f"{prefix(part)}/{name}": value for part, values in by_split.items() for name, value in values.items()}
    return flat | {
        "best_step": state.best_step,
        "steps": state.step,
        "samples_seen": state.samples_seen,
        "train_seconds": round(state.train_seconds, 2),
        "samples_per_second": round(state.samples_seen / state.train_seconds, 1),
        "run/num_processes": accelerator.num_processes,
        "run/mixed_precision": accelerator.mixed_precision,
        "run/device": settings["run/devices"][0],
        "run/peak_memory_gib": round(peak_memory_gib(accelerator), 2),
        **{name: settings[name] for name in ORIGIN if name in settings},
    }


def write_results(folder: Path, results: dict[str, Any]) -> str:
    """Save the numbers of a finished run as results.json; return them as one line of JSON."""
    results = finite(results)
    (folder / "results.json").write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return json.dumps(results, ensure_ascii=False)


def end_run(
    accelerator: Accelerator,
    folder: Path,
    scored: dict[str, Scored],
    metrics: Sequence[str],
    data: Data,
    settings: dict[str, Any],
    results: dict[str, Any],
) -> None:
    """Print the reports of the final splits and, as the last line, the results; save both, and the model's card.

    The main process does it.
    """
    if not accelerator.is_main_process:
        return
    for split, (scores, predictions) in scored.items():
        print(write_report(folder / f"eval-{split}", split, scores, metrics, predictions, data), flush=True)
    thresholds = next((p.thresholds for _, p in scored.values() if p.thresholds is not None), np.array([]))
    write_model_card(folder / "model", data.name, settings, results, thresholds.tolist())
    print(write_results(folder, results), flush=True)


def build_eval_results(
    accelerator: Accelerator, config: EvalConfig, data: Data, scores: dict[str, float], seconds: float
) -> dict[str, Any]:
    """The scores of one split, flat, the seconds that its forward passes took, and under `run/` what made them."""
    return {f"{prefix(config.split)}/{name}": value for name, value in scores.items()} | {
        "model": config.source.model,
        "dataset": data.name,
        "samples": len(data.tokens[config.split]),
        "seconds": round(seconds, 3),
        "run/num_processes": accelerator.num_processes,
        "run/mixed_precision": accelerator.mixed_precision,
        "run/device": describe_devices(accelerator)[0],
        "run/peak_memory_gib": round(peak_memory_gib(accelerator), 2),
        "run/data_fingerprint": data.fingerprint(),
    }
