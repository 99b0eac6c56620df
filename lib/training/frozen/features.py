"""The output of the frozen part of a model: computed once for every split, cached on disk, trained on from memory."""

import dataclasses
import hashlib
import time
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from lib.config.sections import ModelConfig
from lib.config.train import TrainingConfig
from lib.data.load import Data
from lib.data.loader import Batches, Tensors, build_loader, to_device
from lib.evaluation.batch_size import split_batches
from lib.evaluation.scoring import check_counts, share_batches
from lib.model.layers import count_parameters, set_train_mode
from lib.model.padding import same_logits
from lib.model.sharding import is_sharded
from lib.runtime.cpu.tuning import use_one_core_for
from lib.runtime.precision import DTYPES, cast_weights
from lib.runtime.processes import any_process
from lib.runtime.seeds import seed_everything
from lib.training.frozen.feature_cache import (
    cache_folder,
    check_features,
    data_digest,
    load_features,
    model_digest,
    save_features,
)
from lib.training.frozen.stand_in import StandIn, as_it_is, first_rows, name_samples, views
from lib.training.learner import Learner

PROBE = 8
"""Samples per split on which the stand-in is compared with the model."""

KEPT = 4
"""The cache on disk may grow to this many times `--feature_cache_gib`."""


class NotCacheable(Exception):
    """Why the frozen part must run in every step."""


def cache_features(learner: Learner, batches: Batches, model: ModelConfig, training: TrainingConfig) -> Batches:
    """Batches with which the model reads the output of its frozen part from memory instead of computing it.

    The output is computed once for every split, shared among processes, or loaded from disk. Samples, batches and dropout
    above the frozen part stay the same. Returns `batches` unchanged if nothing is frozen, if `--no_cache_features` or
    `--head_solver` is given, if the model is in shards, or if logits from the cache differ from those of the model; the main
    process prints why. The learner must be prepared and hold its weights.
    """
    accelerator, data, part = learner.accelerator, batches.data, model.freeze
    if training.no_cache_features or part in (None, "embeddings", "0") or model.head_solver:
        return batches
    if "num_windows" in data.tokens["train"].column_names:
        say(accelerator, "- the frozen part runs in every step: --window_stride gives a text more than one input")
        return batches
    if is_sharded(learner.model):
        say(accelerator, "- the frozen part runs in every step: with FSDP no process holds it whole")
        return batches
    lengths = np.concatenate([data.lengths[split] for split in data.tokens])
    stand_in = StandIn(learner.inner_model, str(part), lengths, accelerator.device)
    set_train_mode(stand_in.model)
    try:
        say(accelerator, Builder(learner, stand_in, batches, training, model.model).build())
    except NotCacheable as reason:
        stand_in.remove()
        say(accelerator, f"- the frozen part runs in every step: {reason}")
        return batches
    if stand_in.is_backbone:
        trained, _ = count_parameters(stand_in.model)
        use_one_core_for(trained * training.train_batch_size)
    named, collator = name_samples(data, stand_in.is_backbone), as_it_is if stand_in.is_backbone else batches.collator
    return dataclasses.replace(batches, data=named, collator=collator)


@dataclasses.dataclass(frozen=True)
class Builder:
    """Fills the table of a stand-in and checks that the model computes the same logits from it."""

    learner: Learner
    stand_in: StandIn
    batches: Batches
    config: TrainingConfig
    model_name: str

    @property
    def accelerator(self) -> Accelerator:
        return self.learner.accelerator

    @property
    def data(self) -> Data:
        return self.batches.data

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the cache."""
        return DTYPES.get(self.accelerator.mixed_precision, torch.float32)

    def build(self) -> str:
        """Returns a line for the start block. Raises NotCacheable if the frozen part must run in every step."""
        started = time.perf_counter()
        size = self.prepare_table(self.choose_view())
        how = self.fill()
        for split in self.data.tokens:
            rows, batch = self.probe(split)
            _, logits = self.whole(batch)
            if not self.is_same(logits, self.logits_of(rows, batch)):
                raise NotCacheable("its output depends on the other texts of a batch, or on random numbers")
        what = f"the frozen backbone ({self.stand_in.view})" if self.stand_in.is_backbone else "the frozen layers"
        kind = str(self.dtype).removeprefix("torch.")
        return (
            f"- {what}, {kind}, {size / 2**20:,.1f} MiB, runs once: {how}, {time.perf_counter() - started:.1f} s "
            f"({cache_folder()})"
        )

    # ------------------------------------------------------------------------------------------------ checking

    def probe(self, split: str) -> tuple[torch.Tensor, Tensors]:
        """Row numbers and tensors of some samples of a split, from the shortest to the longest."""
        order = np.argsort(self.data.lengths[split], kind="stable")
        indices = np.unique(order[np.linspace(0, len(order) - 1, min(PROBE, len(order))).astype(int)])
        batch = next(iter(build_loader(self.data.tokens[split], [indices], self.batches.collator)))
        batch.pop("labels")
        batch = to_device(batch, self.accelerator.device)
        rows = torch.from_numpy(indices + first_rows(self.data)[split])
        return rows.to(self.accelerator.device), batch

    def whole(self, batch: Tensors) -> tuple[Any, torch.Tensor]:
        """Output of the frozen part and logits in train mode, with a fixed seed: dropout must be equal, too."""
        seed_everything(self.config.seed)
        return self.stand_in.compute_whole(batch)

    @torch.no_grad()
    def logits_of(self, rows: torch.Tensor, batch: Tensors) -> torch.Tensor | None:
        """Logits of samples from the table; None if the head cannot work with it."""
        if self.stand_in.is_backbone:  # as in `Rows`
            one = torch.ones(len(rows), 1, dtype=torch.int64, device=rows.device)
            batch = {"input_ids": one, "attention_mask": one}
        seed_everything(self.config.seed)
        try:
            return self.stand_in.model(**batch, rows=rows).logits.float()
        except Exception:  # each head that needs more than one position raises its own error
            return None

    def is_same(self, logits: torch.Tensor, others: torch.Tensor | None) -> bool:
        """Whether logits are equal up to rounding, on every process."""
        same = others is not None and same_logits(logits, others, self.dtype)
        return not any_process(self.accelerator, not same)

    def choose_view(self) -> int:
        """Find which vector of the output the head reads; returns its size. Raises NotCacheable if it reads more."""
        rows, batch = self.probe("train")
        if "attention_mask" not in batch:
            raise NotCacheable("its tokenizer returns no attention mask")
        output, logits = self.whole(batch)
        states = self.stand_in.learn_form(output)
        if states.requires_grad:
            raise NotCacheable("something below it is trained, such as positions that all layers share")
        if not self.stand_in.is_backbone:
            return states.shape[-1]
        for view, vectors in views(output, batch, self.stand_in.model.config.pad_token_id).items():
            self.stand_in.view, self.stand_in.table = view, vectors.detach()
            if self.is_same(logits, self.logits_of(torch.arange(len(rows), device=rows.device), batch)):
                return vectors.shape[1]
        raise NotCacheable("the head needs more than one vector of a text")

    # ------------------------------------------------------------------------------------------------ computing

    def prepare_table(self, width: int) -> int:
        """Allocate the table of all vectors of `width` numbers; returns its bytes.

        Raises NotCacheable if it is larger than `--feature_cache_gib`.
        """
        stand_in, limit = self.stand_in, self.config.feature_cache_gib
        count = sum(map(self.positions, self.data.tokens))
        size = count * width * self.dtype.itemsize
        if size > limit * 2**30:
            raise NotCacheable(f"its output takes {size / 2**30:.2f} GiB, --feature_cache_gib allows {limit:g}")
        stand_in.table = torch.zeros(count, width, dtype=self.dtype, device=self.accelerator.device)
        return size

    def positions(self, split: str) -> int:
        """Rows of the table that a split occupies."""
        return len(self.data.tokens[split]) if self.stand_in.is_backbone else int(self.data.lengths[split].sum())

    def fill(self) -> str:
        """Load or compute the vectors of every split; returns which, in words."""
        stand_in, start, how = self.stand_in, 0, []
        made_of = model_digest(
            stand_in.model, len(stand_in.modules), stand_in.view, self.dtype, self.accelerator.device.type
        )
        for split in self.data.tokens:
            part = stand_in.table[start : start + self.positions(split)]
            how.append(f"{split} {self.fill_split(split, part, made_of)}")
            start += len(part)
        return ", ".join(how)

    def fill_split(self, split: str, part: torch.Tensor, made_of: str) -> str:
        key = hashlib.sha256(f"{made_of} {data_digest(self.data.tokens[split])}".encode()).hexdigest()[:32]
        folder = cache_folder() / key
        state = [check_features(folder) if self.accelerator.is_main_process else None]
        damage = broadcast_object_list(state)[0]
        found = load_features(folder, part.shape, part.dtype) if damage is None else None
        if not any_process(self.accelerator, found is None):
            assert found is not None
            part.copy_(found)
            return "found"
        self.encode(split, part)
        problem = None
        if self.accelerator.is_main_process:
            limit = KEPT * self.config.feature_cache_gib * 2**30
            problem = save_features(folder, part, {"split": split, "model": self.model_name}, limit)
        notes = ["computed"] + ([f"instead of damaged ones ({damage})"] if damage not in (None, "absent") else [])
        return " ".join([*notes, *([f"but not kept: {problem}"] if problem else [])])

    def encode(self, split: str, part: torch.Tensor) -> None:
        """Compute the vectors of a split, each once on one process, and gather them in `part` on all."""
        source, first = self.batches.split(split), first_rows(self.data)[split]
        counts = torch.zeros(len(source.tokens), device=self.accelerator.device)

        def compute(indices: torch.Tensor, batch: Tensors) -> None:
            inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
            places, vectors = self.stand_in.vectors(indices + first, self.stand_in.compute(inputs), inputs)
            self.stand_in.table[places] = vectors.to(self.dtype)
            counts[indices] += 1

        size, what = self.learner.eval_size, f"features of {split}"
        with torch.no_grad(), cast_weights(self.stand_in.model, self.accelerator.mixed_precision):
            while not share_batches(self.accelerator, source, split_batches(source, size), compute, what):
                size = size.halved(source.positions)
                part.zero_()
                counts.zero_()
        self.learner.eval_size = size
        check_counts(self.accelerator.reduce(counts, "sum").cpu().numpy())
        if self.accelerator.num_processes > 1:
            # Summed as bytes: x + 0 is exact for every dtype.
            part.copy_(self.accelerator.reduce(part.view(torch.uint8), "sum").view(self.dtype))


def say(accelerator: Accelerator, line: str) -> None:
    if accelerator.is_main_process:
        print(line, flush=True)
