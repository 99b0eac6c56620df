"""What the user asked of the device that a script computes on, and of the processes that share the work."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class DeviceOptions:
    """The options of the same names; `cpu_kernels`, `deterministic` and `cuda_graphs` are for training.

    The processes of a launch wait for each other for at most `join_timeout` seconds without a sign of the others.
    """

    mixed_precision: str
    attn_implementation: str = "auto"
    cpu_kernels: bool = True
    deterministic: bool = False
    join_timeout: float = 600.0
    cuda_graphs: bool = False
