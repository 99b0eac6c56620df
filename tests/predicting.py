"""predict.py inside the test's process: the flags a user types, and the answers as they would be written."""

from pathlib import Path
from typing import Any

from lib.config.cli import parse_cli
from lib.config.predict import PredictConfig
from lib.inference.inputs import read_rows
from lib.inference.outputs import flat_row
from lib.inference.stream import answer_rows
from lib.inference.tasks import build_predict, load_model, text_columns
from lib.run.finished import find_model
from lib.runtime.accelerator import build_accelerator


def settings(*flags: object) -> PredictConfig:
    return parse_cli(PredictConfig, [*map(str, flags), "--mixed_precision", "no"])


def raw_answers(*flags: object) -> list[tuple[Any, dict[str, Any]]]:
    """Rows and their answers, as they come out of the task."""
    config = settings(*flags)
    accelerator, trained = build_accelerator("no"), find_model(config.model, config.mixed_precision)
    model, tokenizer = load_model(config, trained, accelerator.device)
    predict = build_predict(config, model, tokenizer, accelerator.device)
    rows = read_rows(config.inputs, text_columns(config, trained))
    return list(answer_rows(accelerator, rows, predict, config.per_device_eval_batch_size, config.seed))


def answers(*flags: object) -> list[dict[str, Any]]:
    return [flat_row(row, answer) for row, answer in raw_answers(*flags)]


def lines_file(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    return path
