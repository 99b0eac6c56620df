"""The nine tasks: which model a task needs, and how it answers a batch of rows.

Where transformers has a pipeline for the task, the pipeline answers; question answering, summarization and translation
lost theirs in transformers 5, and embeddings are more than its lists of numbers.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import transformers
from transformers import pipeline

from lib.config.predict import PredictConfig
from lib.data.columns import TEXT_GUESSES
from lib.data.tokenization import stored_windows
from lib.errors import UserError
from lib.inference.embeddings import build_embedder
from lib.inference.generation import build_writer, task_prefix
from lib.inference.inputs import Columns, Row
from lib.inference.pipelines import PIPELINES
from lib.inference.question_answering import build_reader
from lib.inference.stream import Answer, Predict
from lib.model.adapters.adapt import adapter_folder, load_classifier, tokenizer_source
from lib.model.load import load_tokenizer, load_trained, longest_input
from lib.run.finished import TrainedModel


@dataclasses.dataclass
class CutTexts:
    """Counts the texts that are longer than what is read of them, while their answers pass by."""

    tokenizer: Any
    read: Callable[[Row], Sequence[str]]
    """What the model reads of a row: its one or two texts."""
    seen: int = 0
    cut: int = 0

    def watch(self, answers: Iterator[tuple[Row, Answer]]) -> Iterator[tuple[Row, Answer]]:
        for row, answer in answers:
            self.seen += 1
            self.cut += is_cut(self.tokenizer, self.read(row))
            yield row, answer

    def __str__(self) -> str:
        limit = self.tokenizer.model_max_length
        share = f"{self.cut:,} of {self.seen:,} texts ({self.cut / max(self.seen, 1):.1%})"
        return f"{share} are longer than {limit:,} tokens and were cut (--max_length)"


MODELS = {
    "feature-extraction": "AutoModel",
    "fill-mask": "AutoModelForMaskedLM",
    "ner": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "summarization": "AutoModelForSeq2SeqLM",
    "text-generation": "AutoModelForCausalLM",
    "translation": "AutoModelForSeq2SeqLM",
}
"""Classes other than that of a text classifier."""

ONE_TEXT: tuple[Columns, ...] = tuple(guess for guess in TEXT_GUESSES if len(guess) == 1)


def text_columns(config: PredictConfig, trained: TrainedModel) -> tuple[Columns, ...]:
    """Names of columns that hold the text, as the run had them and as usual for the task."""
    if config.task == "question-answering":
        return (("question", "context"),)
    usual = TEXT_GUESSES if config.task in ("sentiment-analysis", "feature-extraction") else ONE_TEXT
    trained_on = trained.data.text_columns if trained.data else None
    return ((trained_on,) if trained_on else ()) + tuple(usual)


def load_model(config: PredictConfig, trained: TrainedModel, device: torch.device) -> tuple[Any, Any]:
    """(model, tokenizer) for the task; the tokenizer knows the longest input.

    Raises UserError when the model cannot be loaded or was not trained for the task.
    """
    tokenizer = load_tokenizer(tokenizer_source(trained.source))
    if config.task in MODELS and adapter_folder(trained.source) is not None:
        raise UserError(f"--task {config.task}: {config.model.model} is an adapter of a text classifier")
    if config.task in MODELS:
        kind = getattr(transformers, MODELS[config.task])
        model = load_trained(trained.source, kind, f"model for {config.task}")
    else:
        model = load_classifier(trained.source)
    if (
        getattr(model.config, "pad_token_id", None) is None
    ):  # a decoder that classifies looks for the last token before it
        model.config.pad_token_id = tokenizer.pad_token_id
    windows = stored_windows(tokenizer)
    trained_with = trained.data.max_length if trained.data else windows.max_length if windows else None
    asked = config.max_length or trained_with
    limits = [asked, tokenizer.model_max_length, longest_input(model)]
    tokenizer.model_max_length = min(limit for limit in limits if limit is not None)
    special = tokenizer.num_special_tokens_to_add()
    if tokenizer.model_max_length <= special:
        raise UserError(f"--max_length {config.max_length} leaves no room for text beside {special} special tokens")
    return model.to(device).eval(), tokenizer


def build_predict(config: PredictConfig, model: Any, tokenizer: Any, device: torch.device) -> Predict:
    """How the task is done: a function from a batch of rows to their answers."""
    top_k = config.top_k or 1
    if config.task == "feature-extraction":
        return with_a_token(build_embedder(model, tokenizer, config.embedding), tokenizer)
    if config.task == "question-answering":
        return build_reader(model, tokenizer, config.answer, top_k, config.per_device_eval_batch_size)
    if config.task in ("summarization", "translation"):
        return build_writer(config.task, model, tokenizer, config.generate, top_k)
    if config.task == "fill-mask" and tokenizer.mask_token is None:
        raise UserError(f"--model {config.model.model}: its tokenizer has no mask; name a masked language model")
    predict = PIPELINES[config.task](config, pipeline(config.task, model=model, tokenizer=tokenizer, device=device))
    return predict if config.task == "text-generation" else with_a_token(predict, tokenizer)


def count_cut(config: PredictConfig, model: Any, tokenizer: Any) -> CutTexts:
    """The count of texts that lose their end; of tasks that read a text in windows, or cut its beginning, none does."""
    task, settings = config.task, config.zero_shot
    windowed = task == "sentiment-analysis" and stored_windows(tokenizer) is not None
    if windowed or task in ("question-answering", "ner", "text-generation"):
        return CutTexts(tokenizer, lambda row: ())
    if task == "zero-shot-classification":
        hypothesis = settings.hypothesis_template.format(max(settings.candidate_labels, key=len))
        return CutTexts(tokenizer, lambda row: (row.texts[0], hypothesis))
    prefix = task_prefix(task, model, config.generate) if task in ("summarization", "translation") else ""
    return CutTexts(tokenizer, lambda row: (prefix + row.texts[0], *row.texts[1:]))


def with_a_token(predict: Predict, tokenizer: Any) -> Predict:
    """Empty texts as one token, where the tokenizer, a decoder's, puts none around them: models take no empty input."""
    if tokenizer.num_special_tokens_to_add():
        return predict
    token = tokenizer.bos_token or tokenizer.eos_token or tokenizer.pad_token

    def filled(rows: list[Row]) -> list[Answer]:
        return predict([dataclasses.replace(row, texts=tuple(text or token for text in row.texts)) for row in rows])

    return filled


def is_cut(tokenizer: Any, texts: Sequence[str]) -> bool:
    """Whether texts have more tokens than the tokenizer's limit; only those with enough bytes for that are taken apart."""
    limit = tokenizer.model_max_length
    if (
        sum(len(text.encode()) for text in texts)
        + tokenizer.num_special_tokens_to_add(pair=len(texts) == 2)
        + len(texts)
        <= limit
    ):
        return False
    return len(tokenizer(*texts, verbose=False)["input_ids"]) > limit
