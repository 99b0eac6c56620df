"""`--head_solver lbfgs`: the last linear layer over a frozen backbone is solved for instead of trained.

On vectors that do not change, its loss is convex: for each strength of regularization there is one best layer. Validation
chooses the strength, and which vectors the layer reads:

- those that it reads in the model as it was loaded, such as BERT's pooled vector;
- those that a square layer with an activation below it reads, such as the first token's vector: that layer (the pooler of
  BERT, the dense layer in the head of RoBERTa) becomes an identity;
- the mean of the token vectors after a middle layer, in models made of BERT's layers: attention without queries and keys
  is a mean over the tokens, so that the last layer can write this mean into the first token. The layers between only
  standardize.

The result is an ordinary model of its architecture.
"""

import contextlib
import dataclasses
import operator
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from torch import nn

from lib.data.loader import Batches, StepBatch, Tensors, build_loader, to_device
from lib.errors import UserError
from lib.evaluation.batch_size import split_batches
from lib.evaluation.linear import STRENGTHS, Linear, choose_best, fit_linear, predictions_of
from lib.evaluation.scores import LOWER_IS_BETTER, Metrics
from lib.evaluation.scoring import check_counts, share_batches
from lib.model.forward import pool_logits
from lib.model.layers import find_layers, set_train_mode
from lib.model.padding import TOLERANCE, same_logits
from lib.runtime.precision import DTYPES, cast_weights
from lib.runtime.processes import agree_to_stop
from lib.runtime.watchdog import beat
from lib.training.frozen.stand_in import states_of, views
from lib.training.learner import Learner

LOADED = "the vectors that the last layer reads"
IDENTITY = "the vectors below the pooling layer"

IDENTITIES = ((2.0**-10, 0.0), (1.0, 16.0))
"""(scale, shift) with which an activation is linear: tanh near 0, ReLU and GELU far above it."""

LOUD = 2.0**8
"""The factor of a mean that is added to the vector of the first token, which is lost beside it."""

PARTS_OF_A_LAYER = (
    *("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense", "output.dense"),
    *("attention.output.LayerNorm", "output.LayerNorm"),
)
"""The linear layers and norms of BERT's layer, as transformers names them in BERT, RoBERTa, ELECTRA, XLM-R and others."""

PROBE = 8
"""Samples on which the layers of a head are found."""

Call = tuple[nn.Linear, torch.Tensor]
"""A linear layer and what it was given."""


def solve_head(learner: Learner, batches: Batches, metrics: Metrics) -> None:
    """Set the last layer of the model to the best one for its frozen vectors, and count that as one step over all samples.

    Every process computes a share of the vectors, and the main process solves. Nothing is random. Raises UserError if the
    logits are not a linear layer of one vector, or the vectors take more memory than `--feature_cache_gib`; Stopped if a
    process was asked to stop, which leaves the model as it was.
    """
    accelerator, data, model = learner.accelerator, batches.data, learner.inner_model
    labels, weights = data.labels("train"), batches.weights
    model.eval()
    with torch.no_grad():
        head = find_head(learner, batches)
        vectors = {split: read_vectors(learner, batches, head, split) for split in ("train", "validation")}
    set_train_mode(model)
    found: list[Any] = [None]
    problem, outputs, best = data.problem_type, len(data.label_names), -np.inf
    sign = -1 if metrics.best in LOWER_IS_BETTER else 1
    for place, name in enumerate(head.names):
        train, validation = (vectors[split][:, place] for split in ("train", "validation"))
        fits = fit_linear(train, labels, problem, outputs, weights, head.last.bias is not None)
        solutions, predictions = [], []
        for strength in STRENGTHS:  # the others wait for the main process before each, so that nobody waits for long
            beat(f"solving the head on {name}, strength {strength:g}")
            agree_to_stop(accelerator)
            if accelerator.is_main_process:
                solutions.append(next(fits))
                predictions.append(predictions_of(solutions[-1](validation), data.labels("validation"), problem))
        if accelerator.is_main_process:
            number, value = choose_best(predictions, metrics.best)
            print(
                f"- head on {name}: {metrics.best} {value * sign:.4f} on validation, strength {STRENGTHS[number]:g}",
                flush=True,
            )
            if value > best:
                losses = predictions_of(solutions[number](train), labels, problem).losses
                loss = float((losses * (1 if weights is None else weights)).sum(dtype=np.float64))
                best, found = value, [(name, solutions[number], loss)]
    name, solution, loss = broadcast_object_list(found)[0]
    head.install(name, solution)
    weight = float(len(labels) if weights is None else weights.sum(dtype=np.float64))
    share = torch.tensor(loss if accelerator.is_main_process else 0.0, device=accelerator.device)
    learner.count_step(StepBatch([], len(labels), weight), share, torch.zeros((), device=accelerator.device))


@dataclasses.dataclass
class Head:
    """The last linear layer of a model, and the square layer below it that can become an identity, if there is one."""

    model: Any
    last: nn.Linear
    position: str | None
    """Of which token the last layer is given the vector, where it is given those of all tokens."""
    square: nn.Linear | None = None
    scale: float = 1.0
    shift: float = 0.0
    layers: Any = None
    """Those of a model made of BERT's layers, of which the square layer reads the first token."""

    @property
    def names(self) -> list[str]:
        """The vectors that the last layer can read, in words."""
        means = [f"the mean of the tokens after layer {number}" for number in self.middle]
        return [LOADED, *([] if self.square is None else [IDENTITY]), *means]

    @property
    def middle(self) -> list[int]:
        """The layers whose mean can be read, counted from 1: those at a half and two thirds of the height, and all but one."""
        number = len(self.layers or ())
        return sorted({round(number / 2), round(number * 2 / 3), number - 1} - {-1, 0, number})

    def vectors(self, inputs: Tensors) -> torch.Tensor:
        """float32 (samples, names, size): the vectors of a batch; of a text in several windows their mean."""
        counts = inputs.get("num_windows")
        rows = {name: tensor for name, tensor in inputs.items() if name != "num_windows"}
        below = [self.layers[number - 1] for number in self.middle] if self.layers else []
        with recording([self.last, self.square]) as calls, outputs_of(below) as states:
            self.model(**rows)
        given = dict(calls)  # the last input of each layer
        found = [given[self.last] if self.position is None else self.pick(given[self.last], rows)]
        if self.square is not None:
            found.append(given[self.square])
        for number, tokens in zip(self.middle, states, strict=True):
            found.append(self.mean(tokens, rows["attention_mask"], number))
        stacked = torch.stack([vectors.float() for vectors in found], dim=1)
        # Logits are linear in these vectors, and those of a text are the mean over its windows.
        return stacked if counts is None else pool_logits(stacked, counts.tolist())

    def pick(self, states: torch.Tensor, rows: Tensors) -> torch.Tensor:
        return views((states,), rows, self.model.config.pad_token_id)[str(self.position)]

    def mean(self, states: torch.Tensor, mask: torch.Tensor, number: int) -> torch.Tensor:
        """What the last layer writes into the first token once `average_after` has changed the layers."""
        norm = self.layers[-1].output.LayerNorm

        def standardize(vectors: torch.Tensor) -> torch.Tensor:
            return nn.functional.layer_norm(vectors, norm.normalized_shape, eps=norm.eps)

        tokens = states.float() if number == len(self.layers) - 1 else standardize(states.float())
        mean = (tokens * mask[:, :, None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)
        return standardize(tokens[:, 0] + LOUD * mean)

    def average_after(self, number: int) -> None:
        """Have the last layer write the mean of the tokens after layer `number` into each of them."""
        for layer in self.layers[number:]:  # what they add is 0, and their norms have no weights
            for linear in (layer.attention.output.dense, layer.output.dense):
                set_linear(linear, 0.0)
            for norm in (layer.attention.output.LayerNorm, layer.output.LayerNorm):
                norm.weight.fill_(1.0)
                norm.bias.zero_()
        attention = self.layers[-1].attention
        set_linear(attention.self.query, 0.0)
        set_linear(attention.self.key, 0.0)
        set_linear(attention.self.value, 1.0)
        set_linear(attention.output.dense, LOUD)

    def make_identity(self, scale: float, shift: float) -> None:
        """Have the square layer with its activation return scale * vector + shift."""
        assert self.square is not None
        self.scale, self.shift = scale, shift
        set_linear(self.square, scale, shift)

    @torch.no_grad()
    def install(self, name: str, solution: Linear) -> None:
        """Have the last layer read the vectors of this name, and give it the solution for them."""
        weight, bias = solution.weight, solution.bias
        if name not in (LOADED, IDENTITY):
            self.average_after(self.middle[self.names.index(name) - 2])
        if name != LOADED:
            self.make_identity(self.scale, self.shift)
            weight = weight / self.scale
            bias = bias - self.shift * weight.sum(axis=1)
        self.last.weight.copy_(torch.from_numpy(weight))
        if self.last.bias is not None:
            self.last.bias.copy_(torch.from_numpy(bias))


def set_linear(layer: nn.Linear, factor: float, shift: float = 0.0) -> None:
    """Have a square layer, or with the factor 0 any, return factor * vector + shift."""
    layer.weight.zero_()
    if factor:
        layer.weight.fill_diagonal_(factor)
    layer.bias.fill_(shift)


@contextlib.contextmanager
def recording(modules: Iterable[nn.Module | None]) -> Iterator[list[Call]]:
    """The calls within of those modules that are linear layers, in their order."""
    calls: list[Call] = []

    def record(layer: Any, given: Any) -> None:
        calls.append((layer, given[0].detach()))

    hooks = [module.register_forward_pre_hook(record) for module in modules if isinstance(module, nn.Linear)]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def outputs_of(layers: Iterable[nn.Module]) -> Iterator[list[torch.Tensor]]:
    """The token vectors after each layer within, in their order."""
    states: list[torch.Tensor] = []

    def record(_: Any, __: Any, output: Any) -> None:
        states.append(states_of(output))

    hooks = [layer.register_forward_hook(record) for layer in layers]
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()


def find_head(learner: Learner, batches: Batches) -> Head:
    """The layers of a head, found by trying: what they are called differs between architectures.

    Raises UserError if the logits are not one linear layer of one vector.
    """
    model, accelerator = learner.inner_model, learner.accelerator
    dtype = DTYPES.get(accelerator.mixed_precision, torch.float32)
    indices = np.arange(min(PROBE, len(batches.data.tokens["train"])))
    batch = next(iter(build_loader(batches.data.tokens["train"], [indices], batches.collator)))
    batch = to_device(batch, accelerator.device)
    rows = {name: tensor for name, tensor in batch.items() if name not in ("labels", "num_windows")}
    with recording(model.modules()) as calls:
        logits = model(**rows).logits.float()
    head = None
    for last, given in reversed(calls):
        if last.out_features == logits.shape[-1] and head is None:
            choices: dict[Any, torch.Tensor] = {None: given}
            if given.dim() > 2:
                choices = views((given,), rows, model.config.pad_token_id)
            for position, vectors in choices.items():
                if head is None and len(vectors) == len(logits):
                    head = Head(model, last, position) if same_logits(logits, apply(last, vectors), dtype) else None
    if head is None or batches.unpadded:
        raise UserError(
            f"--head_solver lbfgs: the logits of {type(model).__name__} are not one linear layer of one vector of a text; "
            "leave it out: --freeze backbone alone trains any head"
        )
    place = [layer for layer, _ in calls].index(head.last)
    below, given = calls[place - 1] if place else (head.last, logits)
    size = head.last.in_features
    if given.dim() == 2 and (below.in_features, below.out_features) == (size, size) and below.bias is not None:
        head.square = below
        kept = [parameter.detach().clone() for parameter in (below.weight, below.bias)]
        for scale, shift in IDENTITIES:
            head.make_identity(scale, shift)
            with recording([head.last]) as calls:
                model(**rows)
            returned = (dict(calls)[head.last].float() - shift) / scale
            linear = bool((returned - given).abs().max() <= TOLERANCE[dtype] * given.abs().max())
            if linear:
                break
        below.weight.copy_(kept[0])
        below.bias.copy_(kept[1])
        head.square = below if linear else None
    if head.square is not None and (layers := layers_of_bert(model)) is not None:
        with outputs_of(layers) as states:
            model(**rows)
        if len(states) == len(layers) and same_logits(given.float(), states[-1][:, 0].float(), dtype):
            head.layers = layers
    return head


def layers_of_bert(model: Any) -> Any:
    """The layers of a model that is made of those of BERT; None for another."""
    try:
        layers = find_layers(model, "--head_solver")
        for layer in layers:
            query, _, value, *_ = (operator.attrgetter(part)(layer) for part in PARTS_OF_A_LAYER)
            if not query.in_features == value.in_features == value.out_features:
                return None
    except (UserError, AttributeError):
        return None
    return None if getattr(model.config, "is_decoder", False) else layers


def apply(layer: nn.Linear, vectors: torch.Tensor) -> torch.Tensor:
    """What a layer makes of vectors, in float32."""
    return nn.functional.linear(
        vectors.float(), layer.weight.float(), None if layer.bias is None else layer.bias.float()
    )


def read_vectors(learner: Learner, batches: Batches, head: Head, split: str) -> np.ndarray:
    """float32 (rows, names, size): the vectors of a split, each computed once by one of the processes."""
    accelerator, source, limit = learner.accelerator, batches.split(split), learner.plan.config.feature_cache_gib
    table = torch.empty(len(source.tokens), len(head.names), head.last.in_features, device="meta")
    if table.nbytes > limit * 2**30:
        raise UserError(
            f"--head_solver lbfgs: the vectors of {split} take {table.nbytes / 2**30:.2f} GiB, --feature_cache_gib allows "
            f"{limit:g}; allow more, or train the head without it"
        )
    table = torch.zeros(table.shape, device=accelerator.device)
    counts = torch.zeros(len(table), device=accelerator.device)

    def compute(indices: torch.Tensor, batch: Tensors) -> None:
        table[indices] = head.vectors({name: tensor for name, tensor in batch.items() if name != "labels"})
        counts[indices] += 1

    size, what = learner.eval_size, f"vectors of {split}"
    with cast_weights(head.model, accelerator.mixed_precision):
        while not share_batches(accelerator, source, split_batches(source, size), compute, what):
            size = size.halved(source.positions)
            table.zero_()
            counts.zero_()
    learner.eval_size = size
    check_counts(accelerator.reduce(counts, "sum").cpu().numpy())
    return accelerator.reduce(table, "sum").cpu().numpy()  # x + 0 is exact
