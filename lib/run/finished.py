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
from lib.model.source import model_name


@dataclasses.dataclass(frozen=True)
class TrainedModel:
    """A trained model, the data settings of its run if it is one, and the precision to compute in."""

    source: ModelSource
    data: DataConfig | None
    precision: str


def find_model(source: ModelSource, precision: str) -> TrainedModel:
    """The model that `--model` names; if it is the folder of a run, the model of that run.

    Raises UserError if the folder does not exist, or the run has no model yet.
    """
    folder = Path(source.model)
    if not (folder / "config.yaml").is_file():
        if is_lost_folder(source.model):
            raise UserError(f"--model {source.model}: no such folder")
        return TrainedModel(source, None, precision)
    data = load_config(TrainConfig, folder / "config.yaml").data
    return TrainedModel(run_model(folder, "--model"), data, run_precision(folder, precision))


def find_scored_model(config: EvalConfig) -> TrainedModel:
    """The model to score: that of `--run`, or `--model`. Raises UserError if the run has no model yet."""
    if config.run is None:
        return TrainedModel(config.model, None, config.mixed_precision)
    folder = Path(config.run)
    return TrainedModel(run_model(folder, "--run"), config.data, run_precision(folder, config.mixed_precision))


def run_model(folder: Path, flag: str) -> ModelSource:
    """The model of a run, named by `flag`. Raises UserError if there is none yet."""
    if not (folder / "model" / "config.json").is_file():
        raise UserError(f"{flag} {folder} has no model folder yet; let train.py reach its first evaluation")
    return ModelSource(str(folder / "model"))


def run_precision(folder: Path, asked: str) -> str:
    """The precision that was asked for; `auto` is that of the run in `folder`."""
    results = folder / "results.json"
    if asked == "auto" and results.is_file():
        return json.loads(results.read_text(encoding="utf-8"))["run/mixed_precision"]
    return asked


def eval_folder(config: EvalConfig) -> Path:
    """The folder of eval.py's report."""
    if config.output_dir:
        return Path(config.output_dir)
    named = f"{dataset_name(config.data)}-{config.split}"
    if config.run is None:
        return Path("outputs") / f"eval-{model_name(config.source.model)}-{named}"
    own = not (config.data.dataset or config.data.test_file or config.data.validation_file)
    if not own:
        own = flatten(config.data) == flatten(load_config(TrainConfig, Path(config.run) / "config.yaml").data)
    return Path(config.run) / f"eval-{config.split if own else named}"
