"""The memory that training takes, counted before it starts: one step on tensors that have shapes and dtypes, but no data.

forecast          the bytes of each part, and their peak, for a model and a micro-batch
Method            another way to train the model, to be forecast
lighter_methods   those that take less than the way that a model is trained
"""

import contextlib
import copy
import dataclasses
import weakref
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lib.config.sections import AdapterConfig, ModelSource
from lib.config.train import TrainConfig
from lib.errors import UserError, first_line
from lib.model.adapters.adapt import adapt, frozen_layers
from lib.model.forward import Inputs, compute_logits
from lib.model.frozen_weights import hold_as_4bit
from lib.model.layers import backbone_of, freeze, set_train_mode
from lib.model.recomputation import recompute_layers
from lib.model.sharding import own_part
from lib.runtime.precision import DTYPES, keep_in_dtype
from lib.training.gradients import Gradients
from lib.training.optimizer import large_tables
from lib.training.working_weights import WorkingWeights, copied_weights


@dataclasses.dataclass(frozen=True)
class Forecast:
    """Bytes that training takes on a device.

    What is there all the time: `base`, which is not the model's (libraries and data in main memory), the `weights`, with
    the bf16 copies that steps compute with, and the two `moments` of AdamW. In each step come and go the `gradients` and
    the `activations`: all that a forward of one micro-batch keeps for its backward, copies of weights that autocast makes
    included. Gradients appear while activations go, so that the most of both at once, `step`, lies between the larger one
    and their sum, with what operations need for a moment. `activations` and `step` are None where the model cannot be run
    without data, for the reason `fault`. Of a step, some memory is `lost` between blocks that are in use. In main memory, a
    `snapshot` of weights and moments may be written as a checkpoint meanwhile.
    """

    weights: int
    gradients: int
    moments: int
    activations: int | None
    step: int | None
    base: int = 0
    lost: int = 0
    snapshot: int = 0
    fault: str = ""

    @property
    def peak(self) -> int:
        """The most bytes at one time; without the activations where they are not known."""
        kept = self.base + self.lost + self.weights + self.moments + self.snapshot
        return kept + (self.gradients if self.step is None else self.step)


class Tally(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make within: `live` now, `peak` at most.

    Values that code asks for are answered by 0 or False: there is no data.
    """

    def __init__(self, held: Sequence[torch.Tensor]) -> None:
        """The tensors that are `held` are there already and not counted."""
        super().__init__()
        self.live = self.peak = 0
        self.known: dict[int, Any] = {tensor.untyped_storage()._cdata: tensor for tensor in held}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 0.0 if args[0].is_floating_point() else 0
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.count(tensor.untyped_storage())
        return result

    def count(self, storage: torch.UntypedStorage) -> None:
        """Count a storage once, until it is freed."""
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known[key] = weakref.ref(storage, lambda _: self.free(key, size))
            self.live += size
            self.peak = max(self.peak, self.live)

    def free(self, key: int, size: int) -> None:
        del self.known[key]
        self.live -= size


def copy_shapes(model: nn.Module, device: torch.device) -> Any:
    """A copy of `model` whose parameters and buffers have no data; its code is the same.

    On `device` they are PyTorch's fake tensors, which operations treat as tensors there; or they are on `meta`.
    """
    held: dict[int, Any] = {}
    with contextlib.nullcontext() if device.type == "meta" else FakeTensorMode(allow_non_fake_inputs=True):
        for tensor in (*model.parameters(), *model.buffers()):
            shape = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=device)
            is_parameter = isinstance(tensor, nn.Parameter)
            held[id(tensor)] = nn.Parameter(shape, requires_grad=tensor.requires_grad) if is_parameter else shape
            vars(held[id(tensor)]).update(vars(tensor))  # what quantized weights know of their scales
    return copy.deepcopy(model, held)


def forecast(
    model: nn.Module,
    inputs: Inputs,
    device: torch.device,
    precision: str,
    has_gradients: bool = False,
    copied: bool = False,
) -> Forecast:
    """What a step of `model` takes on `device`, for the micro-batch `inputs`.

    The step is a forward and a backward of a copy of the model, on tensors without data, with the casts that mixed
    `precision` makes on the device. It takes about a second for a model of any size, draws no random numbers, and changes
    nothing. Without a mask of attention, `inputs` have no padding. With `has_gradients`, all gradients are there already:
    of earlier micro-batches, or in the memory in which several processes sum them; with `copied`, the step is computed with
    `WorkingWeights`. Not counted are what the allocator of
    the device loses to rounding and fragments, and AdamW's own step, which needs less than the backward before it.
    """
    parts = lasting_parts(model, copied)
    evaluation = cast_bytes(model, precision, copied)
    try:
        activations, step = count_step(copy_shapes(model, device), inputs, device, precision, has_gradients, copied)
    except Exception as error:  # code of others, which must not end a run here
        return dataclasses.replace(parts, fault=f"{type(error).__name__}: {first_line(error)}")
    return dataclasses.replace(parts, activations=activations, step=max(step, evaluation))


def lasting_parts(model: nn.Module, copied: bool = False) -> Forecast:
    """A forecast without activations; of a model in shards, for those of this process."""
    own = [own_part(tensor) for tensor in (*model.parameters(), *model.buffers())]
    held = {t.untyped_storage()._cdata: t.nbytes for t in own}
    gradients = sum(own_part(parameter).nbytes for parameter in model.parameters() if parameter.requires_grad)
    copies = sum(weight.numel() for weight in copied_weights(model)) * torch.bfloat16.itemsize if copied else 0
    return Forecast(sum(held.values()) + copies, gradients, 2 * gradients, None, None)


def count_step(
    model: nn.Module, inputs: Inputs, device: torch.device, precision: str, has_gradients: bool, copied: bool
) -> tuple[int, int]:
    """(bytes that a forward keeps for its backward, most bytes of gradients and activations at once); uses `model` up."""
    first: Any = next(model.parameters())
    before = 0
    with first.fake_mode, torch.random.fork_rng(devices=[]):
        tables = prepare_tables(model) if device.type == "cpu" else set()
        for parameter in model.parameters():
            if parameter in tables or (has_gradients and parameter.requires_grad):
                parameter.grad = torch.empty_like(parameter)
                before += parameter.nbytes
        # Counts of windows are read on the CPU.
        fed = {n: t if n == "num_windows" else torch.empty_like(t, device=device) for n, t in inputs.items()}
        working = WorkingWeights(model, copied)
        alone: Any = SimpleNamespace(num_processes=1)
        Gradients(alone, model, working)
        working.refresh()
        held = [*model.parameters(), *model.buffers(), *fed.values(), *working.of.values()]
        with Tally(held) as tally, torch.autograd.set_multithreading_enabled(False):
            with torch.autocast(device.type, DTYPES.get(precision), enabled=precision in DTYPES):
                logits = compute_logits(model, fed)
            kept = tally.live
            logits.sum().backward()
    return kept, before + tally.peak


def prepare_tables(model: nn.Module) -> set[torch.Tensor]:
    """Treat large embedding tables as `TableAdamW` does; returns their weights, whose gradients are always there."""
    tables = large_tables(model)
    for table in tables:
        table.sparse = False
        table.register_forward_hook(lambda module, _, output: RowsOnly.apply(module.weight, output.detach()))
    return {table.weight for table in tables}


class RowsOnly(torch.autograd.Function):
    """The output of an embedding table whose gradient is not made anew in each backward, but added to in some rows."""

    @staticmethod
    def forward(_: Any, weight: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        return output.view_as(output)

    @staticmethod
    def backward(_: Any, gradient: torch.Tensor) -> tuple[None, None]:
        return None, None


def cast_bytes(model: nn.Module, precision: str, copied: bool) -> int:
    """Bytes of the copies of weights that evaluation works with beside those of steps, see `cast_weights`."""
    dtype = DTYPES.get(precision)
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)] if dtype else []
    cast = {p: p.numel() for layer in layers for p in layer.parameters(recurse=False) if p.dtype == torch.float32}
    for weight in copied_weights(model) if copied else ():
        cast.pop(weight)
    return sum(cast.values()) * dtype.itemsize if dtype else 0


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to train a model that takes more or less memory."""

    adapter: Literal["lora"] | None = None
    frozen: Literal["backbone"] | None = None
    load_in: Literal["4bit"] | None = None
    recomputed: bool = False

    @property
    def flags(self) -> str:
        """How to ask train.py for it."""
        given = [
            ("--adapter", self.adapter),
            ("--freeze", self.frozen),
            ("--load_in", self.load_in),
            ("--gradient_checkpointing", self.recomputed),
        ]
        return " ".join(f"{flag} {value}" for flag, value in given if value)

    def add_to(self, config: TrainConfig) -> TrainConfig:
        """`config` with these flags. Raises UserError if train.py refuses them together with its own."""
        training = dataclasses.replace(
            config.training, gradient_checkpointing=self.recomputed or config.training.gradient_checkpointing
        )
        model = dataclasses.replace(
            config.model, freeze=self.frozen or config.model.freeze, load_in=self.load_in or config.model.load_in
        )
        adapter = dataclasses.replace(config.adapter, adapter=self.adapter or config.adapter.adapter)
        return dataclasses.replace(config, training=training, model=model, adapter=adapter)

    def apply(self, model: nn.Module, source: ModelSource, new_weights: list[str], precision: str) -> Any:
        """A copy of `model` on the meta device, changed as train.py would change it.

        Raises UserError if the architecture does not fit, or a package is missing.
        """
        changed = copy_shapes(model, torch.device("meta"))
        with torch.random.fork_rng(devices=[]):
            freeze(changed, self.frozen)
            changed = adapt(changed, AdapterConfig(adapter=self.adapter), source, new_weights)
            changed = recompute_layers(changed, self.recomputed)
        if self.load_in:
            hold_as_4bit(frozen_layers(changed))
        keep_in_dtype(frozen_layers(changed), precision)
        set_train_mode(changed)
        return changed


def lighter_methods(model: nn.Module) -> list[Method]:
    """What could be added to the way `model` is trained, so that it takes less; not what train.py would refuse."""
    whole = all(
        parameter.requires_grad for parameter in model.parameters()
    )  # nothing is frozen, nor is there an adapter
    methods = [Method(adapter="lora"), Method(frozen="backbone")] if whole else []
    backbone = set(backbone_of(model).modules())
    held = [next(layer.parameters()) for layer in frozen_layers(model) if layer in backbone]
    if any(weight.is_floating_point() and not weight.requires_grad for weight in held):
        methods = [Method(load_in="4bit")]
    return [Method(recomputed=True), *methods] if can_recompute(model) else methods


def can_recompute(model: nn.Module) -> bool:
    """Whether --gradient_checkpointing would make training `model` take less: not where it is refused, or on already."""
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        return False
    prompt: Any = getattr(model, "active_peft_config", None)
    if str(getattr(prompt, "peft_type", "")).endswith("PREFIX_TUNING"):
        return False
    try:
        recompute_layers(copy_shapes(model, torch.device("meta")), True)
    except UserError:
        return False
    return True
