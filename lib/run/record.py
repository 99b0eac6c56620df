"""A run as a thing: its name, its folder, the block that introduces it, the results that end it."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from torch import nn
from transformers import DataCollatorWithPadding

from lib.config.cli import load_config, save_config
from lib.config.eval import EvalConfig
from lib.config.sections import AdapterConfig, ModelConfig, UserError, flatten
from lib.config.train import TrainConfig
from lib.data.batching import BLOCK
from lib.data.labels.targets import label_lines
from lib.data.load import Data
from lib.data.sources import ROLES, catalog_source, dataset_name, default_metrics
from lib.evaluation.report import finite, write_report
from lib.evaluation.scores import check_metrics
from lib.evaluation.scoring import Scored, prefix
from lib.model.card import write_model_card
from lib.model.layers import count_parameters
from lib.model.load import Weights, describe_weights, model_name, model_origin
from lib.run.resume import choose_checkpoint, compare_settings, experiment_hash
from lib.runtime.accelerator import describe_devices, describe_precision, peak_memory_gib, run_record
from lib.training.plan import Plan, State, best_metric, evaluation_padding, padding_shares, step_indices

ORIGIN = (
    *("run/data_fingerprint", "run/trainable_parameters", "run/parameters"),
    *("run/model_source", "run/model_commit", "run/model_sha256"),
)
"""Facts about data and model that results repeat."""


def run_name(config: TrainConfig) -> str:
    """The name given, or one that tells model, data, method, learning rate, batch size, epochs and seed."""
    if config.tracking.run_name:
        return config.tracking.run_name
    training = config.training
    length = f"steps{training.max_steps}" if training.max_steps else f"ep{training.num_train_epochs:g}"
    parts = [model_name(config.model.model), dataset_name(config.data)]
    parts += [re.sub(r"[^\w.-]+", "", item) for item in config.model.config_overrides]
    parts += ["scratch"] if config.model.from_scratch else []
    parts += [f"freeze_{config.model.freeze}"] if config.model.freeze else []
    parts += [adapter_name(config.adapter)] if config.adapter.adapter else []
    parts += [config.objective.loss] if config.objective.loss != "cross_entropy" else []
    parts += ["weighted"] if config.objective.class_weights else []
    parts += [f"lr{config.optim.learning_rate:g}", f"bs{training.train_batch_size}", length, f"s{training.seed}"]
    return "-".join(parts)


def adapter_name(config: AdapterConfig) -> str:
    """The method, and of bottlenecks the placement."""
    return config.adapter_placement if config.adapter == "bottleneck" else str(config.adapter)


def run_folder(config: TrainConfig) -> Path:
    return Path(config.tracking.output_dir or Path("outputs") / run_name(config))


def choose_metrics(config: TrainConfig, data: Data) -> tuple[tuple[str, ...], str]:
    """The metrics to compute, and the one that chooses the model; raises UserError when they cannot be computed."""
    metrics = config.metrics or default_metrics(config.data, data.problem_type)
    check_metrics(metrics, len(data.label_names), data.problem_type)
    return metrics, best_metric(config.training.metric_for_best_model, metrics)


def open_folder(config: TrainConfig, folder: Path) -> None:
    """Create the folder of a run and save the configuration there.

    Raises UserError when the folder holds a run with other settings, and names them, unless changes are allowed.
    """
    saved = folder / "config.yaml"
    if saved.exists() and not config.training.allow_changes:
        changed = compare_settings(flatten(load_config(TrainConfig, saved)), flatten(config))
        if changed:
            lines = "\n".join(changed)
            raise UserError(
                f"{folder} holds a run with other settings:\n{lines}\nChoose another --output_dir or --run_name, or go "
                "on with the new settings by --allow_changes."
            )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_config(config, saved)
    except OSError as error:
        raise UserError(f"--output_dir {folder} cannot be written: {error}") from error


def open_run(accelerator: Accelerator, config: TrainConfig, folder: Path, settings: dict[str, Any]) -> Path | None:
    """Open the folder of a run; the checkpoint in it to go on from, the same on every process, or None."""
    if accelerator.is_main_process:
        open_folder(config, folder)
    return choose_checkpoint(accelerator, config.training, folder, settings)


def run_settings(
    accelerator: Accelerator, config: TrainConfig, data: Data, model: nn.Module, collator: DataCollatorWithPadding
) -> dict[str, Any]:
    """All that runs are compared by: resolved options, and under `run/` what they were made with; no secret."""
    trainable, total = count_parameters(model)
    padding = padding_shares(config.training, data, collator.pad_to_multiple_of)
    padding["evaluation"] = evaluation_padding(config.training, data, collator.pad_to_multiple_of)
    record = run_record(accelerator) | {
        "data_fingerprint": data.fingerprint(),
        "label_names": data.label_names,
        "problem_type": data.problem_type,
        "trainable_parameters": trainable,
        "parameters": total,
    }
    if config.training.train_sampling_strategy == "group_by_length":
        record["batches_sorted_together"] = BLOCK
    record |= model_origin(config.model) | {f"padding_{name}": round(share, 4) for name, share in padding.items()}
    names = {"run_name": run_name(config), "output_dir": str(run_folder(config))}
    settings = flatten(config) | names | {f"run/{key}": value for key, value in record.items()}
    return settings | {"run/experiment": experiment_hash(settings)}


def explain_not_finite(step: int, rate: float, plan: Plan, config: TrainConfig, data: Data) -> UserError:
    """The message that ends a run whose loss or gradient is not finite."""
    indices = step_indices(plan, config.training, data.lengths["train"], step)
    return UserError(
        f"the loss or its gradient is not finite at step {step} (learning rate {rate:g}), and nothing of that "
        f"step was learnt. Its samples are rows {' '.join(map(str, sorted(indices)))} of the train split, counted from 0. "
        "Checkpoints and the best model are those from before; try a lower --learning_rate, a smaller --max_grad_norm, or "
        "--mixed_precision no."
    )


def introduce(accelerator: Accelerator, *run: Any) -> None:
    """Print what `describe_run` says, on the main process."""
    if accelerator.is_main_process:
        print(describe_run(accelerator, *run), flush=True)


def describe_run(
    accelerator: Accelerator,
    config: TrainConfig,
    data: Data,
    plan: Plan,
    settings: dict[str, Any],
    weights: Weights,
) -> str:
    """The block before the first step: devices, precision, batch, data, what is trained, what was noticed."""
    trainable, total = settings["run/trainable_parameters"], settings["run/parameters"]
    sizes = ", ".join(f"{len(tokens):,} {split}" for split, tokens in data.tokens.items())
    rows = {
        "run": f"{run_name(config)}  ({run_folder(config)})",
        "devices": "; ".join(describe_devices(accelerator)),
        "processes": f"{accelerator.num_processes}, {accelerator.distributed_type.value}",
        "precision": f"{describe_precision(accelerator.mixed_precision)} (asked for: {config.mixed_precision})",
        "batch": plan.sentence(),
        "steps": f"{plan.total_steps:,} = {plan.num_epochs} epochs of at most {plan.steps_per_epoch:,}",
        "data": f"{data.name}: {sizes}",
        "labels": label_lines(data.tokens["train"]["labels"][:], data.label_names, data.problem_type),
        "padding": describe_padding(config, settings),
        "model": f"{config.model.model}: {total:,} parameters, {trainable:,} trained ({trainable / total:.1%})",
    }
    if config.model.config_overrides:
        rows["changes"] = f"{' '.join(config.model.config_overrides)} (--config_overrides)"
    if config.model.from_scratch:
        rows["new weights"] = "all (--from_scratch)"
    elif weights.new:
        rows["new weights"] = f"{describe_weights(weights.new)} (not in the checkpoint, trained from scratch)"
    if weights.dropped:
        rows["left out"] = f"{describe_weights(weights.dropped)} (in the checkpoint, no part of this model)"
    width = max(map(len, rows))
    return "\n".join(
        [*(f"{name:<{width}}  {text}" for name, text in rows.items()), *(f"- {note}" for note in data.notes)]
    )


def describe_padding(config: TrainConfig, settings: dict[str, Any]) -> str:
    """The share of padding in training, and what it would be with the other choices."""
    shares = {name: settings[f"run/padding_{name}"] for name in ("group_by_length", "random", "pad_to_max_length")}
    chosen = "pad_to_max_length" if config.data.pad_to_max_length else config.training.train_sampling_strategy
    others = ", ".join(f"{name} {share:.1%}" for name, share in shares.items() if name != chosen)
    evaluation = f"{settings['run/padding_evaluation']:.1%} in evaluation"
    return f"{shares[chosen]:.1%} of the positions in training ({chosen}), {evaluation}; it would be: {others}"


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


# ---------------------------------------------------------------------------------------------------- scoring


def eval_model(config: EvalConfig) -> ModelConfig:
    """The model to score: that of the run, or the one named. Raises UserError when the run kept none."""
    if config.run is None:
        assert config.model is not None
        trust: dict[str, Any] = {"allow_pickle": config.allow_pickle, "trust_remote_code": config.trust_remote_code}
        return ModelConfig(config.model, config.model_revision, config.source, **trust)
    folder = Path(config.run) / "model"
    if not (folder / "config.json").is_file():
        raise UserError(f"--run {config.run} has no model folder yet; let train.py reach its first evaluation")
    return ModelConfig(model=str(folder))


def run_precision(config: EvalConfig) -> str:
    """The precision asked for, or that in which the run was trained."""
    results = Path(config.run or "") / "results.json"
    if config.mixed_precision == "auto" and config.run and results.is_file():
        return json.loads(results.read_text(encoding="utf-8"))["run/mixed_precision"]
    return config.mixed_precision


def eval_folder(config: EvalConfig) -> Path:
    if config.output_dir:
        return Path(config.output_dir)
    if config.run and (config.data.dataset or config.data.test_file or config.data.validation_file):
        same = flatten(config.data) == flatten(load_config(TrainConfig, Path(config.run) / "config.yaml").data)
        return Path(config.run) / (
            f"eval-{config.split}" if same else f"eval-{dataset_name(config.data)}-{config.split}"
        )
    if config.run:
        return Path(config.run) / f"eval-{config.split}"
    return Path("outputs") / f"eval-{model_name(str(config.model))}-{dataset_name(config.data)}-{config.split}"


def build_eval_results(
    accelerator: Accelerator, config: EvalConfig, data: Data, scores: dict[str, float], seconds: float
) -> dict[str, Any]:
    """The scores of one split, flat, the seconds that its forward passes took, and under `run/` what made them."""
    return {f"{prefix(config.split)}/{name}": value for name, value in scores.items()} | {
        "model": config.run or config.model,
        "dataset": data.name,
        "samples": len(data.tokens[config.split]),
        "seconds": round(seconds, 3),
        "run/num_processes": accelerator.num_processes,
        "run/mixed_precision": accelerator.mixed_precision,
        "run/device": describe_devices(accelerator)[0],
        "run/peak_memory_gib": round(peak_memory_gib(accelerator), 2),
        "run/data_fingerprint": data.fingerprint(),
    }
