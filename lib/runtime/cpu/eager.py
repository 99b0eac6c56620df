"""Where our CPU kernels apply."""

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad


def is_eager(*tensors: torch.Tensor) -> bool:
    """Whether `tensors` are plain CPU tensors, computed eagerly, or fake ones that stand for them.

    Other subclasses, torch.compile, tracing, torch.func and forward-mode derivatives are left to PyTorch's own kernels.
    """
    return (
        all(type(tensor) in (torch.Tensor, FakeTensor) and tensor.device.type == "cpu" for tensor in tensors)
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
    )
