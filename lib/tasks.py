"""The nine tasks: which model a task needs, and how it answers a batch of rows.

Where transformers has a pipeline for the task, the pipeline answers; question answering, summarization and translation
lost theirs in transformers 5, and embeddings are more than its lists of numbers.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import pipeline
from transformers.pipelines import PipelineException

from lib.cli import load_config
from lib.config import DataConfig, EvalConfig, ModelConfig, TrainConfig, UserError
from lib.data import TEXT_GUESSES
from lib.embeddings import build_embedder
from lib.generation import answer, build_writer, generate_settings
from lib.inference import Answer, Predict
from lib.inputs import Columns, Row
from lib.modeling import label_names, load_classifier, load_tokenizer, load_trained
from lib.predict_config import PredictConfig
from lib.question_answering import build_reader
from lib.run import run_precision

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
        if "/" in config.model and folder.parent.is_dir() and not folder.is_dir():
            raise UserError(f"--model {config.model}: no such folder")
        named = ModelConfig(model=config.model, model_revision=config.model_revision)
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
    tokenizer = load_tokenizer(source.model)
    if config.task in MODELS:
        kind = getattr(transformers, MODELS[config.task])
        model = load_trained(source.model, kind, f"model for {config.task}")
    else:
        model = load_classifier(source.model)
    asked = config.max_length or (source.data.max_length if source.data else None)
    limits = [asked, tokenizer.model_max_length, longest_input(model)]
    tokenizer.model_max_length = min(limit for limit in limits if limit is not None)
    special = tokenizer.num_special_tokens_to_add()
    if tokenizer.model_max_length <= special:
        raise UserError(f"--max_length {config.max_length} leaves no room for text beside {special} special tokens")
    return model.to(device).eval(), tokenizer


def longest_input(model: Any) -> int | None:
    """Positions that a model has; those of the RoBERTa family begin behind the number of the padding token."""
    positions = getattr(model.config, "max_position_embeddings", None)
    tables = (module for name, module in model.named_modules() if name.endswith("position_embeddings"))
    padding = next((table.padding_idx for table in tables if getattr(table, "padding_idx", None) is not None), -1)
    return positions - padding - 1 if isinstance(positions, int) and positions > 0 else None


def build_predict(config: PredictConfig, model: Any, tokenizer: Any, device: torch.device) -> Predict:
    """How the task is done: a function from a batch of rows to their answers."""
    top_k = config.top_k or 1
    if config.task == "feature-extraction":
        return build_embedder(model, tokenizer, config.embedding)
    if config.task == "question-answering":
        return build_reader(model, tokenizer, config.answer, top_k, config.per_device_eval_batch_size)
    if config.task in ("summarization", "translation"):
        return build_writer(config.task, model, tokenizer, config.generate, top_k)
    pipe = pipeline(config.task, model=model, tokenizer=tokenizer, device=device)
    return PIPELINES[config.task](config, pipe)


# ---------------------------------------------------------------------------------------------------- pipelines


def classify(config: PredictConfig, pipe: Any) -> Predict:
    """Answers with `label` and `probabilities` by class; `labels` above one half where several may hold.

    Instead of `probabilities`, `logits` where they were asked for, and `scores` of a regression.
    """
    names, problem = label_names(pipe.model), pipe.model.config.problem_type
    apply = config.function_to_apply
    key = "logits" if apply == "none" else "scores" if apply is None and problem == "regression" else "probabilities"

    def predict(rows: list[Row]) -> list[Answer]:
        inputs = [dict(zip(("text", "text_pair"), row.texts, strict=False)) for row in rows]
        settings = {"function_to_apply": apply} if apply else {}
        outputs = pipe(inputs, batch_size=len(rows), top_k=None, truncation=True, **settings)
        return [shape([(item["label"], item["score"]) for item in output]) for output in outputs]

    def shape(ranked: list[tuple[str, float]]) -> Answer:
        if problem == "multi_label_classification":
            chosen: Answer = {"labels": [name for name, score in ranked if score >= 0.5 and key == "probabilities"]}
        else:
            chosen = {"label": ranked[0][0]} if len(names) > 1 else {}
        ranked = ranked[: config.top_k] if config.top_k else sorted(ranked, key=lambda item: names.index(item[0]))
        return chosen | {key: dict(ranked)}

    return predict


def choose_label(config: PredictConfig, pipe: Any) -> Predict:
    """Zero-shot classification: answers as those of a classifier over the candidate labels.

    Raises UserError for a model that was not trained on entailment.
    """
    if pipe.entailment_id == -1:
        names = ", ".join(label_names(pipe.model))
        raise UserError(
            f"--model {config.model} was not trained on entailment (its classes: {names}); "
            "--task zero-shot-classification needs an NLI model, such as facebook/bart-large-mnli"
        )
    settings = {
        "candidate_labels": list(config.zero_shot.candidate_labels),
        "hypothesis_template": config.zero_shot.hypothesis_template,
        "multi_label": config.zero_shot.multi_label,
        "batch_size": config.per_device_eval_batch_size,
    }

    def predict(rows: list[Row]) -> list[Answer]:
        # The pipeline takes an empty text for a missing one.
        outputs = pipe([row.texts[0] or " " for row in rows], **settings)
        ranked = [dict(list(zip(o["labels"], o["scores"], strict=True))[: config.top_k]) for o in outputs]
        return [{"label": next(iter(scores)), "probabilities": scores} for scores in ranked]

    return predict


def fill_mask(config: PredictConfig, pipe: Any) -> Predict:
    """Answers with `answers`: the likeliest fillings, a list of them for each mask where a text has several.

    `<mask>` and `[MASK]` both stand for the mask, whatever the model's own is. Raises UserError for a text without one.
    """
    mask = pipe.tokenizer.mask_token

    def predict(rows: list[Row]) -> list[Answer]:
        texts = [row.texts[0].replace("<mask>", mask).replace("[MASK]", mask) for row in rows]
        bare = [row.number + 1 for row, text in zip(rows, texts, strict=True) if mask not in text]
        if bare:
            raise UserError(f"row {bare[0]} has no {mask}; --task fill-mask fills that in")
        try:
            outputs = pipe(
                texts, batch_size=len(rows), top_k=config.top_k or 5, tokenizer_kwargs={"truncation": True}
            )
        except PipelineException as error:
            limit = pipe.tokenizer.model_max_length
            raise UserError(f"a {mask} lies beyond the {limit} tokens that are read (--max_length)") from error
        outputs = [outputs] if len(rows) == 1 else outputs
        return [{"answers": output} for output in outputs]

    return predict


def find_entities(config: PredictConfig, pipe: Any) -> Predict:
    """Answers with `entities`; a text longer than the model takes is read in windows, unless tokens stay single."""
    strategy = config.answer.aggregation_strategy
    room = pipe.tokenizer.model_max_length - pipe.tokenizer.num_special_tokens_to_add()
    windowed = strategy != "none" and pipe.tokenizer.is_fast
    settings = {"stride": min(config.answer.stride, room // 2)} if windowed else {}

    def predict(rows: list[Row]) -> list[Answer]:
        texts = [row.texts[0] for row in rows]
        outputs = pipe(texts, batch_size=len(rows), aggregation_strategy=strategy, **settings)
        return [{"entities": output} for output in outputs]

    return predict


def continue_text(config: PredictConfig, pipe: Any) -> Predict:
    """Answers with `generated_text`, the text and what follows; a text that is too long is cut at its beginning."""
    top_k = config.top_k or 1
    settings = generate_settings(pipe.model, config.generate, top_k)
    tokenizer = pipe.tokenizer
    tokenizer.truncation_side = "left"
    new = settings.get("max_new_tokens") or 0
    encode = {"truncation": True, "max_length": max(1, tokenizer.model_max_length - new)}
    empty = tokenizer.bos_token or tokenizer.eos_token

    def predict(rows: list[Row]) -> list[Answer]:
        texts = [row.texts[0] or empty for row in rows]
        outputs = pipe(
            texts, batch_size=len(rows), return_full_text=False, tokenizer_encode_kwargs=encode, **settings
        )
        written = [
            [row.texts[0] + item["generated_text"] for item in output]
            for row, output in zip(rows, outputs, strict=True)
        ]
        return [answer("text-generation", texts) for texts in written]

    return predict


PIPELINES: dict[str, Callable[[PredictConfig, Any], Predict]] = {
    "sentiment-analysis": classify,
    "zero-shot-classification": choose_label,
    "fill-mask": fill_mask,
    "ner": find_entities,
    "text-generation": continue_text,
}
