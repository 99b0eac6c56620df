"""The mask of attention, made outside the model: by itself a model looks for padding, and waits for the device to do so."""

import contextlib
from typing import Any

import torch

from lib.model.forward import Inputs
from lib.model.layers import backbone_of
from lib.runtime.precision import DTYPES

READERS = {
    f"transformers.models.{name}.modeling_{name}"
    for name in ("bert", "distilbert", "electra", "roberta", "xlm_roberta")
}
"""The modules of backbones for which it is exact: all layers read one mask, and nothing reads that of tokens.

ModernBERT also has layers that see a window, and DeBERTa multiplies by the mask of tokens: they make their own.
"""


def with_ready_mask(model: Any, inputs: Inputs, mixed_precision: str, is_padded: bool = True) -> Inputs:
    """`inputs` with the mask that the layers of `model` would get from its mask of tokens (rows, length).

    It is bool (rows, 1, 1, length) for sdpa, a number of that shape for eager attention, or left out where nothing
    `is_padded`. Logits and gradients are equal bit by bit. Returned as they are: inputs without a mask of tokens, those of
    cached features, and all inputs of a model that `reads_ready_mask` is not true of.
    """
    mask = inputs.get("attention_mask")
    if mask is None or mask.ndim != 2 or "rows" in inputs or not reads_ready_mask(model):
        return inputs
    others = {name: tensor for name, tensor in inputs.items() if name != "attention_mask"}
    if not is_padded:
        return others
    ready, backbone = mask.bool()[:, None, None, :], find_backbone(model)
    if (
        backbone.config._attn_implementation == "eager"
    ):  # it is added to the scores, in the dtype of the first layer's input
        projected = hasattr(backbone, "embeddings_project")  # by a linear layer of ELECTRA
        dtype = DTYPES.get(mixed_precision, torch.float32) if projected else torch.float32
        ready = torch.zeros_like(ready, dtype=dtype).masked_fill(~ready, torch.finfo(dtype).min)
    return others | {"attention_mask": ready}


def reads_ready_mask(model: Any) -> bool:
    """Whether `model` is an encoder of READERS with plain attention in float32 embeddings, and without virtual tokens."""
    backbone = find_backbone(model)
    if type(backbone).__module__ not in READERS or getattr(backbone.config, "is_decoder", False):
        return False
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        return False  # which peft puts before the mask of tokens
    kind, embeddings = backbone.config._attn_implementation, backbone.get_input_embeddings()
    return kind == "sdpa" or (kind == "eager" and embeddings.weight.dtype == torch.float32)


def find_backbone(model: Any) -> Any:
    """The model without its head, also inside an adapter of peft; None where a module is no model of transformers."""
    with contextlib.suppress(AttributeError):
        return backbone_of(model)
    return None


def is_padded(inputs: Inputs) -> bool:
    """Whether inputs hold padding; True where their mask lies on a device, which would have to be waited for."""
    mask = inputs.get("attention_mask")
    return mask is None or mask.device.type != "cpu" or not mask.numpy().all()
