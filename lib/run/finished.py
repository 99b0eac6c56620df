"""A finished run, or any model, as eval.py and predict.py find it."""

import dataclasses
import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from lib.config.cli import load_config
from lib.config.eval import EvalConfig, is_run
from lib.config.sections import EVAL_SAMPLES, Attention, DataConfig, ModelSource, flatten
from lib.config.train import TrainConfig
from lib.data.catalog import DEFAULT, dataset_name, own_files
from lib.data.trained_on import UNKNOWN, TrainedOn, read_trained_on
from lib.errors import UserError, require
from lib.evaluation.batch_size import BatchSize
from lib.hub.needs import is_lost_folder
from lib.model.source import resolve_model
from lib.runtime.attention import has_attention
from lib.runtime.device_options import DeviceOptions
from lib.runtime.precision import has_precision


@dataclasses.dataclass(frozen=True)
class TrainedModel:
    """A trained model, what it was trained on as far as that is known, and the precision to compute in."""

    source: ModelSource
    trained_on: TrainedOn
    precision: str
    eval_size: BatchSize | None = None
    """What the evaluations of the run computed at once, so that its scores come out again; None where that is not known."""

    def device(self, join_timeout: float) -> DeviceOptions:
        return DeviceOptions(
            self.precision, self.source.attn_implementation, cpu_kernels=False, join_timeout=join_timeout
        )


def find_model(source: ModelSource, precision: str) -> TrainedModel:
    """The model that `--model` names; if it is the folder of a run, the model of that run.

    Raises UserError if the folder does not exist, or the run has no model yet.
    """
    folder = Path(source.model)
    if is_run(source.model):
        return run_model(folder, "--model", precision, source.attn_implementation)
    if is_lost_folder(source.model):
        raise UserError(f"--model {source.model}: no such folder")
    home = folder.resolve().parent
    if folder.resolve().name == "model" and is_run(str(home)):
        precision = run_precision(home, precision)
        attention = run_attention(home, source.attn_implementation, precision)
        source = replace(source, attn_implementation=attention)
        return TrainedModel(source, run_trained_on(home), precision, run_size(home))
    return TrainedModel(source, read_trained_on(Path(resolve_model(source)) / "config.json"), precision)


def find_scored_model(config: EvalConfig) -> TrainedModel:
    """The model to score: that of `--run`, or `--model`.

    Raises UserError if the run has no model yet.
    """
    if config.run is None:
        return find_model(config.model, config.mixed_precision)
    return run_model(Path(config.run), "--run", config.mixed_precision, config.model.attn_implementation)


def run_model(folder: Path, flag: str, precision: str, attention: Attention) -> TrainedModel:
    """The model of a run, named by `flag`. Raises UserError if there is none yet."""
    if not (folder / "model" / "config.json").is_file():
        raise UserError(f"{flag} {folder} has no model folder yet; let train.py reach its first evaluation")
    precision = run_precision(folder, precision)
    attention = run_attention(folder, attention, precision)
    source = ModelSource(str(folder / "model"), attn_implementation=attention)
    return TrainedModel(source, run_trained_on(folder), precision, run_size(folder))


def run_trained_on(folder: Path) -> TrainedOn:
    """What the model of the run in `folder` was trained on."""
    trained_on = read_trained_on(folder / "model" / "config.json")
    if trained_on == UNKNOWN:  # the best model is from before the run was resumed with this version
        trained_on = read_trained_on(folder / "record.json", None)
    if trained_on == UNKNOWN:  # the whole run is: what its options say
        data = load_config(TrainConfig, folder / "config.yaml").data
        labels = data.label_columns or ((data.label_column,) if data.label_column else ())
        trained_on = TrainedOn(None, data.text_columns or (), labels, data.max_length, (), data.pad_to_max_length)
    return trained_on


def run_precision(folder: Path, asked: str) -> str:
    """The precision that was asked for; `auto` is that of the run in `folder`, if this machine has it."""
    if asked != "auto":
        return asked
    precision = read_results(folder).get("run/mixed_precision")
    return precision if precision in ("no", "bf16", "fp16") and has_precision(precision) else asked


def run_size(folder: Path) -> BatchSize | None:
    """What the evaluations of the run in `folder` computed at once; None for a run that is not finished.

    Where it counted no positions, the samples of its --per_device_eval_batch_size, or as many as without the flag.
    """
    results = read_results(folder)
    positions = results.get("run/eval_positions")
    if isinstance(positions, int) and positions > 0:
        return BatchSize(positions, "positions")
    try:
        given = load_config(TrainConfig, folder / "config.yaml").training.per_device_eval_batch_size
    except UserError:  # of another version, or damaged
        given = None
    return BatchSize(given or EVAL_SAMPLES) if given or results else None


def read_results(folder: Path) -> dict[str, Any]:
    """results.json of a run; empty where the run is not finished, or the file is damaged."""
    try:
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return results if isinstance(results, dict) else {}


def run_attention(folder: Path, asked: Attention, precision: str) -> Attention:
    """The implementation of attention that was asked for; `auto` is that of the run in `folder`, if this machine has it."""
    if asked != "auto":
        return asked
    try:
        stored = load_config(TrainConfig, folder / "config.yaml").model.attn_implementation
    except UserError:  # of another version, or damaged
        return asked
    return stored if has_attention(stored, precision) else "auto"


def eval_folder(config: EvalConfig) -> Path:
    """The folder of eval.py's report: another one for each model, each data set and each --threshold.

    Raises UserError for a link in the folder of a run, which may be a stranger's: it could name any file of the user's.
    """
    if config.output_dir:
        return Path(config.output_dir)
    split = f"{config.split}{threshold_label(config.threshold)}"
    named = f"{data_label(config.data, config.split)}-{split}"
    if config.run_folder is None:
        return Path("outputs") / f"eval-{model_label(config.source.model)}-{named}"
    own = own_data(config.data, load_config(TrainConfig, config.run_folder / "config.yaml").data)
    folder = config.run_folder / f"eval-{split if own else named}"
    link = next((path for path in (folder, *folder.glob("*")) if path.is_symlink()), None)
    require(
        link is None,
        f"{link} is a link, and a report there would be written elsewhere; remove it, or give --output_dir",
    )
    return folder


def own_data(data: DataConfig, run: DataConfig) -> bool:
    """Whether the options name the data of a run, read as the run reads them."""
    asked, trained = flatten(data), flatten(run)
    return all(asked[name] == trained[name] for name in asked)


def model_label(model: str) -> str:
    """A model in the name of a folder: its name on the Hub, or the end of its path with digits that tell it from others."""
    path = Path(model)
    return f"{plain('-'.join(path.resolve().parts[-2:]))}-{digits(path)}" if path.is_dir() else plain(model)


def data_label(data: DataConfig, split: str) -> str:
    """Data in the name of a folder: the name of a data set, or that of a file with digits that tell it from others."""
    files = [Path(file) for file in own_files(data).values()]
    if files:
        return f"{plain(Path(own_files(data).get(split, files[0])).stem)}-{digits(*files)}"
    if Path(data.dataset or DEFAULT).exists():
        return f"{plain(dataset_name(data))}-{digits(Path(data.dataset or DEFAULT))}"
    return plain("-".join(filter(None, [data.dataset or DEFAULT, data.dataset_config])))


def threshold_label(given: tuple[str, ...]) -> str:
    """--threshold in the name of a folder: its number, or digits for numbers of single labels; nothing without it."""
    if not given:
        return ""
    if len(given) == 1 and "=" not in given[0]:
        return f"-threshold{float(given[0])}"
    return f"-threshold-{digits(*sorted(given))}"


def plain(name: str) -> str:
    """`name` as the part of a file's name: user--name for a Hub id."""
    return re.sub(r"[^\w.-]+", "_", name.strip("/").replace("/", "--"))[:80]


def digits(*parts: Path | str) -> str:
    """Six digits that differ between paths, or texts."""
    texts = (str(part.resolve()) if isinstance(part, Path) else part for part in parts)
    return hashlib.sha256("\n".join(texts).encode(errors="replace")).hexdigest()[:6]
