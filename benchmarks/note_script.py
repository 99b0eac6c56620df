"""The study note's complete script, with only the repairs it needs to run today.

    python benchmarks/note_script.py --model FOLDER --data FOLDER

FOLDER of the data holds train.jsonl, validation.jsonl and test.jsonl with the columns of SetFit/sst5: text, label and
label_text. What was repaired, and why:

- model and data are folders, not names on the Hub; the body is `base_model`, not `roberta`, as it may be another one
- the device is the first GPU or the CPU; the options have types; `copy` is imported
- `transformers.AdamW` is gone: PyTorch's, with the settings the old one had when called with the parameters alone, as
  the note does (learning rate 1e-3, epsilon 1e-6, no decay); the note's own `--lr` never reached it, and does not here
- `evaluate.load("accuracy")` asks the Hub: the module of lib/evaluation/metrics instead

All else is the note's: the frozen body runs anew in every epoch, its dropout on; batches are random and padded to their
longest; arithmetic is float32; the schedule warms up over 300 steps; the best epoch is tested.
"""

import argparse
import copy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import evaluate  # noqa: E402
import torch  # noqa: E402
from datasets import load_dataset  # noqa: E402
from torch.optim import AdamW  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    get_scheduler,
)

from benchmarks.measuring import Measures  # noqa: E402


class Classifier:
    """The note's class."""

    def __init__(self, opt: argparse.Namespace) -> None:
        self.opt = opt
        self.measures = Measures()
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.tokenizer = AutoTokenizer.from_pretrained(opt.model)
        self.model = AutoModelForSequenceClassification.from_pretrained(
            opt.model, num_labels=5, ignore_mismatched_sizes=True
        )
        self.model.to(self.device)
        files = {split: f"{opt.data}/{split}.jsonl" for split in ("train", "validation", "test")}
        tokenized = load_dataset("json", data_files=files).map(self.tokenize, batched=True)
        tokenized = tokenized.remove_columns(["text", "label_text"]).rename_column("label", "labels")
        tokenized.set_format("torch")
        collator = DataCollatorWithPadding(self.tokenizer)
        self.loaders = {
            split: DataLoader(
                tokenized[split],
                batch_size=opt.bs,
                shuffle=split == "train",
                collate_fn=self.measures.counting(collator) if split == "train" else collator,
            )
            for split in files
        }
        self.optimizer = AdamW(self.model.parameters(), lr=1e-3, eps=1e-6, weight_decay=0.0)
        for parameter in self.model.base_model.parameters():
            parameter.requires_grad = False
        steps = opt.epoch * len(self.loaders["train"])
        self.lr_scheduler = get_scheduler(
            "linear", optimizer=self.optimizer, num_warmup_steps=300, num_training_steps=steps
        )

    def tokenize(self, rows):
        return self.tokenizer(rows["text"], truncation=True, max_length=self.opt.max_length)

    def train(self) -> float:
        """Accuracy on the test split of the epoch that was best on the validation split."""
        best_accuracy, best_model = 0.0, None
        for epoch in range(self.opt.epoch):
            self.model.train()
            self.measures.begin_epoch()
            for batch in self.loaders["train"]:
                batch = {name: tensor.to(self.device) for name, tensor in batch.items()}
                loss = self.model(**batch).loss
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()
                self.lr_scheduler.step()
                self.measures.step()
            self.measures.end_epoch()
            accuracy = self.score("validation")
            self.measures.evaluated(accuracy)
            if best_accuracy < accuracy:
                best_accuracy = accuracy
                best_model = copy.deepcopy(self.model.state_dict())
            print(f"epoch {epoch} validation: [accuracy: {accuracy}]", flush=True)
        if best_model is not None:
            self.model.load_state_dict(best_model)
        return self.score("test")

    def score(self, split: str) -> float:
        metric = evaluate.load(str(ROOT / "lib" / "evaluation" / "metrics" / "accuracy.py"))
        self.model.eval()
        with self.measures.evaluating(len(self.loaders[split].dataset)):  # type: ignore[arg-type]
            for batch in self.loaders[split]:
                batch = {name: tensor.to(self.device) for name, tensor in batch.items()}
                with torch.no_grad():
                    logits = self.model(**batch).logits
                metric.add_batch(predictions=torch.argmax(logits, dim=-1), references=batch["labels"])
        return metric.compute()["accuracy"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a model and its tokenizer")
    parser.add_argument("--data", required=True, help="folder of train.jsonl, validation.jsonl, test.jsonl")
    parser.add_argument("--epoch", type=int, default=20)
    parser.add_argument("--bs", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-5, help="not used, as in the note")
    parser.add_argument("--max_length", type=int, default=512)
    classifier = Classifier(parser.parse_args())
    accuracy = classifier.train()
    print(classifier.measures.report(test_accuracy=accuracy))


if __name__ == "__main__":
    main()
