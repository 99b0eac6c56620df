"""predict.py as users run it: files, pipes, one and two processes, and the numbers of eval.py."""

import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import predict
from lib.config.cli import dump_config, parse_cli
from lib.config.eval import EvalConfig
from lib.config.predict import PredictConfig
from lib.config.sections import EVAL_SAMPLES, DataConfig
from lib.config.train import TrainConfig
from lib.evaluation.batch_size import BatchSize
from lib.inference import pipelines
from tests import tiny_models
from tests.conftest import Command, read_lines, sentences, write_csv
from tests.predicting import answers, load, settings

FLOAT32 = ("--mixed_precision", "no")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run: a tiny classifier, trained with --max_length 12."""
    folder = tmp_path_factory.mktemp("finished") / "outputs" / "run"
    tiny_models.classifier(folder / "model")
    train = write_csv(folder.parent / "train.csv", sentences(12))
    (folder / "config.yaml").write_text(
        dump_config(TrainConfig(data=DataConfig(train_file=str(train), max_length=12))), encoding="utf-8"
    )
    (folder / "results.json").write_text(json.dumps({"run/mixed_precision": "no"}))
    return folder


@pytest.fixture
def reviews(tmp_path: Path) -> Path:
    return write_csv(tmp_path / "reviews.csv", sentences(211, seed=3))


def test_one_and_two_processes_write_the_same_bytes(finished, reviews, run: Command, tmp_path):
    """The number of threads must be the same: it changes the order of sums."""
    flags = ["--input", reviews, "--model", finished, "--per_device_eval_batch_size", 1, *FLOAT32]
    predict.main(parse_cli(PredictConfig, list(map(str, [*flags, "--output", tmp_path / "one.jsonl"]))))
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = run("predict.py", *flags, "--output", "two.jsonl", processes=2, env=threads)
    assert (tmp_path / "one.jsonl").read_bytes() == (tmp_path / "two.jsonl").read_bytes()
    rows = read_lines(tmp_path / "one.jsonl")
    assert [(row["id"], row["text"]) for row in rows] == [(i, t) for i, (t, _) in enumerate(sentences(211, seed=3))]
    assert done.stdout == ""
    assert done.stderr.count("211 rows in") == 1
    assert "%|" not in done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"reviews.csv", "one.jsonl", "two.jsonl"}


def test_predictions_of_a_run_equal_those_of_eval_py(finished, reviews, tmp_path):
    scoring = ["--run", finished, "--test_file", reviews, "--output_dir", tmp_path / "eval", *FLOAT32]
    importlib.import_module("eval").main(parse_cli(EvalConfig, list(map(str, scoring))))
    wanted = read_lines(tmp_path / "eval" / "predictions.jsonl")
    found = answers("--input", reviews, "--model", finished)
    assert len(found) == len(wanted) == 211
    for a, b in zip(found, wanted, strict=True):
        assert (a["id"], a["text"], a["label"]) == (b["index"], b["text"], b["predicted"])
        assert a["probabilities"] == pytest.approx(b["probabilities"], abs=1e-5)
    assert len({row["label"] for row in found}) > 1


def test_pipe_of_lines_becomes_a_pipe_of_json(finished, run: Command):
    texts = [text for text, _ in sentences(5)]
    done = run("predict.py", "--run", finished, "--top_k=1", *FLOAT32, stdin="\n".join(texts))
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["text"] for row in rows] == texts
    assert all(list(row["probabilities"]) == [row["label"]] for row in rows)
    assert done.stderr.startswith("2 of 5 texts (40.0%) are longer than 12 tokens")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_two_processes_share_the_embeddings_of_a_pipe(run: Command, tmp_path):
    texts = "\n".join(text for text, _ in sentences(40))
    flags = ["--task", "feature-extraction", "--per_device_eval_batch_size", 4, *FLOAT32]
    run("predict.py", *flags, "--output", "one.npy", stdin=texts)
    run("predict.py", *flags, "--output", "two.npy", stdin=texts, processes=2)
    one, two = np.load(tmp_path / "one.npy"), np.load(tmp_path / "two.npy")
    assert one.shape == (40, 384)
    np.testing.assert_allclose(one, two, atol=1e-5)
    assert (tmp_path / "one.ids.jsonl").read_bytes() == (tmp_path / "two.ids.jsonl").read_bytes()


@pytest.mark.slow
def test_user_error_on_the_second_process_is_printed_once(run: Command, tmp_path):
    model = tiny_models.masked(tmp_path / "model")
    # The first process gets the longest text, the second one the row without a mask.
    done = run(
        *("predict.py", "the film was <mask> and dull", "no mask", "--task", "fill-mask", "--model", model),
        *("--per_device_eval_batch_size", 1, *FLOAT32),
        processes=2,
        code=1,
    )
    assert done.stderr.count("error: row 2 has no <mask>") == 1


def test_bad_line_exits_with_2_and_leaves_no_file(finished, run: Command, tmp_path):
    (tmp_path / "t.jsonl").write_text('{"text": "a film"}\n{"text": [3]}\n')
    done = run("predict.py", "--input", "t.jsonl", "--model", finished, "--output", "o.jsonl", *FLOAT32, code=2)
    assert done.stderr.startswith("error: --input t.jsonl: line 2 has [3]")
    assert {path.name for path in tmp_path.iterdir()} == {"t.jsonl"}


def test_unknown_task_is_refused_without_a_traceback(run: Command):
    done = run("predict.py", "a film", "--task", "sentiment", code=2)
    assert "sentiment-analysis" in done.stderr
    assert "Traceback" not in done.stderr


def test_explain_tokens_uses_the_base_tokenizer_of_an_adapter(roberta, tmp_path, capsys):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(roberta)}))
    predict.main(settings("--model", tmp_path, "--explain_tokens", "a film"))
    assert "tokenize" in capsys.readouterr().out


@pytest.mark.slow
def test_explain_tokens_prints_the_ids_of_minilm(run: Command):
    done = run("predict.py", "--explain_tokens", "I hate this so much!")
    assert "101 1045 5223 2023 2061 2172 999 102" in done.stdout


@pytest.mark.parametrize("flags", [(), ("--per_device_eval_batch_size", 8)])
def test_memory_that_is_too_short_is_said_and_every_row_is_predicted(finished, reviews, monkeypatch, capsys, flags):
    """The labels are the same, and the batches smaller from then on."""
    wanted = answers("--input", reviews, "--model", finished, *flags)
    monkeypatch.setattr("lib.evaluation.batch_size.has_own_memory", lambda _: True)
    compute, sizes = pipelines.compute_logits, []

    def short_of_memory(model, inputs, *rest):
        sizes.append(inputs["input_ids"].numel())
        if sizes[-1] > 40:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return compute(model, inputs, *rest)

    monkeypatch.setattr(pipelines, "compute_logits", short_of_memory)
    found = answers("--input", reviews, "--model", finished, *flags)
    said = capsys.readouterr().err
    assert said.count("out of memory with") == said.count("going on with") == sum(size > 40 for size in sizes) > 0
    for row, other in zip(found, wanted, strict=True):
        assert row["label"] == other["label"]
        assert row["probabilities"] == pytest.approx(other["probabilities"], abs=1e-5)


def test_any_task_reads_as_many_examples_as_with_batches_of_samples(finished, monkeypatch):
    """Where positions are counted, groups are shares of that, not forwards."""
    assert load("a film", "--model", finished).group == EVAL_SAMPLES
    assert load("a film", "--model", finished, "--per_device_eval_batch_size", 5).group == 5
    monkeypatch.setattr("lib.evaluation.batch_size.has_own_memory", lambda _: True)
    (finished / "results.json").write_text(json.dumps({"run/mixed_precision": "no", "run/eval_positions": 900}))
    try:
        task = load("a film", "--model", finished)
    finally:
        (finished / "results.json").write_text(json.dumps({"run/mixed_precision": "no"}))
    assert (task.group, task.batch_size) == (None, BatchSize(900, "positions"))
    assert load("a film", "--model", finished).group == EVAL_SAMPLES  # that run counted samples
