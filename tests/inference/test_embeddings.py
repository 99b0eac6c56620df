"""Embeddings do not depend on the batch, equal pooling by hand, and are close for texts that mean the same."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoModel, AutoTokenizer, pipeline

from lib.config.sections import ModelConfig
from lib.errors import UserError
from lib.inference.embeddings import pool
from lib.inference.outputs import write_predictions
from lib.model.source import resolve_model
from tests import tiny_models
from tests.conftest import sentences, tiny_roberta, write_csv
from tests.predicting import predictions

POOLINGS = ("mean", "cls", "max", "last")
TASK = ("--task", "feature-extraction")
TEXTS = [text for text, _ in sentences(9)] + [""]


def embed(*flags: object) -> np.ndarray:
    return np.stack([answer["embedding"] for _, answer in predictions(*TASK, *flags)])


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An encoder, a decoder, and an encoder-decoder."""
    folder = tmp_path_factory.mktemp("embedders")
    roberta = tiny_roberta(folder / "roberta", initializer_range=0.5)
    return {"roberta": roberta, "gpt2": tiny_models.decoder(folder / "gpt2"), "t5": tiny_models.t5(folder / "t5")}


PAIRS = [
    (name, pooling) for name in ("roberta", "gpt2", "t5") for pooling in POOLINGS if (name, pooling) != ("gpt2", "cls")
]


@pytest.mark.parametrize(("name", "pooling"), PAIRS)
def test_padding_does_not_change_an_embedding(models, name, pooling):
    flags = ["--model", models[name], "--pooling", pooling]
    together = embed(*TEXTS, *flags)
    alone = embed(*TEXTS, *flags, "--per_device_eval_batch_size", 1)
    np.testing.assert_allclose(together, alone, atol=1e-5)
    assert len(np.unique(together.round(3), axis=0)) > 5


def test_decoder_refuses_cls_pooling(models):
    """Its first token sees no other: all texts with the same first token would have the same embedding."""
    with pytest.raises(UserError, match=r"--pooling cls.*decoder.*--pooling last or mean"):
        embed(*TEXTS, "--model", models["gpt2"], "--pooling", "cls")


def test_tokenizer_that_pads_on_the_left_changes_nothing(models, tmp_path):
    """A decoder's positions count from the left: padding there would shift the text."""
    folder = tiny_models.decoder(tmp_path / "left")
    AutoTokenizer.from_pretrained(folder, padding_side="left").save_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder).padding_side == "left"
    np.testing.assert_array_equal(embed(*TEXTS, "--model", folder), embed(*TEXTS, "--model", models["gpt2"]))


def test_embeddings_pool_the_token_vectors_of_the_pipeline(models):
    pipe = pipeline("feature-extraction", model=str(models["roberta"]))
    states = [np.array(pipe(text)[0]) for text in TEXTS]
    wanted = {"mean": [s.mean(0) for s in states], "cls": [s[0] for s in states]}
    wanted |= {"max": [s.max(0) for s in states], "last": [s[-1] for s in states]}
    for pooling in POOLINGS:
        found = embed(*TEXTS, "--model", models["roberta"], "--pooling", pooling)
        np.testing.assert_allclose(found, np.stack(wanted[pooling]), atol=1e-5)


def test_pooling_ignores_padding():
    states = torch.tensor([[[9.0], [1.0], [3.0], [9.0]], [[9.0], [9.0], [9.0], [9.0]]])
    mask = torch.tensor([[0, 1, 1, 0], [0, 0, 0, 0]])
    found = {pooling: pool(states, mask, pooling).flatten().tolist() for pooling in POOLINGS}
    assert found == {"mean": [2.0, 0.0], "cls": [1.0, 0.0], "max": [3.0, 0.0], "last": [3.0, 0.0]}


def test_normalized_embeddings_have_length_one(models):
    flags = [*TEXTS, "--model", models["roberta"]]
    plain, unit = embed(*flags), embed(*flags, "--normalize", "True")
    np.testing.assert_allclose(np.linalg.norm(unit, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(unit, plain / np.linalg.norm(plain, axis=1, keepdims=True), atol=1e-6)
    assert not np.allclose(np.linalg.norm(plain, axis=1), 1)


def test_paraphrases_have_the_highest_cosine_similarity():
    pairs = [
        ("A gripping film from start to finish.", "The movie held my attention all the way through."),
        ("The acting was terrible.", "None of the actors gave a decent performance."),
        ("She plays the piano every evening.", "Each night she practises on the keyboard."),
        ("Stock prices fell sharply on Monday.", "At the start of the week shares lost a lot of value."),
    ]
    texts = [text for pair in pairs for text in pair]
    vectors = embed(*texts, "--model", "minilm", "--normalize", "True")
    similarity = vectors @ vectors.T - 2 * np.eye(len(texts))
    assert similarity.argmax(axis=1).tolist() == [1, 0, 3, 2, 5, 4, 7, 6]
    assert min(similarity[i, i + 1] for i in range(0, 8, 2)) > 0.4


def test_minilm_embeddings_equal_mean_pooling_by_hand():
    folder = resolve_model(ModelConfig())
    tokens = AutoTokenizer.from_pretrained(folder)("A gripping film.", return_tensors="pt")
    with torch.no_grad():
        wanted = AutoModel.from_pretrained(folder)(**tokens).last_hidden_state[0].mean(dim=0).numpy()
    np.testing.assert_allclose(embed("A gripping film.", "A much longer text beside it, " * 9)[0], wanted, atol=1e-5)


@pytest.mark.parametrize(("column", "ids"), [(None, list(range(10))), ("name", [f"row {i}" for i in range(10)])])
def test_npy_and_parquet_hold_vectors_and_ids(models, tmp_path, column, ids):
    file = write_csv(tmp_path / "t.csv", [(f"row {i}", text) for i, text in enumerate(TEXTS)], ("name", "text"))
    flags = ["--input", file, "--model", models["roberta"], *(["--id_column", column] if column else [])]
    found = predictions(*TASK, *flags)
    vectors = np.stack([answer["embedding"] for _, answer in found])
    for name in ("v.npy", "v.parquet"):
        assert write_predictions(str(tmp_path / name), iter(found)) == len(TEXTS)
    np.testing.assert_array_equal(np.load(tmp_path / "v.npy"), vectors)
    assert np.load(tmp_path / "v.npy").dtype == np.float32
    assert (tmp_path / "v.ids.jsonl").read_text().splitlines() == [f'"{i}"' if column else str(i) for i in ids]
    table = pq.read_table(tmp_path / "v.parquet")
    assert table.column("id").to_pylist() == ids
    np.testing.assert_array_equal(np.array(table.column("embedding").to_pylist(), dtype=np.float32), vectors)
    assert {path.name for path in tmp_path.iterdir()} == {"t.csv", "v.npy", "v.ids.jsonl", "v.parquet"}


def test_empty_text_has_an_embedding_without_special_tokens(tmp_path):
    folder = tiny_models.decoder(tmp_path / "bare")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
    tokenizer.save_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder)("")["input_ids"] == []
    alone, beside = embed("", "--model", folder), embed("a dull film", "", "--model", folder)
    np.testing.assert_allclose(alone[0], beside[1], atol=1e-5)
