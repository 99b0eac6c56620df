"""What the user asked of the device that a script computes on."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class DeviceOptions:
    """The options of the same names; `cpu_kernels` and `deterministic` are for training."""

    mixed_precision: str
    attn_implementation: str = "auto"
    cpu_kernels: bool = True
    deterministic: bool = False
