"""Every option of predict.py: its name, type, default, help line and check."""

import contextlib
import dataclasses
import os
from pathlib import Path
from typing import Annotated, Literal

import tyro

from lib.config.limits import (
    COUNT,
    INPUT_PATH,
    NUMBER,
    OUTPUT_PATH,
    SEED,
    Within,
    check_settings,
    check_thresholds,
    check_values,
)
from lib.config.sections import (
    EVAL_SAMPLES,
    FILE_FORMATS,
    HubConfig,
    ModelSource,
    Precision,
    alias,
    check_encoding,
    named_format,
)
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
"""Tasks whose models call `generate`."""

OUTPUT_FORMATS = (".jsonl", ".csv", ".npy", ".parquet")


NPY_IDS = ".ids.jsonl"
"""Ending of the file of ids beside an npy file, which has no place for them."""


def check_new(output: str, given: str | None) -> None:
    """Raise UserError if the output is a folder, or is the input: by another name, through a link, or as standard input."""
    names = [output, *([str(Path(output).with_suffix(NPY_IDS))] if output.lower().endswith(".npy") else [])]
    for name in names:
        require(not os.path.isdir(name), f"--output {name} is a folder; name a file in it")
        with contextlib.suppress(OSError, ValueError):  # one of them does not exist, or cannot be looked at
            same = os.path.samestat(os.stat(name), os.fstat(0) if given in (None, "-") else os.stat(given))
            is_file = os.path.isfile(name)
            source = "the standard input" if given in (None, "-") else f"--input {given}"
            require(not (same and is_file), f"--output {name} is {source}, which it would replace; name another file")


@dataclasses.dataclass(frozen=True)
class InputConfig:
    """Input: texts as arguments, a file, or standard input with one text per line."""

    texts: tyro.conf.Positional[tuple[str, ...]] = ()
    """Input texts."""
    input: Annotated[str | None, INPUT_PATH] = None
    """File of texts (csv, tsv, json, jsonl, txt or parquet, of any size), or - for standard input."""
    input_format: Literal["csv", "tsv", "json", "jsonl", "txt", "parquet"] | None = None
    """Format of the input. [default: by the ending of the file; txt for standard input]"""
    encoding: str | None = None
    """Encoding of the input, such as gb18030. [default: by the byte order mark, else UTF-8]"""
    text_columns: tuple[str, ...] | None = None
    """One text column, or two for pairs; guessed when obvious."""
    id_column: str | None = None
    """Column whose value is the id of a row in the output. [default: the number of the row, from 0]"""
    question: str | None = None
    """Question to answer from --context."""
    context: str | None = None
    """Text that contains the answer to --question."""

    def __post_init__(self) -> None:
        check_values(self)
        sources = {"texts as arguments": self.texts, "--input": self.input, "--question": self.question}
        given = [name for name, value in sources.items() if value]
        if len(given) > 1:
            raise UserError(f"{given[0]} and {given[1]} exclude each other; give one of them")
        both = (self.question is None) == (self.context is None)
        require(both, "--question and --context belong together; give both")
        columns = self.text_columns
        require(columns is None or len(columns) in (1, 2), f"--text_columns takes one or two columns, got {columns}")
        check_encoding(self.encoding)
        if self.input not in (None, "-") and self.input_format is None:
            known = named_format(str(self.input)) or str(self.input).lower().endswith(".zip")
            endings = ", ".join(f".{name}" for name in FILE_FORMATS)
            require(
                bool(known),
                f"--input {self.input}: the name must end in one of {endings}; these may be packed, as in .csv.gz",
            )
        require(self.input_format != "parquet" or self.input not in (None, "-"), "parquet is read from a file only")

    @property
    def several(self) -> bool:
        """Whether there may be more than one text."""
        return self.question is None and len(self.texts) != 1


@dataclasses.dataclass(frozen=True)
class EmbeddingConfig:
    """Embeddings: feature-extraction."""

    pooling: Literal["mean", "cls", "max", "last"] = "mean"
    """How token vectors become one vector per text: mean, first token (cls), maximum or last token."""
    normalize: bool = False
    """Scale embeddings to length 1, so that their dot product is the cosine similarity."""


@dataclasses.dataclass(frozen=True)
class SpanConfig:
    """Spans of text: question-answering and ner, which read long texts in windows."""

    stride: Annotated[int, NUMBER] = 128
    """Tokens that neighboring windows share."""
    max_answer_len: Annotated[int, COUNT] = 30
    """Longest answer in tokens."""
    handle_impossible_answer: bool = False
    """Give an empty answer if that is likelier than every span of the text."""
    aggregation_strategy: Literal["none", "simple", "first", "average", "max"] = "simple"
    """How tokens are merged into entities; none: each token is one."""

    def __post_init__(self) -> None:
        check_values(self)


@dataclasses.dataclass(frozen=True)
class ZeroShotConfig:
    """Zero-shot classification."""

    candidate_labels: tuple[str, ...] = ()
    """Labels to choose from."""
    hypothesis_template: str = "This example is {}."
    """Sentence that is true if the label in place of {} is right."""
    multi_label: bool = False
    """Score each label by itself, so that several may be right."""

    def __post_init__(self) -> None:
        template = self.hypothesis_template
        require("{}" in template, f"--hypothesis_template needs a {{}} for the label, got {template!r}")


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """Generation: summarization, text-generation, translation."""

    max_new_tokens: Annotated[int | None, COUNT] = None
    """Longest output in tokens. [default: the model's own setting, else 256]"""
    num_beams: Annotated[int | None, Within("[1, 1000]")] = None
    """Number of beams in beam search. [default: the model's own setting, at least --top_k]"""
    generate_kwargs: tuple[str, ...] = ()
    """Other settings of `generate` as name=value, such as do_sample=True temperature=0.7."""
    prefix: str | None = None
    """Text put before each input. [default: the prefix for the task in a T5 model's configuration]"""
    source_lang: str | None = None
    """Language of the input, as the model names it: en_XX, eng_Latn, en, ..."""
    target_lang: str | None = None
    """Language of the output, as the model names it."""

    def __post_init__(self) -> None:
        check_values(self)
        check_settings("--generate_kwargs", self.generate_kwargs)


@dataclasses.dataclass(frozen=True)
class PredictModel(ModelSource):
    """Model."""

    model: Annotated[str, alias("--model_name_or_path", "--run"), INPUT_PATH] = "minilm"
    """Folder of a finished run, folder of a model, Hub id, or `minilm` (for embeddings)."""


@dataclasses.dataclass(frozen=True)
class PredictConfig:
    """Use a model on new text.

    For example: `predict.py "A film that earns its tears." --model outputs/NAME`, or
    `predict.py --input reviews.csv --model outputs/NAME --output labels.jsonl`.
    """

    inputs: InputConfig = dataclasses.field(default_factory=InputConfig)
    task: TaskName = "sentiment-analysis"
    """Task to do; sentiment-analysis works with every text classifier."""
    model: PredictModel = dataclasses.field(default_factory=PredictModel)
    hub: HubConfig = dataclasses.field(default_factory=HubConfig)
    output: Annotated[str | None, OUTPUT_PATH] = None
    """Output file: jsonl or csv; npy or parquet for embeddings. [default: jsonl on standard output]"""
    top_k: Annotated[int | None, COUNT] = None
    """Number of answers, the likeliest first. [default: 5 for fill-mask, all labels of a classifier, else 1]"""
    function_to_apply: Literal["softmax", "sigmoid", "none"] | None = None
    """Function from a classifier's logits to probabilities; none: give logits. The temperature stored with a model is for
    the function that it was trained with, no other. [default: as the model was trained]"""
    threshold: tuple[str, ...] = ()
    """Least probability at which a label, or the second of two classes, is predicted: a number, or label=number for some.
    [default: those stored with the model, else 0.5]"""
    abstain_below: Annotated[float | None, Within("[0, 1]")] = None
    """Give no label (null; in csv an empty cell) where the probability of the predicted class is below this."""
    max_length: Annotated[int | None, COUNT] = None
    """Longest input in tokens; longer texts are truncated or read in windows. [default: the run's, else the model's]"""
    embedding: EmbeddingConfig = dataclasses.field(default_factory=EmbeddingConfig)
    span: SpanConfig = dataclasses.field(default_factory=SpanConfig)
    zero_shot: ZeroShotConfig = dataclasses.field(default_factory=ZeroShotConfig)
    generate: GenerateConfig = dataclasses.field(default_factory=GenerateConfig)
    per_device_eval_batch_size: Annotated[int | None, COUNT] = None
    """Texts per forward pass on each device. [default: 64; for text classifiers on a GPU the positions of the run's
    evaluations, else 32,768]"""
    padding_free: bool = False
    """Text classifiers: run the texts of a batch in one row without padding. Results are the same up to rounding."""
    seed: Annotated[int, SEED] = 42
    """Seed for sampling with do_sample=True."""
    mixed_precision: Precision = "auto"
    """Precision; auto: that of the run, else the launcher's choice, else what train.py takes on this device."""
    join_timeout: Annotated[float, Within("(0, 1000000]")] = 600.0
    """Seconds that the processes of a launch wait for each other at the start; one that downloads is waited for longer."""
    explain_tokens: tuple[str, ...] = ()
    """Print how the tokenizer turns these texts into token ids, step by step, and stop."""
    export_onnx: Annotated[str | None, OUTPUT_PATH] = None
    """Export the model as ONNX to this folder, compare it with PyTorch, and stop."""
    merge_adapter: Annotated[str | None, OUTPUT_PATH] = None
    """Add the adapter's update to the weights of its base model, write the whole model to this folder, and stop."""

    @property
    def eval_samples(self) -> int:
        """Texts per forward pass, where they are counted."""
        return self.per_device_eval_batch_size or EVAL_SAMPLES

    def __post_init__(self) -> None:
        """Also refuses options that the task does not have: they would be ignored."""
        check_values(self)
        task = self.task
        if self.output is not None:
            suffix = Path(self.output).suffix.lower()
            endings = ", ".join(OUTPUT_FORMATS)
            require(suffix in OUTPUT_FORMATS, f"--output {self.output}: the name must end in one of {endings}")
            check_new(self.output, self.inputs.input)
            fits = suffix in (".jsonl", ".csv") or task == "feature-extraction"
            require(fits, f"--output {self.output}: {suffix} holds embeddings only; use .jsonl or .csv")

        extractive = task == "question-answering"
        require(self.inputs.question is None or extractive, "--question needs --task question-answering")
        fits = not (extractive and self.inputs.texts)
        require(fits, "--task question-answering takes --question and --context, or --input")

        zero_shot = task == "zero-shot-classification"
        exported = self.export_onnx or self.merge_adapter
        require(not (self.export_onnx and self.merge_adapter), "--merge_adapter and --export_onnx exclude each other")
        if not (self.explain_tokens or exported):
            has_labels = bool(self.zero_shot.candidate_labels)
            require(zero_shot or not has_labels, "--candidate_labels is for --task zero-shot-classification")
            require(
                has_labels or not zero_shot,
                "--task zero-shot-classification needs --candidate_labels, such as --candidate_labels sports politics",
            )
        fits = self.merge_adapter is None or task == "sentiment-analysis"
        require(fits, "--merge_adapter is for text classifiers; leave --task out")
        flash = self.model.attn_implementation.startswith("flash")
        require(
            not (self.export_onnx and flash),
            "--export_onnx: ONNX has no FlashAttention; use --attn_implementation sdpa",
        )
        fits = self.export_onnx is None or task not in (*GENERATING, "zero-shot-classification")
        require(fits, f"--export_onnx is for models that need one forward pass per text, not for --task {task}")

        require(self.top_k is None or task not in ("ner", "feature-extraction"), f"--task {task} has no --top_k")
        fits = self.function_to_apply is None or task == "sentiment-analysis"
        require(fits, "--function_to_apply is for --task sentiment-analysis")
        check_thresholds(self.threshold)
        classifies = task == "sentiment-analysis" and not (self.explain_tokens or exported)
        require(classifies or not self.threshold, "--threshold is for predictions of --task sentiment-analysis")
        require(
            classifies or not self.padding_free,
            "--padding_free is for predictions of --task sentiment-analysis; leave it out",
        )
        abstains = self.abstain_below is not None
        require(classifies or not abstains, "--abstain_below is for predictions of --task sentiment-analysis")
        fits = not abstains or self.function_to_apply != "none"
        require(fits, "--abstain_below compares probabilities, and --function_to_apply none gives logits; choose one")
        beams, wanted = self.generate.num_beams, self.top_k or 1
        fits = task not in GENERATING or beams is None or beams >= wanted
        require(fits, f"--top_k {wanted} needs --num_beams {wanted} or more, got {beams}")
