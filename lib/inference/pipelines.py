"""The five tasks that a pipeline of transformers answers, each as a function from a batch of rows to their answers."""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers import DataCollatorWithPadding
from transformers.pipelines import PipelineException

from lib.config.predict import PredictConfig
from lib.config.sections import MULTI_LABEL, REGRESSION
from lib.data.batching import chunked
from lib.data.tokenization import Windows, check_windows, encode_windows, stored_windows
from lib.errors import UserError
from lib.evaluation.predictions import PLAIN_THRESHOLD
from lib.evaluation.thresholds import stored_thresholds
from lib.inference.generation import answer, generate_settings, generating
from lib.inference.inputs import Row
from lib.inference.stream import Answer, Predict
from lib.model.forward import pool_logits
from lib.model.load import label_names


def classify(config: PredictConfig, pipe: Any) -> Predict:
    """Answers with `label` and `probabilities` by class; `labels` that reach their threshold where several may hold.

    Thresholds are those in the model's configuration, else one half. Instead of `probabilities`, `logits` where they were
    asked for; of a regression the `score` alone, or `scores` by name where it has several.
    """
    names, problem = label_names(pipe.model), pipe.model.config.problem_type
    apply, windows = config.function_to_apply, stored_windows(pipe.tokenizer)
    key = "logits" if apply == "none" else "scores" if apply is None and problem == REGRESSION else "probabilities"
    least = least_scores(pipe.model.config, names, apply)

    def predict(rows: list[Row]) -> list[Answer]:
        inputs = [dict(zip(("text", "text_pair"), row.texts, strict=False)) for row in rows]
        settings = {"top_k": None} | ({"function_to_apply": apply} if apply else {})
        if windows:
            outputs = read_windows(pipe, rows, windows, config.per_device_eval_batch_size, settings)
        else:
            outputs = pipe(inputs, batch_size=len(rows), truncation=True, **settings)
        return [shape([(item["label"], item["score"]) for item in output]) for output in outputs]

    def shape(ranked: list[tuple[str, float]]) -> Answer:
        if key == "scores" and len(names) == 1:
            return {"score": ranked[0][1]}
        if problem == MULTI_LABEL:
            chosen: Answer = {"labels": [name for name, score in ranked if score >= least[name]]}
        else:
            chosen = {"label": ranked[0][0]} if len(names) > 1 else {}
        ranked = ranked[: config.top_k] if config.top_k else sorted(ranked, key=lambda item: names.index(item[0]))
        return chosen | {key: dict(ranked)}

    return predict


def least_scores(config: Any, names: list[str], apply: str | None) -> dict[str, float]:
    """For each label the least score at which it is given, in the units of the scores."""
    stored = stored_thresholds(config)
    least = np.full(len(names), PLAIN_THRESHOLD) if stored is None else stored
    least = np.log(least) - np.log1p(-least) if apply == "none" else least
    return dict(zip(names, least.tolist(), strict=True))


@torch.inference_mode()
def read_windows(pipe: Any, rows: list[Row], windows: Windows, batch_size: int, settings: dict[str, Any]) -> list[Any]:
    """What the pipeline would give for texts of any length, from the mean logits of their windows.

    Raises UserError for pairs, which the model was not trained on.
    """
    windows = dataclasses.replace(windows, max_length=pipe.tokenizer.model_max_length)
    check_windows(pipe.tokenizer, windows, max(len(row.texts) for row in rows))
    encoded = encode_windows(pipe.tokenizer, [row.texts[0] for row in rows], windows)
    counts = encoded.pop("num_windows")
    flat = {name: list(itertools.chain(*pieces)) for name, pieces in encoded.items()}
    collator, found = DataCollatorWithPadding(pipe.tokenizer), []
    for piece in chunked(np.arange(sum(counts)), batch_size):
        batch = collator([{name: values[i] for name, values in flat.items()} for i in piece])
        found.append(pipe.model(**batch.to(pipe.device)).logits.float())
    _, _, settings = pipe._sanitize_parameters(**settings)
    logits = pool_logits(torch.cat(found), counts).cpu()
    return [pipe.postprocess({"logits": row[None]}, **settings) for row in logits]


def choose_label(config: PredictConfig, pipe: Any) -> Predict:
    """Zero-shot classification: answers as those of a classifier over the candidate labels.

    Raises UserError for a model that was not trained on entailment.
    """
    if pipe.entailment_id == -1:
        names = ", ".join(label_names(pipe.model))
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
            outputs = pipe(texts, batch_size=len(rows), top_k=config.top_k or 5, tokenizer_kwargs={"truncation": True})
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
    room = tokenizer.model_max_length - settings["max_new_tokens"]
    if room < 1:
        raise UserError(f"--max_new_tokens {settings['max_new_tokens']} leaves no room for the text before it")
    encode = {"truncation": True, "max_length": room}
    empty = tokenizer.bos_token or tokenizer.eos_token

    def predict(rows: list[Row]) -> list[Answer]:
        texts = [row.texts[0] or empty for row in rows]
        with generating(config.generate):
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
