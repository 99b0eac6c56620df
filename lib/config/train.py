"""Options of train.py: the shared sections, and those of the optimizer, the loss, training and tracking."""

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from lib.config.limits import (
    COUNT,
    FLOAT32_TINY,
    INPUT_PATH,
    NUMBER,
    OUTPUT_NAME,
    OUTPUT_PATH,
    SEED,
    Within,
    check_settings,
    check_steps,
    check_values,
    shorten,
)
from lib.config.sections import AdapterConfig, DataConfig, HubConfig, ModelConfig, Precision, alias
from lib.errors import require
from lib.runtime.device_options import DeviceOptions

TrackerName = Literal["wandb", "swanlab", "tensorboard", "trackio", "none"]
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
    """Optimizer and schedule. Steps are optimizer steps."""

    learning_rate: Annotated[float, alias("--lr"), Within("(0, 1000]")] = 5e-5
    """Peak learning rate of AdamW."""
    head_learning_rate: Annotated[float | None, Within("(0, 1000]")] = None
    """Peak learning rate of the new head, on the same schedule. [default: learning_rate]"""
    layerwise_lr_decay: Annotated[float, Within("(0, 1]")] = 1.0
    """Learning rate of a layer as a factor of that of the layer above it; the top layer trains at learning_rate."""
    weight_decay: Annotated[float, Within("[0, 1000]")] = 0.01
    """Weight decay of matrices; biases and norms are not decayed."""
    adam_beta1: Annotated[float, Within("[0, 1)")] = 0.9
    """Decay rate of the first moment in AdamW."""
    adam_beta2: Annotated[float, Within("[0, 1)")] = 0.999
    """Decay rate of the second moment in AdamW."""
    adam_epsilon: Annotated[float, Within("(0, 1]")] = 1e-8
    """Term added to the denominator in AdamW, for numerical stability."""
    lr_scheduler_type: SchedulerName = "linear"
    """Learning rate schedule after warmup."""
    lr_scheduler_kwargs: tuple[str, ...] = ()
    """Further arguments of the schedule as name=value, such as min_lr=1e-6."""
    warmup_steps: Annotated[float, NUMBER] = 0.06
    """Steps of linear warmup; a value below 1 is a share of all steps."""
    max_grad_norm: Annotated[float | None, Within("(0, 1000000]")] = 1.0
    """Gradients are clipped to this norm. None: no clipping; the norm is still logged."""

    def __post_init__(self) -> None:
        check_values(self)
        check_steps("--warmup_steps", self.warmup_steps)
        check_settings("--lr_scheduler_kwargs", self.lr_scheduler_kwargs)


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """Loss of training. Evaluation always reports the plain loss (cross entropy or squared error), so runs can be compared."""

    loss: Literal["cross_entropy", "focal", "ordinal", "kl"] = "cross_entropy"
    """`focal`: hard samples weigh more. `ordinal`: for ordered classes such as stars; far misses cost more than near ones.
    `kl`: for --soft_labels; the gradients of cross entropy, and 0 where predictions equal the labels."""
    focal_gamma: Annotated[float, Within("[0, 100]")] = 2.0
    """focal: the higher, the less weight for easy samples; 0 is cross entropy."""
    class_weights: tuple[str, ...] = ()
    """`balanced` (rare classes weigh more), or class=weight for some classes, such as negative=2; the others weigh 1."""
    label_smoothing_factor: Annotated[float, Within("[0, 1)")] = 0.0
    """cross_entropy: share of the target probability that is spread evenly over all labels."""
    distill_temperature: Annotated[float, Within("[0.01, 1000]")] = 1.0
    """With --soft_labels: temperature of labels and predictions in the loss, cross_entropy or kl. Above 1, small
    probabilities count for more."""

    def __post_init__(self) -> None:
        check_values(self)
        smoothing = self.label_smoothing_factor
        require(not smoothing or self.loss == "cross_entropy", "--label_smoothing_factor is for --loss cross_entropy")
        untouched = self.focal_gamma == ObjectiveConfig.focal_gamma
        require(untouched or self.loss == "focal", "--focal_gamma is for --loss focal")
        if self.distill_temperature != 1:
            plain = self.loss in ("cross_entropy", "kl") and not smoothing
            require(plain, "--distill_temperature is for --loss cross_entropy or kl, without --label_smoothing_factor")
        for item in self.class_weights if self.class_weights != ("balanced",) else ():
            require(
                is_weight(item.rpartition("=")[2]) and "=" in item,
                f"--class_weights takes `balanced` or class=weight with weights above 0, got {shorten(item)!r}"
                " (a million at most)",
            )


def is_weight(text: str) -> bool:
    """Whether `text` is a number that samples can weigh."""
    try:
        return FLOAT32_TINY <= float(text) <= 1e6
    except ValueError:
        return False


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """Training."""

    num_train_epochs: Annotated[float, alias("--epochs"), Within("(0, 1000000]")] = 3.0
    """Passes over the training data."""
    max_steps: Annotated[int | None, COUNT] = None
    """Number of optimizer steps; overrides num_train_epochs."""
    train_batch_size: Annotated[int, alias("--bs"), COUNT] = 32
    """Samples per optimizer step, over all processes. Part of the experiment: it changes the result."""
    per_device_train_batch_size: Annotated[int | None, COUNT] = None
    """Largest micro-batch of a device. Changes the memory used, never the result. [default: as large as the step needs]"""
    per_device_eval_batch_size: Annotated[int | None, COUNT] = None
    """Samples per forward pass in evaluation. [default: 64 on a CPU; on a GPU 32,768 positions, fewer if memory is short]"""
    train_sampling_strategy: Literal["random", "group_by_length"] = "group_by_length"
    """`group_by_length` makes batches of texts of similar length, which need less padding, and shuffles the batches."""
    eval_steps: Annotated[float | None, Within("(0, 2147483647]")] = None
    """Evaluate every n steps; a value below 1 is a share of all steps. [default: after each epoch]"""
    metric_for_best_model: str | None = None
    """Validation metric, or `loss`, that selects the best model. [default: the first of the metrics]"""
    threshold: Literal["tuned"] | None = None
    """Two classes. `tuned`: the second one is predicted from the probability with the best F1 on validation, not from 0.5."""
    average_checkpoints: Annotated[int, Within("[0, 100]")] = 0
    """Keep the weights of the best n evaluations, and average them at the end of training: the best first, each only if the
    validation metric rises (greedy soup). 0: no averaging."""
    early_stopping_patience: Annotated[int | None, COUNT] = None
    """Stop after n evaluations in a row without a better metric."""
    save_steps: Annotated[int | None, COUNT] = None
    """Save a checkpoint every n steps. [default: after each evaluation]"""
    save_total_limit: Annotated[int, NUMBER] = 2
    """Number of checkpoints to keep; each also holds the best model so far. 0: one, and none once the run is finished."""
    async_save: bool | None = None
    """Write checkpoints in a thread while training goes on, from a copy in main memory of what is trained and of AdamW's
    moments: 12 bytes a trained parameter, up to twice as much beside a GPU, where it is kept. False: training waits.
    [default: True on a GPU, False on a CPU]"""
    resume_from_checkpoint: Annotated[str, INPUT_PATH] = "auto"
    """`auto`: the newest valid checkpoint in the output folder, if there is one; `must`: stop if there is none;
    `never`: delete the checkpoints and start again; or the folder of a checkpoint or of a run."""
    allow_changes: bool = False
    """Resume even if settings that affect the result have changed."""
    max_minutes: Annotated[float | None, Within("(0, 10000000]")] = None
    """Save a checkpoint and stop with exit code 75 this many minutes after the start of the process, or after
    the first start by a launcher that restarts it."""
    pause_at_step: Annotated[int | None, COUNT] = None
    """Save a checkpoint and stop with exit code 75 after this step, its evaluation included. Without it, the run goes on as
    if it had never stopped: the schedule is that of the whole run."""
    join_timeout: Annotated[float, Within("(0, 1000000]")] = 600.0
    """Seconds that the processes of a launch wait for each other at the start; one that downloads is waited for longer."""
    ddp_timeout: Annotated[float, Within("(0, 1000000000]")] = 600.0
    """Seconds without progress in training after which the run stops and names the process that hangs."""
    score_test: bool = True
    """Score the best model on the test split at the end. False: the test split is not read, and validation is scored."""
    dataloader_num_workers: Annotated[int, Within("[0, 512]")] = 0
    """Number of processes that prepare batches. 0: the training process does it itself."""
    no_cache_features: bool = False
    """With --freeze: run the frozen part in every step instead of caching its outputs."""
    feature_cache_gib: Annotated[float, Within("(0, 1000000]")] = 2.0
    """With --freeze: GiB of memory for cached outputs of the frozen part; four times as much on disk."""
    gradient_checkpointing: bool = False
    """Keep only the inputs of the trained layers for the backward pass, and compute the rest again: much less memory for a
    third more time. Results are equal."""
    padding_free: bool = False
    """Run the texts of a batch in one row without padding, in training and evaluation: for lengths that differ much. Results
    are the same up to rounding and dropout masks."""
    compile: bool = False
    """On a GPU: compile the trained layers with torch.compile. For long runs: the first steps and evaluation take a minute or
    more. Refused on a CPU, where it makes no step faster."""
    cuda_graphs: bool = False
    """On a GPU: record the work of a step once for each padded length, and replay it without Python's share of the time.
    Batches are padded to one of a few lengths. Not yet run on a GPU by this project."""
    cpu_kernels: bool = True
    """On a CPU: train with this project's faster dropout, attention and casts. False: with PyTorch's own. Results are the
    same up to rounding and dropout masks."""
    bf16_weights: bool | None = None
    """In bf16: compute with bf16 copies of the weights of linear layers, made once a step, instead of casting each weight in
    every forward. Results are equal; the copies take half the memory of these weights. [default: True on a GPU]"""
    deterministic: bool = True
    """On a GPU: compute by deterministic algorithms, so that equal runs are equal bit by bit. A CPU does anyway. False:
    whatever is fastest."""
    seed: Annotated[int, SEED] = 42
    """Random seed of the new head, the order of samples and dropout."""

    def __post_init__(self) -> None:
        check_values(self)
        check_steps("--eval_steps", self.eval_steps)
        require(
            self.average_checkpoints != 1, "--average_checkpoints 1 averages nothing: give 2 or more, or 0 for none"
        )


@dataclasses.dataclass(frozen=True)
class TrackingConfig:
    """Output and tracking."""

    output_dir: Annotated[str | None, OUTPUT_PATH] = None
    """Output folder of the run. [default: outputs/{run_name}]"""
    run_name: Annotated[str | None, OUTPUT_NAME] = None
    """Name of the run. [default: {model}-{dataset}-(what is not at its default)-lr..-bs..-ep..-s{seed}]"""
    report_to: TrackerName = "wandb"
    """Experiment tracker; W&B and SwanLab work offline if there is no login. metrics.jsonl is always written."""
    project: str | None = None
    """Name of the project in the tracker. [default: WANDB_PROJECT, or SWANLAB_PROJ_NAME for SwanLab, else finetune]"""
    tags: tuple[str, ...] = ()
    """Tags of the run in the tracker."""
    notes: str | None = None
    """Free text stored with the run in the tracker."""
    logging_steps: Annotated[int, COUNT] = 20
    """Log the training loss every n steps."""

    def __post_init__(self) -> None:
        check_values(self)
        name = self.run_name
        plain = name is None or (all(char.isalnum() or char in "._-" for char in name) and name not in (".", ".."))
        require(plain, f"--run_name takes letters, digits and . _ -, got {name!r}")
        require(name is None or len(name) <= 128, f"--run_name takes at most 128 characters, got {len(name or '')}")
        project = self.project
        fits = project is None or (0 < len(project) <= 128 and not set("/\\#?%:") & set(project))
        fits = fits and project not in (".", "..")
        require(
            fits,
            f"--project takes up to 128 characters, none of / \\ # ? % :, and is not . or .., got {shorten(self.project)!r}",
        )
        for tag in self.tags:
            require(0 < len(tag) <= 64, f"--tags takes tags of 1 to 64 characters, got {shorten(tag)!r}")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Fine-tune a text classifier.

    Options can also come from a YAML file: `train.py --config recipe.yaml [flags that override it]`.
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
    """Metrics to compute, or modules in lib/evaluation/metrics. [default: those of the data set or of the problem type]
    Classes: accuracy, f1, f1_macro, f1_micro, f1_weighted, precision_*, recall_*, matthews_correlation, cohen_kappa.
    Regression: pearson, spearman, mse, mae, r2. Multi-label: average_precision, f1_samples, f1_micro, f1_macro."""
    mixed_precision: Precision = "auto"
    """`auto`: the launcher's setting, else bf16 if the device is fast at it, else fp16 on GPUs with tensor cores (V100, T4).
    Weights are always float32."""

    def __post_init__(self) -> None:
        require(not (self.adapter.adapter and self.model.freeze), "--adapter freezes the rest; leave --freeze out")
        if self.data.soft_labels is None:
            flag = "--loss kl" if self.objective.loss == "kl" else "--distill_temperature"
            plain = self.objective.loss != "kl" and self.objective.distill_temperature == 1
            require(plain, f"{flag} is for soft labels; name the columns of probabilities with --soft_labels")
        random = self.adapter.adapter and self.model.from_scratch
        require(not random, "--adapter trains no weights of the model, which --from_scratch makes random; choose one")
        if self.model.load_in:
            flag = f"--load_in {self.model.load_in}"
            require(self.adapter.adapter is not None, f"{flag}: quantized weights do not learn; add --adapter lora")
            require(not self.training.compile, f"{flag}: --compile has no programs for quantized layers; leave one out")
        if self.training.cuda_graphs:
            one = "--cuda_graphs records plain layers; leave out one of it and"
            require(not self.training.compile, f"{one} --compile")
            require(not self.training.gradient_checkpointing, f"{one} --gradient_checkpointing")
            require(not self.model.load_in, f"{one} --load_in")
        recomputed = self.training.gradient_checkpointing
        require(
            not (recomputed and self.adapter.adapter == "prefix"),
            "--gradient_checkpointing: a layer that is computed again does not read the prefix; use --adapter prompt or lora",
        )
        if self.training.padding_free:
            check_padding_free(self)
        if self.model.head_solver:
            check_solved(self)

    @property
    def device(self) -> DeviceOptions:
        training = self.training
        return DeviceOptions(
            self.mixed_precision,
            self.model.attn_implementation,
            training.cpu_kernels,
            training.deterministic,
            training.join_timeout,
            training.cuda_graphs,
        )


def check_padding_free(config: TrainConfig) -> None:
    """Raise UserError for what does not go together with texts in one row."""
    training, adapter = config.training, config.adapter.adapter
    both = "--padding_free and {} do not go together: {}; leave one of them out"
    require(not config.data.pad_to_max_length, both.format("--pad_to_max_length", "one pads, the other does not"))
    require(not training.compile, both.format("--compile", "every row has another length, and a program of its own"))
    require(not training.cuda_graphs, both.format("--cuda_graphs", "rows have any length, and recordings a few"))
    virtual = adapter in ("prefix", "prompt")
    require(
        not virtual, both.format(f"--adapter {adapter}", "its virtual tokens stand before a row, not before each text")
    )
    cached = config.model.freeze is not None and not training.no_cache_features
    require(
        not cached,
        "--padding_free: with --freeze the outputs of the frozen part are cached with their padding; add --no_cache_features, "
        "or leave --padding_free out",
    )


IN_TRAINING = (
    *("num_train_epochs", "max_steps", "train_batch_size", "per_device_train_batch_size", "train_sampling_strategy"),
    *("eval_steps", "early_stopping_patience", "save_steps", "pause_at_step", "dataloader_num_workers"),
    *("no_cache_features", "compile", "cuda_graphs", "cpu_kernels", "bf16_weights", "gradient_checkpointing"),
    *("average_checkpoints", "padding_free"),
)
"""Options of training by steps."""


def check_solved(config: TrainConfig) -> None:
    """Raise UserError for an option that has no effect with --head_solver, which makes one step over all samples."""
    sections: list[tuple[Any, Sequence[str]]] = [
        (config.optim, [field.name for field in dataclasses.fields(OptimConfig)]),
        (config.objective, ["loss", "focal_gamma", "label_smoothing_factor", "distill_temperature"]),
        (config.training, IN_TRAINING),
        (config.tracking, ["logging_steps"]),
    ]
    for section, names in sections:
        for name in names:
            require(
                getattr(section, name) == getattr(type(section), name),
                f"--{name} has no effect with --head_solver, which solves for the head in one step; leave it out",
            )
