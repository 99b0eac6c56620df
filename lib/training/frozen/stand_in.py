"""A stand-in for the frozen part of a model: what it gave once, given back for the samples that a batch names.

Only `forward` of the frozen modules is replaced: the model keeps all its weights, and what lies above them runs as ever,
in the model's own forward. A batch without `rows` is computed as before.
"""

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions as Output

from lib.data.load import Data
from lib.data.loader import Tensors
from lib.model.layers import backbone_of, find_layers


class Reached(Exception):
    """Ends a forward where the frozen part ends, with what it gave."""


def views(output: Any, batch: Tensors, pad_token_id: int | None) -> dict[str, torch.Tensor]:
    """The vectors (batch, size) by which heads know a text, of the output of a backbone, the cheapest first."""
    states, mask, samples = output[0], batch["attention_mask"], torch.arange(len(output[0]), device=output[0].device)
    pooled = getattr(output, "pooler_output", None)
    found = {} if pooled is None else {"pooled": pooled}
    # The last token as the heads of decoders look for it in transformers.
    places = torch.arange(states.shape[1], device=states.device)
    last = (places * (batch["input_ids"] != (-1 if pad_token_id is None else pad_token_id))).argmax(dim=1)
    found |= {"first token": states[:, 0], "last token": states[samples, last]}
    return found | {"mean": (states * mask[:, :, None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)}


class StandIn:
    """Answers for frozen modules out of `table`.

    For a whole backbone, sample i has row i of it, and `view` names what that is. For layers, sample i has the rows from
    starts[i] on, one for each token.
    """

    def __init__(self, model: Any, freeze: str, lengths: np.ndarray, device: torch.device) -> None:
        """`lengths` counts the tokens of all samples that will be named, in the order of their numbers."""
        self.model, self.is_backbone, self.view = model, freeze == "backbone", ""
        layers = [] if self.is_backbone else [*find_layers(model, "--freeze")][: int(freeze)]
        self.modules: list[nn.Module] = layers or [backbone_of(model)]
        self.starts = torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)])).to(device)
        self.table = torch.empty(0)
        self.dtype, self.extras = torch.float32, 0
        self.rows: torch.Tensor | None = None
        self.mask: Any = None
        self.hook = model.register_forward_pre_hook(self.note, with_kwargs=True)
        for module in self.modules:
            self.replace_forward(module)

    def note(self, _: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        self.rows, self.mask = kwargs.pop("rows", None), kwargs.get("attention_mask")
        return args, kwargs

    def replace_forward(self, module: nn.Module) -> None:
        compute = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            if self.rows is None:
                return compute(*args, **kwargs)
            if module is not self.modules[-1]:  # its output is not read
                return self.shaped([*args, *kwargs.values()][0])
            return self.answer(self.rows)

        module.forward = forward

    def remove(self) -> None:
        """Leave the model as it was."""
        self.hook.remove()
        for module in self.modules:
            del module.forward

    def learn_form(self, output: Any) -> torch.Tensor:
        """Take note of the form in which the frozen part gives its states, and return them."""
        states = output[0] if self.is_backbone else states_of(output)
        self.dtype, self.extras = states.dtype, len(output) - 1 if isinstance(output, tuple) else 0
        return states

    def shaped(self, states: torch.Tensor) -> Any:
        """`states` in the form in which the layers of this model give them."""
        return (states, *[None] * self.extras) if self.extras else states

    def answer(self, rows: torch.Tensor) -> Any:
        if self.is_backbone:
            vectors = self.table[rows].to(self.dtype)
            return Output(last_hidden_state=vectors[:, None], pooler_output=vectors)
        states = self.table[self.places(rows, self.mask)] * self.mask[:, :, None]
        return self.shaped(states.to(self.dtype))

    def places(self, rows: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """(batch, length): where in `table` the tokens of samples are, whichever side they are padded on."""
        return (self.starts[rows][:, None] + mask.cumsum(dim=1) - 1).clamp(min=0)

    def compute(self, batch: Tensors) -> Any:
        """What the frozen part gives; nothing above it is computed."""

        def reach(_: nn.Module, __: Any, output: Any) -> None:
            raise Reached(output)

        handle = self.modules[-1].register_forward_hook(reach)
        try:
            self.model(**batch)
        except Reached as reached:
            return reached.args[0]
        finally:
            handle.remove()
        raise AssertionError("the frozen part is not part of the forward")

    def compute_whole(self, batch: Tensors) -> tuple[Any, torch.Tensor]:
        """What the frozen part gives, and the logits that the model makes of it."""
        seen: list[Any] = []
        handle = self.modules[-1].register_forward_hook(lambda _, __, output: seen.append(output))
        try:
            logits = self.model(**batch).logits.float()
            return seen[0], logits
        finally:
            handle.remove()

    def vectors(self, rows: torch.Tensor, output: Any, batch: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
        """(places in `table`, vectors) of samples, out of what `compute` gave."""
        if self.is_backbone:
            return rows, views(output, batch, self.model.config.pad_token_id)[self.view]
        mask = batch["attention_mask"].bool()
        return self.places(rows, batch["attention_mask"])[mask], states_of(output)[mask]


def states_of(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


@dataclasses.dataclass(frozen=True)
class Rows:
    """The samples of a split by their numbers, from `first` on; a batch of them needs no tokens and no padding."""

    first: int
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, column: str) -> np.ndarray:
        return {"labels": self.labels.numpy()}[column]

    def __getitems__(self, indices: list[int]) -> Tensors:
        """One position for each sample; what stands there is not read, but heads count it."""
        rows = torch.tensor(indices)
        one = torch.ones(len(rows), 1, dtype=torch.int64)
        return {"input_ids": one, "attention_mask": one, "rows": rows + self.first, "labels": self.labels[rows]}


def as_it_is(batch: Any) -> Any:
    """The collator of `Rows`."""
    return batch


def first_rows(data: Data) -> dict[str, int]:
    """The number of the first sample of each split."""
    sizes = [len(tokens) for tokens in data.tokens.values()]
    return dict(zip(data.tokens, np.cumsum([0, *sizes]).tolist(), strict=False))


def name_samples(data: Data, is_backbone: bool) -> Data:
    """`data` whose samples carry their numbers: with their tokens, or in place of them when a backbone is not run."""
    tokens: dict[str, Any] = {}
    for split, first in first_rows(data).items():
        dataset = data.tokens[split]
        numbers = np.arange(first, first + len(dataset))
        if is_backbone:
            tokens[split] = Rows(first, torch.tensor(dataset["labels"][:]))
        else:
            tokens[split] = dataset.add_column("rows", numbers)
    return dataclasses.replace(data, tokens=tokens)
