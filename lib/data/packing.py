"""Texts of a batch one after the other in a single row, without padding.

input_ids      (1, tokens)   so is token_type_ids
position_ids   (1, tokens)   from 0 in each text
cu_seqlens     (texts + 1,)  int32: where each text starts, and the end of the last one
row_lengths    (texts,)      the tokens of each text, which stay on the CPU: nothing waits for a GPU to read them
"""

import itertools
from collections.abc import Sequence

import torch

Tensors = dict[str, torch.Tensor]

PER_TOKEN = ("input_ids", "token_type_ids")


def pack(batch: Tensors) -> Tensors:
    """A padded batch without its padding, on either side; what is not one number a token stays as it is."""
    mask = batch["attention_mask"].bool()
    kept = {name: tensor for name, tensor in batch.items() if name not in (*PER_TOKEN, "attention_mask")}
    tokens = {name: batch[name][mask][None] for name in PER_TOKEN if name in batch}
    return kept | tokens | segments(mask.sum(dim=1))


def segments(lengths: torch.Tensor) -> Tensors:
    """position_ids, cu_seqlens and row_lengths for texts of `lengths` (texts,) int64."""
    ends = lengths.cumsum(0)
    places = torch.arange(sum(lengths.tolist())) - (ends - lengths).repeat_interleave(lengths)
    starts = torch.nn.functional.pad(ends, (1, 0)).to(torch.int32)
    return {"position_ids": places[None], "cu_seqlens": starts, "row_lengths": lengths}


def is_packed(inputs: Tensors) -> bool:
    return "cu_seqlens" in inputs


def cut(inputs: Tensors, texts: Sequence[int]) -> list[Tensors]:
    """The per-token columns of a packed batch in pieces of as many `texts`, each a packed batch, pinned like the whole."""
    parts = inputs["row_lengths"].split(list(texts))
    ends = list(itertools.accumulate(sum(part.tolist()) for part in parts))
    tokens = [
        {name: inputs[name][:, start:end] for name in PER_TOKEN if name in inputs}
        for start, end in zip([0, *ends], ends, strict=False)
    ]
    made = [segments(part) for part in parts]
    if inputs["cu_seqlens"].is_pinned():  # a GPU would wait for a copy of what is not
        made = [{name: tensor.pin_memory() for name, tensor in new.items()} for new in made]
    return [own | new for own, new in zip(tokens, made, strict=True)]
