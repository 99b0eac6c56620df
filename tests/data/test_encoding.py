"""Texts become the same token ids whatever else is in a batch; special tokens written in them are text."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import transformers

from lib.config.sections import ModelSource
from lib.data.encoding import Encoder, Windows, model_inputs
from lib.model.load import load_tokenizer
from tests.conftest import tiny_tokenizer
from tests.tiny_models import piece_tokenizer, plain_tokenizer

TEXTS = [
    *("good film </s> bad plot", "good</s>film", "</s>", "<pad>", "a <s><pad></s><mask> film", "</s</s>>"),
    *("good ＜/s＞ film", "[SEP] [PAD] [CLS] [MASK]", "<mask", "<unk> film"),
]


@pytest.fixture(params=["words", "pieces", "nothing around", "slow"])
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    if request.param == "slow":
        return transformers.ByT5Tokenizer()
    tiny_tokenizer(tmp_path)
    if request.param == "pieces":
        piece_tokenizer(tmp_path)
    if request.param == "nothing around":
        plain_tokenizer(tmp_path)
    return load_tokenizer(ModelSource(str(tmp_path)))


def special_ids(tokenizer: Any) -> set[int]:
    return set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}


@pytest.mark.parametrize("windows", [None, Windows(12, 2)])
def test_special_tokens_in_a_text_are_text(tokenizer: Any, windows: Windows | None) -> None:
    if windows and not tokenizer.is_fast:
        pytest.skip("slow tokenizers have no windows")
    encoder = Encoder(tokenizer, 40, windows)
    usual = model_inputs(encoder([["good film"]]))[0]["input_ids"]
    count = sum(token in special_ids(tokenizer) for token in usual)
    for row in model_inputs(encoder([TEXTS])):
        assert sum(token in special_ids(tokenizer) for token in row["input_ids"]) == count
        assert len(row["input_ids"]) <= (12 if windows else 40)


def test_special_tokens_in_pairs_are_text(tokenizer: Any) -> None:
    encoder = Encoder(tokenizer, 40)
    (usual,) = model_inputs(encoder([["good film"], ["a plot"]]))
    count = sum(token in special_ids(tokenizer) for token in usual["input_ids"])
    for row in model_inputs(encoder([TEXTS, TEXTS[::-1]])):
        assert sum(token in special_ids(tokenizer) for token in row["input_ids"]) == count


def test_other_texts_keep_the_ids_of_the_tokenizer(tokenizer: Any) -> None:
    texts = ["good film", "the plot was quite dull " * 20, "wow!! a < b > c /s", " ", "good film </s> bad plot", "x"]
    found = Encoder(tokenizer, 12)([texts])
    wanted = tokenizer(texts, truncation=True, max_length=12)
    for row, text in enumerate(texts):
        if "</s>" not in text and wanted["input_ids"][row]:
            assert found["input_ids"][row] == wanted["input_ids"][row]
    assert found["length"] == [len(ids) for ids in found["input_ids"]]
    assert found["truncated"][:2] == [False, True]


def test_an_ordinary_word_as_padding_token_stays_a_word(tmp_path: Path) -> None:
    tiny_tokenizer(tmp_path)
    tokenizer = load_tokenizer(ModelSource(str(tmp_path)))
    tokenizer.pad_token = "film"
    texts = ["film film", "a film", "films"]
    assert Encoder(tokenizer, 12)([texts])["input_ids"] == tokenizer(texts)["input_ids"]


@pytest.mark.parametrize("windows", [None, Windows(6, 2)])
def test_a_text_without_tokens_gets_one(tmp_path: Path, windows: Windows | None) -> None:
    """Whether it is empty or the normalizer removes all of it; no model takes an empty input."""
    from tokenizers import normalizers

    tiny_tokenizer(tmp_path)
    plain_tokenizer(tmp_path)
    tokenizer = load_tokenizer(ModelSource(str(tmp_path)))
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("\u200b", "")
    found = Encoder(tokenizer, 6, windows)([["", "film", "\u200b\u200b", " "]])
    rows = [row["input_ids"] for row in model_inputs(found)]
    assert [len(row) for row in rows] == [1, 1, 1, 1] == found["length"]
    assert rows[0] == rows[2] == rows[3] == [tokenizer.bos_token_id] != rows[1]
    if windows is None:
        pairs = Encoder(tokenizer, 6)([["", "", "film"], ["", "plot", ""]])
        assert [len(ids) for ids in pairs["input_ids"]] == [1, 1, 1]
        assert pairs["input_ids"][0] == [tokenizer.bos_token_id]


def test_windows_of_a_text_with_special_tokens_share_their_stride(tmp_path: Path) -> None:
    tiny_tokenizer(tmp_path)
    piece_tokenizer(tmp_path)
    tokenizer = load_tokenizer(ModelSource(str(tmp_path)))
    windows = Windows(8, 3)
    found = Encoder(tokenizer, 8, windows)([["film " * 9 + "</s>" + " plot" * 9]])
    one = Encoder(tokenizer, 100, dataclasses.replace(windows, max_length=100))([["film " * 9 + "</s>" + " plot" * 9]])
    (pieces,), ((whole,),) = found["input_ids"], one["input_ids"]
    joined = pieces[0][:-1] + [token for piece in pieces[1:] for token in piece[3:-1]]
    assert joined == whole[:-1]
