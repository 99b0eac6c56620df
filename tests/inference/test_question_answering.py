"""Question answering gives the best of all spans of all windows, as brute force finds it."""

from pathlib import Path

import numpy as np
import pytest
import torch

from lib.errors import UserError
from lib.inference.inputs import Example
from lib.inference.load import Task
from lib.inference.question_answering import Spans, best_spans, context_windows, merge_spans
from lib.inference.tasks import build_predict
from tests import tiny_models
from tests.conftest import WORDS, sentences
from tests.predicting import answers, load

TASK = ("--task", "question-answering")
QUESTION = "was the film good"


def text_of(length: int, seed: int) -> str:
    rng = np.random.default_rng(seed)
    return " ".join(rng.choice([*WORDS, *map(str, range(60))], length))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.reader(tmp_path_factory.mktemp("reader"))


def brute_force_spans(task: Task, question: str, context: str) -> dict[tuple[int, int], float]:
    """The spans {(begin, end): score} of windows cut by hand; (0, 0) is the empty answer."""
    model, tokenizer, config = task.model, task.tokenizer, task.config.span
    stride, longest = config.stride, config.max_answer_len
    asked, words = tokenizer.tokenize(question), context.split()
    room = tokenizer.model_max_length - len(asked) - 4
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
    return scores | ({(0, 0): min(nulls)} if config.handle_impossible_answer else {})


@pytest.mark.parametrize("empty", [False, True])
@pytest.mark.parametrize(("length", "longest"), [(1, 30), (12, 3), (25, 30), (200, 4), (200, 30)])
def test_answers_are_the_best_spans_of_all_windows(folder, length, longest, empty):
    flags = ["--max_length", 40, "--stride", 7, "--max_answer_len", longest, "--handle_impossible_answer", empty]
    task = load(*TASK, "--model", folder, *flags, "--top_k", 5, "--per_device_eval_batch_size", 3)
    context = text_of(length, length)
    (found,) = build_predict(task)([Example(0, 0, (QUESTION, context))])
    scores = brute_force_spans(task, QUESTION, context)
    ranked = sorted(scores, key=lambda span: (-scores[span], span))[:5]
    total = np.exp(np.array(list(scores.values())) - max(scores.values())).sum()
    shares = [np.exp(scores[span] - max(scores.values())) / total for span in ranked]
    assert [(item["start"], item["end"]) for item in found["answers"]] == ranked
    assert [item["score"] for item in found["answers"]] == pytest.approx(shares, abs=1e-5)
    assert found["answer"] == context[found["start"] : found["end"]]
    assert {"answer", "score", "start", "end"} < set(found)


def test_empty_answer_wins_only_with_a_higher_score_than_every_span():
    spans = [Spans(np.array([4]), np.array([9]), np.array([2.0]))]
    assert best_spans(merge_spans(spans, 3.0), 1)[0][:2] == (0, 0)
    assert best_spans(merge_spans(spans, 1.0), 1)[0][:2] == (4, 9)
    assert best_spans(merge_spans(spans, None), 1) == [(4, 9, 1.0)]


def test_span_of_two_windows_counts_once_with_its_higher_score():
    left = Spans(np.array([0, 4]), np.array([3, 9]), np.array([1.0, 2.0]))
    right = Spans(np.array([4, 6]), np.array([9, 9]), np.array([5.0, 1.0]))
    merged = merge_spans([left, right], None)
    assert list(zip(merged.begin, merged.end, merged.score, strict=True)) == [(4, 9, 5.0), (0, 3, 1.0), (6, 9, 1.0)]


@pytest.mark.parametrize("batch_size", [3, 64])
def test_batch_does_not_change_answers(folder, tmp_path, batch_size):
    rows = [(text, text_of(9 * i + 1, i)) for i, (text, _) in enumerate(sentences(9))]
    lines = ["question\tcontext", *("\t".join(row) for row in rows)]
    file = tmp_path / "questions.tsv"
    file.write_text("\n".join(lines) + "\n")
    flags = [*TASK, "--model", folder, "--max_length", 40, "--stride", 5]
    found = answers("--input", file, *flags, "--per_device_eval_batch_size", batch_size)
    assert [row["text"] for row in found] == [list(row) for row in rows]
    single = answers("--input", file, *flags, "--per_device_eval_batch_size", 1)
    assert answers("--question", rows[8][0], "--context", rows[8][1], *flags)[0]["answer"] == single[8]["answer"]
    for row, alone in zip(found, single, strict=True):
        assert (row["answer"], row["start"]) == (alone["answer"], alone["start"])
        assert row["score"] == pytest.approx(alone["score"], abs=1e-5)


def test_empty_context_gets_the_empty_answer(folder):
    (row,) = answers("--question", "film", "--context", " ", *TASK, "--model", folder)
    assert (row["answer"], row["start"], row["end"], row["score"]) == ("", 0, 0, 1.0)


def test_long_question_leaves_room_for_the_context(folder):
    tokenizer = load(*TASK, "--model", folder, "--max_length", 24).tokenizer
    windows = context_windows(tokenizer, [Example(0, 0, (text_of(300, 1), text_of(50, 2)))], stride=128)
    assert max(map(len, windows["input_ids"])) == 24
    seen = {
        place
        for i in range(len(windows["input_ids"]))
        for place, part in zip(windows["offset_mapping"][i], windows.sequence_ids(i), strict=True)
        if part == 1
    }
    assert len(seen) == 50
    tokenizer.model_max_length = 7
    with pytest.raises(UserError, match="no room for text besides 4 special tokens"):
        context_windows(tokenizer, [Example(0, 0, ("a", "b"))], stride=1)
