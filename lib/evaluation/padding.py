"""Batch size and padding never change a number: tried once on a model before it scores or predicts."""

import dataclasses
from typing import Any

from accelerate import Accelerator

from lib.data.encoding import Encoder, model_inputs
from lib.data.loader import Batches, Collator, to_device
from lib.errors import UserError
from lib.model.padding import NOTES, UNPADDED, find_leak
from lib.model.sharding import is_sharded
from lib.runtime.processes import any_process

LONGEST = 128
"""Tokens of the long text that is tried, where the model needs no longer one to change its ways."""


def check_padding(accelerator: Accelerator, model: Any, batches: Batches, tokenizer: Any) -> Batches:
    """`batches` as `model` needs them, which is prepared: without padding in evaluation where padding changes its logits.

    What was found is among the notes of the data, equal on every process. Raises UserError for such a model in shards.
    """
    data = batches.data
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
