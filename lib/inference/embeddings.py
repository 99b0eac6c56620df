"""One vector for a text, out of the vectors that an encoder gives its tokens."""

from typing import Any

import torch
from torch import nn
from torch.nn.functional import normalize

from lib.config.predict import EmbeddingConfig
from lib.errors import UserError
from lib.inference.inputs import Row
from lib.inference.stream import Answer, Predict


def build_embedder(model: Any, tokenizer: Any, config: EmbeddingConfig) -> Predict:
    """Answers of one key, `embedding`, float32 (size,), that do not depend on the texts beside it in the batch.

    Raises UserError when the vector of the first token is asked for and knows nothing of the text.
    """
    # Absolute positions count from the left: padding there would move the text.
    tokenizer.padding_side = "right"
    encoder: nn.Module = model.get_encoder() if model.config.is_encoder_decoder else model
    if config.pooling == "cls" and reads_left_to_right(encoder):
        raise UserError(
            "--pooling cls: this model is a decoder, whose first token knows nothing of what follows, so that all texts that "
            "begin alike would be equal; use --pooling last or mean"
        )

    def predict(rows: list[Row]) -> list[Answer]:
        texts = list(zip(*(row.texts for row in rows), strict=True))
        batch = tokenizer(*map(list, texts), padding=True, truncation=True, return_tensors="pt").to(model.device)
        states = encoder(**batch).last_hidden_state.float()
        vectors = pool(states, batch["attention_mask"], config.pooling)
        vectors = normalize(vectors) if config.normalize else vectors
        return [{"embedding": vector} for vector in vectors.cpu().numpy()]

    return predict


@torch.inference_mode()
def reads_left_to_right(encoder: Any) -> bool:
    """Whether another last token leaves the vector of the first as it was: no entry of a configuration tells for sure."""
    ids = torch.tensor([[3, 4, 5, 6], [3, 4, 5, 7]], device=next(encoder.parameters()).device)
    first, second = encoder(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[:, 0]
    return torch.equal(first, second)


def pool(states: torch.Tensor, mask: torch.Tensor, pooling: str) -> torch.Tensor:
    """(batch, size) from `states` (batch, length, size) and `mask` (batch, length), 1 for a token, 0 for padding.

    A text without a token has a vector of zeros.
    """
    present = mask.bool()[:, :, None]
    rows = torch.arange(len(states), device=states.device)
    if pooling == "mean":
        return (states * present).sum(dim=1) / present.sum(dim=1).clamp(min=1)
    if pooling == "max":
        largest = states.masked_fill(~present, -torch.inf).amax(dim=1)
        return largest.masked_fill(~present.any(dim=1), 0.0)
    places = torch.arange(mask.shape[1], device=mask.device)
    place = mask.argmax(dim=1) if pooling == "cls" else (places * mask).argmax(dim=1)
    return states[rows, place] * present.any(dim=1)
