"""The study note's Trainer section, runnable: transformers.Trainer on the data, model and metrics of train.py.

    python benchmarks/trainer.py --model roberta-base --dataset sst5        any flags of train.py
    python benchmarks/trainer.py --our_order ...                            with the batches of train.py, in their order

The last line on stdout is JSON: scores of the test split, speed, and what else `benchmarks/bench.py` compares.

With `--our_order`, dropout off and no accumulation its losses are those of train.py, step by step. What must be set for
that: the batches themselves (Trainer draws others, and pads what it draws at random), `warmup_steps` in steps, and the
seed before the model is built, for its new head. Accumulation stays different where micro-batches are of unequal size:
Trainer divides the mean of each by their number, a mean of means, while train.py divides the sum by the samples.
"""

import argparse
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402
from transformers import Trainer, TrainerCallback, TrainingArguments  # noqa: E402

from benchmarks.measuring import Measures  # noqa: E402
from lib.config.cli import parse_cli  # noqa: E402
from lib.config.sections import EVAL_SAMPLES  # noqa: E402
from lib.config.train import TrainConfig  # noqa: E402
from lib.data.batching import micro_batches  # noqa: E402
from lib.data.load import Data, load_data  # noqa: E402
from lib.data.loader import build_collator  # noqa: E402
from lib.evaluation.predictions import Predictions  # noqa: E402
from lib.evaluation.scores import choose_metrics, compute_metric  # noqa: E402
from lib.model.load import build_model, load_tokenizer  # noqa: E402
from lib.run import record as run  # noqa: E402
from lib.runtime.precision import resolve_precision, uses_gpu  # noqa: E402
from lib.runtime.seeds import seed_everything  # noqa: E402
from lib.training.plan import Plan, count_steps  # noqa: E402


class Watch(TrainerCallback):
    """Tells `measures` of the epochs, steps and evaluations that Trainer makes."""

    def __init__(self, measures: Measures) -> None:
        self.measures = measures

    def on_epoch_begin(self, *_: Any, **__: Any) -> None:
        self.measures.begin_epoch()

    def on_epoch_end(self, *_: Any, **__: Any) -> None:
        self.measures.end_epoch()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.measures.step()

    def on_evaluate(self, *_: Any, metrics: dict[str, float], **__: Any) -> None:
        self.measures.evaluated(metrics.get("eval_accuracy", math.nan))


class OurBatches:
    """The batches of train.py as indices, epoch after epoch: one more with each iteration."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.epoch = plan, 0

    def __iter__(self) -> Iterator[list[int]]:
        batches = self.plan.epoch(self.epoch)
        self.epoch += 1
        for batch in batches:
            yield from (piece.tolist() for piece in micro_batches(batch, self.plan.micro_batch_size))

    def __len__(self) -> int:
        batch_size = self.plan.config.train_batch_size
        full, rest = divmod(len(self.plan.lengths), batch_size)
        pieces = lambda size: -(-size // self.plan.micro_batch_size)  # noqa: E731
        return full * pieces(batch_size) + pieces(rest)


class RecordingTrainer(Trainer):
    """A Trainer that keeps the loss of every micro-batch and measures itself, and that can be given batches."""

    def __init__(self, *arguments: Any, batches: OurBatches | None = None, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.batches = batches
        self.losses: list[float] = []
        self.measures = Measures()
        self.add_callback(Watch(self.measures))

    data_collator: Any

    def get_train_dataloader(self) -> DataLoader:
        plain = self.data_collator
        self.data_collator = self.measures.counting(plain)
        loader = super().get_train_dataloader() if self.batches is None else self.given_batches()
        self.data_collator = plain
        return loader

    def given_batches(self) -> DataLoader:
        return DataLoader(self.train_dataset, batch_sampler=self.batches, collate_fn=self.data_collator)

    def training_step(self, *arguments: Any, **options: Any) -> torch.Tensor:
        loss = super().training_step(*arguments, **options)
        self.losses.append(loss.item())
        return loss


def arguments_of(config: TrainConfig, plan: Plan, best_by: str) -> TrainingArguments:
    """The settings of train.py in Trainer's words."""
    training, optim = config.training, config.optim
    precision = resolve_precision(config.mixed_precision)
    return TrainingArguments(
        output_dir=str(run.run_folder(config)) + "-trainer",
        per_device_train_batch_size=plan.micro_batch_size,
        gradient_accumulation_steps=-(-config.training.train_batch_size // plan.micro_batch_size),
        per_device_eval_batch_size=training.per_device_eval_batch_size or EVAL_SAMPLES,
        num_train_epochs=training.num_train_epochs,
        max_steps=training.max_steps or -1,
        learning_rate=optim.learning_rate,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.adam_beta1,
        adam_beta2=optim.adam_beta2,
        adam_epsilon=optim.adam_epsilon,
        lr_scheduler_type=optim.lr_scheduler_type,
        warmup_steps=count_steps(optim.warmup_steps, plan.total_steps),
        max_grad_norm=optim.max_grad_norm or 0.0,
        label_smoothing_factor=config.objective.label_smoothing_factor,
        train_sampling_strategy=training.train_sampling_strategy,
        use_cpu=not uses_gpu(),  # Trainer takes bf16 on a CPU only when told that it is to train there
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        seed=training.seed,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model=best_by,
        logging_steps=config.tracking.logging_steps,
        report_to="none",
    )


def build_trainer(config: TrainConfig, our_order: bool = False) -> tuple[RecordingTrainer, Data]:
    """A Trainer as the note builds it, on what train.py would train."""
    tokenizer = load_tokenizer(config.model)
    data = load_data(config.data, tokenizer)
    metrics = choose_metrics(config.metrics, config.data, data, config.training.metric_for_best_model)
    seed_everything(config.training.seed)
    model, _ = build_model(config.model, data.label_names, tokenizer, data.problem_type)
    plan = Plan(config.training, data.lengths["train"], metrics.best)
    arguments = arguments_of(config, plan, metrics.best)

    def compute_metrics(prediction: Any) -> dict[str, float]:
        scores: dict[str, float] = {}
        for name in metrics.names:
            logits = prediction.predictions
            made = Predictions(logits, prediction.label_ids, np.zeros(len(logits)), problem_type=data.problem_type)
            scores |= compute_metric(name, made)
        return scores

    trainer = RecordingTrainer(
        model,
        arguments,
        train_dataset=data.tokens["train"],
        eval_dataset=data.tokens["validation"],
        data_collator=build_collator(tokenizer, config.mixed_precision, arguments.device),
        processing_class=tokenizer,
        compute_metrics=compute_metrics,
        batches=OurBatches(plan) if our_order else None,
    )
    return trainer, data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--our_order", action="store_true", help="the batches of train.py, in their order")
    options, flags = parser.parse_known_args()
    trainer, data = build_trainer(parse_cli(TrainConfig, flags), options.our_order)
    trainer.train()
    split = "test" if "test" in data.tokens else "validation"
    prediction = trainer.predict(data.tokens[split], metric_key_prefix=split)
    scores = prediction.metrics or {}
    measures = trainer.measures
    measures.eval_samples, measures.eval_seconds = len(data.tokens[split]), scores[f"{split}_runtime"]
    speed = round(measures.train_samples / measures.train_seconds, 1)
    print(measures.report(steps=trainer.state.global_step, samples_per_second=speed, **scores))


if __name__ == "__main__":
    main()
