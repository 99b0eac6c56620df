"""Extractive question answering: windows over long contexts, and the best span by its start and end logits.

Spans and their scores are those of BERT on SQuAD (Devlin et al., NAACL 2019, section 4.3).
"""

import dataclasses
from typing import Any

import numpy as np
import torch
from transformers import DataCollatorWithPadding

from lib.data.batching import chunked
from lib.errors import UserError
from lib.inference.inputs import Example
from lib.inference.load import Task
from lib.inference.stream import Predict, Prediction


@dataclasses.dataclass(frozen=True)
class Spans:
    """Candidate answers: `begin` and `end` are int64 character positions, `score` the sum of two logits, float64."""

    begin: np.ndarray
    end: np.ndarray
    score: np.ndarray


def build_question_answering(task: Task) -> Predict:
    """Predictions with `answer`, `score`, `start`, `end`; with --top_k above 1 also `answers`, the best first.

    `start` and `end` count characters of the context. `score` is the softmax over all spans and, with
    --handle_impossible_answer, the empty answer. Raises UserError for a tokenizer without character offsets.
    """
    config, model, tokenizer, top_k = task.config.span, task.model, task.tokenizer, task.config.top_k or 1
    if not tokenizer.is_fast:
        raise UserError("--task question-answering needs a fast tokenizer, one with a tokenizer.json")
    tokenizer.padding_side = "right"

    def predict(examples: list[Example]) -> list[Prediction]:
        windows = context_windows(tokenizer, examples, config.stride)
        starts, ends = window_logits(model, tokenizer, windows, task.config.eval_samples)
        example_of = np.array(windows["overflow_to_sample_mapping"])
        predictions = []
        for number, example in enumerate(examples):
            mine = np.flatnonzero(example_of == number).tolist()
            found = [window_spans(windows, i, starts[i], ends[i], config.max_answer_len) for i in mine]
            empty = None
            if config.handle_impossible_answer:
                # The lowest score counts: the answer is empty only if every window says so.
                cls = [cls_position(tokenizer, windows["input_ids"][i]) for i in mine]
                empty = min(float(starts[i][at] + ends[i][at]) for i, at in zip(mine, cls, strict=True))
            spans = merge_spans(found, empty)
            answers = [
                {"answer": example.texts[1][begin:end], "score": score, "start": begin, "end": end}
                for begin, end, score in best_spans(spans, top_k)
            ]
            predictions.append(answers[0] | ({"answers": answers} if top_k > 1 else {}))
        return predictions

    return predict


def context_windows(tokenizer: Any, examples: list[Example], stride: int) -> Any:
    """Token ids of question and context, the context in windows that share `stride` tokens.

    A question is truncated to half of a window, and neighbors share at most half of the rest. Raises UserError if a window
    has room for fewer than 4 tokens of text.
    """
    limit = tokenizer.model_max_length
    special = tokenizer.num_special_tokens_to_add(pair=True)
    room = limit - special
    if room < 4:
        raise UserError(f"--max_length {limit} leaves no room for text besides {special} special tokens")
    questions = []
    for example in examples:
        question = example.texts[0]
        encoded = tokenizer(question, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ends = [end for _, end in encoded["offset_mapping"]]
        questions.append(question if len(ends) <= room // 2 else question[: ends[room // 2 - 1]])
    return tokenizer(
        questions,
        [example.texts[1] for example in examples],
        truncation="only_second",
        max_length=limit,
        stride=min(stride, (room - room // 2) // 2),
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )


def window_logits(
    model: Any, tokenizer: Any, windows: Any, batch_size: int
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Start and end logits of each window, float64 (tokens,), without padding."""
    collator = DataCollatorWithPadding(tokenizer)
    names = [name for name in tokenizer.model_input_names if name in windows]
    starts: list[np.ndarray] = []
    ends: list[np.ndarray] = []
    for indices in chunked(np.arange(len(windows["input_ids"])), batch_size):
        batch = collator([{name: windows[name][i] for name in names} for i in indices])
        with torch.inference_mode():
            output = model(**batch.to(model.device))
        for logits, found in ((output.start_logits, starts), (output.end_logits, ends)):
            values = logits.double().cpu().numpy()
            found += [values[row, : len(windows["input_ids"][i])] for row, i in enumerate(indices)]
    return starts, ends


def cls_position(tokenizer: Any, input_ids: list[int]) -> int:
    """Position of the token whose logits score the empty answer: the CLS token, else the first."""
    return input_ids.index(tokenizer.cls_token_id) if tokenizer.cls_token_id in input_ids else 0


def window_spans(windows: Any, index: int, start: np.ndarray, end: np.ndarray, max_answer_len: int) -> Spans:
    """All spans of at most `max_answer_len` tokens in one window's context."""
    positions = np.flatnonzero([part == 1 for part in windows.sequence_ids(index)])
    if not len(positions):
        return Spans(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))
    offsets = np.asarray(windows["offset_mapping"][index], dtype=np.int64)
    first = positions[:, None]
    last = first + np.arange(max_answer_len)
    inside = last <= positions[-1]
    first, last = np.broadcast_to(first, last.shape)[inside], last[inside]
    begin, stop = offsets[first, 0], offsets[last, 1]
    not_empty = stop > begin
    return Spans(begin[not_empty], stop[not_empty], (start[first] + end[last])[not_empty])


def merge_spans(windows: list[Spans], empty: float | None) -> Spans:
    """The spans of all windows, each once with its highest score, best first; ties go to the earlier span.

    `empty` is the score of the empty answer, the span from 0 to 0, and None if an answer is required. Without any span the
    empty answer is the only one.
    """
    begin, end, score = (
        np.concatenate([getattr(spans, name) for spans in windows]) for name in ("begin", "end", "score")
    )
    if empty is not None or not len(score):
        begin, end, score = np.append(begin, 0), np.append(end, 0), np.append(score, empty or 0.0)
    order = np.lexsort((end, begin, -score))
    _, firsts = np.unique((begin * (end.max() + 1) + end)[order], return_index=True)
    order = order[np.sort(firsts)]
    return Spans(begin[order], end[order], score[order])


def best_spans(spans: Spans, count: int) -> list[tuple[int, int, float]]:
    """(begin, end, softmax over all spans) of the first `count`."""
    weights = np.exp(spans.score - spans.score.max())
    shares = weights / weights.sum()
    return list(zip(*(values[:count].tolist() for values in (spans.begin, spans.end, shares)), strict=True))
