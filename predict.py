"""Use a model on new text: labels, embeddings, entities, answers, fillings, summaries, translations.

python predict.py "A film that earns its tears." --model outputs/NAME
accelerate launch predict.py --input reviews.csv --model outputs/NAME --output labels.jsonl
python predict.py --task feature-extraction --input reviews.txt --output vectors.npy
"""

import collections
import sys
import time
from pathlib import Path

from lib.config.cli import parse_cli
from lib.config.predict import PredictConfig
from lib.hub.fetch import fetch
from lib.hub.needs import is_lost_folder, model_needs

if __name__ == "__main__":  # before the heavy imports: --help, a misspelt flag and a missing model answer at once
    CONFIG = parse_cli(PredictConfig)
    fetch([] if is_lost_folder(CONFIG.model.model) else model_needs(CONFIG.model), CONFIG.hub)

import lib.runtime.startup  # noqa: F401 - before what imports transformers
from lib.inference.explain_tokens import explain_tokens
from lib.inference.inputs import count_rows, read_rows
from lib.inference.onnx_export import export_onnx
from lib.inference.outputs import write_answers
from lib.inference.stream import answer_rows
from lib.inference.tasks import build_predict, count_cut, load_model, text_columns
from lib.model.load import load_tokenizer
from lib.run.finished import find_model
from lib.runtime.accelerator import build_accelerator
from lib.runtime.precision import cast_weights
from lib.runtime.processes import finish
from lib.runtime.startup import run_script


def main(config: PredictConfig) -> None:
    """Answer every row of the input once, in its order; what is said about the work goes to stderr."""
    trained = find_model(config.model, config.mixed_precision)
    if config.explain_tokens:
        print(explain_tokens(load_tokenizer(trained.source), config.explain_tokens))
        return
    accelerator = build_accelerator(trained.precision)
    model, tokenizer = load_model(config, trained, accelerator.device)
    if config.export_onnx:
        if accelerator.is_main_process:
            difference = export_onnx(model, tokenizer, Path(config.export_onnx))
            print(f"written to {config.export_onnx}; largest difference from PyTorch: {difference:.1e}")
        finish(accelerator, model)
        return

    predict = build_predict(config, model, tokenizer, accelerator.device)
    rows = read_rows(config.inputs, text_columns(config, trained))
    answers = answer_rows(accelerator, rows, predict, config.per_device_eval_batch_size, config.seed)
    with cast_weights(model, accelerator.mixed_precision):
        if accelerator.is_main_process:
            started = time.perf_counter()
            cut = count_cut(config, model, tokenizer)
            total = count_rows(config.inputs) if sys.stderr.isatty() else None
            count = write_answers(config.output, cut.watch(answers), total)
            seconds = time.perf_counter() - started
            if config.output:
                print(f"{count:,} rows in {seconds:.1f} s, written to {config.output}", file=sys.stderr)
            if cut.cut:
                print(cut, file=sys.stderr)
        else:
            collections.deque(answers, maxlen=0)
    finish(accelerator, model)


if __name__ == "__main__":
    run_script(main, CONFIG)
