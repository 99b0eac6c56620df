"""Batch size and padding, or a row without padding, never change a number: tried once on a model before it scores."""

import dataclasses
from typing import Any

import torch
from accelerate import Accelerator

from lib.data.encoding import Encoder, model_inputs
from lib.data.loader import Batches, Collator, to_device
from lib.data.packing import pack
from lib.errors import UserError, first_line
from lib.model.forward import compute_logits
from lib.model.padding import FAILURES, NOTES, UNPADDED, find_leak, in_full_precision, same_logits
from lib.model.sharding import is_sharded
from lib.runtime.precision import DTYPES
from lib.runtime.processes import any_process
from lib.runtime.segments import LEAVE_OUT, NAME, choose_segments

LONGEST = 128
"""Tokens of the long text that is tried, where the model needs no longer one to change its ways."""

MOST_TRIED = 2048
"""Tokens in the row of a trial, about, for models with positions for more."""

WINDOWS = ("sliding_window", "local_attention")
"""Settings of models whose tokens read near ones alone: how far away, in one direction or over both."""


def check_padding(
    accelerator: Accelerator, model: Any, batches: Batches, tokenizer: Any, padding_free: bool = False
) -> Batches:
    """`batches` as `model` needs them, which is prepared: without padding in evaluation where padding changes its logits.

    With `padding_free`, in one row without padding, and attention of the model is by segments from then on. What was found
    is among the notes of the data, equal on every process. Raises UserError for such a model in shards, and for one that
    cannot compute texts in one row.
    """
    data = batches.data
    if padding_free:
        if is_sharded(model):
            raise UserError(f"FSDP and --padding_free do not go together; {LEAVE_OUT}")
        inner = accelerator.unwrap_model(model)
        use_segments(inner, tokenizer, batches.collator, data.max_length, accelerator.mixed_precision)
        return dataclasses.replace(batches, packed=True)
    leak = try_padding(accelerator.unwrap_model(model), tokenizer, batches.collator, data.max_length)
    leak = next((kind for kind in NOTES if any_process(accelerator, leak == kind)), None)
    if leak is None:
        return batches
    if leak in UNPADDED and is_sharded(model):
        kind = accelerator.unwrap_model(model).config.model_type
        raise UserError(
            f"FSDP and {kind} do not go together: padding changes its logits, so that texts of one length run together, and "
            "not all processes as often; launch with accelerate_configs/multi_gpu.yaml"
        )
    data = dataclasses.replace(data, notes=(*data.notes, NOTES[leak]))
    return dataclasses.replace(batches, data=data, unpadded=leak in UNPADDED)


def try_padding(model: Any, tokenizer: Any, collator: Collator, limit: int) -> str | None:
    """`find_leak` on the shortest text of `tokenizer`, another one, and one of up to `limit` tokens."""
    settings, longest = model.config.get_text_config(), LONGEST
    if getattr(settings, "attention_type", None) == "block_sparse":  # BigBird attends to all of a shorter text
        longest = (6 + 2 * settings.num_random_blocks) * settings.block_size
    longest = min(longest, limit)
    texts = ["a", "I", "the film was good and the plot was not " * longest]
    encoded = Encoder(tokenizer, longest)([texts])
    short, other, long = model_inputs(encoded)
    if len(other["input_ids"]) != len(short["input_ids"]):
        other = short
    device = next(model.parameters()).device
    alone, twice, padded = (to_device(collator(batch), device) for batch in ([short], [short, other], [short, long]))
    return find_leak(model, alone, twice, padded)


def use_segments(model: Any, tokenizer: Any, collator: Collator, limit: int, mixed_precision: str) -> None:
    """Have `model` compute attention by segments, after a trial that texts in one row get the logits that each gets alone.

    Tried in float32, and in the mixed precision of the run. Raises UserError if the device or the model has no such
    attention, or the logits differ.
    """
    kind, device = model.config.model_type, next(model.parameters()).device
    usual, dtype = model.config._attn_implementation, DTYPES.get(mixed_precision)
    chosen = choose_segments(usual, device, mixed_precision)
    padded = collator(trial_texts(model, tokenizer, limit))
    if "attention_mask" not in padded:
        raise refusal(kind, "its tokenizer returns no attention mask")
    batch, row = to_device(padded, device), to_device(pack(padded), device)
    for tried in ([None] if chosen == NAME else []) + ([dtype] if dtype else []):  # FlashAttention has no float32
        with in_full_precision(model), torch.autocast(device.type, tried, enabled=tried is not None):
            model.config._attn_implementation = usual
            alone = compute_logits(model, batch, unpadded=True)
            model.config._attn_implementation = chosen
            try:
                together = compute_logits(model, row)
            except (*FAILURES, TypeError, AttributeError, KeyError) as error:  # what a backbone does not return, too
                raise refusal(kind, f"it fails on them ({first_line(error)})") from error
        if not same_logits(alone, together, tried or torch.float32):
            raise refusal(kind, "their logits are others than those of each text alone")


def refusal(kind: str, reason: str) -> UserError:
    return UserError(
        f"--padding_free: a model of type {kind} cannot compute several texts in one row: {reason}; {LEAVE_OUT}"
    )


def trial_texts(model: Any, tokenizer: Any, limit: int) -> list[dict[str, Any]]:
    """Short and long texts, more tokens together than the model has positions, up to some thousand.

    The long ones are twice as long as the model's windows, within `limit`.
    """
    settings = model.config.get_text_config()
    longest = min(max(LONGEST, *(2 * (getattr(settings, name, None) or 0) for name in WINDOWS)), limit)
    positions = getattr(settings, "max_position_embeddings", 0) or 0
    sentence = "the film was good and the plot was not " * longest
    texts = ["a", sentence, "I", sentence[:40]] + [sentence] * (min(positions, MOST_TRIED) // longest)
    return model_inputs(Encoder(tokenizer, longest)([texts]))
