"""Options of train.py, from the sections of config.py."""

import dataclasses

from lib.config import (
    AdapterConfig,
    DataConfig,
    HubConfig,
    ModelConfig,
    OptimConfig,
    Precision,
    TrackingConfig,
    TrainingConfig,
    require,
)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Fine-tune a text classifier.

    Options can be collected in a YAML file: `train.py --config recipe.yaml [flags that override it]`.
    """

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    training: TrainingConfig = dataclasses.field(default_factory=TrainingConfig)
    tracking: TrackingConfig = dataclasses.field(default_factory=TrackingConfig)
    adapter: AdapterConfig = dataclasses.field(default_factory=AdapterConfig)
    hub: HubConfig = dataclasses.field(default_factory=HubConfig)
    metrics: tuple[str, ...] | None = None
    """Metrics to compute: accuracy, f1_macro, f1_micro, f1_weighted, f1, precision_*, recall_*, matthews_correlation,
    cohen_kappa, or a module in lib/metrics. [default: those of the data set, else accuracy and f1_macro]"""
    mixed_precision: Precision = "auto"
    """`auto`: the launcher's choice, else bf16 where the device is fast at it. Weights are float32 in any case."""

    def __post_init__(self) -> None:
        require(not (self.adapter.adapter and self.model.freeze), "--adapter freezes the rest; leave --freeze out")
