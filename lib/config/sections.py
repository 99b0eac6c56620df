"""Options that several scripts share: name, type, default, help line and check."""

import ast
import codecs
import dataclasses
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from lib.config.limits import (
    COUNT,
    INPUT_NAME,
    INPUT_PATH,
    NUMBER,
    WORKERS,
    Within,
    check_settings,
    check_values,
    shorten,
)
from lib.errors import require

CLASSIFICATION = "single_label_classification"
REGRESSION = "regression"
MULTI_LABEL = "multi_label_classification"
"""Problem types, as `problem_type` in the configuration of a transformers model."""

ProblemType = Literal["auto", "single_label_classification", "regression", "multi_label_classification"]
Precision = Literal["auto", "no", "fp16", "bf16"]
Attention = Literal["auto", "sdpa", "eager", "flash_attention_2", "flash_attention_3"]
ModelHub = Literal["hub", "modelscope"]


EVAL_SAMPLES = 64
"""Samples per forward pass in evaluation and prediction where no number is given, on a CPU."""

FILE_FORMATS = ("csv", "tsv", "json", "jsonl", "parquet", "txt")
"""Files that are read, by their endings. Training does not read txt, which has no labels."""
PACKED = (".gz", ".bz2", ".xz", ".zip")


def named_format(path: str) -> str | None:
    """The format that the ending of a name stands for, before .gz and the like; None where there is none."""
    name = Path(path).name.lower()
    name = next((name.removesuffix(ending) for ending in PACKED if name.endswith(ending)), name)
    ending = name.rpartition(".")[2] if "." in name else ""
    return "jsonl" if ending == "ndjson" else ending if ending in FILE_FORMATS else None


def check_encoding(name: str | None) -> None:
    """Raise UserError for a name that Python does not know, and for a codec that is no encoding of text."""
    try:
        known = name is None or "a,b\n".encode(name).decode(name) == "a,b\n"
        known = known and (
            name is None
            or codecs.lookup(name).name.replace("-", "_")
            not in ("idna", "punycode", "unicode_escape", "raw_unicode_escape")
        )
    except (LookupError, UnicodeError, ValueError, TypeError):
        known = False
    require(known, f"--encoding {name!r} is not known; examples are utf-8, gb18030, big5, shift_jis, cp1252, utf-16-le")


def words(problem_type: str) -> str:
    """The name of a problem type in messages, such as multi-label classification."""
    return problem_type.replace("_", "-").replace("-classification", " classification")


def alias(*names: str) -> Any:
    return tyro.conf.arg(aliases=names)


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """Model."""

    model: Annotated[str, alias("--model_name_or_path"), INPUT_PATH] = "minilm"
    """`minilm` (installed with this project), a folder, or a Hub id such as roberta-base."""
    model_revision: Annotated[str | None, INPUT_NAME] = None
    """Branch, tag or commit of the model on the Hub."""
    source: ModelHub = "hub"
    """Site that a model is downloaded from: the Hub or its mirror, or ModelScope (needs the package modelscope)."""
    allow_pickle: bool = False
    """Allow pickled weights (.bin) if there are no safetensors. Loading a pickle can run arbitrary code."""
    trust_remote_code: bool = False
    """Run the Python code in the model's repository. A Hub model also needs --model_revision COMMIT."""
    attn_implementation: Attention = "auto"
    """What computes attention: PyTorch (sdpa), plain products (eager), or the package flash-attn on a GPU. `auto`: sdpa where
    the architecture has it, else eager; for a trained run what it was trained with, where this machine has it."""

    def __post_init__(self) -> None:
        check_values(self)
        pinned = re.fullmatch("[0-9a-f]{40}", self.model_revision or "") or Path(self.model or "").is_dir()
        require(
            not self.trust_remote_code or bool(pinned),
            "--trust_remote_code needs --model_revision COMMIT (40 digits): the code on a branch can change",
        )


@dataclasses.dataclass(frozen=True)
class ModelConfig(ModelSource):
    """Model."""

    config_overrides: tuple[str, ...] = ()
    """Changes to the model's config as name=value, such as num_hidden_layers=4 hidden_dropout_prob=0.2."""
    from_scratch: bool = False
    """Start from random weights instead of the pretrained ones; config and tokenizer are kept."""
    freeze: str | None = None
    """What not to train: `backbone` (all but the head), `embeddings`, or a number n (embeddings and lowest n layers)."""
    load_in: Literal["4bit", "8bit"] | None = None
    """With --adapter: hold the frozen weights of the linear layers in 4 bits (nf4) or 8 (int8), a seventh or a quarter of the
    memory; needs the package bitsandbytes. Head and adapter stay float32."""
    head_solver: Literal["lbfgs"] | None = None
    """With --freeze backbone: solve for the last layer instead of training it, with scikit-learn; no learning rate, no epochs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        solvable = self.head_solver is None or self.freeze == "backbone"
        require(solvable, "--head_solver needs --freeze backbone: it solves for the last layer over a frozen model")
        known = self.freeze in (None, "backbone", "embeddings") or str(self.freeze).isdecimal()
        require(known, f"--freeze takes backbone, embeddings or a number of layers, got {self.freeze!r}")
        require(
            not (self.from_scratch and self.freeze), "--from_scratch: --freeze would keep random weights; leave it out"
        )
        check_settings("--config_overrides", self.config_overrides)
        for name, _, text in (item.partition("=") for item in self.config_overrides if "dropout" in item):
            value = literal(text)
            inside = not isinstance(value, int | float) or 0 <= value <= 1
            require(inside, f"--config_overrides {name}={text}: a dropout must lie in [0, 1]")


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """Adapters: train and save only the new weights and the head."""

    adapter: Literal["bottleneck", "lora", "dora", "ia3", "prefix", "prompt"] | None = None
    """Adapter method; all but bottleneck need the package peft."""
    adapter_placement: Literal["pfeiffer", "houlsby"] = "pfeiffer"
    """bottleneck: pfeiffer: after feed-forward and its norm; houlsby: after attention and feed-forward, before the norms."""
    adapter_reduction_factor: Annotated[float, Within("[0.01, 1000000]")] = 16
    """bottleneck: hidden size of the model divided by that of the adapter."""
    adapter_non_linearity: Literal["relu", "gelu", "swish", "tanh"] | None = None
    """bottleneck: activation function of the adapter. [default: relu for pfeiffer, swish for houlsby]"""
    lora_rank: Annotated[int, Within("[1, 4096]")] = 8
    """lora, dora: rank of the weight update."""
    lora_alpha: Annotated[float, Within("(0, 1000000]")] = 16
    """lora, dora: the weight update is scaled by lora_alpha / lora_rank."""
    adapter_target_modules: tuple[str, ...] = ()
    """lora, dora, ia3: names of the modules to adapt; lora, dora also `all-linear`: every linear layer below the head.
    [default: the queries and values of attention, or what peft has for the architecture]"""
    num_virtual_tokens: Annotated[int, Within("[1, 100000]")] = 20
    """prefix, prompt: number of trained virtual tokens before the text."""

    def __post_init__(self) -> None:
        check_values(self)
        for methods, names in (
            (("bottleneck",), ("adapter_placement", "adapter_reduction_factor", "adapter_non_linearity")),
            (("lora", "dora"), ("lora_rank", "lora_alpha")),
            (("lora", "dora", "ia3"), ("adapter_target_modules",)),
            (("prefix", "prompt"), ("num_virtual_tokens",)),
        ):
            for name in names if self.adapter not in methods else ():
                untouched = getattr(self, name) == getattr(AdapterConfig, name)
                require(
                    untouched,
                    f"--{name} is for --adapter {' or '.join(methods)}, not for {self.adapter or 'a run without it'}",
                )
        if "all-linear" in self.adapter_target_modules:
            alone = len(self.adapter_target_modules) == 1 and self.adapter in ("lora", "dora")
            require(alone, "--adapter_target_modules all-linear stands alone, and is for --adapter lora or dora")

    @property
    def virtual_tokens(self) -> int:
        """How many positions of the model are not for text."""
        return self.num_virtual_tokens if self.adapter in ("prefix", "prompt") else 0


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Data."""

    dataset: Annotated[str | None, INPUT_PATH] = None
    """A short name (movie_reviews, sst5, sst2, mrpc, ...), a Hub id `user/name`, or a folder. [default: movie_reviews]"""
    dataset_config: Annotated[str | None, INPUT_NAME] = None
    """Configuration of a Hub data set; for movie_reviews: `five`, `binary` or `rating`."""
    revision: Annotated[str | None, INPUT_NAME] = None
    """Branch, tag or commit of a Hub data set."""
    train_file: Annotated[str | None, INPUT_PATH] = None
    """Your own training data: csv, tsv, json, jsonl, parquet, or a folder saved by `datasets`."""
    validation_file: Annotated[str | None, INPUT_PATH] = None
    """Your own validation data. [default: a stratified tenth of the training data]"""
    test_file: Annotated[str | None, INPUT_PATH] = None
    """Your own test data."""
    encoding: str | None = None
    """Encoding of your files, such as gb18030. [default: by the byte order mark, else UTF-8]"""
    text_columns: tuple[str, ...] | None = None
    """The text column, or two for text pairs. [default: guessed from the names]"""
    label_column: str | None = None
    """The label column. [default: guessed from the names]"""
    label_columns: tuple[str, ...] | None = None
    """Multi-label data: two or more columns of 0 and 1, one for each label."""
    soft_labels: tuple[str, ...] | None = None
    """Probabilities of the classes in place of labels: a column for each class, or one with all, such as `probabilities` in the
    output of predict.py. Splits without these columns have labels."""
    label_order: tuple[str, ...] | None = None
    """All labels in the order of the outputs. For a model whose outputs have no names (LABEL_0), the labels they stand for."""
    problem_type: ProblemType = "auto"
    """Kind of prediction. `auto`: regression for real numbers, multi-label for lists or --label_columns, else single-label."""
    max_length: Annotated[int, COUNT] = 128
    """Maximum input length in tokens; longer texts are truncated and counted, unless --window_stride is given."""
    window_stride: Annotated[int | None, NUMBER] = None
    """Split longer texts into windows that overlap by n tokens; a text's logits are their mean, in training too."""
    pad_to_max_length: bool = False
    """Pad every batch to max_length, not to its longest text, for devices that need fixed shapes."""
    max_train_samples: Annotated[int | None, COUNT] = None
    """Train on a fixed random subset of n samples, for a quick try."""
    max_eval_samples: Annotated[int | None, COUNT] = None
    """Use a fixed random subset of n samples of every other split, for a quick try."""
    fold: str | None = None
    """`2/5`: leave the second of five parts of the training data out, and score it in place of the test split."""
    preprocessing_num_workers: Annotated[int | None, WORKERS] = None
    """Number of processes for a tokenizer written in Python. [default: 1; fast tokenizers use all cores without it]"""

    def __post_init__(self) -> None:
        check_values(self)
        check_encoding(self.encoding)
        number, _, total = (self.fold or "1/2").partition("/")
        known = number.isascii() and total.isascii() and number.isdecimal() and total.isdecimal()
        known = known and 2 <= int(total) <= 1000 and 1 <= int(number) <= int(total)
        require(
            known, f"--fold takes the number of a part and how many there are, such as 2/5; got {shorten(self.fold)!r}"
        )
        files = [name for name in ("train_file", "validation_file", "test_file") if getattr(self, name) is not None]
        if files:
            require(self.dataset is None, f"--dataset and --{files[0]} exclude each other; give one of them")
            for name in ("dataset_config", "revision"):
                require(getattr(self, name) is None, f"--{name} is for --dataset, not for --{files[0]}; leave it out")
        columns = ("",) if self.text_columns is None else self.text_columns
        require(
            len(columns) in (1, 2),
            f"--text_columns takes one or two columns, got {len(columns)}: {' '.join(columns)}; "
            "for example --text_columns premise hypothesis",
        )
        several = self.label_columns
        require(not (self.label_column and several), "--label_column and --label_columns exclude each other")
        require(several is None or len(several) > 1, "--label_columns takes two or more columns, separated by spaces")
        for name in ("text_columns", "label_columns", "soft_labels", "label_order"):
            given = getattr(self, name) or ()
            twice = next((value for value in given if given.count(value) > 1), None)
            require(twice is None, f"--{name} names {twice} twice")
        for name, labels in (
            ("label_column", (self.label_column,)),
            ("label_columns", several or ()),
            ("soft_labels", self.soft_labels or ()),
        ):
            both = next((column for column in self.text_columns or () if column in labels), None)
            require(
                both is None, f"--text_columns {both} is also --{name}: a model would read the answer; name another"
            )
        require(
            self.label_order is None or len(self.label_order) > 1,
            "--label_order takes two or more labels, separated by spaces",
        )
        numbers = self.problem_type == REGRESSION
        for name in ("label_order", "soft_labels"):
            given = getattr(self, name) is not None
            require(not (given and numbers), f"--{name} is for classes, not for --problem_type regression")
        require(self.soft_labels != (), "--soft_labels takes one column, or two or more, separated by spaces")


@dataclasses.dataclass(frozen=True)
class HubConfig:
    """Hub and mirrors."""

    hub_endpoint: str | None = None
    """URL of the Hub or a mirror, such as https://hf-mirror.com. [default: HF_ENDPOINT, else the Hub]"""
    hub_timeout: Annotated[float, Within("(0, 1000000]")] = 5.0
    """Seconds to wait for the Hub. After that the run uses the cache, or stops and says what is missing."""
    verify_hashes: bool = False
    """Check the hash of every file before use; files from a mirror are checked against the Hub itself."""
    send_token_to_mirror: bool = False
    """Send your Hub token to a mirror, too."""

    def __post_init__(self) -> None:
        check_values(self)
        require(self.hub_endpoint != "", "--hub_endpoint is empty; leave it out, or give an address")


def literal(text: str) -> Any:
    """The value of a Python or YAML literal, such as 0.2, true or [1, 2]; other text stays as it is."""
    try:
        return ast.literal_eval({"true": "True", "false": "False", "null": "None"}.get(text, text))
    except (ValueError, SyntaxError):
        return text


def flatten(config: Any) -> dict[str, Any]:
    """All options of a configuration by flag name, without the sections."""
    flat: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        flat.update(flatten(value) if dataclasses.is_dataclass(value) else {field.name: value})
    return flat
