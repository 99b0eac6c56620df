"""Options of train.py: the shared sections of config.py, and optimizer, training and tracking."""

import dataclasses
import math
from typing import Annotated, Literal

from lib.config.sections import (
    AdapterConfig,
    DataConfig,
    HubConfig,
    ModelConfig,
    Precision,
    alias,
    check_positive,
    is_plain_name,
)
from lib.errors import require

TrackerName = Literal["wandb", "tensorboard", "trackio", "none"]
SchedulerName = Literal[
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "reduce_lr_on_plateau",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "warmup_stable_decay",
    "greedy",
]


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """Optimizer and schedule, counted in optimizer steps."""

    learning_rate: Annotated[float, alias("--lr")] = 5e-5
    """Peak learning rate of AdamW."""
    head_learning_rate: float | None = None
    """Peak learning rate of the head, which is new; it follows the same schedule. [default: learning_rate]"""
    layerwise_lr_decay: float = 1.0
    """Each layer learns at this share of the rate of the layer above it, the embeddings below the lowest; the top layer
    learns at learning_rate."""
    weight_decay: float = 0.01
    """Decay of matrices; biases and norms are not decayed."""
    adam_beta1: float = 0.9
    """Decay rate of the first moment."""
    adam_beta2: float = 0.999
    """Decay rate of the second moment."""
    adam_epsilon: float = 1e-8
    """Term added to the denominator."""
    lr_scheduler_type: SchedulerName = "linear"
    """Shape of the learning rate after warm-up."""
    lr_scheduler_kwargs: tuple[str, ...] = ()
    """Further settings of the schedule, as name=value, such as min_lr=1e-6."""
    warmup_steps: float = 0.06
    """Steps of linear warm-up; below 1 it is a share of all steps."""
    max_grad_norm: float | None = 1.0
    """Gradients are clipped to this norm; None: logged but not clipped."""

    def __post_init__(self) -> None:
        require(self.learning_rate > 0, f"--learning_rate must be above 0, got {self.learning_rate}")
        require(self.warmup_steps >= 0, f"--warmup_steps must not be negative, got {self.warmup_steps}")
        decay = self.layerwise_lr_decay
        require(0 < decay <= 1, f"--layerwise_lr_decay must lie in (0, 1], got {decay}")
        check_positive(self, "max_grad_norm", "head_learning_rate")
        for item in self.lr_scheduler_kwargs:
            require("=" in item, f"--lr_scheduler_kwargs takes name=value, got {item!r}")


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """Loss. Evaluation always reports plain cross entropy, so that runs can be compared."""

    loss: Literal["cross_entropy", "focal", "ordinal"] = "cross_entropy"
    """`focal` leaves more to the hard samples; `ordinal` is for graded labels, numbered from one end to the other, and
    makes a far miss dearer than a near one."""
    focal_gamma: float = 2.0
    """focal: how little easy samples count; 0 is cross entropy."""
    class_weights: tuple[str, ...] = ()
    """`balanced`: every class counts alike, however rare; or class=weight for some, such as negative=2 neutral=5."""
    label_smoothing_factor: float = 0.0
    """cross_entropy: share of the target spread over all labels."""

    def __post_init__(self) -> None:
        smoothing = self.label_smoothing_factor
        require(0 <= smoothing < 1, f"--label_smoothing_factor must lie in [0, 1), got {smoothing}")
        require(not smoothing or self.loss == "cross_entropy", "--label_smoothing_factor is for --loss cross_entropy")
        require(0 <= self.focal_gamma < math.inf, f"--focal_gamma must not be negative, got {self.focal_gamma}")
        untouched = self.focal_gamma == ObjectiveConfig.focal_gamma
        require(untouched or self.loss == "focal", "--focal_gamma is for --loss focal")
        for item in self.class_weights if self.class_weights != ("balanced",) else ():
            require(
                is_positive(item.rpartition("=")[2]) and "=" in item,
                f"--class_weights takes `balanced` or class=weight with weights above 0, got {item!r}",
            )


def is_positive(text: str) -> bool:
    """Whether `text` is a finite number above 0."""
    try:
        return 0 < float(text) < math.inf
    except ValueError:
        return False


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """Training."""

    num_train_epochs: Annotated[float, alias("--epochs")] = 3.0
    """Passes over the training data."""
    max_steps: int | None = None
    """Optimizer steps; overrides num_train_epochs."""
    train_batch_size: Annotated[int, alias("--bs")] = 32
    """Samples per optimizer step over all processes: part of the experiment."""
    per_device_train_batch_size: int | None = None
    """Largest micro-batch a device holds: memory only, never changes the result. [default: what the step needs]"""
    per_device_eval_batch_size: int = 64
    """Samples per forward in evaluation."""
    train_sampling_strategy: Literal["random", "group_by_length"] = "group_by_length"
    """`group_by_length` puts texts of like length together and shuffles the finished batches."""
    eval_steps: int | None = None
    """Evaluate every n steps; each epoch when absent."""
    metric_for_best_model: str | None = None
    """Validation metric that chooses the model kept, or `loss`. [default: the first of the metrics]"""
    early_stopping_patience: int | None = None
    """Stop after n evaluations without a better metric."""
    save_steps: int | None = None
    """Save a checkpoint every n steps; after each evaluation when absent."""
    save_total_limit: int = 2
    """Checkpoints kept; each holds the best model so far as well."""
    resume_from_checkpoint: str = "auto"
    """`auto`: from the newest valid checkpoint of the output folder, if any; `must`: stop if there is none; `never`: start
    anew and remove them; or the folder of a checkpoint or of a run."""
    allow_changes: bool = False
    """Resume although settings changed that change the result."""
    max_minutes: float | None = None
    """Save and stop with exit code 75 after this time, counted from the start of the process."""
    ddp_timeout: float = 600.0
    """Seconds without progress in training after which the run ends and names the process that hangs."""
    dataloader_num_workers: int = 0
    """Processes that prepare batches; 0: the training process does it."""
    no_cache_features: bool = False
    """With --freeze, run the frozen part in every step instead of keeping what it gives."""
    feature_cache_gib: float = 2.0
    """With --freeze, keep at most so much of what the frozen part gives in memory; four times as much on disk."""
    compile: bool = False
    """torch.compile the trained layers: for long runs, as the first steps and evaluation then take a minute or more."""
    cpu_kernels: bool = True
    """On a CPU, train with this project's faster dropout, attention and casts; False: with PyTorch's own. Results are the
    same but for rounding and dropout masks."""
    seed: int = 42
    """Fixes the new head, the order of samples and dropout."""

    def __post_init__(self) -> None:
        require(self.num_train_epochs > 0, f"--num_train_epochs must be above 0, got {self.num_train_epochs}")
        require(self.seed >= 0, f"--seed must not be negative, got {self.seed}")
        require(self.dataloader_num_workers >= 0, "--dataloader_num_workers must not be negative")
        check_positive(self, "max_steps", "train_batch_size", "per_device_train_batch_size", "eval_steps")
        check_positive(self, "per_device_eval_batch_size", "early_stopping_patience", "save_steps", "save_total_limit")
        check_positive(self, "max_minutes", "ddp_timeout", "feature_cache_gib")


@dataclasses.dataclass(frozen=True)
class TrackingConfig:
    """Output and tracking."""

    output_dir: str | None = None
    """Folder of the run. [default: outputs/{run_name}]"""
    run_name: str | None = None
    """Name of the run. [default: {model}-{dataset}-lr..-bs..-s{seed}]"""
    report_to: TrackerName = "wandb"
    """Tracker; W&B goes offline when there is no login. metrics.jsonl is written in any case."""
    project: str = "finetune"
    """Project of the tracker."""
    tags: tuple[str, ...] = ()
    """Tags of the tracker's run."""
    notes: str | None = None
    """Free text kept with the tracker's run."""
    logging_steps: int = 20
    """Log the training loss every n steps."""

    def __post_init__(self) -> None:
        check_positive(self, "logging_steps")
        name = self.run_name
        require(name is None or is_plain_name(name), f"--run_name takes letters, digits and . _ -, got {name!r}")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Fine-tune a text classifier.

    Options can be collected in a YAML file: `train.py --config recipe.yaml [flags that override it]`.
    """

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    objective: ObjectiveConfig = dataclasses.field(default_factory=ObjectiveConfig)
    training: TrainingConfig = dataclasses.field(default_factory=TrainingConfig)
    tracking: TrackingConfig = dataclasses.field(default_factory=TrackingConfig)
    adapter: AdapterConfig = dataclasses.field(default_factory=AdapterConfig)
    hub: HubConfig = dataclasses.field(default_factory=HubConfig)
    metrics: tuple[str, ...] | None = None
    """Metrics to compute: accuracy, f1_macro, f1_micro, f1_weighted, f1, precision_*, recall_*, matthews_correlation,
    cohen_kappa; of numbers pearson, spearman, mse, mae, r2; of several labels average_precision, f1_samples; or a module in
    lib/evaluation/metrics. [default: those of the data set, else the usual ones of what is learnt]"""
    mixed_precision: Precision = "auto"
    """`auto`: the launcher's choice, else bf16 where the device is fast at it. Weights are float32 in any case."""

    def __post_init__(self) -> None:
        require(not (self.adapter.adapter and self.model.freeze), "--adapter freezes the rest; leave --freeze out")
        scratch = self.adapter.adapter and self.model.from_scratch
        require(
            not scratch, "--adapter keeps the model below it as it is, which --from_scratch leaves random; choose one"
        )
