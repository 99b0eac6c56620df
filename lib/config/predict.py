"""Every option of predict.py: its name, type, default, help line and check."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from lib.config.sections import HubConfig, ModelSource, Precision, alias, check_positive
from lib.errors import UserError, require

TaskName = Literal[
    "feature-extraction",
    "fill-mask",
    "ner",
    "question-answering",
    "sentiment-analysis",
    "summarization",
    "text-generation",
    "translation",
    "zero-shot-classification",
]
GENERATING = ("summarization", "text-generation", "translation")
INPUT_FORMATS = (".csv", ".tsv", ".jsonl", ".txt", ".parquet")
OUTPUT_FORMATS = (".jsonl", ".csv", ".npy", ".parquet")


@dataclasses.dataclass(frozen=True)
class InputConfig:
    """Input: texts as arguments, a file, or the standard input, one text a line."""

    texts: tyro.conf.Positional[tuple[str, ...]] = ()
    """Texts to work on."""
    input: str | None = None
    """File of texts: csv, tsv, jsonl, txt or parquet, of any size; - is the standard input."""
    input_format: Literal["csv", "tsv", "jsonl", "txt", "parquet"] | None = None
    """Format of the input. [default: by the ending of the file; txt for the standard input]"""
    text_columns: tuple[str, ...] | None = None
    """One text column, or two for pairs; guessed when obvious."""
    id_column: str | None = None
    """Column that names the rows in the output. [default: the number of the row, from 0]"""
    question: str | None = None
    """Question to be answered from --context."""
    context: str | None = None
    """Text that holds the answer to --question."""

    def __post_init__(self) -> None:
        sources = {"texts as arguments": self.texts, "--input": self.input, "--question": self.question}
        given = [name for name, value in sources.items() if value]
        if len(given) > 1:
            raise UserError(f"{given[0]} and {given[1]} exclude each other; give one of them")
        both = (self.question is None) == (self.context is None)
        require(both, "--question and --context belong together; give both")
        columns = self.text_columns
        require(columns is None or len(columns) in (1, 2), f"--text_columns takes one or two columns, got {columns}")
        if self.input not in (None, "-") and self.input_format is None:
            suffix = Path(str(self.input)).suffix.lower()
            endings = ", ".join(INPUT_FORMATS)
            require(suffix in INPUT_FORMATS, f"--input {self.input}: the name must end in one of {endings}")
        require(self.input_format != "parquet" or self.input not in (None, "-"), "parquet is read from a file only")


@dataclasses.dataclass(frozen=True)
class EmbeddingConfig:
    """Embeddings: feature-extraction."""

    pooling: Literal["mean", "cls", "max", "last"] = "mean"
    """How the vectors of a text's tokens become one: their mean, the first, the largest values, or the last."""
    normalize: bool = False
    """True: embeddings of length 1, so that their dot product is the cosine."""


@dataclasses.dataclass(frozen=True)
class AnswerConfig:
    """Long texts: question-answering and ner read them in windows."""

    stride: int = 128
    """Tokens that neighbouring windows share."""
    max_answer_len: int = 30
    """Longest answer in tokens."""
    handle_impossible_answer: bool = False
    """True: the answer may be that the text holds none, an empty one."""
    aggregation_strategy: Literal["none", "simple", "first", "average", "max"] = "simple"
    """How tokens become entities; none: every token by itself."""

    def __post_init__(self) -> None:
        require(self.stride >= 0, f"--stride must not be negative, got {self.stride}")
        check_positive(self, "max_answer_len")


@dataclasses.dataclass(frozen=True)
class ZeroShotConfig:
    """Zero-shot classification."""

    candidate_labels: tuple[str, ...] = ()
    """The labels to choose from."""
    hypothesis_template: str = "This example is {}."
    """Sentence that a label makes true."""
    multi_label: bool = False
    """True: each label by itself, so that several may hold."""

    def __post_init__(self) -> None:
        template = self.hypothesis_template
        require("{}" in template, f"--hypothesis_template needs a {{}} for the label, got {template!r}")


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """Generation: summarization, text-generation, translation."""

    max_new_tokens: int | None = None
    """Longest output in tokens. [default: the model's own setting, else 256]"""
    num_beams: int | None = None
    """Beams searched. [default: the model's own setting, and at least --top_k]"""
    generate_kwargs: tuple[str, ...] = ()
    """Further settings of `generate`, as name=value, such as do_sample=True temperature=0.7."""
    prefix: str | None = None
    """Words put before each text. [default: what a T5 model has in its settings for the task]"""
    source_lang: str | None = None
    """Language of the text, as the model names it: en_XX, eng_Latn, en, ..."""
    target_lang: str | None = None
    """Language wanted, as the model names it."""

    def __post_init__(self) -> None:
        check_positive(self, "max_new_tokens", "num_beams")
        for item in self.generate_kwargs:
            require("=" in item, f"--generate_kwargs takes name=value, got {item!r}")


@dataclasses.dataclass(frozen=True)
class PredictModel(ModelSource):
    """Model."""

    model: Annotated[str, alias("--model_name_or_path", "--run")] = "minilm"
    """Folder of a finished run, folder of a model, Hub id, or `minilm` (for embeddings)."""


@dataclasses.dataclass(frozen=True)
class PredictConfig:
    """Use a model on new text.

    For example: `predict.py "A film that earns its tears." --model outputs/NAME`, or
    `predict.py --input reviews.csv --model outputs/NAME --output labels.jsonl`.
    """

    inputs: InputConfig = dataclasses.field(default_factory=InputConfig)
    task: TaskName = "sentiment-analysis"
    """What to do; sentiment-analysis is the use of any text classifier."""
    model: PredictModel = dataclasses.field(default_factory=PredictModel)
    hub: HubConfig = dataclasses.field(default_factory=HubConfig)
    output: str | None = None
    """File to write: jsonl or csv; npy or parquet for embeddings. [default: jsonl on the standard output]"""
    top_k: int | None = None
    """Give the k most likely answers. [default: 5 fillings of a mask, all labels, else 1]"""
    function_to_apply: Literal["softmax", "sigmoid", "none"] | None = None
    """What makes probabilities of a classifier's logits; none: give the logits. [default: as the model was trained]"""
    max_length: int | None = None
    """Longest input in tokens; longer texts are cut, or read in windows. [default: that of the run, else the model's]"""
    embedding: EmbeddingConfig = dataclasses.field(default_factory=EmbeddingConfig)
    answer: AnswerConfig = dataclasses.field(default_factory=AnswerConfig)
    zero_shot: ZeroShotConfig = dataclasses.field(default_factory=ZeroShotConfig)
    generate: GenerateConfig = dataclasses.field(default_factory=GenerateConfig)
    per_device_eval_batch_size: int = 64
    """Texts per forward."""
    seed: int = 42
    """Fixes what is sampled with do_sample=True."""
    mixed_precision: Precision = "auto"
    """`auto`: that of the run, else the launcher's choice, else bf16 where the device is fast at it."""
    explain_tokens: tuple[str, ...] = ()
    """Show how the model's tokenizer takes these texts apart, step by step, and stop."""
    export_onnx: str | None = None
    """Write the model to this folder as ONNX, check that it gives the same numbers, and stop."""

    def __post_init__(self) -> None:
        check_positive(self, "top_k", "max_length", "per_device_eval_batch_size")
        require(self.seed >= 0, f"--seed must not be negative, got {self.seed}")
        check_task(self)
        if self.output is not None:
            suffix = Path(self.output).suffix.lower()
            endings = ", ".join(OUTPUT_FORMATS)
            require(suffix in OUTPUT_FORMATS, f"--output {self.output}: the name must end in one of {endings}")
            text = suffix in (".jsonl", ".csv") or self.task == "feature-extraction"
            require(text, f"--output {self.output}: {suffix} holds embeddings only; use .jsonl or .csv")


def check_task(config: PredictConfig) -> None:
    """Raise UserError when an option that changes the result is not one of the task."""
    task, inputs = config.task, config.inputs
    question = task == "question-answering"
    require(inputs.question is None or question, "--question needs --task question-answering")
    require(not (question and inputs.texts), "--task question-answering takes --question and --context, or --input")
    labels = bool(config.zero_shot.candidate_labels)
    working = not (config.explain_tokens or config.export_onnx)
    require(
        labels == (task == "zero-shot-classification") or not working,
        "--candidate_labels is for --task zero-shot-classification"
        if labels
        else "--task zero-shot-classification needs --candidate_labels, such as --candidate_labels sports politics",
    )
    require(config.top_k is None or task not in ("ner", "feature-extraction"), f"--task {task} has no --top_k")
    require(
        config.function_to_apply is None or task == "sentiment-analysis",
        "--function_to_apply is for --task sentiment-analysis",
    )
    exportable = config.export_onnx is None or task not in (*GENERATING, "zero-shot-classification")
    require(exportable, f"--export_onnx takes models of one forward; not --task {task}")
    beams, wanted = config.generate.num_beams, config.top_k or 1
    enough = task not in GENERATING or beams is None or beams >= wanted
    require(enough, f"--top_k {wanted} needs --num_beams {wanted} or more, got {beams}")
