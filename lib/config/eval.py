"""Options of eval.py."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from lib.config.cli import flags_from_yaml, last_value
from lib.config.sections import DataConfig, HubConfig, ModelSource, Precision, alias, check_positive
from lib.errors import require


@dataclasses.dataclass(frozen=True)
class EvalModel(ModelSource):
    """Model."""

    model: Annotated[str | None, alias("--model_name_or_path")] = None  # type: ignore[assignment]  # or --run
    """A classifier: folder or Hub id."""


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Score a finished run, or any classifier, on one split.

    The data of a run are known from its folder: `eval.py --run outputs/NAME`. With `--model` name the data as well.
    """

    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    hub: HubConfig = dataclasses.field(default_factory=HubConfig)
    run: str | None = None
    """Folder of a finished run."""
    model: EvalModel = dataclasses.field(default_factory=EvalModel)
    split: str = "test"
    """Split to score: train, validation, test, or another one of the data set."""
    metrics: tuple[str, ...] | None = None
    """Metrics to compute; see train.py --help."""
    per_device_eval_batch_size: int = 64
    """Samples per forward."""
    bootstrap_samples: int = 1000
    """Resamples behind each 95 % interval."""
    seed: int = 42
    """Fixes the bootstrap."""
    output_dir: str | None = None
    """Where the report goes. [default: {run}/eval-{split}, or outputs/eval-{model}-{dataset}-{split}]"""
    mixed_precision: Precision = "auto"
    """`auto`: that of the run, else the launcher's choice, else bf16 where the device is fast at it."""

    def __post_init__(self) -> None:
        require(bool(self.run) != bool(self.model.model), "give either --run FOLDER or --model ID_OR_FOLDER")
        check_positive(self, "per_device_eval_batch_size", "bootstrap_samples")

    @property
    def source(self) -> ModelSource:
        """What is scored: the model named, or the folder of the run."""
        return self.model if self.run is None else ModelSource(self.run)

    @staticmethod
    def implied_flags(arguments: Sequence[str]) -> list[str]:
        """The data settings of the run behind `--run`; only what is not about its data when other data are named.

        Raises UserError when the folder holds no run.
        """
        run = last_value(arguments, "--run")
        if run is None:
            return []
        path = Path(run) / "config.yaml"
        require(path.is_file(), f"--run {run}: no config.yaml there, so it is not the folder of a run")
        shared = {"metrics", "max_length", "window_stride", "preprocessing_num_workers"}
        if not {"--dataset", "--train_file", "--validation_file", "--test_file"} & set(arguments):
            shared |= {field.name for field in dataclasses.fields(DataConfig)} | {"seed"}
        return list(flags_from_yaml(path, frozenset(shared)))
