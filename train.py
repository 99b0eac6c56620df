"""Fine-tune a text classifier: on one GPU, several, or a CPU.

    accelerate launch train.py                                         a small model and real data, no Hub needed
    accelerate launch train.py --model roberta-base --dataset sst5
    CUDA_VISIBLE_DEVICES=2,3 accelerate launch train.py --train_file train.csv --validation_file dev.csv

The flow: settings -> data -> model -> steps -> best model -> final test. What each part does is in lib/.
"""

import time

from lib.cli import parse_cli
from lib.config import TrainConfig
from lib.hub_fetch import fetch

if __name__ == "__main__":  # before the heavy imports: --help, a misspelt flag and a missing model answer at once
    CONFIG = parse_cli(TrainConfig)
    fetch(CONFIG)

from lib.batching import build_collator
from lib.checkpoint import publish_model, restore_model
from lib.data import load_data
from lib.evaluation import check_metrics, evaluate_split
from lib.modeling import build_model, load_tokenizer, set_train_mode
from lib.optim import advance_on_metric, build_optimizer, build_scheduler, learning_rate
from lib.progress import Interval, Progress
from lib.report import write_report
from lib.run import build_results, describe_scores, introduce, open_folder, run_folder, run_settings, write_results
from lib.runtime import build_accelerator, finish, run_script, seed_everything
from lib.sources import default_metrics
from lib.tracking import RunLog, check_tracker
from lib.training import State, all_windows, best_metric, build_plan, optimizer_step, should_stop, update_best


def main(config: TrainConfig) -> None:
    """Run one experiment: its last line on stdout, also saved as results.json, holds the results."""
    training, tracking = config.training, config.tracking
    check_tracker(tracking.report_to)
    folder, eval_batch_size = run_folder(config), training.per_device_eval_batch_size
    accelerator = build_accelerator(config.mixed_precision, tracking.report_to, folder)

    # Data: the first process tokenises, the others read its cache.
    tokenizer = load_tokenizer(config.model)
    with accelerator.main_process_first():
        data = load_data(config.data, tokenizer)
    metrics = config.metrics or default_metrics(config.data)
    check_metrics(metrics, len(data.label_names))
    best_by = best_metric(training.metric_for_best_model, metrics)

    # Model, optimizer, schedule. The schedule is not prepared: it advances once per optimizer step, not per process.
    seed_everything(training.seed)
    model, new_weights = build_model(config.model, data.label_names, tokenizer)
    plan = build_plan(training, len(data.tokens["train"]), accelerator.num_processes)
    optimizer = build_optimizer(model, config.optim, accelerator.device)
    scheduler = build_scheduler(optimizer, config.optim, plan.total_steps, best_by)
    collator = build_collator(tokenizer, accelerator.mixed_precision, accelerator.device)

    if accelerator.is_main_process:
        open_folder(config, folder)
        print(introduce(accelerator, config, data, model, plan, collator, new_weights), flush=True)
    run_log = RunLog(accelerator, folder, tracking)
    run_log.start(run_settings(accelerator, config, data, model), metrics)
    model, optimizer = accelerator.prepare(model, optimizer)

    # Training.
    state, eval_scores = State(), {}
    progress, interval = Progress(accelerator, plan.total_steps), Interval(accelerator)
    started = time.perf_counter()
    set_train_mode(model)
    for window in all_windows(plan, training, data, collator, accelerator.process_index):
        rate = learning_rate(optimizer)
        loss_sum, grad_norm = optimizer_step(
            accelerator, model, optimizer, scheduler, window, config.optim, training.seed, state
        )
        interval.add(loss_sum, grad_norm, window)
        progress.step()

        values: dict[str, float] = {}
        if plan.is_eval_step(state.step) or state.step % tracking.logging_steps == 0:
            values = interval.read() | {"train/learning_rate": rate, "train/epoch": state.step / plan.steps_per_epoch}
            progress.show(state.step, values)
        if plan.is_eval_step(state.step):
            scores, _ = evaluate_split(accelerator, model, data, "validation", collator, eval_batch_size, metrics)
            progress.write(describe_scores(f"step {state.step}, validation:", scores))
            values |= {f"eval/{name}": value for name, value in scores.items()}
            advance_on_metric(scheduler, config.optim.lr_scheduler_type, scores[best_by])
            if update_best(state, scores, best_by):
                eval_scores = scores
                publish_model(accelerator, model, tokenizer, folder / "model")
            interval.reset()
        if values:
            run_log.log(state.step, state.samples_seen, values)
        if should_stop(state, training.early_stopping_patience):
            progress.write(f"stopped early: no better {best_by} in {state.evals_since_best} evaluations")
            break
    progress.close()
    train_seconds = time.perf_counter() - started

    # Final test of the best model, and the report.
    restore_model(accelerator, model, folder / "model", state)
    split = "test" if "test" in data.tokens else "validation"
    scores, predictions = evaluate_split(accelerator, model, data, split, collator, eval_batch_size, metrics)
    results = build_results(accelerator, state, data, model, train_seconds, {"validation": eval_scores, split: scores})
    if accelerator.is_main_process:
        print(write_report(folder / f"eval-{split}", split, scores, metrics, predictions, data), flush=True)
    run_log.finish(results, predictions, data, split)
    if accelerator.is_main_process:
        print(write_results(folder, results), flush=True)
    finish(accelerator, model, optimizer)


if __name__ == "__main__":
    run_script(main, CONFIG)
