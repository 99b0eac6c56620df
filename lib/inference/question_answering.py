"""Answers as spans of a context: windows over long texts, the search over start and end logits, and no answer at all.

Spans and their scores are those of BERT on SQuAD (Devlin et al., NAACL 2019, section 4.3).
"""

import dataclasses
from typing import Any

import numpy as np
import torch
from transformers import DataCollatorWithPadding

from lib.config.predict import AnswerConfig
from lib.data.batching import chunked
from lib.errors import UserError
from lib.inference.inputs import Row
from lib.inference.stream import Answer, Predict


@dataclasses.dataclass(frozen=True)
class Spans:
    """Candidate answers: `begin` and `end` are int64 places in the context, `score` the sum of two logits, float64."""

    begin: np.ndarray
    end: np.ndarray
    score: np.ndarray


def build_reader(model: Any, tokenizer: Any, config: AnswerConfig, top_k: int, batch_size: int) -> Predict:
    """Answers with `answer`, `score`, `start`, `end`, and with `top_k` above 1 also `answers`, the best first.

    `start` and `end` count characters of the context; `score` is the probability among all spans, and no answer where
    it is allowed. Raises UserError for a tokenizer that does not tell where its tokens stand.
    """
    if not tokenizer.is_fast:
        raise UserError("--task question-answering needs a fast tokenizer, one with a tokenizer.json")
    tokenizer.padding_side = "right"
    collator = DataCollatorWithPadding(tokenizer)

    def predict(rows: list[Row]) -> list[Answer]:
        windows = read_windows(tokenizer, rows, config.stride)
        start, end = window_logits(model, collator, windows, batch_size)
        answers = []
        for number, row in enumerate(rows):
            mine = [i for i, sample in enumerate(windows["overflow_to_sample_mapping"]) if sample == number]
            found = [window_spans(windows, i, start[i], end[i], config.max_answer_len) for i in mine]
            none = min(float(start[i][cls] + end[i][cls]) for i in mine for cls in [cls_place(tokenizer, windows, i)])
            spans = merge_spans(found, none if config.handle_impossible_answer else None)
            answers.append(describe(best_spans(spans, top_k), row.texts[1], top_k))
        return answers

    return predict


def read_windows(tokenizer: Any, rows: list[Row], stride: int) -> Any:
    """Question and context as token ids, the context cut into windows that share `stride` tokens.

    At most half of a window is question, and at most half of what is left is shared, however short the window.
    """
    limit = tokenizer.model_max_length
    special = tokenizer.num_special_tokens_to_add(pair=True)
    room = limit - special
    if room < 4:
        raise UserError(f"--max_length {limit} leaves no room for text beside {special} special tokens")
    questions = [first_tokens(tokenizer, row.texts[0], room // 2) for row in rows]
    return tokenizer(
        questions,
        [row.texts[1] for row in rows],
        truncation="only_second",
        max_length=limit,
        stride=min(stride, (room - room // 2) // 2),
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )


def first_tokens(tokenizer: Any, text: str, count: int) -> str:
    """The part of a text that its first `count` tokens cover."""
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    return text if len(offsets) <= count else text[: offsets[count - 1][1]]


def window_logits(
    model: Any, collator: Any, windows: Any, batch_size: int
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Start and end logits of each window, float64 (tokens,), without those of padding."""
    names = [name for name in collator.tokenizer.model_input_names if name in windows]
    start: list[np.ndarray] = []
    end: list[np.ndarray] = []
    for piece in chunked(np.arange(len(windows["input_ids"])), batch_size):
        batch = collator([{name: windows[name][i] for name in names} for i in piece])
        with torch.inference_mode():
            output = model(**batch.to(model.device))
        for logits, found in ((output.start_logits, start), (output.end_logits, end)):
            values = logits.double().cpu().numpy()
            found += [values[row, : len(windows["input_ids"][i])] for row, i in enumerate(piece)]
    return start, end


def window_spans(windows: Any, index: int, start: np.ndarray, end: np.ndarray, max_answer_len: int) -> Spans:
    """All spans of one window's context of at most `max_answer_len` tokens."""
    places = np.flatnonzero([part == 1 for part in windows.sequence_ids(index)])
    if not len(places):
        return Spans(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))
    offsets = np.asarray(windows["offset_mapping"][index], dtype=np.int64)
    first = places[:, None]
    last = first + np.arange(max_answer_len)
    inside = last <= places[-1]
    first, last = np.broadcast_to(first, last.shape)[inside], last[inside]
    begin, stop = offsets[first, 0], offsets[last, 1]
    whole = stop > begin
    return Spans(begin[whole], stop[whole], (start[first] + end[last])[whole])


def merge_spans(windows: list[Spans], none: float | None) -> Spans:
    """The spans of all windows, each once with its highest score, the best first.

    `none` is the score of no answer, the empty span at 0; without any span it is all there is. Ties go to the earlier
    span.
    """
    begin, end, score = (
        np.concatenate([getattr(spans, name) for spans in windows]) for name in ("begin", "end", "score")
    )
    if none is not None or not len(score):
        begin, end, score = np.append(begin, 0), np.append(end, 0), np.append(score, none or 0.0)
    order = np.lexsort((end, begin, -score))
    _, firsts = np.unique((begin * (end.max() + 1) + end)[order], return_index=True)
    order = order[np.sort(firsts)]
    return Spans(begin[order], end[order], score[order])


def best_spans(spans: Spans, count: int) -> list[tuple[int, int, float]]:
    """(begin, end, probability among all spans) of the best `count`."""
    weights = np.exp(spans.score - spans.score.max())
    shares = weights / weights.sum()
    return [(int(spans.begin[i]), int(spans.end[i]), float(shares[i])) for i in range(min(count, len(shares)))]


def describe(spans: list[tuple[int, int, float]], context: str, top_k: int) -> Answer:
    answers = [
        {"answer": context[begin:end], "score": share, "start": begin, "end": end} for begin, end, share in spans
    ]
    return answers[0] | ({"answers": answers} if top_k > 1 else {})


def cls_place(tokenizer: Any, windows: Any, index: int) -> int:
    """Where a window has the token that stands for no answer: the CLS token, or the first."""
    ids = windows["input_ids"][index]
    return ids.index(tokenizer.cls_token_id) if tokenizer.cls_token_id in ids else 0
