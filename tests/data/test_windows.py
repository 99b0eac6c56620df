"""Texts longer than the model: windows hold every token, and a text counts once, however many windows it has."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch.nn.functional import cross_entropy

from lib.config.sections import DataConfig, ModelConfig
from lib.data.batching import padding_share
from lib.data.encoding import Windows, encode_windows
from lib.data.load import Data, load_data
from lib.data.loader import Batches, Share, build_collator
from lib.data.tokenization import choose_windows, stored_windows
from lib.errors import UserError
from lib.evaluation.batch_size import BatchSize
from lib.evaluation.scoring import predict
from lib.inference.inputs import Example
from lib.inference.tasks import build_predict, count_truncation
from lib.model.load import build_model, load_tokenizer
from tests.conftest import Command, read_lines, results_of, sentences, write_csv
from tests.predicting import load
from tests.stepping import add_gradients

CPU = torch.device("cpu")
SIZE = 12


@pytest.fixture(scope="module")
def tokenizer(roberta_without_dropout: Path) -> Any:
    return load_tokenizer(ModelConfig(model=str(roberta_without_dropout)))


def data_of(folder: Path, tokenizer: Any, **settings: Any) -> Data:
    files = {
        f"{role}_file": str(write_csv(folder / f"{role}.csv", sentences(SIZE))) for role in ("train", "validation")
    }
    return load_data(DataConfig(**files, **settings), tokenizer)


def model_of(source: Path, data: Data, tokenizer: Any) -> Any:
    torch.manual_seed(0)
    return build_model(ModelConfig(model=str(source)), data.label_names, tokenizer)[0]


def mean_logits(model: Any, data: Data) -> torch.Tensor:
    """The reference: the model on each window by itself, then the mean over the windows of a text."""
    rows = [
        torch.stack([model(input_ids=torch.tensor([ids])).logits[0] for ids in windows]).mean(0)
        for windows in data.tokens["train"]["input_ids"]
    ]
    return torch.stack(rows)


# ---------------------------------------------------------------------------------------------------- cutting


@pytest.mark.parametrize(("max_length", "stride"), [(8, 0), (8, 2), (8, 5), (5, 1), (64, 3)])
def test_windows_hold_every_token_and_share_the_stride(tokenizer: Any, max_length: int, stride: int) -> None:
    texts = [text for text, _ in sentences(30)] + [""]
    encoded = encode_windows(tokenizer, texts, Windows(max_length, stride))
    for text, windows, count in zip(texts, encoded["input_ids"], encoded["num_windows"], strict=True):
        whole, bare = tokenizer(text)["input_ids"], [ids[1:-1] for ids in windows]
        assert count == len(windows)
        assert all(ids[0] == whole[0] and ids[-1] == whole[-1] for ids in windows)
        assert all(len(ids) == max_length for ids in windows[:-1])
        assert bare[0] + [token for ids in bare[1:] for token in ids[stride:]] == whole[1:-1]
        assert all(one[len(one) - stride :] == two[:stride] for one, two in itertools.pairwise(bare))
        if len(whole) <= max_length:
            assert windows == [whole]
    assert (max(encoded["num_windows"]) > 1) == (max_length < 64)


@pytest.mark.parametrize("settings", [{"stride": 6}, {"stride": 2, "num_columns": 2}])
def test_impossible_windows_are_refused(tokenizer: Any, settings: dict) -> None:
    with pytest.raises(UserError, match=r"--window_stride \d.*(cannot share as many|not for pairs)"):
        choose_windows(tokenizer, **{"max_length": 8, "num_columns": 1, "trained": False} | settings)


def test_windows_are_saved_with_the_tokenizer_until_a_model_is_trained_without(tokenizer: Any, tmp_path: Path) -> None:
    choose_windows(tokenizer, 8, 2, 1, trained=False)
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(ModelConfig(model=str(tmp_path)))
    assert stored_windows(again) == Windows(8, 2)
    assert choose_windows(again, 8, None, 1, trained=True) == Windows(8, 2)
    assert choose_windows(again, 6, None, 1, trained=True) == Windows(6, 2)
    assert choose_windows(again, 64, None, 1, trained=False) is None
    assert stored_windows(again) is None


def test_windows_are_in_the_notes_and_the_fingerprint(tokenizer: Any, tmp_path: Path) -> None:
    cut, windowed = (data_of(tmp_path, tokenizer, max_length=8, window_stride=stride) for stride in (None, 2))
    assert cut.fingerprint() != windowed.fingerprint()
    counts = windowed.tokens["train"]["num_windows"]
    share = np.mean(np.array(counts) > 1)
    (note,) = (note for note in windowed.notes if "train texts" in note)
    parts = [f"{share:.1%}", "8 tokens", "share 2", f"{np.mean(counts):.1f} a text", f"{max(counts)} at most"]
    assert [part for part in parts if part not in note] == []
    assert windowed.lengths["train"].tolist() == [sum(map(len, ids)) for ids in windowed.tokens["train"]["input_ids"]]


# ---------------------------------------------------------------------------------------------------- model


def test_logits_of_a_text_are_the_mean_of_its_windows_in_every_batch_size(
    tokenizer: Any, roberta_without_dropout: Path, tmp_path: Path
) -> None:
    data = data_of(tmp_path, tokenizer, max_length=8, window_stride=2)
    model = model_of(roberta_without_dropout, data, tokenizer).eval()
    with torch.inference_mode():
        wanted = mean_logits(model, data).numpy()
    assert np.ptp(wanted, axis=0).min() > 0.05  # texts have different logits
    for batch_size, length in ((1, None), (5, None), (SIZE, None), (5, 16)):
        collator = build_collator(tokenizer, "no", CPU, length)
        found = predict(Accelerator(cpu=True), model, Batches(data, collator).split("train"), BatchSize(batch_size))
        np.testing.assert_allclose(found.logits, wanted, atol=1e-5)
        losses = cross_entropy(torch.from_numpy(wanted), torch.from_numpy(found.labels), reduction="none")
        np.testing.assert_allclose(found.losses, losses.numpy(), atol=1e-5)


@pytest.mark.parametrize("limit", [None, 30])
@pytest.mark.parametrize(("world_size", "micro_batch_size"), [(1, SIZE), (1, 5), (3, 3)])
def test_loss_of_a_step_over_windows_is_the_mean_loss_of_texts(
    tokenizer: Any,
    roberta_without_dropout: Path,
    tmp_path: Path,
    world_size: int,
    micro_batch_size: int,
    limit: int | None,
) -> None:
    """So are the gradients summed over processes; `limit` cuts micro-batches by positions, as after out of memory."""
    data = data_of(tmp_path, tokenizer, max_length=8, window_stride=2)
    model = model_of(roberta_without_dropout, data, tokenizer)
    reference = cross_entropy(mean_logits(model, data), torch.tensor(data.tokens["train"]["labels"]))
    wanted = torch.autograd.grad(reference, list(model.parameters()), allow_unused=True)
    batches, total = Batches(data, build_collator(tokenizer, "no", CPU)), 0.0
    for rank in range(world_size):
        batch = next(batches.steps([np.arange(SIZE)], Share(micro_batch_size, rank, world_size)))
        total += add_gradients(model, batch, positions=limit)
    assert total / SIZE == pytest.approx(reference.item(), abs=1e-6)
    for parameter, gradient in zip(model.parameters(), wanted, strict=True):
        if gradient is not None:
            torch.testing.assert_close(parameter.grad, gradient, atol=1e-6, rtol=1e-4)


def test_windows_do_not_change_the_training_of_short_texts_bit_for_bit(
    tokenizer: Any, roberta_without_dropout: Path, tmp_path: Path
) -> None:
    found = []
    for stride in (None, 2):
        data = data_of(tmp_path, tokenizer, max_length=64, window_stride=stride)
        model = model_of(roberta_without_dropout, data, tokenizer)
        batch = next(Batches(data, build_collator(tokenizer, "no", CPU)).steps([np.arange(SIZE)], Share(5)))
        assert ("num_windows" in batch.micro_batches[0].inputs) == (stride is not None)
        loss = add_gradients(model, batch)
        found.append([torch.tensor(loss), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert all(map(torch.equal, *found))


def test_split_micro_batches_keep_the_windows_of_a_text_together(tokenizer: Any, tmp_path: Path) -> None:
    data = data_of(tmp_path, tokenizer, max_length=8, window_stride=2)
    batch = next(Batches(data, build_collator(tokenizer, "no", CPU)).steps([np.arange(SIZE)], Share(7)))
    most = 24  # three windows of eight tokens
    pieces = batch.pieces(most)
    assert all(piece.positions <= most or len(piece) == 1 for piece in pieces)
    assert len(pieces) > len(batch.micro_batches)
    assert {len(piece) for piece in pieces} > {1}
    assert all(piece.positions == piece.inputs["input_ids"].numel() for piece in pieces)
    assert all(len(piece.inputs["input_ids"]) == piece.inputs["num_windows"].sum() for piece in pieces)
    for name in batch.micro_batches[0].inputs:
        pad = [(8 - piece.inputs[name].shape[-1]) if piece.inputs[name].ndim == 2 else 0 for piece in pieces]
        assert not any(pad)
        whole = torch.cat([micro_batch.inputs[name] for micro_batch in batch.micro_batches])
        assert torch.equal(torch.cat([piece.inputs[name] for piece in pieces]), whole)
    for name in ("labels", "weights"):
        whole = torch.cat([getattr(micro_batch, name) for micro_batch in batch.micro_batches])
        assert torch.equal(torch.cat([getattr(piece, name) for piece in pieces]), whole)


def test_padding_share_counts_windows(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    data = data_of(tmp_path, tokenizer, max_length=8, window_stride=2)
    batches = [np.array([0, 3, 5]), np.array([1]), np.array([2, 4])]
    for multiple, device in ((None, "no"), (8, "bf16")):
        collator = build_collator(tokenizer, device, torch.device("cuda"))
        padded = [collator([data.tokens["train"][int(i)] for i in batch])["attention_mask"] for batch in batches]
        share = 1 - sum(int(mask.sum()) for mask in padded) / sum(mask.numel() for mask in padded)
        lengths = data.lengths["train"]
        assert padding_share(lengths, batches, multiple, data.max_length) == pytest.approx(share)


# ---------------------------------------------------------------------------------------------------- the scripts


def test_eval_and_predict_use_the_windows_of_the_run(run: Command, roberta: Path, tmp_path: Path) -> None:
    flags: list[Any] = []
    for seed, role in enumerate(("train", "validation", "test")):
        flags += [f"--{role}_file", write_csv(tmp_path / f"{role}.csv", sentences(30, seed))]
    flags += ["--model", roberta, "--lr", "1e-2", "--max_steps", 6, "--output_dir", "run", "--report_to", "none"]
    trained = results_of(run("train.py", *flags, "--max_length", 8, "--window_stride", 2, "--mixed_precision", "no"))
    rows = read_lines(tmp_path / "run" / "eval-test" / "predictions.jsonl")
    flags = ["--model", tmp_path / "run" / "model", "--test_file", tmp_path / "test.csv", "--mixed_precision", "no"]
    scored = results_of(run("eval.py", *flags))
    assert scored["test/loss"] == pytest.approx(trained["test/loss"], abs=1e-6)
    flags = ["--input", "test.csv", "--model", "run/model", "--output", "answers.jsonl", "--mixed_precision", "no"]
    run("predict.py", *flags, "--per_device_eval_batch_size", 5)
    for row, answer in zip(rows, read_lines(tmp_path / "answers.jsonl"), strict=True):
        assert answer["label"] == row["predicted"]
        assert answer["probabilities"] == pytest.approx(row["probabilities"], abs=2e-6)
    task = load("--model", tmp_path / "run")
    assert (task.tokenizer.model_max_length, stored_windows(task.tokenizer)) == (8, Windows(8, 2))
    counted = count_truncation(task)
    assert len(list(counted.watch(iter([(Example(0, 0, ("good " * 30,)), {})])))) == 1
    assert (counted.seen, counted.truncated) == (1, 0)
    predict = build_predict(task)
    assert predict([Example(0, 0, (rows[0]["text"],))])[0]["label"] == rows[0]["predicted"]
    with pytest.raises(UserError, match="--window_stride 2 is for one text column, not for pairs"):
        predict([Example(0, 0, ("a good film", "a bad plot"))])
