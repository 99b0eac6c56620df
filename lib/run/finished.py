"""A finished run, or any model, as eval.py and predict.py find it."""

import dataclasses
import json
from pathlib import Path

from lib.config.cli import load_config
from lib.config.eval import EvalConfig
from lib.config.sections import DataConfig, ModelSource, flatten
from lib.config.train import TrainConfig
from lib.data.catalog import dataset_name
from lib.errors import UserError
from lib.hub.needs import is_lost_folder
from lib.model.load import model_name


@dataclasses.dataclass(frozen=True)
class TrainedModel:
    """A model to use: `data` are the data settings of the run that made it, `precision` the one to work in."""

    source: ModelSource
    data: DataConfig | None
    precision: str


def find_model(source: ModelSource, precision: str) -> TrainedModel:
    """The model that --model names: that of a run when it is the folder of one.

    Raises UserError when the folder is not there or its run kept no model.
    """
    folder = Path(source.model)
    if not (folder / "config.yaml").is_file():
        if is_lost_folder(source.model):
            raise UserError(f"--model {source.model}: no such folder")
        return TrainedModel(source, None, precision)
    data = load_config(TrainConfig, folder / "config.yaml").data
    return TrainedModel(run_model(folder, "--model"), data, run_precision(folder, precision))


def find_scored_model(config: EvalConfig) -> TrainedModel:
    """The model to score: that of the run, or the one named. Raises UserError when the run kept none."""
    if config.run is None:
        return TrainedModel(config.model, None, config.mixed_precision)
    folder = Path(config.run)
    return TrainedModel(run_model(folder, "--run"), config.data, run_precision(folder, config.mixed_precision))


def run_model(folder: Path, flag: str) -> ModelSource:
    """The model of a run, named by `flag`. Raises UserError when the run kept none."""
    if not (folder / "model" / "config.json").is_file():
        raise UserError(f"{flag} {folder} has no model folder yet; let train.py reach its first evaluation")
    return ModelSource(str(folder / "model"))


def run_precision(folder: Path, asked: str) -> str:
    """The precision asked for, or that in which the run in `folder` was trained."""
    results = folder / "results.json"
    if asked == "auto" and results.is_file():
        return json.loads(results.read_text(encoding="utf-8"))["run/mixed_precision"]
    return asked


def eval_folder(config: EvalConfig) -> Path:
    """Where the report of a split goes."""
    if config.output_dir:
        return Path(config.output_dir)
    named = f"{dataset_name(config.data)}-{config.split}"
    if config.run is None:
        return Path("outputs") / f"eval-{model_name(config.source.model)}-{named}"
    trained_on = load_config(TrainConfig, Path(config.run) / "config.yaml").data
    other = config.data.dataset or config.data.test_file or config.data.validation_file
    own = not other or flatten(config.data) == flatten(trained_on)
    return Path(config.run) / f"eval-{config.split if own else named}"
