"""A model in shards: its parameters, gradients and AdamW's moments are spread over processes by PyTorch's FSDP2.

Each process holds a part of every parameter as a DTensor. Before a layer computes, its parts are gathered; after the
backward pass its gradients are summed, and each process keeps the sum of its part (ZeRO, Rajbhandari et al. 2020; FSDP,
Zhao et al. 2023). With replicas (HSDP), every group of processes holds a whole model, and groups add their gradients.
"""

import contextlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard

from lib.model.layers import find_layers
from lib.runtime.launch_checks import Sharding
from lib.runtime.watchdog import beat

SHARDED = (
    *("bert", "roberta", "xlm-roberta", "camembert", "electra", "distilbert", "deberta-v2", "modernbert"),
    *("gpt2", "llama", "qwen2", "qwen3"),
)
"""Model types that are tested in shards, and two with the code of one of them.

In others a list of layers may be half of the model, or a process may use other parameters than the rest.
"""

PART = 2**30
"""Bytes of a model in shards that the first process gathers at a time to export it; a larger tensor is a part of its own."""


def shard_model(model: nn.Module, sharding: Sharding, device: torch.device) -> None:
    """Spread the parameters of `model`, equal on all processes, over their devices, in place; names stay what they are.

    Each transformer layer is gathered by itself, what is left of the model as one. Gradients are summed, not averaged,
    and in float32: what autocast computes with is cast after gathering, as without shards. Raises UserError if the model
    does not show its layers.
    """
    layers = find_layers(model, "FSDP")
    mesh = device_mesh(sharding.shards, sharding.replicas, device.type)
    for module in (*layers, model):
        fully_shard(module, mesh=mesh, reshard_after_forward=sharding.reshard_after_forward)
        module.set_gradient_divide_factor(1.0)
        # Else NCCL would multiply by the factor while it adds, which it reads as 0 in bf16.
        module.set_force_sum_reduction_for_comms(True)


def device_mesh(shards: int, replicas: int, device: str) -> DeviceMesh:
    """The processes as (replicas, shards), or as (shards,) without replicas: neighbours hold the parts of one model."""
    if replicas == 1:
        return init_device_mesh(device, (shards,), mesh_dim_names=("shard",))
    return init_device_mesh(device, (replicas, shards), mesh_dim_names=("replicate", "shard"))


def is_sharded(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)


def without_gradients(model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """A context to compute in without gradients; inference mode is not for shards: layers are gathered into memory that
    training uses as well.
    """
    return torch.no_grad() if is_sharded(model) else torch.inference_mode()


def is_shard(value: Any) -> bool:
    """Whether a value is a tensor of which this process holds a part."""
    return isinstance(value, DTensor)


def own_part(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor: its shard, or all of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: torch.Tensor, everywhere: bool = False) -> torch.Tensor:
    """A copy in main memory of a tensor in shards, as it is without; every process must call this.

    The main process gets it, `everywhere` every process; the others get back their shard. A tensor without shards is
    returned as it is.
    """
    if not isinstance(tensor, DTensor):
        return tensor
    with torch.no_grad():
        gathered = tensor.full_tensor()  # of uneven shards it may be a view of padded memory
    if everywhere or torch.distributed.get_rank() == 0:
        return gathered.to("cpu", copy=True, memory_format=torch.contiguous_format)
    return tensor


def own_slices(like: torch.Tensor) -> tuple[slice, ...]:
    """Where the part that this process holds of a tensor lies in the whole: a slice for each dimension."""
    slices = [slice(0, size) for size in like.shape]
    if isinstance(like, DTensor):
        for dimension, placement in enumerate(like.placements):
            if isinstance(placement, Shard):
                begin, end = slices[placement.dim].start, slices[placement.dim].stop
                size = -(-(end - begin) // like.device_mesh.size(dimension))
                begin = min(begin + like.device_mesh.get_local_rank(dimension) * size, end)
                slices[placement.dim] = slice(begin, min(begin + size, end))
    return tuple(slices)


def as_shard(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A tensor that every process holds whole, in the shards of `like`; nothing is sent."""
    if not isinstance(like, DTensor):
        return tensor
    part = tensor.detach()[own_slices(like)].to(
        like.to_local().device, copy=True, memory_format=torch.contiguous_format
    )  # after the cut: the GPU has room
    return DTensor.from_local(part, like.device_mesh, like.placements, shape=like.shape, stride=like.stride())


def free_layers(model: nn.Module) -> None:
    """Have all processes hold their parts alone: an evaluation may leave layers gathered."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """What a model in shards saves: its parameters and buffers, each under the first of its names."""
    free_layers(model)
    names = [{name for name, _ in model.named_parameters(remove_duplicate=once)} for once in (True, False)]
    return {name: tensor for name, tensor in model.state_dict().items() if name in names[0] or name not in names[1]}


def gathered_parts(model: nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """The tensors of a model in shards, whole on the first process, in parts of PART bytes; every process must exhaust it.

    None for a model that is not in shards.
    """
    tensors = list(tensors_of(model).items()) if is_sharded(model) else []
    while tensors:
        count, size = 1, tensors[0][1].nbytes
        while count < len(tensors) and size + tensors[count][1].nbytes <= PART:
            size += tensors[count][1].nbytes
            count += 1
        part, tensors = tensors[:count], tensors[count:]
        beat()
        yield {name: whole(tensor) for name, tensor in part}


@contextlib.contextmanager
def whole_weights(model: nn.Module, change: bool = False, frozen: bool = True) -> Iterator[None]:
    """Within, the main process finds whole parameters in main memory in `model`, where it had shards: to save them.

    With `change`, every process does, and what it does to them is kept: to load others. Without `frozen`, frozen ones stay
    in shards. Every process must call this; the model cannot compute within. Does nothing for a model that is not in shards.
    """
    free_layers(model)
    if not is_sharded(model):
        yield
        return
    places = [(module, dict(module._parameters)) for module in model.modules()]
    hooks = {module: module._load_state_dict_post_hooks for module, _ in places}
    held: dict[int, Any] = {
        id(p): p
        for _, parameters in places
        for p in parameters.values()
        if isinstance(p, DTensor) and (frozen or p.requires_grad)
    }
    found: dict[int, nn.Parameter] = {}  # tied weights stay tied
    for key, shard in held.items():
        if (gathered := whole(shard, everywhere=change)) is not shard:
            found[key] = nn.Parameter(gathered, requires_grad=shard.requires_grad)
    try:
        for module, parameters in places:
            module._parameters.update({name: found[id(p)] for name, p in parameters.items() if id(p) in found})
            module._load_state_dict_post_hooks = OrderedDict()  # of FSDP, which expects shards
        yield
        with torch.no_grad():
            for key, parameter in found.items() if change else ():
                own_part(held[key]).copy_(own_part(as_shard(parameter, held[key])))
    finally:
        for module, parameters in places:
            module._parameters.update(parameters)
            module._load_state_dict_post_hooks = hooks[module]


def norm_over_shards(norm: torch.Tensor, gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    """The 2-norm of whole gradients from that of the parts of this process; replicas hold the same, and do not count."""
    first = next(iter(gradients), None)
    if not isinstance(first, DTensor):
        return norm
    squares = norm.to(first.device, torch.float64).square()
    for dimension, placement in enumerate(first.placements):
        if placement.is_shard():
            torch.distributed.all_reduce(squares, group=first.device_mesh.get_group(dimension))
    return squares.sqrt().float()
