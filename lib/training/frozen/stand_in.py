"""A stand-in for the frozen modules of a model: it returns their cached output for the samples of a batch.

Only `forward` of the frozen modules is replaced. The model keeps all its weights, and everything above the frozen modules
runs in the model's own forward. A batch without `rows` is computed as usual.
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
    """Ends a forward after the last frozen module; carries its output."""


def views(output: Any, batch: Tensors, pad_token_id: int | None) -> dict[str, torch.Tensor]:
    """The vectors (batch, size) that heads read from the output of a backbone, cheapest first."""
    states, mask, samples = output[0], batch["attention_mask"], torch.arange(len(output[0]), device=output[0].device)
    pooled = getattr(output, "pooler_output", None)
    found = {} if pooled is None else {"pooled": pooled}
    # The last token that is not padding, as the heads of decoders in transformers find it.
    places = torch.arange(states.shape[1], device=states.device)
    last = (places * (batch["input_ids"] != (-1 if pad_token_id is None else pad_token_id))).argmax(dim=1)
    found |= {"first token": states[:, 0], "last token": states[samples, last]}
    return found | {"mean": (states * mask[:, :, None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)}


class StandIn:
    """Returns the output of frozen modules from `table` instead of computing it.

    For a whole backbone, row i is the vector of sample i, and `view` says which vector of `views` it is. For layers, the
    rows from starts[i] on are the tokens of sample i.
    """

    def __init__(self, model: Any, freeze: str, lengths: np.ndarray, device: torch.device) -> None:
        """`lengths` counts the tokens of each sample, in the order of their numbers."""
        self.model, self.is_backbone, self.view = model, freeze == "backbone", ""
        layers = [] if self.is_backbone else [*find_layers(model, "--freeze")][: int(freeze)]
        self.modules: list[nn.Module] = layers or [backbone_of(model)]
        self.starts = torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)])).to(device)
        self.table = torch.empty(0)
        self.dtype, self.extras = torch.float32, 0
        self.rows: torch.Tensor | None = None
        self.mask: Any = None
        self.hook = model.register_forward_pre_hook(self.remember_rows, with_kwargs=True)
        for module in self.modules:
            self.replace_forward(module)

    def remember_rows(self, _: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        self.rows, self.mask = kwargs.pop("rows", None), kwargs.get("attention_mask")
        return args, kwargs

    def replace_forward(self, module: nn.Module) -> None:
        compute = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            if self.rows is None:
                return compute(*args, **kwargs)
            if module is not self.modules[-1]:  # its output is not used: pass the input on
                return self.shaped([*args, *kwargs.values()][0])
            return self.cached_output(self.rows)

        module.forward = forward

    def remove(self) -> None:
        """Give the modules their own forward back."""
        self.hook.remove()
        for module in self.modules:
            del module.forward

    def learn_form(self, output: Any) -> torch.Tensor:
        """Remember whether the frozen part returns a tensor or a tuple, and in which dtype; returns its hidden states."""
        states = output[0] if self.is_backbone else states_of(output)
        self.dtype, self.extras = states.dtype, len(output) - 1 if isinstance(output, tuple) else 0
        return states

    def shaped(self, states: torch.Tensor) -> Any:
        """Hidden states as the layers of this model return them: a tensor, or a tuple with further entries."""
        return (states, *[None] * self.extras) if self.extras else states

    def cached_output(self, rows: torch.Tensor) -> Any:
        if self.is_backbone:
            vectors = self.table[rows].to(self.dtype)
            return Output(last_hidden_state=vectors[:, None], pooler_output=vectors)
        states = self.table[self.places(rows, self.mask)] * self.mask[:, :, None]
        return self.shaped(states.to(self.dtype))

    def places(self, rows: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """(batch, length): the rows of `table` that hold the tokens of samples, padded on either side."""
        return (self.starts[rows][:, None] + mask.cumsum(dim=1) - 1).clamp(min=0)

    def compute(self, batch: Tensors) -> Any:
        """The output of the frozen part; nothing above it is computed."""

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
        """The output of the frozen part, and the logits of the whole model."""
        seen: list[Any] = []
        handle = self.modules[-1].register_forward_hook(lambda _, __, output: seen.append(output))
        try:
            logits = self.model(**batch).logits.float()
            return seen[0], logits
        finally:
            handle.remove()

    def vectors(self, rows: torch.Tensor, output: Any, batch: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
        """(rows of `table`, vectors) of samples, from the output of `compute`."""
        if self.is_backbone:
            return rows, views(output, batch, self.model.config.pad_token_id)[self.view]
        mask = batch["attention_mask"].bool()
        return self.places(rows, batch["attention_mask"])[mask], states_of(output)[mask]


def states_of(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


@dataclasses.dataclass(frozen=True)
class Rows:
    """The samples of a split as numbers from `first` on: a batch needs neither tokens nor padding."""

    first: int
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, column: str) -> np.ndarray:
        return {"labels": self.labels.numpy()}[column]

    def __getitems__(self, indices: list[int]) -> Tensors:
        """One position per sample: its token is not read, but heads look at the mask."""
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
    """`data` with a column `rows`, the number of each sample; without tokens if the whole backbone is cached."""
    tokens: dict[str, Any] = {}
    for split, first in first_rows(data).items():
        dataset = data.tokens[split]
        numbers = np.arange(first, first + len(dataset))
        if is_backbone:
            tokens[split] = Rows(first, torch.tensor(dataset["labels"][:]))
        else:
            tokens[split] = dataset.add_column("rows", numbers)
    return dataclasses.replace(data, tokens=tokens)
