"""Text embeddings: the token vectors of an encoder, pooled into one vector for each text."""

from typing import Any

import torch
from torch import nn
from torch.nn.functional import normalize

from lib.data.encoding import Encoder, model_inputs
from lib.data.loader import build_collator, to_device
from lib.errors import UserError
from lib.inference.inputs import Example
from lib.inference.load import Task
from lib.inference.stream import Predict, Prediction


def build_embeddings(task: Task) -> Predict:
    """Predictions with `embedding`, float32 (size,), independent of the other texts in the batch.

    Raises UserError for --pooling cls with a decoder.
    """
    config, model, tokenizer = task.config.embedding, task.model, task.tokenizer
    # Padding on the left would shift the text's absolute positions.
    tokenizer.padding_side = "right"
    model_encoder: nn.Module = model.get_encoder() if model.config.is_encoder_decoder else model
    if config.pooling == "cls" and is_causal(model_encoder):
        raise UserError(
            "--pooling cls: this model is a decoder, whose first token sees none of the tokens after it, so that all texts "
            "with the same first token would have the same embedding; use --pooling last or mean"
        )

    encoder, collator = Encoder(tokenizer, tokenizer.model_max_length), build_collator(tokenizer, "no", model.device)

    def predict(examples: list[Example]) -> list[Prediction]:
        encoded = encoder(list(zip(*(example.texts for example in examples), strict=True)))
        batch = to_device(collator(model_inputs(encoded)), model.device)
        states = model_encoder(**batch).last_hidden_state.float()
        vectors = pool(states, batch["attention_mask"], config.pooling)
        vectors = normalize(vectors) if config.normalize else vectors
        return [{"embedding": vector} for vector in vectors.cpu().numpy()]

    return predict


@torch.inference_mode()
def is_causal(encoder: Any) -> bool:
    """Whether the first token's vector ignores the last token. It is tried, since no entry of a configuration is reliable."""
    ids = torch.tensor([[3, 4, 5, 6], [3, 4, 5, 7]], device=next(encoder.parameters()).device)
    first, second = encoder(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[:, 0]
    return torch.equal(first, second)


def pool(states: torch.Tensor, mask: torch.Tensor, pooling: str) -> torch.Tensor:
    """Vectors (batch, size) from `states` (batch, length, size) and `mask` (batch, length), 1 for a token, 0 for padding.

    A text without tokens gets zeros.
    """
    present = mask.bool()[:, :, None]
    if pooling == "mean":
        return (states * present).sum(dim=1) / present.sum(dim=1).clamp(min=1)
    if pooling == "max":
        largest = states.masked_fill(~present, -torch.inf).amax(dim=1)
        return largest.masked_fill(~present.any(dim=1), 0.0)
    positions = torch.arange(mask.shape[1], device=mask.device)
    position = mask.argmax(dim=1) if pooling == "cls" else (positions * mask).argmax(dim=1)
    return states[torch.arange(len(states), device=states.device), position] * present.any(dim=1)
