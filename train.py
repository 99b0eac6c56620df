"""Fine-tune a text classifier: on one GPU, several, or a CPU.

    accelerate launch train.py                                         a small model and real data, no Hub needed
    accelerate launch train.py --model roberta-base --dataset sst5
    CUDA_VISIBLE_DEVICES=2,3 accelerate launch train.py --train_file train.csv --validation_file dev.csv

`main` is the run, `train_step` one optimizer step, `forward_backward` one micro-batch: change how a model learns there.
"""

from typing import Any

from lib.config.cli import parse_cli
from lib.config.train import TrainConfig
from lib.data.catalog import ROLES, data_needs
from lib.hub.fetch import fetch
from lib.hub.needs import model_needs
from lib.runtime.signals import watch_signals
from lib.runtime.streams import keep_writing

if __name__ == "__main__":  # before the heavy imports: --help, a misspelt flag and a missing model answer at once
    keep_writing()
    CONFIG = parse_cli(TrainConfig)
    fetch(model_needs(CONFIG.model) + data_needs(CONFIG.data), CONFIG.hub)
    watch_signals()

from lib.runtime.startup import run_script  # imports the heavy libraries, without what is not used

# isort: split
import torch

from lib.data.load import load_data
from lib.data.loader import Batches, MicroBatch, StepBatch, build_collator
from lib.evaluation.padding import check_padding
from lib.evaluation.scores import choose_metrics
from lib.evaluation.thresholds import check_tuned
from lib.model.build import build_classifier, check_trainable
from lib.model.forward import compute_logits
from lib.model.load import load_tokenizer
from lib.run.record import run_folder
from lib.run.results import final_splits
from lib.run.run import Run
from lib.runtime.accelerator import build_accelerator
from lib.runtime.processes import agree_to_stop
from lib.runtime.seeds import seed_everything
from lib.training.frozen.features import cache_features
from lib.training.frozen.solver import solve_head
from lib.training.learner import Learner, build_learner
from lib.training.objective import build_objective
from lib.training.plan import build_plan
from lib.training.step import attempts, clip_gradients, try_longest_batch


def main(config: TrainConfig) -> dict[str, Any]:
    """Run one experiment; returns its results, which are also the last line on stdout, and in results.json."""
    accelerator = build_accelerator(config.device, config.tracking.report_to, run_folder(config), shards=True)
    run = Run(config, accelerator)
    check_trainable(config)

    # Data: the first process tokenizes, then that of each other machine unless it shares the cache; the others read it.
    tokenizer = load_tokenizer(config.model, config.adapter.virtual_tokens)
    with accelerator.main_process_first(), accelerator.local_main_process_first():
        data = load_data(config.data, tokenizer, ROLES if config.training.score_test else ROLES[:2])
    if run.is_finished(data):
        return run.results
    metrics = choose_metrics(config.metrics, config.data, data, config.training.metric_for_best_model)
    check_tuned(config.training.threshold, data)

    # Model, objective, optimizer, schedule. Nothing is trained yet; `start` resumes if there is a checkpoint.
    seed_everything(config.training.seed)
    model, weights = build_classifier(config, data, tokenizer, accelerator.device, accelerator.mixed_precision)
    plan = build_plan(config, data, metrics, accelerator)
    objective = build_objective(config.objective, data)
    learner = build_learner(accelerator, model, objective, plan, config.optim)
    collator = build_collator(tokenizer, accelerator.mixed_precision, accelerator.device, data.padded_to)
    batches = Batches(data, collator, objective.weights)
    batches = check_padding(accelerator, learner.model, batches, tokenizer, config.training.padding_free)
    run.start(learner, batches, metrics, weights)
    batches = cache_features(learner, batches, config.model, config.training)

    # Training. Signals and the time limit wait until all processes can save together.
    state = learner.state
    with run.guard(learner):
        try_longest_batch(learner, batches.longest(plan.micro_batch_size), forward_backward)
        for batch in plan.steps(batches, state):
            if batch is not None:  # None: a resumed run was stopped between a step and what follows it
                if config.model.head_solver:
                    solve_head(learner, batches, metrics)
                else:
                    train_step(learner, batch, config)
                run.progress.step(state)
            agree_to_stop(accelerator)
            if plan.is_log_step(state):
                values = run.progress.show(learner)
                if plan.is_eval_step(state):
                    scores, _ = learner.evaluate(batches.split("validation"), metrics, tune_thresholds=True)
                    values |= {f"eval/{name}": value for name, value in scores.items()}
                    if learner.update_best(scores):
                        run.save_best(learner, tokenizer)
                run.log_values(state, values)
                learner.meter.reset()
            state.pending = False
            if plan.is_save_step(state):
                run.save_checkpoint()

    # With --average_checkpoints: means of the weights of the best evaluations, kept as long as they get better.
    for steps in run.averages(learner):
        scores, _ = learner.evaluate(batches.split("validation"), metrics, tune_thresholds=True)
        if learner.update_average(steps, scores):
            run.save_best(learner, tokenizer)

    # Final test of the best model, and the report.
    run.load_best(learner)
    scored = {split: learner.evaluate(batches.split(split), metrics) for split in final_splits(data)}
    return run.finish(learner, scored, data)


def train_step(learner: Learner, batch: StepBatch, config: TrainConfig) -> None:
    """One optimizer step over all processes: the same step on any number of them, in micro-batches of any size."""
    accelerator, optimizer, state = learner.accelerator, learner.optimizer, learner.state
    for attempt in attempts(learner, batch):  # again in smaller micro-batches where memory was too short
        with attempt as micro_batches:
            for index, micro_batch in enumerate(micro_batches):
                seed_everything(config.training.seed, state.step, index, accelerator.process_index)  # dropout
                attempt.loss += forward_backward(learner, micro_batch, batch.weight)
    # Gradients are now the sums over all processes, exchanged while the last micro-batch went backward.
    grad_norm = clip_gradients(accelerator, optimizer, config.optim.max_grad_norm)
    optimizer.step()  # leaves the weights as they are if a gradient is not finite
    learner.step_schedule(grad_norm)
    optimizer.zero_grad()
    learner.count_step(batch, attempt.loss, grad_norm)


def forward_backward(learner: Learner, micro_batch: MicroBatch, step_weight: float) -> torch.Tensor:
    """Add the gradients of a micro-batch to the parameters'; returns its summed loss.

    The loss is divided by the weight of the whole step, over all processes: never a mean of means.
    """
    logits = compute_logits(learner.model, micro_batch.inputs)
    losses = learner.objective.loss(logits, micro_batch.labels)
    loss = (losses * micro_batch.weights).sum()
    learner.accelerator.backward(loss / step_weight)
    return loss.detach()


if __name__ == "__main__":
    run_script(main, CONFIG)
