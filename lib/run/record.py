"""The record of a run: its name and folder, what it found out and decided, and what makes it comparable with others."""

import hashlib
import importlib.metadata
import json
import platform
import re
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from lib.config.limits import OUTPUT_NAME
from lib.config.sections import flatten
from lib.config.train import TrainConfig, TrainingConfig
from lib.data.batching import BATCHES_PER_MEGABATCH, count_windows, epoch_batches, padding_share
from lib.data.catalog import dataset_name
from lib.data.labels.problem_types import count_labels
from lib.data.load import Data
from lib.data.loader import Batches
from lib.data.trained_on import TrainedOn
from lib.errors import is_hidden, redact
from lib.evaluation.batch_size import BatchSize
from lib.evaluation.scores import Metrics
from lib.model.layers import count_parameters
from lib.model.load import summarize_weight_names
from lib.model.source import LoadingInfo, model_identity, model_name
from lib.runtime.accelerator import describe_devices
from lib.runtime.atomic import finite, write_atomically
from lib.runtime.git import git
from lib.runtime.launch_checks import read_sharding
from lib.runtime.variables import variables
from lib.training.learner import Learner

VERSIONS = ("torch", "transformers", "accelerate", "datasets", "evaluate", "scikit-learn", "tokenizers", "wandb")

HARMLESS = {
    *("output_dir", "run_name", "report_to", "project", "tags", "notes", "logging_steps"),
    *("per_device_train_batch_size", "per_device_eval_batch_size", "pad_to_max_length"),
    *("dataloader_num_workers", "preprocessing_num_workers"),
    *("hub_endpoint", "hub_timeout", "verify_hashes", "send_token_to_mirror"),
    *(
        "no_cache_features",
        "feature_cache_gib",
        "cpu_kernels",
        "bf16_weights",
        "padding_free",
        "gradient_checkpointing",
        "deterministic",
    ),
    *("save_steps", "save_total_limit", "resume_from_checkpoint", "allow_changes", "max_minutes", "pause_at_step"),
    *("ddp_timeout", "join_timeout", "async_save"),
}
"""Settings that do not change the result: a run may be resumed with others."""

IDENTITY = ("run/model_sha256", "run/model_config", "run/tokenizer_sha256", "run/code_sha256")
"""What the result depends on in the files of a model, see `model_identity`."""

PLACES = {"model", "model_revision", "source"}
"""Settings that say where a model is: where its files are known to be the same, the result does not depend on them."""

LISTED = 100
"""Most entries of a list that are shown outside record.json."""

LENGTH = {"num_train_epochs", "max_steps"}
"""Settings that change the learning rate of every step."""


def run_name(config: TrainConfig) -> str:
    """`--run_name`, by default made of model, data, method, other settings that are not at their defaults, and the seed."""
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
    parts += unusual(config)
    parts += [f"lr{config.optim.learning_rate:g}", f"bs{training.train_batch_size}", length, f"s{training.seed}"]
    name = "".join("_" if is_hidden(character) else character for character in "-".join(parts))
    if len(name.encode()) <= OUTPUT_NAME.limit:
        return name
    # Too long for a folder: the end, which says how it was trained, is kept, and a hash stands for the rest.
    end = "-".join(parts[-4:])[-100:]
    start = name.encode()[: OUTPUT_NAME.limit - len(end.encode()) - 10].decode(errors="ignore")
    return f"{start}-{hashlib.sha256(name.encode()).hexdigest()[:8]}-{end}"


NAMED = {
    *("model", "config_overrides", "from_scratch", "freeze", "adapter", "adapter_placement", "loss", "class_weights"),
    *("learning_rate", "train_batch_size", "num_train_epochs", "max_steps", "seed", "metrics"),
    *("dataset", "dataset_config", "train_file", "validation_file", "test_file", "encoding", "text_columns"),
    *("label_column", "label_columns", "label_order", "problem_type", "allow_pickle", "trust_remote_code", "source"),
}
"""Settings that a run's name holds in another form, or that say where and how the data are read."""

LONGEST_PARTS = 60
"""Characters of the other settings in a run's name; digits stand for what is longer."""


def unusual(config: TrainConfig) -> list[str]:
    """The other settings that change the result and are not at their defaults, as parts of a name: `warmup_steps0.1`."""
    usual, parts = flatten(TrainConfig()), []
    for name, value in flatten(config).items():
        if name in NAMED or name in HARMLESS or value == usual[name]:
            continue
        shown = (
            "+".join(map(str, value))
            if isinstance(value, tuple)
            else f"{value:g}"
            if isinstance(value, float)
            else str(value)
        )
        shown = "" if value is True else re.sub(r"[^\w.+]+", "_", shown)
        parts.append(f"no_{name}" if value is False else f"{name}_{shown}" if shown[:1].isalpha() else f"{name}{shown}")
    text = "-".join(parts)
    if len(text) <= LONGEST_PARTS:
        return parts
    return [
        text[:LONGEST_PARTS].rpartition("-")[0] or text[:LONGEST_PARTS],
        hashlib.sha256(text.encode()).hexdigest()[:6],
    ]


def run_folder(config: TrainConfig) -> Path:
    """`--output_dir`, by default the name of the run in outputs/; each run of a W&B sweep has its own."""
    given, name = variables("WANDB_"), run_name(config)
    if given.get("WANDB_SWEEP_ID") and given.get("WANDB_RUN_ID"):
        name += f"-{given['WANDB_RUN_ID']}"
    return Path(config.tracking.output_dir or Path("outputs") / name)


def run_settings(
    config: TrainConfig, learner: Learner, batches: Batches, metrics: Metrics, weights: LoadingInfo
) -> dict[str, Any]:
    """What runs are compared by: all options, and under `run/` versions, devices, data and model; no secrets."""
    accelerator, data, multiple = (
        learner.accelerator,
        batches.data,
        getattr(batches.collator, "pad_to_multiple_of", None),
    )
    trainable, total = count_parameters(learner.inner_model)
    padding = padding_shares(config.training, data, multiple)
    padding["evaluation"] = evaluation_padding(data, learner.eval_size, multiple)
    if batches.packed:
        padding |= dict.fromkeys((config.training.train_sampling_strategy, "evaluation"), 0.0)
    record = run_record(accelerator) | describe_data(data, metrics)
    record |= {"sharding": str(sharding)} if (sharding := read_sharding()) else {}
    record["attention"] = learner.inner_model.config._attn_implementation
    record["notes"] += [redact(note) for note in learner.objective.notes]
    record |= {"metric_for_best_model": metrics.best, "trainable_parameters": trainable, "parameters": total}
    record |= {"new_weights": summarize_weight_names(weights.new)} if weights.new else {}
    if config.model.load_in:
        record["version_bitsandbytes"] = version("bitsandbytes")
    if config.training.train_sampling_strategy == "group_by_length":
        record["batches_sorted_together"] = BATCHES_PER_MEGABATCH
    record |= {f"padding_{name}": round(share, 4) for name, share in padding.items()}
    if accelerator.is_main_process:  # the only one that compares and writes; hashing large files takes seconds
        record |= model_identity(config.model)
    names = {"run_name": run_name(config), "output_dir": str(run_folder(config))}
    settings = flatten(config) | names | {f"run/{key}": value for key, value in record.items()}
    return settings | {"run/experiment": experiment_hash(settings)}


def describe_data(data: Data, metrics: Metrics) -> dict[str, Any]:
    """What was found out about the data, and how a model reads and is scored on them; plain values for JSON."""
    return {
        "dataset": data.name,
        "data_fingerprint": data.fingerprint(),
        "text_columns": list(data.text_columns),
        "label_columns": list(data.label_columns),
        **({"soft_labels": list(data.soft_labels)} if data.soft_labels else {}),
        "label_names": data.label_names,
        "problem_type": data.problem_type,
        "max_length": data.max_length,
        "window_stride": data.window_stride,
        "pad_to_max_length": data.pad_to_max_length,
        "metrics": list(metrics.names),
        "split_sizes": {split: len(tokens) for split, tokens in data.tokens.items()},
        "class_counts": {
            split: count_labels(data.labels(split), data.label_names, data.problem_type) for split in data.tokens
        },
        "notes": [redact(note) for note in data.notes],
    }


def trained_on(data: Data, metrics: Metrics) -> TrainedOn:
    """What is stored with a model, so that whoever uses it reads text as its training did."""
    columns, padded = (data.text_columns, data.label_columns), data.pad_to_max_length
    return TrainedOn(data.name, *columns, data.max_length, metrics.names, padded, data.soft_labels)


def bounded(value: Any) -> Any:
    """`value` for a place that is read as a whole: of a list or mapping with more than 100 entries only their number."""
    if isinstance(value, dict | list | tuple) and len(value) > LISTED:
        return f"{len(value):,} entries, see record.json"
    return {key: bounded(item) for key, item in value.items()} if isinstance(value, dict) else value


def write_record(folder: Path, settings: dict[str, Any], outcome: dict[str, Any]) -> None:
    """Write record.json: what config.yaml leaves open, as this run resolved it, and what came out, such as thresholds."""
    record = {key.removeprefix("run/"): value for key, value in settings.items() if key.startswith("run/")}
    text = json.dumps(finite({"run_name": settings["run_name"]} | record | outcome), indent=2, ensure_ascii=False)
    write_atomically(folder / "record.json", text + "\n")


def read_identity(folder: Path) -> dict[str, Any]:
    """What record.json says about the files of the model, as in the settings; empty where it says nothing."""
    try:
        record = json.loads((folder / "record.json").read_text(encoding="utf-8"))
        return {key: record[name] for key in IDENTITY if (name := key.removeprefix("run/")) in record}
    except (OSError, ValueError, TypeError):
        return {}


def experiment(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that the result depends on, as they are after a round trip through JSON."""
    names = {"run/data_fingerprint", "run/label_names", "run/batches_sorted_together", *IDENTITY}
    names -= {"run/model_sha256"} if settings.get("from_scratch") else set()
    chosen = {k: v for k, v in settings.items() if (k in names) or (k not in HARMLESS and not k.startswith("run/"))}
    return json.loads(json.dumps(chosen))


def recipe(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that the result depends on; the files of the model in place of their path, where they are known."""
    places = PLACES if has_identity(settings) else set()
    return {key: value for key, value in experiment(settings).items() if key not in places}


def has_identity(settings: dict[str, Any]) -> bool:
    """Whether all files of the model are known; some earlier versions recorded the weights alone."""
    optional = {"run/code_sha256", *(["run/model_sha256"] if settings.get("from_scratch") else [])}
    return {*IDENTITY} - optional <= settings.keys()


def experiment_hash(settings: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(recipe(settings), sort_keys=True).encode()).hexdigest()[:16]


def compare_settings(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """A line for each setting that changes the experiment, and for each part of the model that is another one.

    An option that `before` did not have yet was at its default; of files that either does not know, nothing is said.
    Another place of the same model is no change.
    """
    there, here = flatten(TrainConfig()) | before, now
    unknown = {*IDENTITY} - (there.keys() & here.keys())
    old, new = (experiment({key: s[key] for key in s if key not in unknown}) for s in (there, here))
    keys = [key for key in new if old.get(key) != new[key]]
    if "run/model_sha256" in keys and same_weights(old["run/model_sha256"], new["run/model_sha256"]):
        keys.remove("run/model_sha256")
    if has_identity(there) and has_identity(here) and not {*IDENTITY} & {*keys}:
        keys = [key for key in keys if key not in PLACES]
    lines = [
        f"  {key.removeprefix('run/')}: {old.get(key)} there, {new[key]} now" for key in keys if key not in IDENTITY
    ]
    if LENGTH & set(keys):
        lines.append("  (another length changes the learning rate of every step, also of past ones)")
    return lines + [line for key in keys if key in IDENTITY for line in other_files(key, there, here)]


def same_weights(before: str, now: str) -> bool:
    """Whether two lists of hashes are of the same files; earlier versions left out, or added, the index of the weights."""
    first, second = {*before.split()}, {*now.split()}
    return first <= second or second <= first


def other_files(key: str, before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What changed in the files of the model, in words; `key` is one of `IDENTITY`."""
    model, old, new = f"--model {now['model']}", before[key], now[key]
    if key == "run/model_sha256":
        shown = [", ".join(digest[:8] for digest in hashes.split()[:3]) for hashes in (old, new)]
        line = (
            f"  the weights of {model} are not those that the run began with: sha256 {shown[0]} there, {shown[1]} now"
        )
        commits = [settings.get("run/model_commit") for settings in (before, now)]
        if commits[0] and commits[0] != commits[1]:
            line += f" (commit {commits[0]} there, {commits[1] or 'a folder'} now: --model_revision {commits[0]})"
        return [line]
    names = sorted(name for name in {*old, *new} if old.get(name) != new.get(name))
    if key == "run/model_config":
        return [f"  {name} in config.json of {model}: {old.get(name)} there, {new.get(name)} now" for name in names]
    what = "tokenizer" if key == "run/tokenizer_sha256" else "code"
    return [f"  the {what} of {model} is not that which the run began with: {', '.join(names)}"]


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


def evaluation_padding(data: Data, size: BatchSize, multiple: int | None = None) -> float:
    """Share of padding among all positions of an evaluation."""
    lengths, positions = data.lengths["validation"], data.positions("validation")
    if data.pad_to_max_length:
        return 1.0 - float(lengths.sum() / positions.sum())
    return padding_share(lengths, size.batches(positions), multiple, data.max_length)
