"""--padding_free through the commands: the same scores and predictions as with padding, on any number of processes."""

import functools
import json
import shutil
from pathlib import Path

import pytest

from benchmarks import padding_free
from lib.config.cli import parse_cli
from lib.config.train import TrainConfig
from lib.run.introduction import describe_padding
from lib.training.state import State
from tests.conftest import Command, read_lines, results_of, sentences, write_csv
from tests.tiny_models import trainable

NO_DROPOUT = ["hidden_dropout_prob=0.0", "attention_probs_dropout_prob=0.0"]
FLAGS = ["--report_to", "none", "--mixed_precision", "no", "--lr", 1e-3, "--bs", 8, "--config_overrides", *NO_DROPOUT]
LONG = " ".join(["the film was good and the plot was not"] * 6)


def files(folder: Path) -> list[object]:
    """Texts of 4 to 50 tokens, and files of them by the flags of train.py."""
    flags: list[object] = []
    for seed, role in enumerate(("train", "validation", "test")):
        rows = [
            (f"{text} {LONG}" if index % 5 == 0 else text, label)
            for index, (text, label) in enumerate(sentences(24, seed))
        ]
        flags += [f"--{role}_file", write_csv(folder / f"{role}.csv", rows)]
    return flags


def train(call: Command, folder: Path, model: Path, name: str, *flags: object) -> tuple[dict, list[dict]]:
    """results.json and metrics.jsonl of a short run."""
    call("train.py", "--model", model, *files(folder), "--epochs", 2, "--output_dir", name, *FLAGS, *flags)
    return json.loads((folder / name / "results.json").read_text()), read_lines(folder / name / "metrics.jsonl")


def test_training_and_scores_are_those_with_padding(call: Command, roberta: Path, tmp_path: Path) -> None:
    """Without dropout; in micro-batches of another size; and what other scripts make of the model."""
    padded, curve = train(call, tmp_path, roberta, "padded")
    found, packed = train(call, tmp_path, roberta, "packed", "--padding_free", "--per_device_train_batch_size", 3)
    assert len(curve) == len(packed) > 1
    for line, other in zip(curve, packed, strict=True):
        for key in ("train/loss", "train/grad_norm", "eval/loss", "eval/accuracy"):
            assert (key in line) == (key in other)
            assert other.get(key) == pytest.approx(line.get(key), abs=1e-5, rel=1e-4)
    assert found["test/loss"] == pytest.approx(padded["test/loss"], abs=1e-5)
    assert json.loads((tmp_path / "packed/record.json").read_text())["attention"] == "segments"
    assert "segments" not in (tmp_path / "packed/model/config.json").read_text()
    with_padding, without = (json.loads((tmp_path / n / "record.json").read_text()) for n in ("padded", "packed"))
    for name in ("group_by_length", "evaluation"):
        assert with_padding[f"padding_{name}"] > 0 == without[f"padding_{name}"]
    for name in ("random", "pad_to_max_length"):
        assert with_padding[f"padding_{name}"] == without[f"padding_{name}"] > 0

    usual = results_of(call("eval.py", "--run", "packed", "--output_dir", "usual"))
    again = results_of(call("eval.py", "--run", "packed", "--output_dir", "again", "--padding_free"))
    assert again["test/loss"] == pytest.approx(usual["test/loss"], abs=1e-6)
    for row, other in zip(
        *(read_lines(tmp_path / name / "predictions.jsonl") for name in ("usual", "again")), strict=True
    ):
        assert other["predicted"] == row["predicted"]
        assert other["probabilities"] == pytest.approx(row["probabilities"], abs=1e-5)

    flags = ["--model", "packed", "--input", "test.csv", "--mixed_precision", "no", "--output"]
    call("predict.py", *flags, "usual.jsonl")
    call("predict.py", *flags, "again.jsonl", "--padding_free", "--per_device_eval_batch_size", 5)
    for row, other in zip(read_lines(tmp_path / "usual.jsonl"), read_lines(tmp_path / "again.jsonl"), strict=True):
        assert other["label"] == row["label"]
        assert other["probabilities"] == pytest.approx(row["probabilities"], abs=1e-5)


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(call: Command, run: Command, roberta: Path, tmp_path: Path) -> None:
    one, curve = train(call, tmp_path, roberta, "one", "--padding_free")
    flags = ["--model", roberta, *files(tmp_path), "--epochs", 2, "--output_dir", "two", *FLAGS, "--padding_free"]
    two = results_of(run("train.py", *flags, processes=2))
    assert two["run/num_processes"] == 2
    for key in ("test/loss", "test/accuracy"):
        assert two[key] == pytest.approx(one[key], abs=1e-5)
    for line, other in zip(curve, read_lines(tmp_path / "two/metrics.jsonl"), strict=True):
        assert other.get("train/loss") == pytest.approx(line.get("train/loss"), abs=1e-5)
    scored = results_of(run("eval.py", "--run", "one", "--output_dir", "scored", "--padding_free", processes=2))
    assert scored["run/num_processes"] == 2
    assert scored["test/loss"] == pytest.approx(one["test/loss"], abs=1e-6)


@pytest.mark.slow
def test_two_processes_predict_what_one_does(call: Command, run: Command, roberta: Path, tmp_path: Path) -> None:
    train(call, tmp_path, roberta, "run")
    flags = ["--model", "run", "--input", "test.csv", "--mixed_precision", "no", "--padding_free"]
    flags += ["--per_device_eval_batch_size", 5, "--output"]
    call("predict.py", *flags, "one.jsonl")
    done = run("predict.py", *flags, "two.jsonl", processes=2)
    assert done.stderr.count("24 rows in") == 1  # by the first of two: one that is alone would say it, too
    one, two = (read_lines(tmp_path / f"{name}.jsonl") for name in ("one", "two"))
    assert len(one) == len(two) == 24
    for row, other in zip(one, two, strict=True):
        assert (other["text"], other["label"]) == (row["text"], row["label"])
        assert other["probabilities"] == pytest.approx(row["probabilities"], abs=1e-6)


def test_the_start_block_says_that_there_is_no_padding() -> None:
    shares = {"group_by_length": 0.25, "random": 0.5, "pad_to_max_length": 0.75, "evaluation": 0.1}
    settings = {f"run/padding_{name}": share for name, share in shares.items()}
    usual = describe_padding(TrainConfig(), settings)
    assert usual.startswith("25.0% of the positions in training (group_by_length), 10.0% in evaluation")
    said = describe_padding(parse_cli(TrainConfig, ["--padding_free"]), settings)
    assert said == "none, texts stand in one row; it would be: random 50.0%, pad_to_max_length 75.0%"


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (("--pad_to_max_length",), "--pad_to_max_length"),
        (("--compile",), "--compile"),
        (("--freeze", "embeddings"), "--no_cache_features"),
        (("--adapter", "prompt"), "--adapter prompt"),
        (("--freeze", "backbone", "--no_cache_features", "--head_solver", "lbfgs"), "--head_solver"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    flags: tuple[str, ...], reason: str, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_cli(TrainConfig, ["--padding_free", *flags])
    assert ended.value.code == 2
    assert reason in (message := capsys.readouterr().err)
    assert "leave" in message


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (("--attn_implementation", "eager"), "by sdpa or FlashAttention"),
        (("--config_overrides", "hidden_dropout_prob=0.0"), "attention_probs_dropout_prob=0.0"),
    ],
)
def test_attention_that_cannot_compute_one_row_is_refused(
    call: Command, roberta: Path, tmp_path: Path, flags: tuple[str, ...], reason: str
) -> None:
    done = call("train.py", "--model", roberta, *files(tmp_path), *FLAGS, "--padding_free", *flags, code=2)
    assert reason in done.stderr
    assert "leave --padding_free out" in done.stderr


@pytest.mark.parametrize("kind", ["deberta-v2", "gpt2", "mpnet", "fnet", "big_bird"])
def test_a_model_that_mixes_the_texts_of_a_row_is_refused(call: Command, tmp_path: Path, kind: str) -> None:
    model = trainable(kind, tmp_path / "model")
    flags = ["--model", model, "--max_length", 40, *files(tmp_path), "--padding_free", "--report_to", "none"]
    zero = ["hidden_dropout", "attention_dropout", "attention_probs_dropout_prob", "attn_pdrop"]
    settings = json.loads((model / "config.json").read_text())
    overrides = [f"{name}=0.0" for name in zero if settings.get(name)]
    given = ["--config_overrides", *overrides] if overrides else []
    done = call("train.py", *flags, *given, "--mixed_precision", "no", code=2)
    assert "--padding_free" in done.stderr
    assert "leave --padding_free out" in done.stderr


def test_positions_are_counted_on_a_device_with_its_own_memory(
    call: Command, roberta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CPU that is taken for a GPU: train, resume, eval and predict count what the run found, and score the same."""
    usual, _ = train(call, tmp_path, roberta, "usual")
    monkeypatch.setattr("lib.evaluation.batch_size.has_own_memory", lambda _: True)
    short = functools.partial(State, eval_positions=500)  # as after a lack of memory
    monkeypatch.setattr("lib.training.learner.State", short)
    flags = ["--model", roberta, *files(tmp_path), "--epochs", 2, "--output_dir", "run", *FLAGS]
    started = call("train.py", *flags)
    assert "batches of at most 500 positions" in started.stdout
    results = results_of(started)
    assert results["run/eval_positions"] == 500
    assert results["test/loss"] == pytest.approx(usual["test/loss"], abs=1e-5)
    state = json.loads(next((tmp_path / "run/checkpoints").glob("*/state.json")).read_text())["state"]
    assert state["eval_positions"] == 500

    scored = call("eval.py", "--run", "run", "--output_dir", "scored")
    assert "evaluated in batches of at most 500 positions" in scored.stdout
    assert results_of(scored)["test/loss"] == results["test/loss"]
    call("predict.py", "--model", "run", "--input", "test.csv", "--mixed_precision", "no", "--output", "answers.jsonl")
    for row, answer in zip(
        read_lines(tmp_path / "scored/predictions.jsonl"), read_lines(tmp_path / "answers.jsonl"), strict=True
    ):
        assert answer["probabilities"] == pytest.approx(row["probabilities"], abs=1e-5)
    fixed = call("eval.py", "--run", "run", "--output_dir", "fixed", "--per_device_eval_batch_size", 4)
    assert "positions" not in fixed.stdout
    older = shutil.copytree(tmp_path / "run", tmp_path / "older")  # from before positions were counted
    (older / "results.json").write_text(json.dumps({n: v for n, v in results.items() if n != "run/eval_positions"}))
    assert "positions" not in call("eval.py", "--run", "older", "--output_dir", "again").stdout


def test_a_run_of_fp16_is_scored_on_a_cpu(call: Command, roberta: Path, tmp_path: Path) -> None:
    """In float32, and that is said: a CPU has no fp16."""
    trained, _ = train(call, tmp_path, roberta, "run")
    folder = shutil.copytree(tmp_path / "run", tmp_path / "fp16")
    config = (folder / "config.yaml").read_text()
    assert "mixed_precision: 'no'" in config
    (folder / "config.yaml").write_text(config.replace("mixed_precision: 'no'", "mixed_precision: fp16"))
    results = json.loads((folder / "results.json").read_text()) | {"run/mixed_precision": "fp16"}
    (folder / "results.json").write_text(json.dumps(results))
    scored = call("eval.py", "--run", "fp16", "--output_dir", "scored")
    assert results_of(scored)["run/mixed_precision"] in ("no", "bf16")
    assert results_of(scored)["test/loss"] == pytest.approx(trained["test/loss"], abs=1e-2)
    call("predict.py", "--model", "fp16", "--input", "test.csv", "--output", "answers.jsonl")
    assert len(read_lines(tmp_path / "answers.jsonl")) == 24


def test_the_check_for_a_gpu_works() -> None:
    found = padding_free.main(["--tiny"])
    assert found["largest_difference"] < 1e-5
    assert 0 < found["padding"] < 0.5
