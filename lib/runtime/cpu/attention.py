"""Attention in training on a CPU: PyTorch's result, in fewer passes over memory."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import AttentionInterface

from lib.runtime.cpu.eager import is_eager

LONGEST = {torch.bfloat16: 256, torch.float32: 128}
"""Keys up to which the gradients without dropout come faster from `Attention`, by dtype; others are left to PyTorch."""


def attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: torch.Tensor | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' "sdpa" attention; in training on a CPU computed by `Attention` where that is faster.

    PyTorch has two ways there. The one with dropout computes in float32; the one without takes ten times as long in bf16
    for the gradients of short texts. All that `Attention` does not cover goes to transformers: a mask that is not boolean
    or only implied (causal), fewer heads of keys than of queries, a learned bias, and what `others` ask for.
    """
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
    faster = 0 < dropout < 1 or (dropout == 0 and query.requires_grad and key.shape[2] <= LONGEST.get(dtype, 0))
    covered = (
        module.training
        and faster
        and is_eager(query, key, value, *([] if attention_mask is None else [attention_mask]))
        and are_covered(query, key, value, dtype)
        and (is_covered_mask(attention_mask, query, key) if attention_mask is not None else not causal)
        and position_bias is None
        and others.get("softcap") is None
        and others.get("cache") is None
        and not others.get("output_attentions")
    )
    if not covered:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, position_bias, **others
        )
    batch, heads, positions, width = query.shape
    q, k, v = (x.to(dtype).reshape(batch * heads, *x.shape[2:]) for x in (query, key, value))
    scale = scaling if scaling is not None else width**-0.5
    result = Attention.apply(q, k, v, attention_mask, (batch, heads), scale, dropout)
    return result.view(batch, heads, positions, v.shape[2]).transpose(1, 2).contiguous(), None


def are_covered(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether shapes and dtypes are those of plain attention; keys may be more or fewer than queries."""
    same_dtype = query.dtype == key.dtype == value.dtype
    rotated = torch.is_autocast_enabled("cpu") and {query.dtype, key.dtype, value.dtype} <= {dtype, torch.float32}
    return (
        dtype in LONGEST
        and (same_dtype or rotated)  # under autocast, rotary embeddings leave queries and keys in float32
        and query.ndim == key.ndim == value.ndim == 4
        and query.shape[:2] == key.shape[:2] == value.shape[:2]
        and key.shape[2] == value.shape[2]
        and query.shape[3] == key.shape[3]
        and query.numel() > 0 < value.numel()
    )


def is_covered_mask(mask: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> bool:
    """Whether `mask` is boolean and broadcasts to the scores (batch, heads, queries, keys)."""
    scores = *query.shape[:3], key.shape[2]
    fits = all(size in (1, wanted) for size, wanted in zip(reversed(mask.shape), reversed(scores), strict=False))
    return mask.dtype == torch.bool and 2 <= mask.ndim <= 4 and fits


class Attention(torch.autograd.Function):
    """softmax(q kᵀ · scaling) with dropout, times v, and its gradients (Vaswani et al. 2017, 3.2.1).

    q, k, v and the result are (batch · heads, positions, width), of one dtype; `shape` is (batch, heads). `mask` is None
    or boolean, broadcasts to (batch, heads, queries, keys), and is False where a query must not read a key; a query that
    may read none gets zeros, as in PyTorch. Softmax is float32, as is dropout's factor 1 / (1 - dropout).
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None,
        shape: tuple[int, int],
        scaling: float,
        dropout: float,
    ) -> torch.Tensor:
        weights = attention_weights(q, k, mask, shape, scaling)
        dropped = weights.to(q.dtype)
        kept = None
        if dropout:
            kept = torch.empty_like(dropped).bernoulli_(1 - dropout)
            dropped = dropped * kept
        dropped = dropped.view(len(q), q.shape[1], k.shape[1])
        ctx.save_for_backward(q, k, v, mask, weights, kept, dropped)
        ctx.shape, ctx.scaling, ctx.factor = shape, scaling, 1 / (1 - dropout)
        return torch.bmm(dropped, v).mul_(ctx.factor)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, mask, weights, kept, dropped = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: through functions that can be differentiated again
            again = attention_weights(q, k, mask, ctx.shape, ctx.scaling).to(q.dtype)
            again = (again if kept is None else again * kept).view(dropped.shape)
            inputs = [x for x, wanted in zip((q, k, v), ctx.needs_input_grad, strict=False) if wanted]
            found = iter(torch.autograd.grad(torch.bmm(again, v) * ctx.factor, inputs, gradient, create_graph=True))
            of_inputs = [next(found) if wanted else None for wanted in ctx.needs_input_grad[:3]]
            return *of_inputs, None, None, None, None
        given = gradient * ctx.factor
        of_weights = torch.bmm(given, v.transpose(1, 2)).view(weights.shape)
        of_weights = (of_weights if kept is None else of_weights.mul_(kept)).float()
        of_scores = torch._softmax_backward_data(of_weights, weights, -1, torch.float32).mul_(ctx.scaling)
        of_scores = of_scores.to(q.dtype).view(dropped.shape)
        of_q, of_k = torch.bmm(of_scores, k), torch.bmm(of_scores.transpose(1, 2), q)
        return of_q, of_k, torch.bmm(dropped.transpose(1, 2), given), None, None, None, None


def attention_weights(
    q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None, shape: tuple[int, int], scaling: float
) -> torch.Tensor:
    """softmax(q kᵀ · scaling) over the keys that `mask` allows: float32, (batch, heads, queries, keys)."""
    scores = torch.bmm(q, k.transpose(1, 2)).view(*shape, q.shape[1], k.shape[1])
    if mask is None:
        return torch.softmax(torch.add(scores.new_zeros(1, dtype=torch.float32), scores, alpha=scaling), -1)
    bias = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
    weights = torch.softmax(torch.add(bias, scores, alpha=scaling), -1)
    reads = mask.any(-1, keepdim=True)
    return weights if bool(reads.all()) else weights * reads


@contextlib.contextmanager
def fast_attention() -> Iterator[None]:
    """Within, every model whose attention is "sdpa" computes it by `attention_forward`.

    Does nothing where a program has registered an attention of its own under that name.
    """
    if AttentionInterface()["sdpa"] is not sdpa_attention_forward:
        yield
        return
    AttentionInterface.register("sdpa", attention_forward)
    try:
        yield
    finally:
        AttentionInterface.register("sdpa", sdpa_attention_forward)
