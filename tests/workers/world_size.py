"""Train a tiny model without dropout on data of many sizes; save losses, learning rates and weights.

    world_size.py MODEL OUT MICRO_BATCH_SIZE ADAPTER SIZE [SIZE ...]

Run by test_laws.py on one process and, through the launcher, on two.
"""

import sys
from pathlib import Path

import torch
from conftest import sentences, write_csv

from lib.adaptation import adapt
from lib.batching import build_collator
from lib.config import AdapterConfig, DataConfig, ModelConfig
from lib.data import Data, load_data
from lib.freezing import set_train_mode
from lib.modeling import build_model, load_tokenizer
from lib.optim import build_optimizer, build_scheduler, learning_rate
from lib.plan import State, all_windows, build_plan
from lib.processes import finish
from lib.runtime import build_accelerator, seed_everything
from lib.train_config import OptimConfig, TrainingConfig
from lib.training import optimizer_step

# A large epsilon: AdamW divides by the size of the gradient, and would blow rounding errors up where that is zero.
OPTIM = OptimConfig(learning_rate=1e-2, adam_epsilon=1e-2, warmup_steps=1, lr_scheduler_type="cosine")


def shorten(data: Data, size: int) -> Data:
    tokens = data.tokens["train"].select(range(size))
    return Data("", {}, {"train": tokens}, {"train": data.lengths["train"][:size]}, data.label_names, ("text",), [])


def train(accelerator, source: ModelConfig, tokenizer, data: Data, micro_batch_size: int, adapter) -> dict:
    config = TrainingConfig(num_train_epochs=2, train_batch_size=16, per_device_train_batch_size=micro_batch_size)
    seed_everything(0)
    model, weights = build_model(source, data.label_names, tokenizer)
    model = adapt(model, AdapterConfig(adapter=adapter), source, weights.new)
    plan = build_plan(config, len(data.tokens["train"]), accelerator.num_processes)
    optimizer = build_optimizer(model, OPTIM, accelerator.device)
    scheduler = build_scheduler(optimizer, OPTIM, plan.total_steps, "accuracy")
    collator = build_collator(tokenizer, accelerator.mixed_precision, accelerator.device)
    model, optimizer = accelerator.prepare(model, optimizer)
    set_train_mode(model)
    state, losses, norms, rates = State(), [], [], []
    for window in all_windows(plan, config, data, collator, accelerator.process_index):
        rates.append(learning_rate(optimizer))
        loss, norm = optimizer_step(accelerator, model, optimizer, scheduler, window, OPTIM, config.seed, state)
        losses.append(accelerator.reduce(loss, "sum").item() / window.num_samples)
        norms.append(norm.item())
    weights = torch.cat([p.detach().flatten() for p in accelerator.unwrap_model(model).parameters()])
    accelerator.free_memory(model, optimizer)
    return {"losses": losses, "norms": norms, "rates": rates, "samples": state.samples_seen, "weights": weights.clone()}


def main(model_folder: str, out: str, micro_batch_size: str, adapter: str, *sizes: str) -> None:
    accelerator = build_accelerator("no")
    source = ModelConfig(model=model_folder)
    tokenizer = load_tokenizer(source)
    with accelerator.main_process_first():
        files = {role: write_csv(Path(out) / f"{role}.csv", sentences(40)) for role in ("train", "validation")}
        data = load_data(
            DataConfig(train_file=str(files["train"]), validation_file=str(files["validation"])), tokenizer
        )
    results: dict = {"world_size": accelerator.num_processes}
    method = None if adapter == "none" else adapter
    for size in map(int, sizes):
        results[size] = train(accelerator, source, tokenizer, shorten(data, size), int(micro_batch_size), method)
    if accelerator.is_main_process:
        torch.save(results, Path(out) / f"results-{accelerator.num_processes}-{micro_batch_size}.pt")
    finish(accelerator)


if __name__ == "__main__":
    main(*sys.argv[1:])
