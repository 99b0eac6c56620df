"""Positions that a model counts for the tokens of a text."""

from typing import Any

FROM_PADDING = (
    *("camembert", "data2vec-text", "esm", "ibert", "layoutlmv3", "lilt", "longformer", "luke", "markuplm", "mpnet"),
    *("roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod"),
)
"""Model types of the RoBERTa family: they count positions from the id of the padding token + 1."""


def first_position(settings: Any) -> int:
    """The position of the first token of a text, from the configuration of the text model."""
    return (settings.pad_token_id or 0) + 1 if settings.model_type in FROM_PADDING else 0
