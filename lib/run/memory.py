"""What memory a run takes, in words: of a run that starts, and of the ways to train a model, side by side."""

import contextlib
import copy
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification

from lib.config.hub import DoctorConfig
from lib.config.sections import ModelSource
from lib.config.train import TrainConfig
from lib.data.loader import Batches
from lib.errors import UserError, first_line
from lib.model.forward import Inputs, attend_by_length, keep_no_cache
from lib.model.load import longest_input
from lib.model.sharding import is_sharded
from lib.model.source import load_hf_config, loading_errors
from lib.runtime.cpu.kernels import use_cpu_kernels
from lib.runtime.cpu.tuning import keeps_freed_memory
from lib.runtime.memory import own_memory
from lib.runtime.precision import resolve_precision, uses_gpu
from lib.training.learner import Learner
from lib.training.memory_forecast import Forecast, Method, forecast, lasting_parts, lighter_methods
from lib.training.working_weights import are_copied

LITTLE = 0.1
"""Share of a device's memory below which activations are not counted: the start would take a quarter second longer."""

METHODS = (
    Method(),
    Method(recomputed=True),
    Method(adapter="lora"),
    Method(adapter="lora", recomputed=True),
    Method(adapter="lora", load_in="4bit"),
    Method(adapter="lora", load_in="4bit", recomputed=True),
    Method(frozen="backbone"),
)


def describe_memory(
    config: TrainConfig, learner: Learner, batches: Batches, new_weights: list[str]
) -> tuple[str, list[str]]:
    """What the largest micro-batch of the run takes, in words; and a warning with what helps, where that does not fit.

    Activations are counted only where weights, gradients and moments, with a generous guess at the activations, take more
    than a tenth of the memory that this process can have.
    """
    if is_sharded(learner.model):
        return (
            f"{list_parts(lasting_parts(learner.model))} in a process's shards; activations are not counted",
            [],
        )
    device, plan, precision = learner.accelerator.device, learner.plan, learner.accelerator.mixed_precision
    held, most = own_memory(device)
    per_process = math.ceil(min(plan.config.train_batch_size, len(plan.lengths)) / plan.world_size)
    size = min(plan.micro_batch_size, per_process)
    inputs = longest_inputs(batches, size)
    copied = bool(learner.working.of)
    saved = device.type == "cpu" and bool(config.training.async_save)
    parts = with_snapshot(lasting_parts(learner.inner_model, copied), saved)
    guess = guess_activations(learner.inner_model.config, inputs)
    if most is not None and guess is not None and parts.peak + guess < LITTLE * most:
        return f"less than a tenth of {gib(most)} GiB ({list_parts(parts)}; activations were not counted)", []

    buckets = [bucket.flat for bucket in getattr(learner.gradients, "buckets", [])]
    own = [parameter.grad for parameter in learner.inner_model.parameters() if parameter.grad is not None]
    kept = sum(gradient.nbytes for gradient in buckets or own)
    base = max(0, held - parts.weights - kept)  # gradients that are there already are a part of the step

    def count(method: Method, size: int) -> Forecast:
        # The model is what it is: frozen, adapted or recomputed already.
        model = learner.inner_model
        model = model if method == Method() else method.apply(model, config.model, new_weights, precision)
        has_gradients = size < per_process or plan.world_size > 1
        found = forecast(model, longest_inputs(batches, size), device, precision, has_gradients, copied)
        return with_snapshot(with_process(found, base, device), saved)

    found = count(Method(), size)
    shown = " x ".join(f"{number:,}" for number in inputs["input_ids"].shape)
    text = f"about {gib(found.peak)} GiB{'' if most is None else f' of {gib(most)}'} ({list_parts(found, shown)})"
    if most is None or found.peak <= most:
        return text, []

    def help_line(flags: str, found: Forecast) -> str:
        return f"{flags}: {gib(found.peak)} GiB{'' if found.peak <= most else ' (still too much)'}"

    helps = [help_line("--async_save False", with_snapshot(found, False))] if saved else []
    for method in lighter_methods(learner.inner_model):
        with contextlib.suppress(Exception):  # not with other flags, not for this architecture, or a package is missing
            method.add_to(config)
            helps.append(help_line(method.flags, count(method, size)))
    fewer = size
    while found.peak > most and fewer > 1:
        fewer //= 2
        found = count(Method(), fewer)
    if fewer < size:
        helps.append(help_line(f"--per_device_train_batch_size {fewer}", found))
    advice = f"; what helps, and to how much: {', '.join(helps)}" if helps else ""
    return text, [f"warning: memory may not suffice{advice}"]


def with_process(found: Forecast, base: int, device: torch.device) -> Forecast:
    """A forecast with the memory of the process that is not the model's, and what is lost between blocks."""
    kept = device.type == "cpu" and keeps_freed_memory()
    return dataclasses.replace(found, base=base, lost=lost_in_holes(found.step or 0) if kept else 0)


def with_snapshot(found: Forecast, saved: bool) -> Forecast:
    """A forecast with what is copied to be `saved` while training goes on, or without."""
    return dataclasses.replace(found, snapshot=(found.gradients + found.moments) * saved)


def lost_in_holes(step: int) -> int:
    """Bytes that the heap of a CPU grows by beyond what is in use, where freed memory is kept: in holes too small to use.

    An empirical formula, which fits four runs: BERT 24 M (a step of 814 MB) lost 297 MB, with recomputed layers (250) 256,
    GPT-2 (1,330) 430, a Llama with LoRA (500) 408. Where freed memory was given back, nothing was lost.
    """
    return int(0.17 * step) + min(step, 200 * 2**20)


def longest_inputs(batches: Batches, size: int) -> Inputs:
    """The inputs of the `size` longest training samples; without a mask where there is no padding among them."""
    inputs = dataclasses.replace(batches, packed=False).longest(size).micro_batches[0].inputs
    mask = inputs.get("attention_mask")
    if mask is not None and bool(mask.all()):
        return {name: tensor for name, tensor in inputs.items() if name != "attention_mask"}
    return inputs


def guess_activations(hf_config: Any, inputs: Inputs) -> int | None:
    """Bytes that float32 layers keep of `inputs`, about twice what a BERT keeps; None for an unusual configuration."""
    settings, (rows, length) = hf_config.get_text_config(), inputs["input_ids"].shape
    names = ("num_hidden_layers", "hidden_size", "num_attention_heads")
    layers, width, heads = (getattr(settings, name, None) for name in names)
    if not (isinstance(layers, int) and isinstance(width, int) and isinstance(heads, int)):
        return None
    return rows * length * layers * (150 * width + 16 * heads * length)


def gib(size: float) -> str:
    """Bytes in GiB, with about three digits."""
    number = size / 2**30
    return f"{number:.{2 if number < 10 else 1 if number < 100 else 0}f}"


def list_parts(found: Forecast, shape: str = "") -> str:
    """The parts of a forecast in GiB; `shape` is that of the micro-batch."""
    parts = [f"weights {gib(found.weights)}", f"gradients {gib(found.gradients)}", f"AdamW {gib(found.moments)}"]
    if found.activations is not None:
        parts.append(f"activations {gib(found.activations)} for {shape} tokens")
    elif shape:
        parts.append(f"activations are not known: the model does not run without data ({found.fault})")
    others = {"libraries and data": found.base, "unused between blocks": found.lost}
    others |= {"the copy that a checkpoint is written from": found.snapshot}
    return ", ".join(parts + [f"{name} {gib(size)}" for name, size in others.items() if size])


def compare_methods(config: DoctorConfig, source: ModelSource) -> str:
    """A table of what the ways to train a model take on this machine, from its config.json alone.

    Texts are as long as `--max_length`, or as the model can read. Raises UserError if no classifier can be built.
    """
    device = torch.device("cuda" if uses_gpu() else "cpu")
    precision = resolve_precision(config.mixed_precision)
    use_cpu_kernels(device.type == "cpu")
    hf_config = load_hf_config(source)
    for settings in (hf_config, hf_config.get_text_config()):
        settings.pad_token_id = 0 if getattr(settings, "pad_token_id", None) is None else settings.pad_token_id
    with loading_errors(source), torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(copy.deepcopy(hf_config), dtype=torch.float32)
    model = keep_no_cache(attend_by_length(model))
    held, most = own_memory(device)
    length = min(config.max_length, longest_input(hf_config) or config.max_length)
    size = min(config.train_batch_size, config.per_device_train_batch_size or config.train_batch_size)

    @functools.cache  # the table and the samples that fit ask for the same sizes
    def count(changed: Any, rows: int) -> Forecast:
        ids = torch.empty(rows, length, dtype=torch.int64, device="meta")
        inputs = {"input_ids": ids, "attention_mask": ids}
        has_gradients, copied = rows < config.train_batch_size, are_copied(None, precision, device)
        found = forecast(changed, inputs, device, precision, has_gradients, copied)
        return with_process(found, held, device)

    table = [["GiB", "weights", "gradients", "AdamW", "activations", "peak", "samples that fit"]]
    for method in METHODS:
        name = method.flags or "the whole model"
        try:
            if method.load_in and getattr(hf_config, "quantization_config", None):
                raise UserError("the weights are quantized already")
            changed = method.apply(model, source, [], precision)
        except UserError as error:
            table.append([name, f"not possible: {first_line(error)}"])
            continue
        found = count(changed, size)
        row = [name, gib(found.weights), gib(found.gradients), gib(found.moments)]
        if found.activations is None:
            table.append([*row, f"not known ({found.fault})"])
            continue
        peak = functools.partial(lambda changed, rows: count(changed, rows).peak, changed)
        least = found.base + found.weights + found.moments
        fits = "not known" if most is None else samples_that_fit(peak, config.train_batch_size, most, least)
        table.append([*row, gib(found.activations), gib(found.peak), fits])
    widths = [max(len(row[column]) for row in table if len(row) == len(table[0])) for column in range(len(table[0]))]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in table]
    place = "the GPU" if device.type == "cuda" else "main memory"
    free = "" if most is None else f", of {gib(most)} GiB of {place}"
    parameters = sum(parameter.numel() for parameter in model.parameters())
    title = (
        f"Memory to train {parameters / 1e6:,.0f} million parameters in micro-batches of {size} x {length} tokens "
        f"(precision {precision}){free}:"
    )
    note = "The peak counts what is there at one time, libraries included; samples that fit are those of a micro-batch."
    return "\n".join([title, "", *lines, "", note])


def samples_that_fit(peak: Callable[[int], int], whole: int, most: int, least: int = 0) -> str:
    """How many of the `whole` samples of a step a micro-batch can have, where one of n takes `peak(n)` of `most` bytes.

    `least` bytes are taken whatever n is. Peaks are forecasts that take seconds: few of them are asked for.
    """
    if least > most:
        return "0"
    if peak(whole) <= most:
        return f"all {whole:,}"
    if peak(1) > most:
        return "0"
    # Smaller ones add to the gradients of those before, so that all of them take more with each sample.
    fits, fails = 1, whole
    while fails - fits > 1:
        slope = (peak(fails) - peak(fits)) / (fails - fits)  # nearly a line
        guess = fits + int((most - peak(fits)) / slope) if slope > 0 else fails
        guess = min(max(guess, fits + 1), fails - 1)
        fits, fails = (guess, fails) if peak(guess) <= most else (fits, guess)
    return f"{fits:,}"
