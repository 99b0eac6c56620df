"""predict.py inside the test's process: from the flags that a user types to the predictions as they would be written."""

from pathlib import Path
from typing import Any

from lib.config.cli import parse_cli
from lib.config.predict import PredictConfig
from lib.inference.inputs import Example, read_examples
from lib.inference.load import Task, load_task
from lib.inference.outputs import to_record
from lib.inference.stream import Prediction, predict_stream
from lib.inference.tasks import build_predict
from lib.run.finished import find_model
from lib.runtime.accelerator import build_accelerator
from lib.runtime.device_options import DeviceOptions


def settings(*flags: object) -> PredictConfig:
    return parse_cli(PredictConfig, [*map(str, flags), "--mixed_precision", "no"])


def load(*flags: object) -> Task:
    config = settings(*flags)
    return load_task(config, find_model(config.model, "no"), build_accelerator(DeviceOptions("no")).device)


def predictions(*flags: object) -> list[tuple[Example, Prediction]]:
    task, accelerator = load(*flags), build_accelerator(DeviceOptions("no"))
    examples = read_examples(task.config.inputs, task.text_columns, task.trained_on)
    predict = build_predict(task)
    return list(predict_stream(accelerator, examples, predict, task.group, task.config.seed))


def answers(*flags: object) -> list[dict[str, Any]]:
    """The records that predict.py writes."""
    return [to_record(example, prediction) for example, prediction in predictions(*flags)]


def lines_file(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    return path
