"""One optimizer step: forward and backward over micro-batches, the sum over processes, AdamW, the schedule."""

import math
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from torch.optim import Optimizer

from lib.config.train import OptimConfig
from lib.data.load import Data
from lib.data.loader import Collator, Window, build_loader, split_micro_batches
from lib.model.forward import compute_logits
from lib.model.losses import Loss
from lib.runtime.memory import halve, has_own_memory, is_out_of_memory
from lib.runtime.processes import any_process, lowest, sum_gradients
from lib.runtime.seeds import seed_everything
from lib.runtime.watchdog import beat
from lib.training.optimizer import advance_scheduler, learning_rate
from lib.training.plan import Plan
from lib.training.state import State


def optimizer_step(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Optimizer,
    scheduler: Any,
    loss: Loss,
    window: Window,
    config: OptimConfig,
    seed: int,
    state: State,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Forward and backward over the micro-batches of this process, then one step of AdamW and of the schedule.

    The model must be in train mode (`set_train_mode`). The weighted losses of the samples are summed and divided by the
    weights of the whole step, so that neither processes nor micro-batches nor a short last batch change it. When memory
    is too short on one process, all of them halve their micro-batches and repeat the step. A step whose gradient is not
    finite leaves the weights as they are.

    Returns the summed weighted loss of this process and the norm of the gradients before clipping, both on the device:
    reading them waits for the device, which is left to the caller. Raises UserError when not even one sample fits in
    memory.
    """
    beat(f"step {state.step + 1}")
    state.learning_rate = learning_rate(optimizer)
    loss_sum = fit_gradients(accelerator, model, optimizer, loss, window, seed, state)
    sum_gradients(accelerator, model)
    norm = clip_gradients(accelerator, optimizer, config.max_grad_norm or math.inf)
    optimizer.step()
    if accelerator.optimizer_step_was_skipped:
        norm = torch.zeros(())  # fp16 with too large a scale
    else:
        advance_scheduler(scheduler, config.lr_scheduler_type)
    optimizer.zero_grad()
    state.step += 1
    state.samples_seen += window.num_samples
    state.pending = True
    return loss_sum, norm


def fit_gradients(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Optimizer,
    loss: Loss,
    window: Window,
    seed: int,
    state: State,
) -> torch.Tensor:
    """Gradients of this process and their summed loss, with micro-batches halved on all processes until they fit."""
    while True:
        loss_sum = accumulate_gradients(accelerator, model, loss, window, seed, state)
        if not any_process(accelerator, loss_sum is None):
            assert loss_sum is not None
            return loss_sum
        optimizer.zero_grad()
        largest = max(len(micro_batch["labels"]) for micro_batch in split_micro_batches(window, state.micro_batch_size))
        state.micro_batch_size = halve(-lowest(accelerator, -largest), "--per_device_train_batch_size")


def try_longest_batch(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Optimizer,
    plan: Plan,
    data: Data,
    collator: Collator,
    loss: Loss,
    state: State,
) -> None:
    """Forward and backward of the longest samples, so that a lack of memory shows now; nothing is learnt from them.

    Room is left for AdamW's two moments, which the first step makes.
    """
    if not has_own_memory(accelerator.device):
        return
    beat("trying the longest batch")
    indices = np.argsort(data.lengths["train"], kind="stable")[::-1][: plan.micro_batch_size]
    batch = next(iter(build_loader(data.tokens["train"], [indices], collator)))
    batch["sample_weight"] = torch.ones(len(indices))
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    moments = None if optimizer.state else torch.empty(2 * trained, dtype=torch.uint8, device=accelerator.device)
    fit_gradients(accelerator, model, optimizer, loss, Window([batch], len(indices), len(indices)), 0, state)
    optimizer.zero_grad()
    del moments


def accumulate_gradients(
    accelerator: Accelerator, model: nn.Module, loss: Loss, window: Window, seed: int, state: State
) -> torch.Tensor | None:
    """The summed loss of this process, whose gradients are added to the parameters'; None when memory was too short."""
    loss_sum = torch.zeros((), device=accelerator.device)
    try:
        for index, micro_batch in enumerate(split_micro_batches(window, state.micro_batch_size)):
            seed_everything(seed, state.step, index, accelerator.process_index)
            with accelerator.no_sync(model):  # gradients are summed once, by `sum_gradients`
                micro_sum = micro_batch_loss(model, micro_batch, accelerator.device, loss)
                accelerator.backward(micro_sum / window.weight)
            loss_sum += micro_sum.detach()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return None
    return loss_sum


def clip_gradients(accelerator: Accelerator, optimizer: Any, max_norm: float) -> torch.Tensor:
    """Have the coming step of AdamW clip the gradients to `max_norm`, or do nothing when they are not finite.

    Neither waits for them: the fused kernels take a divisor and a flag from the device, as a GradScaler gives them; with
    fp16 there is one, which does the second by itself. Returns the norm before clipping.
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    if accelerator.scaler is not None or not inner.defaults.get("fused"):
        trained = [parameter for group in inner.param_groups for parameter in group["params"]]
        return accelerator.clip_grad_norm_(trained, max_norm)
    norm = gradient_norm(inner.gradients())
    inner.found_inf = (~torch.isfinite(norm)).float()
    inner.grad_scale = None if math.isinf(max_norm) else ((norm + 1e-6) / max_norm).clamp(min=1.0)
    return norm


def gradient_norm(gradients: list[torch.Tensor]) -> torch.Tensor:
    """The 2-norm of all numbers in `gradients`.

    On a CPU by dot products: `vector_norm` adds all squares to few sums there, which for a table of 12 million numbers is
    5e-4 off in float32, and takes three times as long.
    """
    if not gradients or gradients[0].device.type != "cpu":
        return nn.utils.get_total_norm(gradients)
    flat = [gradient.reshape(-1) for gradient in gradients]
    return torch.stack([torch.dot(numbers, numbers) for numbers in flat]).sum().sqrt()


def micro_batch_loss(
    model: nn.Module, micro_batch: dict[str, torch.Tensor], device: torch.device, loss: Loss
) -> torch.Tensor:
    """Summed weighted losses of the samples, in float32."""
    inputs = dict(micro_batch)
    labels, weight = (inputs.pop(name).to(device, non_blocking=True) for name in ("labels", "sample_weight"))
    return (loss(compute_logits(model, inputs, device), labels) * weight).sum()
