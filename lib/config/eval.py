"""Options of eval.py."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

from lib.config.cli import Given, read_yaml
from lib.config.limits import COUNT, INPUT_PATH, OUTPUT_NAME, OUTPUT_PATH, SEED, Within, check_thresholds, check_values
from lib.config.sections import DataConfig, HubConfig, ModelSource, Precision, alias
from lib.errors import printable, require


@dataclasses.dataclass(frozen=True)
class EvalModel(ModelSource):
    """Model."""

    model: Annotated[str | None, alias("--model_name_or_path"), INPUT_PATH] = None  # type: ignore[assignment]  # or --run
    """Classifier to score: a folder or a Hub id."""


@dataclasses.dataclass(frozen=True)
class EvalDataConfig(DataConfig):
    """Data."""

    max_length: Annotated[int | None, COUNT] = None  # type: ignore[assignment]
    """Maximum input length in tokens; longer texts are truncated and counted, or read in windows. [default: that of the
    model's training, else the longest that the model takes]"""


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Score a finished run, or any classifier, on one split.

    `eval.py --run outputs/NAME` scores a run on its own data. With `--model`, name the data as well.
    """

    data: EvalDataConfig = dataclasses.field(default_factory=EvalDataConfig)
    hub: HubConfig = dataclasses.field(default_factory=HubConfig)
    run: Annotated[str | None, INPUT_PATH] = None
    """Folder of the finished run to score."""
    model: EvalModel = dataclasses.field(default_factory=EvalModel)
    split: Annotated[str, OUTPUT_NAME] = "test"
    """Split to score: train, validation, test, or another one of the data set."""
    metrics: tuple[str, ...] | None = None
    """Metrics to compute; see train.py --help."""
    threshold: tuple[str, ...] = ()
    """Least probability at which a label, or the second of two classes, is predicted: a number, or label=number for some.
    The report has a folder of its own. [default: those stored with the model, else 0.5]"""
    per_device_eval_batch_size: Annotated[int | None, COUNT] = None
    """Samples per forward pass. [default: 64 on a CPU; on a GPU the positions of the run's evaluations, else 32,768]"""
    padding_free: bool = False
    """Run the texts of a batch in one row without padding: for lengths that differ much. Scores are the same up to rounding."""
    bootstrap_samples: Annotated[int, Within("[1, 1000000]")] = 1000
    """Bootstrap resamples behind each 95 % confidence interval."""
    seed: Annotated[int, SEED] = 42
    """Random seed of the bootstrap."""
    output_dir: Annotated[str | None, OUTPUT_PATH] = None
    """Folder of the report. [default: {run}/eval-{split}, or outputs/eval-{model}-{dataset}-{split}; with
    --threshold, followed by -threshold and the number]"""
    report_to: Literal["auto", "none"] = "auto"
    """`auto`: the scores of a run are added to its own run in its tracker, if it has one."""
    mixed_precision: Precision = "auto"
    """`auto`: the precision of the run, else the launcher's setting, else what train.py takes on this device."""
    join_timeout: Annotated[float, Within("(0, 1000000]")] = 600.0
    """Seconds that the processes of a launch wait for each other at the start; one that downloads is waited for longer."""

    def __post_init__(self) -> None:
        check_values(self)
        check_thresholds(self.threshold)
        fixed = self.padding_free and self.data.pad_to_max_length
        require(not fixed, "--padding_free and --pad_to_max_length do not go together; leave one of them out")
        require((self.run is None) != (self.model.model is None), "give either --run FOLDER or --model ID_OR_FOLDER")

    @property
    def source(self) -> ModelSource:
        """The model to score: that of --model, or the folder of the run."""
        return self.model if self.run is None else ModelSource(self.run)

    @property
    def run_folder(self) -> Path | None:
        """The folder of the run that --run, or --model, names; None where --model names something else."""
        folder = self.run or str(self.model.model)
        return Path(folder) if self.run or is_run(folder) else None

    @staticmethod
    def implied(values: dict[str, Any]) -> list[Given]:
        """Options of the run in `--run`: its data and metrics, so that it is scored as it was trained.

        The folder may be a stranger's: no other option of eval.py is taken from it, such as where the report is written,
        which server is asked, who gets the token, and whether code in a repository or in pickled weights runs. But it names
        the tracker, the project and the run there that get the scores, unless `--report_to none` is given. If `values`, the
        options that were given, name other data, only options that are not about the data are taken; the columns of the
        training are kept with the model. Raises UserError if the folder holds no run.
        """
        for name in ("run", "model"):
            INPUT_PATH.check(f"--{name}", values.get(name) or "-")
        model = values.get("model")
        run = values.get("run") or (model if model and is_run(model) else None)
        if run is None:
            return []
        path = Path(run) / "config.yaml"
        require(path.is_file(), f"--run {printable(run)}: no config.yaml there, so it is not the folder of a run")
        shared = {"metrics", "encoding", "max_length", "window_stride", "preprocessing_num_workers"}
        if not NAMES_DATA & set(values):
            shared |= {field.name for field in dataclasses.fields(DataConfig)} | {"seed"}
        for one, other in (("label_column", "label_columns"), ("label_columns", "label_column")):
            shared -= {other, "soft_labels"} if one in values else set()
        return [given for given in read_yaml(str(path), "--run") if given.flag.removeprefix("--") in shared]


NAMES_DATA = {"dataset", "train_file", "validation_file", "test_file"}
"""Options that name other data than those of the run."""


def is_run(folder: str) -> bool:
    """Whether `folder` is that of a run, whose model is in model/."""
    return (Path(folder) / "config.yaml").is_file() and not (Path(folder) / "config.json").is_file()
