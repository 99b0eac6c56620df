"""Parameter groups, AdamW, and a schedule counted in optimizer steps."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau
from transformers import get_scheduler
from transformers.optimization import GreedyLR

from lib.config.sections import literal
from lib.config.train import OptimConfig
from lib.errors import UserError
from lib.evaluation.scores import LOWER_IS_BETTER
from lib.model.layers import backbone_of, find_embeddings, find_layers
from lib.model.sharding import as_shard, is_shard, is_sharded, whole
from lib.model.stored_tensors import StoredTensors
from lib.runtime.processes import is_alone
from lib.training.plan import count_steps

LARGE_TABLE = 2**20
"""Size of an embedding table (numbers) above which zeroing its whole gradient costs more than zeroing the rows of a batch."""

METRIC_SCHEDULERS = (GreedyLR, ReduceLROnPlateau)
"""Schedulers that follow the validation metric instead of the step."""


def build_optimizer(model: nn.Module, config: OptimConfig, device: torch.device) -> Optimizer:
    """AdamW (Loshchilov and Hutter 2019) over the trainable parameters, fused if PyTorch has it for the device.

    On a CPU the trainable parameters are copied to memory of their own: they lie in the memory-mapped file of the
    checkpoint, where the first step would copy them page by page, ten times as slowly. Shards have it already; their
    tables have no gradients to reuse.
    """
    on_cpu = device.type == "cpu" and not is_sharded(model)
    for parameter in model.parameters() if on_cpu else ():
        if parameter.requires_grad:
            parameter.data = parameter.data.clone()
    return TableAdamW(
        parameter_groups(model, config),
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        fused=device.type in ("cpu", "cuda"),
        tables=large_tables(model) if on_cpu else (),
    )


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """Trainable parameters grouped by peak learning rate and weight decay; those at `learning_rate` come first.

    Matrices are decayed, vectors are not: decaying biases and norm scales pulls activations towards zero without
    regularizing. Raises UserError if `--layerwise_lr_decay` is given and the layers of the model are not found.
    """
    rates, peak = other_rates(model, config), config.learning_rate
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            groups.setdefault((rates.get(parameter, peak), parameter.ndim >= 2), []).append(parameter)
    return [
        {"params": groups[rate, matrix], "lr": rate, "weight_decay": config.weight_decay if matrix else 0.0}
        for rate, matrix in sorted(groups, key=lambda key: (key[0] != peak, -key[0], not key[1]))
    ]


def other_rates(model: Any, config: OptimConfig) -> dict[nn.Parameter, float]:
    """Peak rates of the parameters with a rate of their own: layers below the top one, embeddings, the head.

    All others learn at `learning_rate`: the top layer, a pooler between it and the head, tables that all layers share
    (discriminative fine-tuning, Howard and Ruder 2018). The head is everything outside the backbone except virtual tokens.
    """
    rates: dict[nn.Parameter, float] = {}
    if config.layerwise_lr_decay != 1:
        if model.config.is_encoder_decoder:
            raise UserError(
                f"--layerwise_lr_decay: {type(model).__name__} has an encoder and a decoder; only models with one stack of "
                "layers are supported"
            )
        layers = find_layers(model, "--layerwise_lr_decay")
        embeddings = nn.ModuleList(find_embeddings(backbone_of(model)))
        for distance, part in enumerate([*reversed(layers), embeddings]):
            rate = config.learning_rate * config.layerwise_lr_decay**distance
            rates |= dict.fromkeys(part.parameters(), rate)
    if config.head_learning_rate is not None:
        body = set(backbone_of(model).parameters())
        head = [p for name, p in model.named_parameters() if p not in body and "prompt_encoder." not in name]
        rates |= dict.fromkeys(head, config.head_learning_rate)
    return rates


class TableAdamW(AdamW):
    """AdamW that reuses the gradients of large embedding tables: PyTorch allocates a table of zeros for each batch."""

    def __init__(self, *arguments: Any, tables: Sequence[nn.Embedding] = (), **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.kept: list[tuple[nn.Embedding, torch.Tensor, list[torch.Tensor]]] = []
        """Tables, their gradients, and the rows touched since the last `zero_grad`."""
        for table in tables:
            table.sparse = True  # backward adds the rows of a batch to the existing gradient
            table.weight.grad = torch.zeros_like(table.weight)
            rows: list[torch.Tensor] = []
            table.weight.register_hook(lambda gradient, rows=rows: rows.append(rows_of(gradient)))
            self.kept.append((table, table.weight.grad, rows))

    def gradients(self) -> list[torch.Tensor]:
        """All gradients; of large tables only the touched rows, since all others are zero."""
        touched = {
            table.weight: gradient[torch.cat(rows).unique()]
            for table, gradient, rows in self.kept
            if rows and is_alone()  # other processes touched other rows
        }
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        return [touched.get(p, p.grad) for p in parameters if p.grad is not None]

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        for table, gradient, rows in self.kept:
            if not is_alone():
                gradient.zero_()
            elif rows:
                gradient.index_fill_(0, torch.cat(rows), 0)
            rows.clear()
            table.weight.grad = gradient


def rows_of(gradient: torch.Tensor) -> torch.Tensor:
    """The rows that a gradient touches; all of them if the weights were used as a whole."""
    return gradient._indices()[0] if gradient.is_sparse else torch.arange(len(gradient))


def large_tables(model: nn.Module) -> list[nn.Embedding]:
    """Large trainable embedding tables whose weights no other module shares: a tied head would touch all rows."""
    tables = [module for module in model.modules() if type(module) is nn.Embedding and module.weight.requires_grad]
    users = Counter(id(parameter) for module in model.modules() for parameter in module._parameters.values())
    return [table for table in tables if table.weight.numel() >= LARGE_TABLE and users[id(table.weight)] == 1]


def build_scheduler(optimizer: Optimizer, config: OptimConfig, total_steps: int, metric: str) -> Any:
    """The schedule named by `--lr_scheduler_type`; `metric` is the validation metric that some schedules follow.

    It is not prepared by the accelerator: a prepared scheduler advances once per process instead of once per step.
    Raises UserError if the schedule does not accept the given settings, or needs others.
    """
    name, settings = config.lr_scheduler_type, scheduler_settings(config)
    warmup = count_steps(config.warmup_steps, total_steps)
    if name in ("reduce_lr_on_plateau", "greedy"):
        settings.setdefault("mode", "min" if metric in LOWER_IS_BETTER else "max")
    if name == "greedy":
        settings.setdefault("min_lr", 0.0)  # its own default, 1e-3, is above the rates of fine-tuning
    if name == "warmup_stable_decay":
        settings.setdefault("num_decay_steps", max(1, total_steps // 5))
    if name in ("cosine_with_min_lr", "cosine_warmup_with_min_lr") and not {"min_lr", "min_lr_rate"} & set(settings):
        settings["min_lr_rate"] = 0.1
    try:
        if name in ("constant", "constant_with_warmup") and settings:
            raise TypeError("this schedule has no settings")  # get_scheduler would ignore them
        scheduler = get_scheduler(name, optimizer, warmup, total_steps, scheduler_specific_kwargs=settings)
        check_rates(scheduler, config, total_steps)
        return scheduler
    except (TypeError, ValueError, ArithmeticError) as error:
        raise UserError(f"--lr_scheduler_type {name} with --lr_scheduler_kwargs {settings}: {error}") from error


def check_rates(scheduler: Any, config: OptimConfig, total_steps: int) -> None:
    """Raise ValueError if the learning rate of a step is no number from 0 to a thousand."""
    for shape in scheduler.lr_lambdas if isinstance(scheduler, LambdaLR) else ():
        for step in {*range(min(total_steps, 100)), *(total_steps * part // 100 for part in range(101))}:
            rate = shape(step) * config.learning_rate
            if isinstance(rate, complex) or not 0 <= rate <= 1000:
                raise ValueError(f"the learning rate of step {step} would be {rate}")


def scheduler_settings(config: OptimConfig) -> dict[str, Any]:
    """`("min_lr=1e-6", "num_cycles=2")` as a dictionary, with numbers as numbers."""
    return {name: literal(value) for name, value in (item.split("=", 1) for item in config.lr_scheduler_kwargs)}


def advance_scheduler(scheduler: Any) -> None:
    """Advance by one optimizer step; schedules that follow a metric wait for `advance_on_metric`."""
    if not isinstance(scheduler, METRIC_SCHEDULERS):
        scheduler.step()


def advance_on_metric(scheduler: Any, metric: float) -> None:
    """Advance by one evaluation; only schedules that follow a metric do."""
    if isinstance(scheduler, METRIC_SCHEDULERS):
        scheduler.step(metric)


def learning_rate(optimizer: Optimizer) -> float:
    """The rate of the first group, which is at `--learning_rate` unless only other groups are trained."""
    rate = optimizer.param_groups[0]["lr"]
    return float(rate.item() if isinstance(rate, torch.Tensor) else rate)


def whole_state(optimizer: Optimizer) -> dict[str, Any]:
    """The state dict of the optimizer as one process would have it; every process must call this."""
    saved = optimizer.state_dict()
    moments = {
        number: {name: whole(value) if isinstance(value, torch.Tensor) else value for name, value in state.items()}
        for number, state in saved["state"].items()
    }
    return saved | {"state": moments}


def state_in_parts(optimizer: Optimizer) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The state dict of the optimizer of a model in shards without its moments, and these as `NUMBER.NAME`, in shards."""
    saved = optimizer.state_dict()
    moments = {
        f"{number}.{name}": value
        for number, state in saved["state"].items()
        for name, value in state.items()
        if is_shard(value)
    }
    rest = {
        number: {name: value for name, value in state.items() if f"{number}.{name}" not in moments}
        for number, state in saved["state"].items()
    }
    return saved | {"state": rest}, moments


def number_of(name: str) -> int:
    """The number of the parameter of a moment that `state_in_parts` named."""
    return int(name.partition(".")[0])


def copied(value: Any, like: torch.Tensor) -> Any:
    """A tensor that may lie in a file, in memory of this process, in the shards of `like`; another value as it is."""
    if not isinstance(value, torch.Tensor):
        return value
    return as_shard(value, like) if is_shard(like) else value.clone()


def restore_optimizer(
    optimizer: Optimizer,
    scheduler: Any,
    saved: dict[str, Any],
    saved_scheduler: dict[str, Any],
    parts: StoredTensors | None = None,
) -> None:
    """Restore moments, step counts and the position in the schedule; hyper-parameters stay those of the settings.

    `parts` are the moments that `saved` lacks, see `state_in_parts`. Of moments in shards each process copies, or reads, what
    it holds. Raises UserError if other parameters are trained than in the checkpoint, or in other groups.
    """
    sizes = [[len(group["params"]) for group in groups] for groups in (saved["param_groups"], optimizer.param_groups)]
    if sizes[0] != sizes[1]:
        raise UserError(
            "the checkpoint has other parameter groups: --layerwise_lr_decay, --head_learning_rate, --freeze or "
            "--adapter changed; start again with --resume_from_checkpoint never"
        )
    fresh = [
        {key: value for key, value in group.items() if key not in ("params", "lr")} for group in optimizer.param_groups
    ]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {
        number: {n: copied(v, like=v if n == "step" else parameters[number]) for n, v in values.items()}
        for number, values in saved["state"].items()
    }
    if parts is not None:
        read = {name: torch.empty_like(parameters[number_of(name)], dtype=d) for name, d in parts.dtypes.items()}
        parts.fill(read)
        for name, moment in read.items():
            state[number_of(name)][name.partition(".")[2]] = moment
    optimizer.load_state_dict(saved | {"state": state})
    for group, settings in zip(optimizer.param_groups, fresh, strict=True):
        group.update(settings)
    scheduler.load_state_dict(saved_scheduler)
    if isinstance(scheduler, LambdaLR):
        scheduler.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]
        scheduler._last_lr = [
            rate * shape(scheduler.last_epoch)
            for rate, shape in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
        ]
        for group, rate in zip(optimizer.param_groups, scheduler._last_lr, strict=True):
            group["lr"] = rate
