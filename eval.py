"""Score a finished run, or any classifier, on one split: scores with intervals, per-class report, predictions file.

accelerate launch eval.py --run outputs/NAME --split test
accelerate launch eval.py --model cardiffnlp/twitter-roberta-base-sentiment-latest --test_file test.csv
"""

import dataclasses

from lib.config.cli import parse_cli
from lib.config.eval import EvalConfig
from lib.data.catalog import data_needs
from lib.hub.fetch import fetch
from lib.hub.needs import model_needs
from lib.runtime.streams import keep_writing

if __name__ == "__main__":  # before the heavy imports: --help, a misspelt flag and a missing model answer at once
    keep_writing()
    CONFIG = parse_cli(EvalConfig)
    fetch(model_needs(CONFIG.source) + data_needs(CONFIG.data), CONFIG.hub)

from lib.runtime.startup import run_script  # imports the heavy libraries, without what is not used

# isort: split
from lib.data.labels.problem_types import model_problem
from lib.data.load import load_data
from lib.data.loader import Batches, build_collator
from lib.data.trained_on import as_in_training
from lib.evaluation.batch_size import choose_size
from lib.evaluation.padding import check_padding
from lib.evaluation.scores import choose_metrics
from lib.evaluation.scoring import evaluate
from lib.evaluation.thresholds import choose_thresholds, stored_thresholds
from lib.model.folder import check_vocabulary
from lib.model.load import label_names, load_classifier, load_tokenizer
from lib.run.finished import eval_folder, find_scored_model
from lib.run.ownership import check_report_folder
from lib.run.results import report_evaluation
from lib.run.tracking import send_scores
from lib.runtime.accelerator import build_accelerator
from lib.runtime.atomic import AGAIN, explaining
from lib.runtime.lock import check_writable, locked_folder
from lib.runtime.processes import finish


def main(config: EvalConfig) -> None:
    """Score one split: the last line on stdout, also saved as results.json, holds the scores."""
    folder = eval_folder(config)
    check_writable(folder, "--output_dir")
    check_report_folder(folder)
    trained = find_scored_model(config)
    accelerator = build_accelerator(trained.device(config.join_timeout))
    tokenizer = load_tokenizer(trained.source)
    model = load_classifier(trained.source, tokenizer, accelerator.mixed_precision, accelerator.device)
    check_vocabulary(trained.source, model, tokenizer)
    with accelerator.main_process_first(), accelerator.local_main_process_first():
        options = as_in_training(config.data, trained.trained_on, tokenizer)
        names, problem = label_names(model), model_problem(model.config)
        data = load_data(options, tokenizer, (config.split,), names, problem, trained.trained_on)
    metrics = choose_metrics(config.metrics, config.data, data, trained=trained.trained_on.metrics)
    stored = stored_thresholds(model.config)
    thresholds = choose_thresholds(config.threshold, data.problem_type, data.label_names, stored)

    model = accelerator.prepare_model(model, evaluation_mode=True)
    collator = build_collator(tokenizer, accelerator.mixed_precision, accelerator.device, data.padded_to)
    batches = check_padding(accelerator, model, Batches(data, collator), tokenizer, config.padding_free)
    split = batches.split(config.split)
    size = choose_size(config.per_device_eval_batch_size, accelerator.device, trained.eval_size)
    scored = evaluate(accelerator, model, split, metrics.names, size, thresholds=thresholds)
    if accelerator.is_main_process:
        with locked_folder(folder, wait=60), explaining(folder, AGAIN):
            report = report_evaluation(accelerator, config, trained, batches.data, metrics, scored)
        print(report, flush=True)
    finish(accelerator, model)
    if accelerator.is_main_process and config.report_to == "auto" and config.run_folder is not None:
        label = eval_folder(dataclasses.replace(config, output_dir=None)).name.removeprefix("eval-")
        send_scores(config.run_folder, label, scored.scores)


if __name__ == "__main__":
    run_script(main, CONFIG)
