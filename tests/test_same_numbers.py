"""The final test of train.py, eval.py and predict.py give a text the same probabilities, whatever the model and the text."""

import json
from pathlib import Path

import pytest

from tests.conftest import Command, read_lines, sentences, write_csv
from tests.tiny_models import trainable

FAST = ("roberta", "gpt2", "t5", "xlnet", "big_bird", "fnet")
SLOW = (
    *("albert", "bart", "bert", "camembert", "convbert", "deberta-v2", "distilbert", "electra", "funnel", "llama"),
    *("longformer", "modernbert", "mpnet", "openai-gpt", "qwen2"),
)
TEXTS = [
    *("", "the film was </s> quite good", "<pad> <s> dull [SEP] <mask>", "good", "a plot", "bad " * 100),
    *(text for text, _ in sentences(12, seed=3)),
]


@pytest.mark.parametrize("kind", [*FAST, *(pytest.param(kind, marks=pytest.mark.slow) for kind in SLOW)])
def test_all_scripts_give_a_text_the_same_probabilities(kind: str, call: Command, tmp_path: Path) -> None:
    model = trainable(kind, tmp_path / "model")
    files = [write_csv(tmp_path / f"{role}.csv", sentences(24, seed)) for seed, role in enumerate(("train", "dev"))]
    rows = [{"text": text, "label": "good"} for text in TEXTS]
    test = tmp_path / "test.jsonl"
    test.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--train_file", files[0], "--validation_file", files[1], "--test_file", test, "--max_steps", 2]
    more = ["--mixed_precision", "no", "--per_device_eval_batch_size"]
    call("train.py", "--model", model, *flags, "--report_to", "none", "--output_dir", "run", *more, 64)
    call("eval.py", "--run", "run", "--output_dir", "scored", *more, 3)
    call("predict.py", "--model", "run", "--input", test, "--output", "answers.jsonl", *more, 5)
    trained, scored = (read_lines(tmp_path / name / "predictions.jsonl") for name in ("run/eval-test", "scored"))
    for row, again, answer in zip(trained, scored, read_lines(tmp_path / "answers.jsonl"), strict=True):
        assert answer["label"] == row["predicted"]
        assert again["probabilities"] == pytest.approx(row["probabilities"], abs=1e-5)
        assert answer["probabilities"] == pytest.approx(row["probabilities"], abs=1e-5)
    assert len({row["probabilities"]["good"] for row in trained}) > len(TEXTS) - 6
