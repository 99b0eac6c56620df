"""Fine-tune a text classifier: on one GPU, several, or a CPU.

    accelerate launch train.py                                         a small model and real data, no Hub needed
    accelerate launch train.py --model roberta-base --dataset sst5
    CUDA_VISIBLE_DEVICES=2,3 accelerate launch train.py --train_file train.csv --validation_file dev.csv
The flow: settings -> data -> model -> steps -> best model -> final test. What each part does is in lib/.
"""

import functools

from lib.config.cli import parse_cli
from lib.config.train import TrainConfig
from lib.data.catalog import data_needs
from lib.hub.fetch import fetch
from lib.hub.needs import model_needs
from lib.runtime.signals import watch_signals

if __name__ == "__main__":  # before the heavy imports: --help, a misspelt flag and a missing model answer at once
    CONFIG = parse_cli(TrainConfig)
    fetch(model_needs(CONFIG.model) + data_needs(CONFIG.data), CONFIG.hub)
    watch_signals()

import lib.runtime.startup  # noqa: F401 - before what imports transformers
from lib.data.load import load_data
from lib.data.loader import build_collator
from lib.evaluation.scores import choose_metrics
from lib.evaluation.scoring import evaluate_split
from lib.model.adapters.adapt import adapt
from lib.model.compilation import compile_layers
from lib.model.layers import set_train_mode
from lib.model.load import build_model, load_tokenizer
from lib.run import record as run
from lib.run.best_model import publish_model, restore_model, update_best
from lib.run.checkpoint import Checkpointer
from lib.run.introduction import introduce
from lib.run.progress import Progress
from lib.run.results import build_results, describe_scores, end_run, final_splits
from lib.run.resume import open_run
from lib.run.tracking import RunLog, check_tracker
from lib.runtime.accelerator import build_accelerator
from lib.runtime.processes import agree_to_stop, finish
from lib.runtime.seeds import seed_everything
from lib.runtime.startup import run_script
from lib.training.frozen.features import cache_features
from lib.training.meter import Interval, explain_not_finite
from lib.training.objective import build_objective
from lib.training.optimizer import advance_on_metric, build_optimizer, build_scheduler
from lib.training.plan import all_windows, build_plan
from lib.training.state import State
from lib.training.step import optimizer_step, try_longest_batch


def main(config: TrainConfig) -> None:
    """Run one experiment: its last line on stdout, also saved as results.json, holds the results."""
    training, tracking, folder = config.training, config.tracking, run.run_folder(config)
    check_tracker(tracking.report_to)
    accelerator = build_accelerator(config.mixed_precision, tracking.report_to, folder)

    # Data: the first process tokenises, the others read its cache.
    tokenizer = load_tokenizer(config.model)
    with accelerator.main_process_first():
        data = load_data(config.data, tokenizer)
    metrics = choose_metrics(config.metrics, config.data, data, training.metric_for_best_model)

    # Model, optimizer, schedule. The schedule is not prepared: it advances once per optimizer step, not per process.
    seed_everything(training.seed)
    model, weights = build_model(config.model, data.label_names, tokenizer, data.problem_type)
    model = compile_layers(adapt(model, config.adapter, config.model, weights.new), training.compile, accelerator)
    plan = build_plan(training, len(data.tokens["train"]), accelerator.num_processes)
    objective = build_objective(config.objective, data)
    optimizer = build_optimizer(model, config.optim, accelerator.device)
    scheduler = build_scheduler(optimizer, config.optim, plan.total_steps, metrics.best)
    collator = build_collator(tokenizer, accelerator.mixed_precision, accelerator.device, data.padded_to)

    # The folder of the run, and the checkpoint in it to go on from.
    settings = run.run_settings(accelerator, config, data, model, collator)
    checkpoint = open_run(accelerator, config, folder, settings)
    introduce(accelerator, config, data, plan, settings, weights, objective.notes)
    model, optimizer = accelerator.prepare(model, optimizer)
    state = State(eval_batch_size=training.per_device_eval_batch_size)
    interval = Interval(accelerator, lambda step, rate: explain_not_finite(step, rate, plan, config, data))
    checkpointer = Checkpointer(accelerator, folder, training, settings, model, optimizer, scheduler, state, interval)
    run_id = checkpointer.load(checkpoint)
    inputs, collate = cache_features(accelerator, model, config, data, collator)
    evaluate = functools.partial(evaluate_split, accelerator, model, inputs, collator=collate, metrics=metrics.names)
    run_log = RunLog(accelerator, folder, tracking, state.last_logged, run_id)
    run_log.start(settings, metrics.names)

    # Training. Signals and the time limit wait until all processes can save together.
    progress = Progress(accelerator, plan.total_steps, state)
    windows = all_windows(plan, training, inputs, collate, accelerator.process_index, state.step, objective.weights)
    one_step = functools.partial(optimizer_step, accelerator, model, optimizer, scheduler, objective.loss)
    set_train_mode(model)
    with checkpointer.guarding(run_log):
        try_longest_batch(accelerator, model, optimizer, plan, inputs, collate, objective.loss, state)
        while not plan.is_finished(state):
            if not state.pending:  # else the run was stopped between a step and what follows it
                window = next(windows)
                loss_sum, grad_norm = one_step(window, config.optim, training.seed, state)
                interval.add(loss_sum, grad_norm, window, state.step, state.learning_rate)
                progress.step(state)
            agree_to_stop(accelerator)
            if plan.is_eval_step(state.step) or state.step % tracking.logging_steps == 0:
                values = interval.read() | plan.position(state)
                progress.show(state.step, values)
                if plan.is_eval_step(state.step):
                    scores, predictions = evaluate("validation", batch_size=state.eval_batch_size, tune=True)
                    state.eval_batch_size = predictions.batch_size
                    progress.write(describe_scores(f"step {state.step}, validation:", scores))
                    values |= {f"eval/{name}": value for name, value in scores.items()}
                    advance_on_metric(scheduler, config.optim.lr_scheduler_type, scores[metrics.best])
                    if update_best(state, scores, metrics.best):
                        publish_model(accelerator, model, tokenizer, folder / "model")
                run_log.log(state.step, state.samples_seen, values)
                interval.reset()
            state.pending = False
            if plan.is_save_step(state):
                checkpointer.save(run_log.run_id)
    progress.close(state.step, metrics.best)

    # Final test of the best model, and the report.
    restore_model(accelerator, model, folder / "model", state)
    scored = {split: evaluate(split, batch_size=state.eval_batch_size) for split in final_splits(data)}
    results = build_results(accelerator, config, state, settings, scored)
    run_log.finish(results, scored, data)
    end_run(accelerator, folder, scored, metrics.names, data, settings, results)
    finish(accelerator, model, optimizer)


if __name__ == "__main__":
    run_script(main, CONFIG)
