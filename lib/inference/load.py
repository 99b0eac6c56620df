"""A task of predict.py with the model and tokenizer that do it."""

import dataclasses
from typing import Any

import torch
import transformers

from lib.config.predict import GENERATING, PredictConfig
from lib.config.sections import EVAL_SAMPLES
from lib.data.columns import TEXT_GUESSES
from lib.data.trained_on import UNKNOWN, TrainedOn, input_length
from lib.errors import UserError
from lib.evaluation.batch_size import BatchSize, choose_size
from lib.inference.inputs import Columns
from lib.model.adapters.adapt import adapter_folder
from lib.model.folder import check_vocabulary
from lib.model.load import load_classifier, load_tokenizer, load_trained
from lib.run.finished import TrainedModel

MODELS = {
    "feature-extraction": "AutoModel",
    "fill-mask": "AutoModelForMaskedLM",
    "ner": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "summarization": "AutoModelForSeq2SeqLM",
    "text-generation": "AutoModelForCausalLM",
    "translation": "AutoModelForSeq2SeqLM",
}
"""The model class of each task; the tasks that are missing here use a text classifier."""


@dataclasses.dataclass(frozen=True)
class Task:
    """Options, model and tokenizer; `tokenizer.model_max_length` is the longest input in tokens.

    `trained_on` is what a classifier was trained on; for other tasks it is empty.
    `text_columns` are names that the text columns of the input may have, the likeliest first.
    """

    config: PredictConfig
    model: Any
    tokenizer: Any
    text_columns: tuple[Columns, ...]
    trained_on: TrainedOn
    mixed_precision: str = "no"
    batch_size: BatchSize = dataclasses.field(default_factory=lambda: BatchSize(EVAL_SAMPLES))
    """Of a classifier: the most per forward."""

    @property
    def group(self) -> int | None:
        """Examples that are predicted together: as many as one forward takes; None where positions are counted."""
        return self.batch_size.number if self.batch_size.unit == "samples" else None

    def pipeline(self) -> Any:
        """The pipeline of transformers for this task, on the model's device."""
        return transformers.pipeline(
            self.config.task, model=self.model, tokenizer=self.tokenizer, device=self.model.device
        )


def load_task(config: PredictConfig, trained: TrainedModel, device: torch.device, mixed_precision: str = "no") -> Task:
    """Load the model, in eval mode, and the tokenizer that the task needs.

    The model is float32, but for the base of an adapter, which is held as in training unless it is exported. Raises
    UserError if the model cannot be loaded, was not trained for the task, or --max_length is too short.
    """
    tokenizer = load_task_tokenizer(config, trained)
    if config.task not in MODELS:
        exported = config.export_onnx or config.merge_adapter
        precision = "no" if exported else mixed_precision
        model = load_classifier(trained.source, tokenizer, precision, device, quantized=not exported)
    elif adapter_folder(trained.source) is not None:
        raise UserError(f"--task {config.task}: {config.model.model} is an adapter of a text classifier")
    else:
        kind = getattr(transformers, MODELS[config.task])
        model = load_trained(trained.source, kind, f"model for {config.task}", tokenizer)
    check_vocabulary(trained.source, model, tokenizer)
    if config.task not in MODELS or config.max_length or trained.trained_on.max_length:
        tokenizer.model_max_length = input_length(config.max_length, trained.trained_on, tokenizer)
    special = tokenizer.num_special_tokens_to_add()
    if tokenizer.model_max_length <= special:
        raise UserError(
            f"--max_length {tokenizer.model_max_length} leaves no room for text besides {special} special tokens"
        )
    columns = text_columns(config, trained.trained_on)
    known = trained.trained_on if config.task == "sentiment-analysis" else UNKNOWN
    size = BatchSize(config.eval_samples)
    if config.task == "sentiment-analysis":
        size = choose_size(config.per_device_eval_batch_size, device, trained.eval_size)
    return Task(config, model.to(device).eval(), tokenizer, columns, known, mixed_precision, size)


def load_task_tokenizer(config: PredictConfig, trained: TrainedModel) -> Any:
    """The tokenizer for a task: special tokens in a text are text, except where texts are written with them.

    Raises UserError if it cannot be loaded.
    """
    tokenizer = load_tokenizer(trained.source)
    if config.task in ("fill-mask", *GENERATING):
        tokenizer.split_special_tokens = False
    return tokenizer


def text_columns(config: PredictConfig, trained_on: TrainedOn) -> tuple[Columns, ...]:
    """Those of the model's training, then usual names, of pairs too if the task takes them."""
    if config.task == "question-answering":
        return (("question", "context"),)
    pairs = config.task in ("sentiment-analysis", "feature-extraction")
    usual = tuple(names for names in TEXT_GUESSES if pairs or len(names) == 1)
    return (trained_on.text_columns, *usual) if trained_on.text_columns else usual
