"""Classification, zero-shot classification, fill-mask and NER, by the pipelines of transformers."""

import dataclasses
import itertools
from typing import Any

import numpy as np
import torch
from transformers import DataCollatorWithPadding
from transformers.pipelines import PipelineException

from lib.config.sections import MULTI_LABEL, REGRESSION
from lib.data.batching import chunked
from lib.data.tokenization import Windows, check_windows, encode_windows, stored_windows
from lib.errors import UserError
from lib.evaluation.predictions import DEFAULT_THRESHOLD
from lib.evaluation.thresholds import stored_thresholds
from lib.inference.inputs import Example
from lib.inference.load import Task
from lib.inference.stream import Predict, Prediction
from lib.model.forward import pool_logits
from lib.model.load import label_names


def build_classification(task: Task) -> Predict:
    """Predictions with `label` and `probabilities` by class; multi-label: `labels`, those that reach their threshold.

    Thresholds are those in the model's configuration, else 0.5. With --function_to_apply none there are `logits` instead
    of `probabilities`. Regression gives `score`, or `scores` by name if there are several.
    """
    config, pipe = task.config, task.pipeline()
    names, problem = label_names(task.model), task.model.config.problem_type
    function, windows = config.function_to_apply, stored_windows(task.tokenizer)
    settings = {"top_k": None} | ({"function_to_apply": function} if function else {})
    key = (
        "logits" if function == "none" else "scores" if function is None and problem == REGRESSION else "probabilities"
    )
    stored = stored_thresholds(task.model.config)
    thresholds = np.full(len(names), DEFAULT_THRESHOLD) if stored is None else stored
    if function == "none":
        thresholds = np.log(thresholds) - np.log1p(-thresholds)
    threshold_of = dict(zip(names, thresholds.tolist(), strict=True))

    def predict(examples: list[Example]) -> list[Prediction]:
        if windows:
            outputs = classify_windows(pipe, examples, windows, config.per_device_eval_batch_size, settings)
        else:
            inputs = [dict(zip(("text", "text_pair"), example.texts, strict=False)) for example in examples]
            outputs = pipe(inputs, batch_size=len(examples), truncation=True, **settings)
        return [to_prediction([(item["label"], item["score"]) for item in output]) for output in outputs]

    def to_prediction(ranked: list[tuple[str, float]]) -> Prediction:
        if key == "scores" and len(names) == 1:
            return {"score": ranked[0][1]}
        if problem == MULTI_LABEL:
            chosen: Prediction = {"labels": [name for name, score in ranked if score >= threshold_of[name]]}
        else:
            chosen = {"label": ranked[0][0]} if len(names) > 1 else {}
        ranked = ranked[: config.top_k] if config.top_k else sorted(ranked, key=lambda item: names.index(item[0]))
        return chosen | {key: dict(ranked)}

    return predict


@torch.inference_mode()
def classify_windows(
    pipe: Any, examples: list[Example], windows: Windows, batch_size: int, settings: dict[str, Any]
) -> list[Any]:
    """The pipeline's output for texts of any length, from the mean logits of their windows.

    Raises UserError for text pairs, which cannot be read in windows.
    """
    windows = dataclasses.replace(windows, max_length=pipe.tokenizer.model_max_length)
    check_windows(pipe.tokenizer, windows, max(len(example.texts) for example in examples))
    encoded = encode_windows(pipe.tokenizer, [example.texts[0] for example in examples], windows)
    counts = encoded.pop("num_windows")
    flat = {name: list(itertools.chain(*pieces)) for name, pieces in encoded.items()}
    collator, logits = DataCollatorWithPadding(pipe.tokenizer), []
    for indices in chunked(np.arange(sum(counts)), batch_size):
        batch = collator([{name: values[i] for name, values in flat.items()} for i in indices])
        logits.append(pipe.model(**batch.to(pipe.device)).logits.float())
    _, _, settings = pipe._sanitize_parameters(**settings)
    return [pipe.postprocess({"logits": row[None]}, **settings) for row in pool_logits(torch.cat(logits), counts).cpu()]


def build_zero_shot(task: Task) -> Predict:
    """Predictions with `label` and `probabilities` over the candidate labels.

    Raises UserError for a model that was not trained on entailment.
    """
    config, pipe = task.config, task.pipeline()
    if pipe.entailment_id == -1:
        names = ", ".join(label_names(task.model))
        raise UserError(
            f"--model {config.model.model} was not trained on entailment (its classes: {names}); "
            "--task zero-shot-classification needs an NLI model, such as facebook/bart-large-mnli"
        )
    settings = {
        "candidate_labels": list(config.zero_shot.candidate_labels),
        "hypothesis_template": config.zero_shot.hypothesis_template,
        "multi_label": config.zero_shot.multi_label,
        "batch_size": config.per_device_eval_batch_size,
    }

    def predict(examples: list[Example]) -> list[Prediction]:
        # The pipeline refuses an empty text.
        outputs = pipe([example.texts[0] or " " for example in examples], **settings)
        ranked = [dict(list(zip(o["labels"], o["scores"], strict=True))[: config.top_k]) for o in outputs]
        return [{"label": next(iter(scores)), "probabilities": scores} for scores in ranked]

    return predict


def build_fill_mask(task: Task) -> Predict:
    """Predictions with `answers`, the likeliest fillings; a list for each mask if a text has several.

    `<mask>` and `[MASK]` both stand for the model's own mask token. Raises UserError for a model without a mask token, a
    text without a mask, and a mask that is truncated.
    """
    mask = task.tokenizer.mask_token
    if mask is None:
        raise UserError(f"--model {task.config.model.model}: its tokenizer has no mask; name a masked language model")
    pipe, top_k = task.pipeline(), task.config.top_k or 5

    def predict(examples: list[Example]) -> list[Prediction]:
        texts = [example.texts[0].replace("<mask>", mask).replace("[MASK]", mask) for example in examples]
        for example, text in zip(examples, texts, strict=True):
            if mask not in text:
                raise UserError(f"row {example.number + 1} has no {mask}; --task fill-mask fills that in")
        try:
            outputs = pipe(texts, batch_size=len(texts), top_k=top_k, tokenizer_kwargs={"truncation": True})
        except PipelineException as error:
            limit = task.tokenizer.model_max_length
            raise UserError(f"a {mask} lies beyond the {limit} tokens that are read (--max_length)") from error
        return [{"answers": output} for output in ([outputs] if len(texts) == 1 else outputs)]

    return predict


def build_ner(task: Task) -> Predict:
    """Predictions with `entities`.

    A text longer than the model's input is read in windows; with --aggregation_strategy none it is truncated.
    """
    config, tokenizer, pipe = task.config.span, task.tokenizer, task.pipeline()
    settings: dict[str, Any] = {"aggregation_strategy": config.aggregation_strategy}
    if config.aggregation_strategy != "none" and tokenizer.is_fast:
        room = tokenizer.model_max_length - tokenizer.num_special_tokens_to_add()
        settings["stride"] = min(config.stride, room // 2)

    def predict(examples: list[Example]) -> list[Prediction]:
        outputs = pipe([example.texts[0] for example in examples], batch_size=len(examples), **settings)
        return [{"entities": output} for output in outputs]

    return predict
