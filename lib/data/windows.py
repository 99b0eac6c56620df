"""Texts past the model's length, read in windows that overlap; the logits of a text are the mean of its windows'."""

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import nn

from lib.config.sections import UserError

KEY = "windows"
"""Where tokenizer_config.json says how the model was trained to read long texts."""


@dataclasses.dataclass(frozen=True)
class Windows:
    """Windows of at most `max_length` tokens, special tokens included, of which neighbours share `stride`."""

    max_length: int
    stride: int


def stored_windows(tokenizer: Any) -> Windows | None:
    """How the model of this tokenizer was trained to read long texts; None: it cuts them."""
    stored = tokenizer.init_kwargs.get(KEY)
    return Windows(**stored) if stored else None


def store_windows(tokenizer: Any, windows: Windows | None) -> None:
    """Let the tokenizer be saved with `windows`, so that whoever uses the model reads long texts as it was trained to."""
    tokenizer.init_kwargs.pop(KEY, None)
    if windows is not None:
        tokenizer.init_kwargs[KEY] = dataclasses.asdict(windows)


def choose_windows(
    tokenizer: Any, max_length: int, stride: int | None, num_columns: int, trained: bool
) -> Windows | None:
    """The windows asked for, else, if the model is `trained`, those it was trained with; noted in the tokenizer.

    None: long texts are cut. Raises UserError when texts cannot be read in windows.
    """
    windows = stored_windows(tokenizer) if trained else None
    if stride is not None:
        windows = Windows(max_length, stride)
    if windows is not None:
        check_windows(tokenizer, windows, num_columns)
    store_windows(tokenizer, windows)
    return windows


def check_windows(tokenizer: Any, windows: Windows, num_columns: int) -> None:
    """Raise UserError when texts cannot be read in these windows."""
    flag = f"--window_stride {windows.stride}"
    if num_columns != 1:
        raise UserError(f"{flag} is for one text column, not for pairs")
    if not tokenizer.is_fast:
        raise UserError(f"{flag}: {type(tokenizer).__name__} cannot cut text into windows; it needs a fast tokenizer")
    room = windows.max_length - tokenizer.num_special_tokens_to_add()
    if windows.stride >= room:
        raise UserError(f"{flag}: windows of {room} tokens of text cannot share as many; see also --max_length")


def encode_windows(tokenizer: Any, texts: list[str], windows: Windows) -> dict[str, list[Any]]:
    """Each input of the model (but the mask) as a list of windows for each text, and `num_windows`.

    All windows of a text but the last are full. A text that is not too long is one window, the same tokens as without.
    """
    encoded = tokenizer(
        texts,
        truncation=True,
        max_length=windows.max_length,
        stride=windows.stride,
        return_overflowing_tokens=True,
    )
    counts = np.bincount(encoded["overflow_to_sample_mapping"], minlength=len(texts))
    ends = np.cumsum(counts)
    names = [name for name in ("input_ids", "token_type_ids") if name in encoded]
    grouped = {name: [encoded[name][end - n : end] for end, n in zip(ends, counts, strict=True)] for name in names}
    return grouped | {"num_windows": counts.tolist()}


def compute_logits(model: nn.Module, batch: dict[str, torch.Tensor], device: torch.device) -> torch.Tensor:
    """float32 (samples, outputs): the model's logits, or where `batch` has `num_windows` their mean over each text.

    The counts stay where they are, on the CPU, so that nothing waits for the device; sums over contiguous rows do not
    depend on the order in which a GPU works.
    """
    counts = batch.get("num_windows")
    inputs = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items() if name != "num_windows"}
    logits = model(**inputs).logits.float()
    return logits if counts is None else pool_logits(logits, counts.tolist())


def pool_logits(logits: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """The means (samples, outputs) of the next `counts` rows of (windows, outputs)."""
    return torch.stack([part.mean(dim=0) for part in logits.split(counts)])
