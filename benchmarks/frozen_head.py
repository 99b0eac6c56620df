"""What two slips of the note's complete script do to its numbers: dropout in the frozen body, and a rate that never arrives.

    python benchmarks/frozen_head.py --max_train_samples 2000 --epochs 20

Takes the flags of train.py. The head alone is trained as in recipes/sst5_head.yaml, on outputs of the frozen body: taken
once with its dropout off, as train.py does, and anew for each epoch with its dropout on, as the note does. The outputs of an
epoch are shared by all seeds and rates; a seed sets the head's first weights, the order of samples and its own dropout.
"""

import sys
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import get_scheduler

sys.path.insert(0, ".")

from lib.config.cli import parse_cli
from lib.config.sections import EVAL_SAMPLES
from lib.config.train import TrainConfig
from lib.data.batching import epoch_batches
from lib.data.load import Data, load_data
from lib.data.loader import Collator, build_collator, build_loader
from lib.evaluation.batch_size import BatchSize
from lib.evaluation.report import format_table
from lib.model.load import build_model, load_tokenizer
from lib.runtime.seeds import seed_everything

SEEDS = range(5)
RATES = (1e-3, 1e-5)
WARMUP_STEPS = 300


@torch.inference_mode()
def encode(model: nn.Module, data: Data, split: str, collator: Collator, dropout: bool) -> torch.Tensor:
    """float32 (samples, size): what the head reads of each text."""
    body: Any = getattr(model, str(model.base_model_prefix)).train(dropout)
    batches = BatchSize(EVAL_SAMPLES).batches(data.lengths[split])
    rows = []
    for batch in build_loader(data.tokens[split], batches, collator):
        batch.pop("labels")
        rows.append(body(**batch).pooler_output)
    order = torch.from_numpy(np.concatenate(batches))
    return torch.cat(rows)[torch.argsort(order)]


def labels_of(data: Data, split: str) -> torch.Tensor:
    return torch.tensor(list(data.tokens[split]["labels"]))


def train_head(
    features: list[torch.Tensor],
    data: Data,
    scored: dict[str, torch.Tensor],
    rate: float,
    seed: int,
    config: TrainConfig,
) -> tuple[float, float]:
    """(validation, test) accuracy of the best epoch; `features` of the training data, one for each epoch."""
    seed_everything(seed)
    head = nn.Linear(features[0].shape[1], len(data.label_names))
    nn.init.normal_(head.weight, std=0.02)
    nn.init.zeros_(head.bias)
    labels, size = labels_of(data, "train"), config.training.train_batch_size
    steps = len(features) * -(-len(labels) // size)
    optimizer = torch.optim.AdamW(head.parameters(), lr=rate, eps=1e-6, weight_decay=0.0)
    scheduler = get_scheduler("linear", optimizer, min(WARMUP_STEPS, steps), steps)
    best = (-1.0, 0.0)
    for epoch, rows in enumerate(features):
        for batch in epoch_batches(data.lengths["train"], size, seed, epoch, "random"):
            logits = head(nn.functional.dropout(rows[batch], 0.1))
            optimizer.zero_grad()
            cross_entropy(logits, labels[batch]).backward()
            optimizer.step()
            scheduler.step()
        scores = [accuracy(head, scored[split], labels_of(data, split)) for split in ("validation", "test")]
        best = max(best, (scores[0], scores[1]), key=lambda pair: pair[0])
    return best


@torch.inference_mode()
def accuracy(head: nn.Module, features: torch.Tensor, labels: torch.Tensor) -> float:
    return (head(features).argmax(dim=1) == labels).float().mean().item()


def main(config: TrainConfig) -> None:
    tokenizer = load_tokenizer(config.model)
    data = load_data(config.data, tokenizer)
    model, _ = build_model(config.model, data.label_names, tokenizer)
    collator = build_collator(tokenizer, "no", torch.device("cpu"))
    scored = {split: encode(model, data, split, collator, dropout=False) for split in ("validation", "test")}
    epochs = int(config.training.num_train_epochs)
    table = [["dropout of the frozen body", "learning rate", "validation accuracy", "test accuracy"]]
    for dropout in (False, True):
        features = [encode(model, data, "train", collator, dropout) for _ in range(epochs if dropout else 1)]
        features = features if dropout else features * epochs
        for rate in RATES:
            runs = np.array([train_head(features, data, scored, rate, seed, config) for seed in SEEDS])
            cells = [f"{mean:.4f} ± {std:.4f}" for mean, std in zip(runs.mean(0), runs.std(0, ddof=1), strict=True)]
            table.append(["on" if dropout else "off", f"{rate:g}", *cells])
    print(format_table(table), flush=True)


if __name__ == "__main__":
    main(parse_cli(TrainConfig))
