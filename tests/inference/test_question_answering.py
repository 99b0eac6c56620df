"""The span that is answered is the best of all spans of all windows, found by looking at every one."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

from lib.config.predict import AnswerConfig
from lib.errors import UserError
from lib.inference.inputs import Row
from lib.inference.question_answering import Spans, best_spans, build_reader, merge_spans, read_windows
from tests import tiny_models
from tests.conftest import WORDS, sentences
from tests.predicting import answers

QUESTION = "was the film good"


def text_of(length: int, seed: int) -> str:
    rng = np.random.default_rng(seed)
    return " ".join(rng.choice([*WORDS, *map(str, range(60))], length))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.reader(tmp_path_factory.mktemp("reader"))


@pytest.fixture(scope="module")
def parts(folder):
    return AutoModelForQuestionAnswering.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def by_looking_at_every_span(parts, question: str, context: str, limit: int, stride: int, longest: int, none: bool):
    """The spans {(begin, end): score} of windows cut by hand; (0, 0) stands for no answer."""
    model, tokenizer = parts
    asked, words = tokenizer.tokenize(question), context.split()
    room = limit - len(asked) - 4
    scores: dict[tuple[int, int], float] = {}
    nulls = []
    for first in range(0, len(words), room - stride):
        window = words[first : first + room]
        tokens = ["<s>", *asked, "</s>", "</s>", *window, "</s>"]
        with torch.no_grad():
            output = model(input_ids=torch.tensor([tokenizer.convert_tokens_to_ids(tokens)]))
        start, end = output.start_logits[0].tolist(), output.end_logits[0].tolist()
        nulls.append(start[0] + end[0])
        for i in range(len(window)):
            for j in range(i, min(i + longest, len(window))):
                begin = len(" ".join([*words[: first + i], ""]))
                stop = begin + len(" ".join(window[i : j + 1]))
                score = start[len(asked) + 3 + i] + end[len(asked) + 3 + j]
                scores[begin, stop] = max(score, scores.get((begin, stop), -np.inf))
        if first + room >= len(words):
            break
    return scores | ({(0, 0): min(nulls)} if none else {})


@pytest.mark.parametrize("none", [False, True])
@pytest.mark.parametrize(("length", "longest"), [(1, 30), (12, 3), (25, 30), (200, 4), (200, 30)])
def test_the_answer_is_the_best_of_all_spans_in_all_windows(parts, length, longest, none):
    model, tokenizer = parts
    tokenizer.model_max_length = 40
    config = AnswerConfig(stride=7, max_answer_len=longest, handle_impossible_answer=none)
    context = text_of(length, length)
    (found,) = build_reader(model, tokenizer, config, 5, 3)([Row(0, 0, (QUESTION, context))])
    scores = by_looking_at_every_span(parts, QUESTION, context, 40, 7, longest, none)
    ranked = sorted(scores, key=lambda span: (-scores[span], span))[:5]
    total = np.exp(np.array(list(scores.values())) - max(scores.values())).sum()
    shares = [np.exp(scores[span] - max(scores.values())) / total for span in ranked]
    assert [(item["start"], item["end"]) for item in found["answers"]] == ranked
    assert [item["score"] for item in found["answers"]] == pytest.approx(shares, abs=1e-5)
    assert found["answer"] == context[found["start"] : found["end"]]
    assert {"answer", "score", "start", "end"} < set(found)


def test_no_answer_is_given_where_its_score_is_the_highest_in_every_window():
    """The least of its scores counts: a single window that sees the answer is enough."""
    spans = [Spans(np.array([4]), np.array([9]), np.array([2.0]))]
    assert best_spans(merge_spans(spans, 3.0), 1)[0][:2] == (0, 0)
    assert best_spans(merge_spans(spans, 1.0), 1)[0][:2] == (4, 9)
    assert best_spans(merge_spans(spans, None), 1) == [(4, 9, 1.0)]


def test_a_span_seen_by_two_windows_counts_once_with_its_higher_score():
    left = Spans(np.array([0, 4]), np.array([3, 9]), np.array([1.0, 2.0]))
    right = Spans(np.array([4, 6]), np.array([9, 9]), np.array([5.0, 1.0]))
    merged = merge_spans([left, right], None)
    assert list(zip(merged.begin, merged.end, merged.score, strict=True)) == [(4, 9, 5.0), (0, 3, 1.0), (6, 9, 1.0)]


@pytest.mark.parametrize("batch_size", [3, 64])
def test_rows_are_answered_by_themselves_whatever_the_batch(folder, tmp_path, batch_size):
    rows = [(text, text_of(9 * i + 1, i)) for i, (text, _) in enumerate(sentences(9))]
    lines = ["question\tcontext", *("\t".join(row) for row in rows)]
    file = tmp_path / "questions.tsv"
    file.write_text("\n".join(lines) + "\n")
    flags = ["--task", "question-answering", "--model", folder, "--max_length", 40, "--stride", 5]
    found = answers("--input", file, *flags, "--per_device_eval_batch_size", batch_size)
    assert [row["text"] for row in found] == [list(row) for row in rows]
    single = answers("--input", file, *flags, "--per_device_eval_batch_size", 1)
    assert answers("--question", rows[8][0], "--context", rows[8][1], *flags)[0]["answer"] == single[8]["answer"]
    for row, alone in zip(found, single, strict=True):
        assert (row["answer"], row["start"]) == (alone["answer"], alone["start"])
        assert row["score"] == pytest.approx(alone["score"], abs=1e-5)


def test_an_empty_context_has_no_answer_and_breaks_nothing(folder):
    (row,) = answers("--question", "film", "--context", " ", "--task", "question-answering", "--model", folder)
    assert (row["answer"], row["start"], row["end"], row["score"]) == ("", 0, 0, 1.0)


def test_a_question_longer_than_the_model_leaves_room_for_the_context(parts):
    _, tokenizer = parts
    tokenizer.model_max_length = 24
    windows = read_windows(tokenizer, [Row(0, 0, (text_of(300, 1), text_of(50, 2)))], stride=128)
    assert max(map(len, windows["input_ids"])) == 24
    seen = {
        place
        for i in range(len(windows["input_ids"]))
        for place, part in zip(windows["offset_mapping"][i], windows.sequence_ids(i), strict=True)
        if part == 1
    }
    assert len(seen) == 50
    tokenizer.model_max_length = 7
    with pytest.raises(UserError, match="no room for text beside 4 special tokens"):
        read_windows(tokenizer, [Row(0, 0, ("a", "b"))], stride=1)
