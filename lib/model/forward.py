"""The forward pass: logits of a batch, where a text in several windows gets the mean of its windows' logits."""

import inspect
from typing import Any

import torch
from torch import nn

from lib.data.packing import is_packed
from lib.model.packing import packed_logits

Inputs = dict[str, torch.Tensor]


def compute_logits(model: nn.Module, inputs: Inputs, unpadded: bool = False) -> torch.Tensor:
    """float32 (samples, outputs): the model's logits; with `num_windows` in `inputs`, their mean over each text.

    `inputs` are on the model's device, except for `num_windows` (windows of each text) on the CPU. With `unpadded`, rows
    of equal length run together without their padding, for models whose logits it changes. A packed batch has none.
    """
    counts = inputs.get("num_windows")
    rows = {name: tensor for name, tensor in inputs.items() if name != "num_windows"}
    # Of further outputs, such as XLNet's memories, not every one has a row for each sample.
    if is_packed(rows):
        logits = packed_logits(model, rows)
    else:
        logits = unpadded_logits(model, rows) if unpadded else model(**rows).logits.float()
    return logits if counts is None else pool_logits(logits, counts.tolist())


def unpadded_logits(model: nn.Module, inputs: Inputs) -> torch.Tensor:
    """float32 (rows, outputs): one forward for each length in the batch, padded on either side."""
    mask = inputs["attention_mask"].bool()
    lengths = mask.sum(dim=1)
    parts, places = [], []
    for length in lengths.unique().tolist():
        rows = torch.nonzero(lengths == length)[:, 0]
        kept = mask[rows]
        same = {
            name: tensor[rows][kept].view(len(rows), length) if tensor.shape == mask.shape else tensor[rows]
            for name, tensor in inputs.items()
        }
        parts.append(model(**same).logits.float())
        places.append(rows)
    return torch.cat(parts)[torch.cat(places).argsort()]


def pool_logits(logits: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """(samples, outputs): the means of consecutive groups of rows of (windows, outputs); `counts` are the group sizes.

    Sums over contiguous rows are deterministic on a GPU, unlike those of scatter operations.
    """
    return torch.stack([part.mean(dim=0) for part in logits.split(counts)])


def keep_no_cache(model: Any) -> Any:
    """The classifier, which keeps no keys and values for tokens to come: there are none.

    By itself a decoder copies them in each forward. Layers that are recomputed cannot, and products of the copies differ
    from those of the originals in the last digits on some processors.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if "use_cache" in inspect.signature(inner.forward).parameters:
        inner.register_forward_pre_hook(without_cache, with_kwargs=True)
    return model


def without_cache(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A forward pre-hook."""
    return args, kwargs | {"use_cache": False}


def attend_by_length(model: Any) -> Any:
    """The model; a BigBird chooses full or sparse attention for each batch anew, by its length.

    By itself it leaves its sparse attention for good at the first short batch, so that every number after it depends on
    that.
    """
    for module in model.modules():
        sparse = hasattr(module, "set_attention_type") and module.config.attention_type == "block_sparse"
        if sparse and "input_ids" in inspect.signature(module.forward).parameters:
            module.register_forward_pre_hook(choose_attention, with_kwargs=True)
    return model


def choose_attention(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
    """Set the attention that BigBird takes for the length of its input. Draws no random numbers."""
    given = [*args, kwargs.get("input_ids"), kwargs.get("inputs_embeds")]
    length = next(tensor for tensor in given if tensor is not None).shape[1]
    longest = (5 + 2 * module.config.num_random_blocks) * module.config.block_size
    with torch.random.fork_rng():  # the new attention starts with weights that are replaced at once
        module.set_attention_type("original_full" if length <= longest else "block_sparse")
