"""The record of a run: its name and folder, and the settings that make it comparable with others."""

import hashlib
import importlib.metadata
import json
import platform
import re
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn

from lib.config.sections import flatten
from lib.config.train import TrainConfig, TrainingConfig
from lib.data.batching import BATCHES_PER_MEGABATCH, count_windows, epoch_batches, eval_batches, padding_share
from lib.data.catalog import dataset_name
from lib.data.load import Data
from lib.data.loader import Batches
from lib.model.layers import count_parameters
from lib.model.source import model_name, model_origin
from lib.runtime.accelerator import describe_devices
from lib.runtime.git import git

VERSIONS = ("torch", "transformers", "accelerate", "datasets", "evaluate", "scikit-learn", "tokenizers", "wandb")

HARMLESS = {
    *("output_dir", "run_name", "report_to", "project", "tags", "notes", "logging_steps"),
    *("per_device_train_batch_size", "per_device_eval_batch_size", "pad_to_max_length"),
    *("dataloader_num_workers", "preprocessing_num_workers"),
    *("hub_endpoint", "hub_timeout", "verify_hashes", "send_token_to_mirror"),
    *("no_cache_features", "feature_cache_gib", "cpu_kernels"),
    *("save_steps", "save_total_limit", "resume_from_checkpoint", "allow_changes", "max_minutes", "ddp_timeout"),
}
"""Settings that do not change the result: a run may be resumed with others."""

LENGTH = {"num_train_epochs", "max_steps"}
"""Settings that change the learning rate of every step."""


def run_name(config: TrainConfig) -> str:
    """`--run_name`, by default made of model, data, method, learning rate, batch size, epochs and seed."""
    if config.tracking.run_name:
        return config.tracking.run_name
    training = config.training
    length = f"steps{training.max_steps}" if training.max_steps else f"ep{training.num_train_epochs:g}"
    parts = [model_name(config.model.model), dataset_name(config.data)]
    parts += [re.sub(r"[^\w.-]+", "", item) for item in config.model.config_overrides]
    parts += ["scratch"] if config.model.from_scratch else []
    parts += [f"freeze_{config.model.freeze}"] if config.model.freeze else []
    adapter = config.adapter
    if adapter.adapter:
        parts += [adapter.adapter_placement if adapter.adapter == "bottleneck" else adapter.adapter]
    parts += [config.objective.loss] if config.objective.loss != "cross_entropy" else []
    parts += ["weighted"] if config.objective.class_weights else []
    parts += [f"lr{config.optim.learning_rate:g}", f"bs{training.train_batch_size}", length, f"s{training.seed}"]
    return "-".join(parts)


def run_folder(config: TrainConfig) -> Path:
    return Path(config.tracking.output_dir or Path("outputs") / run_name(config))


def run_settings(accelerator: Accelerator, config: TrainConfig, batches: Batches, model: nn.Module) -> dict[str, Any]:
    """What runs are compared by: all options, and under `run/` versions, devices, data and model; no secrets."""
    data, multiple = batches.data, getattr(batches.collator, "pad_to_multiple_of", None)
    trainable, total = count_parameters(model)
    padding = padding_shares(config.training, data, multiple)
    padding["evaluation"] = evaluation_padding(config.training, data, multiple)
    record = run_record(accelerator) | {
        "data_fingerprint": data.fingerprint(),
        "label_names": data.label_names,
        "problem_type": data.problem_type,
        "trainable_parameters": trainable,
        "parameters": total,
    }
    if config.training.train_sampling_strategy == "group_by_length":
        record["batches_sorted_together"] = BATCHES_PER_MEGABATCH
    record |= model_origin(config.model) | {f"padding_{name}": round(share, 4) for name, share in padding.items()}
    names = {"run_name": run_name(config), "output_dir": str(run_folder(config))}
    settings = flatten(config) | names | {f"run/{key}": value for key, value in record.items()}
    return settings | {"run/experiment": experiment_hash(settings)}


def experiment(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that the result depends on, as they are after a round trip through JSON."""
    names = {"run/data_fingerprint", "run/label_names", "run/batches_sorted_together"}
    chosen = {k: v for k, v in settings.items() if (k in names) or (k not in HARMLESS and not k.startswith("run/"))}
    return json.loads(json.dumps(chosen))


def experiment_hash(settings: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(experiment(settings), sort_keys=True).encode()).hexdigest()[:16]


def compare_settings(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """A line for each setting that changes the experiment; an option that `before` did not have yet was at its default."""
    before, now = experiment(flatten(TrainConfig()) | before), experiment(now)
    keys = [key for key in now if before.get(key) != now[key]]
    lines = [f"  {key.removeprefix('run/')}: {before.get(key)} there, {now[key]} now" for key in keys]
    if LENGTH & set(keys):
        lines.append("  (another length changes the learning rate of every step, also of past ones)")
    return lines


def run_record(accelerator: Accelerator) -> dict[str, Any]:
    """The environment of a run: commit, versions, devices, precision."""
    root = Path(__file__).resolve().parents[2]
    record: dict[str, Any] = {
        "num_processes": accelerator.num_processes,
        "mixed_precision": accelerator.mixed_precision,
        "devices": describe_devices(accelerator),
        "python": platform.python_version(),
        "git_commit": git(root, "rev-parse", "HEAD"),
        "git_dirty": bool(git(root, "status", "--porcelain", "--untracked-files=no")),
    }
    return record | {f"version_{name}": version(name) for name in VERSIONS}


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def padding_shares(config: TrainingConfig, data: Data, multiple: int | None = None) -> dict[str, float]:
    """Share of padding among all positions of the first epoch, for each way to form and pad batches."""
    lengths, limit = data.lengths["train"], data.max_length
    shares = {
        strategy: padding_share(
            lengths, epoch_batches(lengths, config.train_batch_size, config.seed, 0, strategy), multiple, limit
        )
        for strategy in ("group_by_length", "random")
    }
    return shares | {"pad_to_max_length": 1.0 - float(lengths.sum() / count_windows(lengths, limit).sum()) / limit}


def evaluation_padding(config: TrainingConfig, data: Data, multiple: int | None = None) -> float:
    """Share of padding among all positions of an evaluation."""
    lengths, positions = data.lengths["validation"], data.positions("validation")
    if data.pad_to_max_length:
        return 1.0 - float(lengths.sum() / positions.sum())
    batches = eval_batches(positions, config.per_device_eval_batch_size)
    return padding_share(lengths, batches, multiple, data.max_length)
