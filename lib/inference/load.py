"""A task of predict.py with the model and tokenizer that do it."""

import dataclasses
from typing import Any

import torch
import transformers

from lib.config.predict import PredictConfig
from lib.data.columns import TEXT_GUESSES
from lib.data.tokenization import stored_windows
from lib.errors import UserError
from lib.inference.inputs import Columns
from lib.model.adapters.adapt import adapter_folder
from lib.model.load import load_classifier, load_tokenizer, load_trained, longest_input
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

    `text_columns` are names that the text columns of the input may have, the likeliest first.
    """

    config: PredictConfig
    model: Any
    tokenizer: Any
    text_columns: tuple[Columns, ...]

    def pipeline(self) -> Any:
        """The pipeline of transformers for this task, on the model's device."""
        return transformers.pipeline(
            self.config.task, model=self.model, tokenizer=self.tokenizer, device=self.model.device
        )


def load_task(config: PredictConfig, trained: TrainedModel, device: torch.device) -> Task:
    """Load the model and the tokenizer that the task needs, in float32 and eval mode.

    Raises UserError if the model cannot be loaded, was not trained for the task, or --max_length is too short.
    """
    tokenizer = load_tokenizer(trained.source)
    if config.task not in MODELS:
        model = load_classifier(trained.source)
    elif adapter_folder(trained.source) is not None:
        raise UserError(f"--task {config.task}: {config.model.model} is an adapter of a text classifier")
    else:
        kind = getattr(transformers, MODELS[config.task])
        model = load_trained(trained.source, kind, f"model for {config.task}")
    if getattr(model.config, "pad_token_id", None) is None:
        # A decoder classifies by the last token that is not padding.
        model.config.pad_token_id = tokenizer.pad_token_id

    windows = stored_windows(tokenizer)
    trained_length = trained.data.max_length if trained.data else windows.max_length if windows else None
    limits = [config.max_length or trained_length, tokenizer.model_max_length, longest_input(model)]
    tokenizer.model_max_length = min(limit for limit in limits if limit is not None)
    special = tokenizer.num_special_tokens_to_add()
    if tokenizer.model_max_length <= special:
        raise UserError(f"--max_length {config.max_length} leaves no room for text besides {special} special tokens")
    return Task(config, model.to(device).eval(), tokenizer, text_columns(config, trained))


def text_columns(config: PredictConfig, trained: TrainedModel) -> tuple[Columns, ...]:
    """Those of the run's training data, then usual names, of pairs too if the task takes them."""
    if config.task == "question-answering":
        return (("question", "context"),)
    pairs = config.task in ("sentiment-analysis", "feature-extraction")
    usual = tuple(names for names in TEXT_GUESSES if pairs or len(names) == 1)
    trained_on = trained.data.text_columns if trained.data else None
    return (trained_on, *usual) if trained_on else usual
