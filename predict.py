"""Use a model on new text: labels, embeddings, entities, answers, fillings, summaries, translations.

python predict.py "A film that earns its tears." --model outputs/NAME
accelerate launch predict.py --input reviews.csv --model outputs/NAME --output labels.jsonl
python predict.py --task feature-extraction --input reviews.txt --output vectors.npy
"""

import collections
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from lib.config.cli import parse_cli
from lib.config.predict import PredictConfig
from lib.errors import printable
from lib.hub.fetch import fetch
from lib.hub.needs import is_lost_folder, model_needs
from lib.runtime.streams import keep_writing

if __name__ == "__main__":  # before the heavy imports: --help, a misspelt flag and a missing model answer at once
    keep_writing(only_prints=True)
    CONFIG = parse_cli(PredictConfig)
    fetch([] if is_lost_folder(CONFIG.model.model) else model_needs(CONFIG.model), CONFIG.hub)

import lib.runtime.startup  # noqa: F401 - before what imports transformers
from lib.inference.explain_tokens import explain_tokens
from lib.inference.exports import describe_export
from lib.inference.inputs import Example, count_rows, read_examples
from lib.inference.load import Task, load_task, load_task_tokenizer
from lib.inference.merged_export import export_merged
from lib.inference.onnx_export import export_onnx
from lib.inference.outputs import write_predictions
from lib.inference.stream import Prediction, predict_stream
from lib.inference.tasks import build_predict, count_truncation
from lib.model.frozen_weights import KEY as LOAD_IN
from lib.run.finished import find_model
from lib.runtime.accelerator import build_accelerator
from lib.runtime.lock import check_writable
from lib.runtime.precision import cast_weights
from lib.runtime.processes import finish
from lib.runtime.startup import run_script


def main(config: PredictConfig) -> None:
    """Predict once for every row of the input, in its order; messages go to stderr."""
    if config.output:
        check_writable(Path(config.output), "--output")
    trained = find_model(config.model, config.mixed_precision)
    if config.explain_tokens:
        print(explain_tokens(load_task_tokenizer(config, trained), config.explain_tokens))
        return
    accelerator = build_accelerator(trained.device(config.join_timeout))
    task = load_task(config, trained, accelerator.device, accelerator.mixed_precision)
    if folder := config.export_onnx or config.merge_adapter:
        if accelerator.is_main_process:
            export = export_onnx if config.export_onnx else export_merged
            load_in = getattr(task.model.config, LOAD_IN, None)
            difference = export(task.model, task.tokenizer, Path(folder))
            print(describe_export(folder, difference, load_in))
        finish(accelerator, task.model)
        return

    examples = read_examples(config.inputs, task.text_columns, task.trained_on)
    predictions = predict_stream(accelerator, examples, build_predict(task), task.group, config.seed)
    with cast_weights(task.model, accelerator.mixed_precision):
        if accelerator.is_main_process:
            write(task, predictions)
        else:
            collections.deque(predictions, maxlen=0)  # computes this process's share
    finish(accelerator, task.model)


def write(task: Task, predictions: Iterator[tuple[Example, Prediction]]) -> None:
    """Write the predictions as they come, then report their number, the time and how many texts were truncated."""
    config, truncation, started = task.config, count_truncation(task), time.perf_counter()
    total = count_rows(config.inputs) if sys.stderr.isatty() else None
    count = write_predictions(config.output, truncation.watch(predictions), total)
    if config.output:
        seconds = time.perf_counter() - started
        print(f"{count:,} rows in {seconds:.1f} s, written to {printable(config.output)}", file=sys.stderr)
    if truncation.truncated:
        print(truncation, file=sys.stderr)


if __name__ == "__main__":
    run_script(main, CONFIG)
