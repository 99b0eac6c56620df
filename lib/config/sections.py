"""Options that scripts share: name, type, default, help line and check."""

import ast
import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from lib.errors import UserError, require

CLASSIFICATION = "single_label_classification"

REGRESSION = "regression"

MULTI_LABEL = "multi_label_classification"


Precision = Literal["auto", "no", "fp16", "bf16"]
ModelHub = Literal["hub", "modelscope"]
ProblemType = Literal["auto", "single_label_classification", "regression", "multi_label_classification"]


def alias(*names: str) -> Any:
    return tyro.conf.arg(aliases=names)


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """Model."""

    model: Annotated[str, alias("--model_name_or_path")] = "minilm"
    """`minilm` (comes with the installation), a folder, or a Hub id such as roberta-base."""
    model_revision: str | None = None
    """Branch, tag or commit of a Hub model."""
    source: ModelHub = "hub"
    """Where a model that is no folder comes from: the Hub or its mirror, or ModelScope (package modelscope)."""
    allow_pickle: bool = False
    """Load pickled weights (.bin) where there are no safetensors; a pickle can run programs."""
    trust_remote_code: bool = False
    """Run the program that a model brings; a Hub model needs --model_revision COMMIT with it."""

    def __post_init__(self) -> None:
        pinned = len(self.model_revision or "") == 40 or Path(self.model or "").is_dir()
        require(
            not self.trust_remote_code or pinned,
            "--trust_remote_code needs --model_revision COMMIT (40 digits): a branch can name another program tomorrow",
        )


@dataclasses.dataclass(frozen=True)
class ModelConfig(ModelSource):
    """Model."""

    config_overrides: tuple[str, ...] = ()
    """Changes to the model's configuration as name=value, such as num_hidden_layers=4 hidden_dropout_prob=0.2."""
    from_scratch: bool = False
    """Build the model from its configuration alone, with random weights; the tokenizer is kept."""
    freeze: str | None = None
    """Part that is not trained: `backbone`, `embeddings`, or a number n: the embeddings and the n lowest layers."""

    def __post_init__(self) -> None:
        super().__post_init__()
        known = self.freeze in (None, "backbone", "embeddings") or str(self.freeze).isdecimal()
        require(known, f"--freeze takes backbone, embeddings or a number of layers, got {self.freeze!r}")
        require(
            not (self.from_scratch and self.freeze), "--from_scratch: --freeze would keep random weights; leave it out"
        )
        for item in self.config_overrides:
            require("=" in item, f"--config_overrides takes name=value, got {item!r}")


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """Adapters: only new weights and the head are trained and saved."""

    adapter: Literal["bottleneck", "lora", "dora", "ia3", "prefix", "prompt"] | None = None
    """Method; all but bottleneck need the package peft."""
    adapter_placement: Literal["pfeiffer", "houlsby"] = "pfeiffer"
    """bottleneck: behind each feed-forward part and its norm, or behind attention as well and before the norms."""
    adapter_reduction_factor: float = 16
    """bottleneck: the model's width divided by that of the adapter."""
    adapter_non_linearity: Literal["relu", "gelu", "swish", "tanh"] | None = None
    """bottleneck: activation between its two layers. [default: relu for pfeiffer, swish for houlsby]"""
    lora_rank: int = 8
    """lora, dora: rank of the change of a matrix."""
    lora_alpha: float = 16
    """lora, dora: the change is scaled by lora_alpha / lora_rank."""
    adapter_target_modules: tuple[str, ...] = ()
    """lora, dora, ia3: names of the modules that are changed. [default: as usual for the architecture]"""
    num_virtual_tokens: int = 20
    """prefix, prompt: trained positions before the text."""

    def __post_init__(self) -> None:
        check_positive(self, "adapter_reduction_factor", "lora_rank", "lora_alpha", "num_virtual_tokens")
        for methods, names in (
            (("bottleneck",), ("adapter_placement", "adapter_reduction_factor", "adapter_non_linearity")),
            (("lora", "dora"), ("lora_rank", "lora_alpha")),
            (("lora", "dora", "ia3"), ("adapter_target_modules",)),
            (("prefix", "prompt"), ("num_virtual_tokens",)),
        ):
            for name in names if self.adapter not in methods else ():
                untouched = getattr(self, name) == getattr(AdapterConfig, name)
                require(untouched, f"--{name} is for --adapter {' or '.join(methods)}, not for {self.adapter}")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Data."""

    dataset: str | None = None
    """An alias (movie_reviews, sst5, sst2, mrpc, ...), a Hub id `user/name`, or a folder. [default: movie_reviews]"""
    dataset_config: str | None = None
    """Configuration of a Hub data set; for movie_reviews: `five`, `binary` or `rating`."""
    revision: str | None = None
    """Branch, tag or commit of a Hub data set."""
    train_file: str | None = None
    """Own training data: csv, tsv, json, jsonl, parquet, or a folder saved by `datasets`."""
    validation_file: str | None = None
    """Own validation data; a stratified tenth of the training data when absent."""
    test_file: str | None = None
    """Own test data."""
    text_columns: tuple[str, ...] | None = None
    """One text column, or two for pairs; guessed when obvious."""
    label_column: str | None = None
    """Label column; guessed when obvious."""
    label_columns: tuple[str, ...] | None = None
    """Several columns of 0 and 1, each a label, of which a text may have several."""
    problem_type: ProblemType = "auto"
    """What is learnt. `auto`: real numbers are regression, lists or --label_columns several labels, all else classes."""
    max_length: int = 128
    """Longest input in tokens; longer texts are cut and their share is reported, unless --window_stride is given."""
    window_stride: int | None = None
    """Read longer texts in windows of max_length of which neighbours share n tokens; a text's logits are the mean of its
    windows', in training as well."""
    pad_to_max_length: bool = False
    """Pad every batch to --max_length instead of its longest text, for devices that need fixed shapes."""
    max_train_samples: int | None = None
    """Use only n training samples, a fixed random choice, for a quick try."""
    max_eval_samples: int | None = None
    """Use only n samples of every other split, a fixed random choice, for a quick try."""
    preprocessing_num_workers: int | None = None
    """Processes that tokenise; one by default, the tokenizer itself already uses threads."""

    def __post_init__(self) -> None:
        files = [name for name in ("train_file", "validation_file", "test_file") if getattr(self, name)]
        if files and self.dataset:
            raise UserError(f"--dataset and --{files[0]} exclude each other; give one of them")
        for name in ("dataset_config", "revision") if files else ():
            require(getattr(self, name) is None, f"--{name} is for --dataset, not for --{files[0]}; leave it out")
        columns = self.text_columns
        require(
            columns is None or len(columns) in (1, 2),
            f"--text_columns takes one or two columns, got {len(columns or ())}: {' '.join(columns or ())}; "
            "for example --text_columns premise hypothesis",
        )
        several = self.label_columns
        require(not (self.label_column and several), "--label_column and --label_columns exclude each other")
        require(several is None or len(set(several)) == len(several) > 1, "--label_columns takes two or more columns")
        stride = self.window_stride
        require(stride is None or stride >= 0, f"--window_stride must not be negative, got {stride}")
        check_positive(self, "max_length", "max_train_samples", "max_eval_samples", "preprocessing_num_workers")


@dataclasses.dataclass(frozen=True)
class HubConfig:
    """Hub and mirrors."""

    hub_endpoint: str | None = None
    """Address of the Hub or a mirror, such as https://hf-mirror.com. [default: HF_ENDPOINT, else the Hub]"""
    hub_timeout: float = 5.0
    """Seconds within which the Hub must answer; then the run goes on from the cache, or stops and says what is missing."""
    verify_hashes: bool = False
    """Compare all files with the hashes the Hub names before they are used; those of a mirror with the Hub's own."""
    send_token_to_mirror: bool = False
    """Send your Hub token also to a mirror."""

    def __post_init__(self) -> None:
        check_positive(self, "hub_timeout")


def check_positive(config: Any, *names: str) -> None:
    """Raise UserError unless each named field is None or above 0."""
    for name in names:
        value = getattr(config, name)
        require(value is None or value > 0, f"--{name} must be above 0, got {value}")


def literal(text: str) -> Any:
    """The value that a text spells in Python or YAML, such as 0.2, true or [1, 2]; else the text itself."""
    try:
        return ast.literal_eval({"true": "True", "false": "False", "null": "None"}.get(text, text))
    except (ValueError, SyntaxError):
        return text


def is_plain_name(name: str) -> bool:
    return name not in ("", ".", "..") and all(char.isalnum() or char in "._-" for char in name)


def flatten(config: Any) -> dict[str, Any]:
    """All options of a configuration by their flag name, sections dissolved."""
    flat: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        flat.update(flatten(value) if dataclasses.is_dataclass(value) else {field.name: value})
    return flat


def words(problem_type: str) -> str:
    """How a problem is called in messages."""
    return problem_type.replace("_", "-").replace("-classification", " classification")
