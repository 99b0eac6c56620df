"""A hand-written Accelerate loop, as documentation and example scripts teach it, with their defaults.

    python benchmarks/manual_loop.py --model FOLDER --data FOLDER           train, validate after each epoch
    python benchmarks/manual_loop.py --model FOLDER --data FOLDER --score train

Written from the documented behaviour: float32 unless the launcher says otherwise, batches shuffled at random and padded
to their longest, AdamW of PyTorch in its default form with no decay of biases and norms, a linear schedule that is
prepared with the rest, `gather_for_metrics` in evaluation. FOLDER of the data holds train.jsonl, validation.jsonl and
test.jsonl with columns text and label.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import evaluate  # noqa: E402
import torch  # noqa: E402
from accelerate import Accelerator  # noqa: E402
from accelerate.utils import set_seed  # noqa: E402
from datasets import load_dataset  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    get_scheduler,
)

from benchmarks.measuring import Measures  # noqa: E402

SPLITS = ("train", "validation", "test")


def build_loaders(raw: Any, options: argparse.Namespace, tokenizer: Any, measures: Measures) -> dict[str, DataLoader]:
    """A loader of each split; that of training is shuffled. `ordered` is the split to score, in its order."""

    def encode(rows: dict[str, list]) -> dict[str, list]:
        encoded = tokenizer(rows["text"], truncation=True, max_length=options.max_length)
        encoded["labels"] = rows["label"]
        return encoded

    tokens = raw.map(encode, batched=True, remove_columns=raw["train"].column_names, desc="tokenize")
    collator = DataCollatorWithPadding(tokenizer)
    size = options.batch_size
    loaders = {split: DataLoader(tokens[split], batch_size=size, collate_fn=collator) for split in SPLITS}
    loaders["ordered"] = loaders[options.score or "validation"]
    loaders["train"] = DataLoader(
        tokens["train"], batch_size=size, shuffle=True, collate_fn=measures.counting(collator)
    )
    return loaders


def build_optimizer(model: torch.nn.Module, options: argparse.Namespace) -> torch.optim.Optimizer:
    undecayed = ("bias", "LayerNorm.weight")
    groups: tuple[list, list] = ([], [])
    for name, parameter in model.named_parameters():
        groups[any(part in name for part in undecayed)].append(parameter)
    return torch.optim.AdamW(
        [{"params": groups[0], "weight_decay": options.weight_decay}, {"params": groups[1], "weight_decay": 0.0}],
        lr=options.learning_rate,
    )


def score(accelerator: Accelerator, model: torch.nn.Module, loader: DataLoader, measures: Measures) -> float:
    """Accuracy over all batches of `loader`."""
    metric = evaluate.load(str(ROOT / "lib" / "evaluation" / "metrics" / "accuracy.py"))
    model.eval()
    with measures.evaluating(len(loader.dataset)):  # type: ignore[arg-type]
        for batch in loader:
            with torch.no_grad():
                outputs = model(**batch)
            predictions = outputs.logits.argmax(dim=-1)
            predictions, references = accelerator.gather_for_metrics((predictions, batch["labels"]))
            metric.add_batch(predictions=predictions, references=references)
    return metric.compute()["accuracy"]


def train(
    accelerator: Accelerator,
    model: torch.nn.Module,
    loaders: dict[str, DataLoader],
    options: argparse.Namespace,
    measures: Measures,
) -> None:
    """Train for the epochs asked for, with an evaluation after each."""
    optimizer = build_optimizer(model, options)
    scheduler = get_scheduler("linear", optimizer, 0, options.epochs * len(loaders["train"]))
    model, optimizer, loader, validation, scheduler = accelerator.prepare(
        model, optimizer, loaders["train"], loaders["validation"], scheduler
    )
    for epoch in range(options.epochs):
        model.train()
        measures.begin_epoch()
        for batch in loader:
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            measures.step()
        measures.end_epoch()
        accuracy = score(accelerator, model, validation, measures)
        measures.evaluated(accuracy)
        accelerator.print(f"epoch {epoch}: accuracy {accuracy:.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a model and its tokenizer")
    parser.add_argument("--data", required=True, help="folder of train.jsonl, validation.jsonl, test.jsonl")
    parser.add_argument("--score", choices=SPLITS, help="only score this split")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--learning_rate", type=float, default=5e-5)
    parser.add_argument("--weight_decay", type=float, default=0.0)
    parser.add_argument("--max_length", type=int, default=128)
    parser.add_argument("--seed", type=int, default=42)
    options = parser.parse_args()
    accelerator, measures = Accelerator(), Measures()
    set_seed(options.seed)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    raw = load_dataset("json", data_files={split: f"{options.data}/{split}.jsonl" for split in SPLITS})
    classes = max(raw["train"]["label"]) + 1
    model = AutoModelForSequenceClassification.from_pretrained(options.model, num_labels=classes)
    loaders = build_loaders(raw, options, tokenizer, measures)
    if options.score:
        model, loader = accelerator.prepare(model, loaders["ordered"])
        print(measures.report(accuracy=score(accelerator, model, loader, measures)))
        return
    train(accelerator, model, loaders, options, measures)
    print(measures.report())


if __name__ == "__main__":
    main()
