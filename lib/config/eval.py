"""Options of eval.py."""

import dataclasses
from typing import Annotated

from lib.config.sections import DataConfig, HubConfig, Precision, Source, alias, check_positive, check_trust, require


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Score a finished run, or any classifier, on one split.

    The data of a run are known from its folder: `eval.py --run outputs/NAME`. With `--model` name the data as well.
    """

    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    hub: HubConfig = dataclasses.field(default_factory=HubConfig)
    run: str | None = None
    """Folder of a finished run."""
    model: Annotated[str | None, alias("--model_name_or_path")] = None
    """A classifier: folder or Hub id."""
    model_revision: str | None = None
    """Branch, tag or commit of a Hub model."""
    source: Source = "hub"
    """Where a model that is no folder comes from; see train.py --help."""
    allow_pickle: bool = False
    """Load pickled weights (.bin) where there are no safetensors; a pickle can run programs."""
    trust_remote_code: bool = False
    """Run the program that a model brings; a Hub model needs --model_revision COMMIT with it."""
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
        require(bool(self.run) != bool(self.model), "give either --run FOLDER or --model ID_OR_FOLDER")
        check_positive(self, "per_device_eval_batch_size", "bootstrap_samples")
        check_trust(self)
