"""The forward of a batch without padding: the texts in one row, the classifier's own head on the first token of each."""

import dataclasses
from typing import Any

import torch

from lib.data.packing import Tensors
from lib.model.layers import backbone_of
from lib.model.positions import first_position


def packed_logits(model: Any, inputs: Tensors) -> torch.Tensor:
    """float32 (texts, outputs): the logits of a batch made by `pack`, whose attention must be by segments.

    Between backbone and head, each text becomes a row of one token. Backbone and head are those of the model, whatever
    their names, in the precision and with the adapters that they have.
    """
    inputs = dict(inputs)
    starts, lengths = inputs.pop("cu_seqlens"), inputs.pop("row_lengths").tolist()
    backbone, settings = backbone_of(unwrapped(model)), unwrapped(model).config.get_text_config()
    segments = Segments(starts, lengths, getattr(settings, "classifier_pooling", None) == "mean")
    hook = backbone.register_forward_hook(segments.to_rows)
    try:
        inputs["position_ids"] = inputs["position_ids"] + first_position(settings)
        return model(**inputs, **segments.places()).logits.float()
    finally:
        hook.remove()


def unwrapped(model: Any) -> Any:
    """The model below what the accelerator put around it."""
    return getattr(model, "module", model)


@dataclasses.dataclass(frozen=True)
class Segments:
    """The segments of a row: where each starts on the device (texts + 1,), and their lengths.

    `mean`: the head takes the mean of a text's tokens, as ModernBERT can, not its first one.
    """

    starts: torch.Tensor
    lengths: list[int]
    mean: bool = False

    def places(self) -> dict[str, Any]:
        """What attention is told, by the names of transformers."""
        starts, longest = self.starts, max(self.lengths)
        return {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": longest, "max_length_k": longest}

    def to_rows(self, backbone: Any, _: Any, output: Any) -> Any:
        """The output of a backbone with a row of one token for each text, and what its pooler makes of that."""
        states = output.last_hidden_state[0]
        means = [part.mean(dim=0) for part in states.split(self.lengths)] if self.mean else None
        rows = states[self.starts[:-1]] if means is None else torch.stack(means)
        output["last_hidden_state"] = rows[:, None]
        if output.get("pooler_output") is not None:
            output["pooler_output"] = backbone.pooler(rows[:, None])
        return output
