"""What a run must compute, and how fast the machine multiplies matrices: their ratio says what is left to gain.

Useful work is counted without padding. A forward pass of one text of s tokens through L layers of width h:

    2 · (weights of the layers' linear maps) · s  +  4 · L · h · s²  +  2 · (weights of the head's linear maps)

Multiply and add count as two; the middle term is the scores of attention and the sums they weigh, and the head reads one
token. Training takes three times as much: backward multiplies once for the gradient of the inputs and once for that of
the weights (Chowdhery et al. 2022, PaLM, appendix B: 6N + 12LHQT a token). Embeddings, norms, dropout and the optimizer
count as nothing. Holds for encoders of the BERT and RoBERTa kind.
"""

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lib.model.layers import find_layers

BLOCKS, SECONDS = 5, 0.3


def linear_weights(module: nn.Module) -> int:
    return sum(part.weight.numel() for part in module.modules() if isinstance(part, nn.Linear))


def forward_flops(model: Any, lengths: Sequence[int]) -> float:
    """FLOPs of one forward pass of a classifier over texts of so many tokens; training takes three times as much."""
    layers = find_layers(model, "benchmarks")
    body = linear_weights(layers)
    head = linear_weights(model) - body
    attention = 4 * len(layers) * model.config.hidden_size
    return float(sum(2 * body * s + attention * s * s + 2 * head for s in lengths))


def matmul_rates(hidden: int, inner: int, rows: int, device: torch.device) -> dict[str, float]:
    """FLOP/s of the linear maps of one layer over `rows` tokens, by arithmetic: the best of five blocks.

    Four maps are square (queries, keys, values, output), two go to the inner width and back. On a GPU `fp32 fast` is TF32;
    on a CPU it is whatever `torch.set_float32_matmul_precision("medium")` allows.
    """
    rates = {}
    for name, dtype, precision in (
        ("fp32", torch.float32, "highest"),
        ("fp32 fast", torch.float32, "medium"),
        ("bf16", torch.bfloat16, "highest"),
    ):
        torch.set_float32_matmul_precision(precision)
        shapes = [(hidden, hidden)] * 4 + [(inner, hidden), (hidden, inner)]
        weights = [torch.randn(shape, device=device, dtype=dtype) for shape in shapes]
        inputs = [torch.randn(rows, shape[1], device=device, dtype=dtype) for shape in shapes]
        flops = sum(2 * rows * weight.numel() for weight in weights)
        rates[name] = flops / min(layer_seconds(inputs, weights) for _ in range(BLOCKS))
    torch.set_float32_matmul_precision("highest")
    return rates


@torch.inference_mode()
def layer_seconds(inputs: list[torch.Tensor], weights: list[torch.Tensor]) -> float:
    """Mean seconds of one pass over all maps, for at least 0.3 seconds."""
    passes, elapsed, started = 0, 0.0, time.perf_counter()
    while elapsed < SECONDS:
        for x, weight in zip(inputs, weights, strict=True):
            nn.functional.linear(x, weight)
        if x.device.type == "cuda":
            torch.cuda.synchronize()
        passes += 1
        elapsed = time.perf_counter() - started
    return elapsed / passes
