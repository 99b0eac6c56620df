"""Attention of training on a CPU: what PyTorch's does there, in fewer passes over memory."""

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import AttentionInterface


class Attention(torch.autograd.Function):
    """softmax(q kᵀ · scaling + bias) with dropout, times v, and its gradients (Vaswani et al. 2017, 3.2.1).

    Queries, keys, values and the result are (batch, heads, positions, width), `bias` broadcasts over the scores and gets no
    gradient. Products have the type of the queries; softmax is float32, as is the factor that makes up for what dropout
    takes away.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        bias: torch.Tensor,
        scaling: float,
        dropout: float,
    ) -> torch.Tensor:
        batch, heads = query.shape[:2]
        q, k, v = (x.reshape(batch * heads, *x.shape[2:]) for x in (query, key, value))
        scores = torch.bmm(q, k.transpose(1, 2)).view(batch, heads, q.shape[1], k.shape[1])
        weights = torch.softmax(torch.add(bias, scores, alpha=scaling), -1)
        dropped = weights.to(q.dtype)
        kept = None
        if dropout:
            kept = torch.empty_like(dropped).bernoulli_(1 - dropout)
            dropped = dropped * kept
        dropped = dropped.view(batch * heads, q.shape[1], k.shape[1])
        ctx.save_for_backward(q, k, v, weights, kept, dropped)
        ctx.scaling, ctx.factor = scaling, 1 / (1 - dropout)
        return torch.bmm(dropped, v).mul_(ctx.factor).view(batch, heads, q.shape[1], v.shape[2])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, weights, kept, dropped = ctx.saved_tensors
        given = (gradient * ctx.factor).reshape(q.shape[0], *gradient.shape[2:])
        of_weights = torch.bmm(given, v.transpose(1, 2)).view(weights.shape)
        of_weights = (of_weights if kept is None else of_weights.mul_(kept)).float()
        of_scores = torch._softmax_backward_data(of_weights, weights, -1, torch.float32).mul_(ctx.scaling)
        of_scores = of_scores.to(q.dtype).view(dropped.shape)
        of_inputs = (
            torch.bmm(of_scores, k),
            torch.bmm(of_scores.transpose(1, 2), q),
            torch.bmm(dropped.transpose(1, 2), given),
        )
        return *(x.view(*weights.shape[:2], *x.shape[1:]) for x in of_inputs), None, None, None


LONGEST = {torch.bfloat16: 256, torch.float32: 128}
"""Positions up to which gradients without dropout come faster from `Attention`, by type."""
UNKNOWN = ("softcap", "cache", "output_attentions")
"""What transformers answers itself, by an error, a warning or a cache."""


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
    """transformers' "sdpa" as ever, except in training on a CPU, where `Attention` is faster.

    PyTorch has two ways there. The one with dropout looks for rows that are masked as a whole and works in float32; that
    without takes ten times as long in bf16 for the gradients of short texts. What `Attention` does not know is left to them:
    a mask that is only implied or is not boolean, fewer keys than queries, a bias that is learnt, what `others` ask for.
    """
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    known = attention_mask.dtype == torch.bool if attention_mask is not None else not causal
    known = known and query.shape[1] == key.shape[1] == value.shape[1] and position_bias is None
    known = known and not any(others.get(name) for name in UNKNOWN)
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
    faster = dropout > 0 or (query.requires_grad and key.shape[2] <= LONGEST.get(dtype, 0))
    training = module.training and query.device.type == "cpu" and not torch.compiler.is_compiling()
    if not (training and known and faster):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, position_bias, **others
        )
    query, key, value = (x.to(dtype) for x in (query, key, value))  # rotated ones come in float32
    if attention_mask is None:
        bias = query.new_zeros(1, dtype=torch.float32)
    else:
        bias = torch.where(attention_mask, 0.0, torch.finfo(torch.float32).min)
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    return Attention.apply(query, key, value, bias, scale, dropout).transpose(1, 2).contiguous(), None


def use_fast_attention() -> None:
    """Give every model of this process whose attention is "sdpa" the one above."""
    AttentionInterface.register("sdpa", attention_forward)
