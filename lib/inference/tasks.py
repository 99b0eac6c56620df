"""The nine tasks: which model a task needs, and how it answers a batch of rows.

Where transformers has a pipeline for the task, the pipeline answers; question answering, summarization and translation
lost theirs in transformers 5, and embeddings are more than its lists of numbers.
"""

import dataclasses
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import pipeline

from lib.config.cli import load_config
from lib.config.eval import EvalConfig
from lib.config.predict import PredictConfig, is_lost_folder
from lib.config.sections import DataConfig, ModelConfig, UserError
from lib.config.train import TrainConfig
from lib.data.columns import TEXT_GUESSES
from lib.data.windows import stored_windows
from lib.inference.embeddings import build_embedder
from lib.inference.explain_tokens import CutTexts
from lib.inference.generation import build_writer, task_prefix
from lib.inference.inputs import Columns, Row
from lib.inference.pipelines import PIPELINES
from lib.inference.question_answering import build_reader
from lib.inference.stream import Answer, Predict
from lib.model.adapters.adapt import adapter_folder, load_classifier, tokenizer_source
from lib.model.load import load_tokenizer, load_trained, longest_input
from lib.run.record import run_precision

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


@dataclasses.dataclass(frozen=True)
class Source:
    """A model to use: `data` are the data settings of the run that made it, `precision` the one to work in."""

    model: ModelConfig
    data: DataConfig | None
    precision: str


def find_source(config: PredictConfig) -> Source:
    """The model that --model names: that of a run when it is the folder of one.

    Raises UserError when the folder is not there or its run kept no model.
    """
    folder = Path(config.model)
    if not (folder / "config.yaml").is_file():
        if is_lost_folder(config.model):
            raise UserError(f"--model {config.model}: no such folder")
        trust: dict[str, Any] = {"allow_pickle": config.allow_pickle, "trust_remote_code": config.trust_remote_code}
        named = ModelConfig(config.model, config.model_revision, config.source, **trust)
        return Source(named, None, config.mixed_precision)
    if not (folder / "model" / "config.json").is_file():
        raise UserError(f"--model {config.model} has no model folder yet; let train.py reach its first evaluation")
    precision = run_precision(EvalConfig(run=config.model, mixed_precision=config.mixed_precision))
    data = load_config(TrainConfig, folder / "config.yaml").data
    return Source(ModelConfig(model=str(folder / "model")), data, precision)


def text_columns(config: PredictConfig, source: Source) -> tuple[Columns, ...]:
    """Names of columns that hold the text, as the run had them and as usual for the task."""
    if config.task == "question-answering":
        return (("question", "context"),)
    usual = TEXT_GUESSES if config.task in ("sentiment-analysis", "feature-extraction") else ONE_TEXT
    trained_on = source.data.text_columns if source.data else None
    return ((trained_on,) if trained_on else ()) + tuple(usual)


def load_model(config: PredictConfig, source: Source, device: torch.device) -> tuple[Any, Any]:
    """(model, tokenizer) for the task; the tokenizer knows the longest input.

    Raises UserError when the model cannot be loaded or was not trained for the task.
    """
    tokenizer = load_tokenizer(tokenizer_source(source.model))
    if config.task in MODELS and adapter_folder(source.model) is not None:
        raise UserError(f"--task {config.task}: {config.model} is an adapter of a text classifier")
    if config.task in MODELS:
        kind = getattr(transformers, MODELS[config.task])
        model = load_trained(source.model, kind, f"model for {config.task}")
    else:
        model = load_classifier(source.model)
    if (
        getattr(model.config, "pad_token_id", None) is None
    ):  # a decoder that classifies looks for the last token before it
        model.config.pad_token_id = tokenizer.pad_token_id
    windows = stored_windows(tokenizer)
    trained_with = source.data.max_length if source.data else windows.max_length if windows else None
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
        raise UserError(f"--model {config.model}: its tokenizer has no mask; name a masked language model")
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
