"""The start block, printed before the first step."""

from typing import Any

from lib.config.train import TrainConfig
from lib.data.labels.problem_types import summarize_labels
from lib.data.load import Data
from lib.data.loader import Batches
from lib.errors import printable
from lib.model.adapters.adapt import describe_adapter
from lib.model.load import summarize_weight_names
from lib.model.source import LoadingInfo
from lib.run.memory import describe_memory
from lib.run.record import run_folder, run_name
from lib.runtime.accelerator import describe_devices
from lib.runtime.attention import describe_attention
from lib.runtime.determinism import describe_determinism
from lib.runtime.precision import describe_precision
from lib.runtime.processes import describe_processes
from lib.training.learner import Learner

FEW_SAMPLES = 16
"""Samples per process and step below which a GPU mostly waits for the CPU."""


def describe_run(
    config: TrainConfig, settings: dict[str, Any], learner: Learner, batches: Batches, weights: LoadingInfo
) -> str:
    """Devices, precision, batch, data, model, memory, and notes about them, one line each."""
    data = batches.data
    accelerator, plan, notes = learner.accelerator, learner.plan, [*settings["run/notes"], *few_samples(learner)]
    trainable, total = settings["run/trainable_parameters"], settings["run/parameters"]
    sizes = ", ".join(f"{len(tokens):,} {split}" for split, tokens in data.tokens.items())
    epochs = "epoch" if plan.num_epochs == 1 else "epochs"
    rows = {
        "run": f"{run_name(config)}  ({run_folder(config)})",
        "devices": "; ".join(describe_devices(accelerator)),
        "processes": describe_processes(accelerator),
        "precision": f"{describe_precision(accelerator.mixed_precision)} (asked for: {config.mixed_precision})",
        "attention": describe_attention(
            learner.inner_model.config._attn_implementation, accelerator.device.type, config.training.cpu_kernels
        ),
        "equal runs": describe_determinism(accelerator.device.type),
        "batch": plan.sentence(),
        **(
            {"cuda graphs": learner.graphs.describe(data.window_stride is not None)}
            if config.training.cuda_graphs
            else {}
        ),
        "steps": f"{plan.total_steps:,} in {plan.num_epochs} {epochs} of at most {plan.steps_per_epoch:,}",
        "data": f"{data.name}: {sizes}",
        "columns": describe_columns(data),
        "length": describe_length(data),
        "labels": summarize_labels(data.labels("train"), data.label_names, data.problem_type),
        "metrics": f"{', '.join(settings['run/metrics'])}; the best model by {settings['run/metric_for_best_model']}",
        "padding": describe_padding(config, settings),
        "evaluation": str(learner.eval_size),
        "model": f"{config.model.model}: {total:,} parameters, {trainable:,} trained ({trainable / total:.1%})",
    }
    if adapter := describe_adapter(learner.inner_model):
        held = f"; the frozen linear layers in {config.model.load_in}" if config.model.load_in else ""
        rows["adapter"] = f"{adapter}{held}"
    if config.model.config_overrides:
        rows["changes"] = f"{' '.join(config.model.config_overrides)} (--config_overrides)"
    if config.model.from_scratch:
        rows["new weights"] = "all (--from_scratch)"
    elif weights.new:
        rows["new weights"] = f"{summarize_weight_names(weights.new)} (not in the checkpoint, trained from scratch)"
    if weights.unused:
        rows["left out"] = f"{summarize_weight_names(weights.unused)} (in the checkpoint, no part of this model)"
    if not plan.is_solved:
        rows["memory"], warnings = describe_memory(config, learner, batches, weights.new)
        notes += warnings
    width = max(map(len, rows))
    lines = [f"{name:<{width}}  {text}" for name, text in rows.items()] + [f"- {note}" for note in notes]
    return "\n".join(map(printable, lines))


def few_samples(learner: Learner) -> list[str]:
    """A warning where a step gives several GPUs so few samples that they wait for the CPU most of the time."""
    plan, on_gpu = learner.plan, learner.accelerator.device.type == "cuda"
    share = plan.config.train_batch_size / plan.world_size
    if not on_gpu or plan.world_size == 1 or share >= FEW_SAMPLES:
        return []
    return [
        f"warning: {share:g} samples per step and process keep a GPU busy for a part of the time; fewer processes may be as "
        "fast, and a larger --train_batch_size, which changes the result, uses them better"
    ]


def describe_columns(data: Data) -> str:
    kinds = {"text": data.text_columns, "label": data.label_columns, "soft labels": data.soft_labels}
    return "; ".join(f"{kind} {' '.join(columns)}" for kind, columns in kinds.items() if columns)


def describe_length(data: Data) -> str:
    """The most tokens that are read of a text at once, and what becomes of longer ones."""
    longer = "are cut" if data.window_stride is None else f"are read in windows that share {data.window_stride}"
    return f"at most {data.max_length:,} tokens; longer texts {longer}"


def describe_padding(config: TrainConfig, settings: dict[str, Any]) -> str:
    """The share of padding in training, which is none in one row, and with the other ways to form batches."""
    shares = {name: settings[f"run/padding_{name}"] for name in ("group_by_length", "random", "pad_to_max_length")}
    chosen = "pad_to_max_length" if config.data.pad_to_max_length else config.training.train_sampling_strategy
    others = ", ".join(f"{name} {share:.1%}" for name, share in shares.items() if name != chosen)
    if config.training.padding_free:
        return f"none, texts stand in one row; it would be: {others}"
    evaluation = f"{settings['run/padding_evaluation']:.1%} in evaluation"
    return f"{shares[chosen]:.1%} of the positions in training ({chosen}), {evaluation}; it would be: {others}"
