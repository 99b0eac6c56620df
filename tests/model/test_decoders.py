"""Decoders that classify: which token pads, on which side, and that neither changes a logit, here and in other programs."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from lib.config.sections import ModelConfig
from lib.data.encoding import Encoder, Windows, model_inputs
from lib.data.loader import build_collator
from lib.model.forward import compute_logits
from lib.model.load import build_model, load_classifier, load_tokenizer
from lib.model.padding import find_leak
from tests.conftest import tiny_tokenizer
from tests.tiny_models import ENCODER, NAMES, labels, plain_tokenizer

CPU = torch.device("cpu")
KINDS = (
    "gpt2",
    "llama",
    "qwen2",
    "qwen3",
    "mistral",
    "gemma",
    "gemma3_text",
    "phi",
    "phi3",
    "opt",
    "gpt_neox",
    "bloom",
)
MORE = {
    "opt": {"word_embed_proj_dim": 16, "ffn_dim": 32},
    "gpt2": {"max_position_embeddings": 64},
    **{kind: {"head_dim": 8, "num_key_value_heads": 1} for kind in ("gemma", "gemma3_text", "qwen3")},
    **{kind: {"num_key_value_heads": 1} for kind in ("llama", "mistral", "qwen2", "phi3")},
}
TEXTS = ["a good film", "the plot was very dull and not fine film movie", "", "great </s> film </s>", "</s>"]


def save(kind: str, folder: Path, **changes: object) -> Path:
    """A decoder without a padding token, and a tokenizer that has none and puts nothing around a text."""
    settings = ENCODER | MORE.get(kind, {}) | labels(NAMES) | {"pad_token_id": None} | changes
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(kind, **settings))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3) if parameter.dim() > 1 else None
    model.save_pretrained(folder)
    tiny_tokenizer(folder)
    plain_tokenizer(folder)
    return folder


def change_tokenizer(folder: Path, **changes: object) -> None:
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def logits(model, tokenizer, texts=TEXTS) -> torch.Tensor:
    """As evaluation computes them: of all texts in one batch."""
    encoded = Encoder(tokenizer, 32)([list(texts)])
    with torch.no_grad():
        return compute_logits(model.eval(), build_collator(tokenizer, "no", CPU)(model_inputs(encoded)))


@pytest.mark.parametrize("kind", KINDS)
def test_text_has_the_same_logits_alone_in_a_batch_and_where_it_is_loaded_again(tmp_path, kind):
    """Also an empty text, and one that spells the end token, which is text; also by transformers alone."""
    source = ModelConfig(str(save(kind, tmp_path / kind)))
    change_tokenizer(tmp_path / kind, padding_side="left")
    tokenizer = load_tokenizer(source)
    assert tokenizer.padding_side == "right"
    model, _ = build_model(source, NAMES, tokenizer)
    assert model.config.pad_token_id == tokenizer.pad_token_id
    assert model.get_input_embeddings().num_embeddings == ENCODER["vocab_size"]
    batch = logits(model, tokenizer)
    alone = torch.cat([logits(model, tokenizer, [text]) for text in TEXTS])
    torch.testing.assert_close(batch, alone, atol=1e-5, rtol=1e-5)
    # By tokens: the tokenizer that transformers makes for a Qwen2 knows one of these words only.
    rows = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in ([5, 20, 8], [7, 10, 14, 17])]
    collator = build_collator(tokenizer, "no", CPU)
    with torch.no_grad():
        first, second = compute_logits(model, collator(rows))
        shorter = compute_logits(model, collator(rows[:1]))[0]
    torch.testing.assert_close(first, shorter, atol=1e-5, rtol=1e-5)
    assert (first - second).abs().max() > 1e-3
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    again = ModelConfig(str(tmp_path / "saved"))
    assert torch.equal(logits(load_classifier(again, load_tokenizer(again)), load_tokenizer(again)), batch)
    plain = AutoTokenizer.from_pretrained(again.model)(TEXTS[:2], padding=True, return_tensors="pt")
    with torch.no_grad():
        others = AutoModelForSequenceClassification.from_pretrained(again.model).eval()(**plain).logits
    torch.testing.assert_close(others, batch[:2], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma"])
def test_padding_on_the_left_changes_no_logit_of_a_rotary_decoder(tmp_path, kind):
    source = ModelConfig(str(save(kind, tmp_path / kind)))
    tokenizer = load_tokenizer(source)
    model, _ = build_model(source, NAMES, tokenizer)
    texts = TEXTS[:2]
    right = logits(model, tokenizer, texts)
    tokenizer.padding_side = "left"
    torch.testing.assert_close(logits(model, tokenizer, texts), right, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("known", [-1, 4])
def test_padding_token_of_the_tokenizer_is_that_of_the_model(tmp_path, known):
    """As in the first Llama, whose config.json says -1, and where a tokenizer was given another one afterwards."""
    source = ModelConfig(str(save("llama", tmp_path / "llama", pad_token_id=4)))
    file = tmp_path / "llama/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"pad_token_id": known}))
    change_tokenizer(tmp_path / "llama", pad_token="</s>")
    tokenizer = load_tokenizer(source)
    for model in (build_model(source, NAMES, tokenizer)[0], load_classifier(source, tokenizer)):
        assert model.config.pad_token_id == tokenizer.pad_token_id == 2
        alone = torch.cat([logits(model, tokenizer, [text]) for text in TEXTS[:2]])
        torch.testing.assert_close(logits(model, tokenizer, TEXTS[:2]), alone, atol=1e-5, rtol=1e-5)


def test_text_that_ends_in_the_padding_token_of_its_tokenizer_has_one_answer(tmp_path):
    """As of tokenizers that put an end token behind a text, with which they also pad."""
    source = ModelConfig(str(save("llama", tmp_path / "llama")))
    tiny_tokenizer(tmp_path / "llama")
    change_tokenizer(tmp_path / "llama", pad_token="</s>")
    tokenizer = load_tokenizer(source)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == tokenizer("a")["input_ids"][-1]
    model, _ = build_model(source, NAMES, tokenizer)
    batch = logits(model, tokenizer)
    torch.testing.assert_close(batch, torch.cat([logits(model, tokenizer, [t]) for t in TEXTS]), atol=1e-5, rtol=1e-5)
    encoded = [model_inputs(Encoder(tokenizer, 32)([texts])) for texts in (["a"], ["a", "I"], ["a", "the film " * 9])]
    assert find_leak(model, *map(build_collator(tokenizer, "no", CPU), encoded)) is None


def test_windows_of_a_decoder_have_the_mean_of_their_logits_alone(tmp_path):
    source = ModelConfig(str(save("gpt2", tmp_path / "gpt2")))
    tokenizer = load_tokenizer(source)
    model, _ = build_model(source, NAMES, tokenizer)
    encoded = Encoder(tokenizer, 32, Windows(8, 2))([["the plot was very dull and not fine film movie", "great"]])
    rows = model_inputs(encoded)
    assert encoded["num_windows"] == [2, 1]
    collator = build_collator(tokenizer, "no", CPU)
    with torch.no_grad():
        inputs = dict(collator(rows)) | {"num_windows": torch.tensor(encoded["num_windows"])}
        found = compute_logits(model.eval(), inputs)
        alone = torch.cat([compute_logits(model, collator([row])) for row in rows])
    torch.testing.assert_close(found, torch.stack([alone[:2].mean(0), alone[2]]), atol=1e-5, rtol=1e-5)
