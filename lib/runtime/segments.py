"""Attention within the segments of a row: texts that stand one after the other do not read each other.

Registered with transformers as "segments". A forward with `cu_seq_lens_q`, as transformers calls the place where each text
starts, is computed by segments: on a GPU in one kernel (PyTorch's `varlen_attn`, without dropout), else one text after the
other by "sdpa". Any other forward is left to "sdpa".
"""

import importlib.util
from typing import Any

import torch
from torch import nn
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from lib.errors import UserError
from lib.runtime.attention import FLASH

NAME = "segments"

CAPABILITY = (8, 0)
"""Compute capability of the first GPUs with kernels for texts of any length."""

LEAVE_OUT = "leave --padding_free out"


def segment_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of (rows, heads, positions, width) tensors: (rows, positions, heads, width), and no weights.

    `cu_seq_lens_q` (texts + 1,) int32 has the start of each text in the one row, and its end. With `sliding_window` a token
    reads those that are less than as many positions away, as with FlashAttention in transformers. Raises ValueError for
    dropout in a kernel that has none.
    """
    others = {name: value for name, value in others.items() if name not in ("cu_seq_lens_k", "max_length_k")}
    sdpa = AttentionInterface()["sdpa"]
    if cu_seq_lens_q is None:
        mask = near(query, sliding_window) if attention_mask is None else attention_mask
        return sdpa(module, query, key, value, mask, dropout=dropout, scaling=scaling, **others)
    kind = query.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype
    if has_kernel(kind, dtype):
        from torch.nn.attention.varlen import varlen_attn  # not in every build of PyTorch

        if dropout:
            raise ValueError("attention by segments has no dropout on a GPU")
        reach = -1 if sliding_window is None else sliding_window - 1
        q, k, v = (x.to(dtype)[0].transpose(0, 1) for x in (query, key, value))
        starts, longest, window = cu_seq_lens_q, max_length_q or len(q), (reach, reach)
        attended = varlen_attn(q, k, v, starts, starts, longest, longest, scale=scaling, window_size=window)
        assert isinstance(attended, torch.Tensor)  # without further outputs
        return attended[None], None
    sizes = cu_seq_lens_q.diff().tolist()
    texts = zip(query.split(sizes, dim=2), key.split(sizes, dim=2), value.split(sizes, dim=2), strict=True)
    parts = [
        sdpa(module, q, k, v, near(q, sliding_window), dropout=dropout, scaling=scaling, **others)[0]
        for q, k, v in texts
    ]
    return torch.cat(parts, dim=1), None


def has_kernel(device_type: str, dtype: torch.dtype) -> bool:
    """Whether one kernel computes all segments; there is none for float32, in which a model is tried."""
    return device_type == "cuda" and dtype in (torch.bfloat16, torch.float16)


def near(query: torch.Tensor, sliding_window: int | None) -> torch.Tensor | None:
    """(1, 1, positions, positions): whether a token reads another one; None where each reads all."""
    length = query.shape[2]
    if sliding_window is None or length <= sliding_window:
        return None
    places = torch.arange(length, device=query.device)
    return ((places[:, None] - places).abs() < sliding_window)[None, None]


def padding_mask(*args: Any, attention_mask: torch.Tensor | None = None, **settings: Any) -> torch.Tensor | None:
    """The mask of "sdpa"; none where there is no padding, as in a row of segments: it would grow with its square."""
    return None if attention_mask is None else sdpa_mask(*args, attention_mask=attention_mask, **settings)


AttentionInterface.register(NAME, segment_attention)
AttentionMaskInterface.register(NAME, padding_mask)


def choose_segments(implementation: str, device: torch.device, mixed_precision: str) -> str:
    """The implementation that computes segments in place of `implementation`: FlashAttention does by itself.

    Raises UserError if there is none, or this device or precision has no kernel for it.
    """
    if implementation in (*FLASH, NAME):
        return implementation
    if implementation != "sdpa":
        raise UserError(
            f"--padding_free needs attention by sdpa or FlashAttention, and this model's is {implementation}; {LEAVE_OUT}, or "
            "--attn_implementation eager where that is given"
        )
    if device.type == "cpu":
        return NAME
    if device.type != "cuda":
        raise UserError(f"--padding_free has no kernel for the device {device.type}; {LEAVE_OUT}")
    if mixed_precision == "no":
        raise UserError(f"--padding_free computes in bf16 or fp16 on a GPU; add --mixed_precision bf16, or {LEAVE_OUT}")
    if (found := torch.cuda.get_device_capability(device)) < CAPABILITY:
        raise UserError(
            f"--padding_free needs a GPU of compute capability 8.0, this one has {found[0]}.{found[1]}; {LEAVE_OUT}"
        )
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        raise UserError(f"--padding_free: this PyTorch ({torch.__version__}) has no varlen_attn; {LEAVE_OUT}")
    return NAME
