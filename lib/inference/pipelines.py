"""Classification, and zero-shot classification, fill-mask and NER by the pipelines of transformers."""

import dataclasses
import logging
from typing import Any

import numpy as np
import torch
from transformers.pipelines import PipelineException

from lib.config.sections import CLASSIFICATION, MULTI_LABEL, REGRESSION, words
from lib.data.encoding import Encoder, model_inputs
from lib.data.loader import build_collator, build_loader, to_device
from lib.data.tokenization import check_windows, stored_windows
from lib.errors import UserError
from lib.evaluation.calibration import stored_temperature
from lib.evaluation.padding import try_padding, use_segments
from lib.evaluation.predictions import DEFAULT_THRESHOLD
from lib.evaluation.thresholds import choose_thresholds, has_thresholds, stored_thresholds
from lib.inference.inputs import Example
from lib.inference.load import Task
from lib.inference.stream import Predict, Prediction
from lib.model.forward import compute_logits, pool_logits
from lib.model.load import label_names
from lib.model.padding import NOTES, UNPADDED
from lib.runtime.memory import is_out_of_memory

logger = logging.getLogger(__name__)


def build_classification(task: Task) -> Predict:
    """Predictions with `label` and `probabilities` by class; multi-label: `labels`, those that reach their threshold.

    Thresholds are those of --threshold, else those in the model's configuration, else 0.5. Logits are divided by the
    temperature there before they become probabilities, by the function that the model was trained with. The label is None
    below --abstain_below. With --function_to_apply none there are `logits` instead of `probabilities`. Regression gives
    `score`, or `scores` by name if there are several. Token ids, batches and forward are those of evaluation, so that the
    numbers are, too. Raises UserError for --threshold and --abstain_below where the model does not fit.
    """
    config, tokenizer, model = task.config, task.tokenizer, task.model
    names, problem, limit = label_names(model), model.config.problem_type, tokenizer.model_max_length
    windows = stored_windows(tokenizer)
    encoder = Encoder(tokenizer, limit, windows and dataclasses.replace(windows, max_length=limit))
    collator = build_collator(tokenizer, "no", model.device, limit if task.trained_on.pad_to_max_length else None)
    leak, packed = None, config.padding_free
    if packed:
        use_segments(model, tokenizer, collator, limit, task.mixed_precision)
    elif config.inputs.several:
        leak = try_padding(model, tokenizer, collator, limit)
    if leak is not None:
        logger.warning(NOTES[leak])
    collator, size = dataclasses.replace(collator, packed=packed), task.batch_size
    usual = usual_function(model.config)
    function = config.function_to_apply or usual
    key = "logits" if config.function_to_apply == "none" else "scores" if function == "none" else "probabilities"
    kind = problem or CLASSIFICATION
    stored = stored_thresholds(model.config) if has_thresholds(kind, len(names)) else None
    own = choose_thresholds(config.threshold, kind, names, stored)
    found = stored if own is None else own
    thresholds = np.full(len(names), DEFAULT_THRESHOLD) if found is None else found
    temperature = 1.0 if usual == "none" else stored_temperature(model.config) or 1.0
    if config.abstain_below is not None and (kind != CLASSIFICATION or len(names) == 1):
        what = words(kind) if kind != CLASSIFICATION else "a single output"
        raise UserError(f"--abstain_below is for models that give one class of several, this is {what}")

    @torch.inference_mode()
    def predict(examples: list[Example]) -> list[Prediction]:
        columns = list(zip(*(example.texts for example in examples), strict=True))
        if encoder.windows:
            check_windows(tokenizer, encoder.windows, len(columns))
        encoded = encoder(columns)
        rows, counts = model_inputs(encoded), encoded.get("num_windows", [1] * len(examples))
        while (logits := logits_of(rows)) is None:
            pass
        return [to_prediction(row) for row in pool_logits(logits, counts).numpy()]

    def logits_of(rows: list[dict[str, Any]]) -> torch.Tensor | None:
        """The logits of rows of tokens, on the CPU; None, and smaller batches from then on, where memory was too short."""
        nonlocal size
        lengths = np.array([len(row["input_ids"]) for row in rows])
        pieces = size.pieces(lengths, packed)
        try:
            loader = build_loader(rows, pieces, collator)
            parts = [compute_logits(model, to_device(batch, model.device), leak in UNPADDED) for batch in loader]
            return torch.cat(parts).cpu()[np.concatenate(pieces).argsort()]
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        size = size.halved(lengths, packed)
        return None

    def to_prediction(logits: np.ndarray) -> Prediction:
        probable = apply_function(usual, logits.astype(np.float64) / temperature)
        scores = probable if function == usual else apply_function(function, logits)
        if key == "scores" and len(names) == 1:
            return {"score": float(scores[0])}
        ranked = np.argsort(-logits, kind="stable").tolist()
        chosen: Prediction = {}
        if kind == MULTI_LABEL:
            chosen = {"labels": [names[i] for i in ranked if probable[i] >= thresholds[i]]}
        elif len(names) > 1:
            place = ranked[0] if found is None else int(probable[1] >= thresholds[1])
            abstains = config.abstain_below is not None and not scores[place] >= config.abstain_below
            chosen = {"label": None if abstains else names[place]}
        listed = ranked[: config.top_k] if config.top_k else range(len(names))
        return chosen | {key: {names[i]: float(scores[i]) for i in listed}}

    return predict


def usual_function(hf_config: Any) -> str:
    """The function from logits to probabilities that fits the problem that a classifier was trained for."""
    if hf_config.problem_type == REGRESSION:
        return "none"
    return "sigmoid" if hf_config.problem_type == MULTI_LABEL or hf_config.num_labels == 1 else "softmax"


def apply_function(function: str, logits: np.ndarray) -> np.ndarray:
    """float64 (outputs,): the softmax, the sigmoid, or with `none` the logits themselves."""
    from scipy.special import expit, softmax  # not before something is predicted

    return {"softmax": softmax, "sigmoid": expit, "none": np.asarray}[function](logits.astype(np.float64))


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
        "batch_size": config.eval_samples,
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
