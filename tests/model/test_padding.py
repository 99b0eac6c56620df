"""What padding does to a model is found out on the model; where it leaks, evaluation runs without it."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from lib.config.sections import ModelSource
from lib.data.loader import build_collator
from lib.errors import UserError
from lib.evaluation.padding import try_padding, use_segments
from lib.model.forward import compute_logits
from lib.model.load import load_classifier, load_tokenizer
from lib.model.padding import find_leak
from lib.runtime import segments
from tests.tiny_models import any_classifier, save_classifier, trainable

LEAKY = ("big_bird", "convbert", "fnet")
CPU = torch.device("cpu")


def parts(kind: str, folder: Path) -> tuple[Any, Any]:
    source = ModelSource(str(trainable(kind, folder)))
    tokenizer = load_tokenizer(source)
    return load_classifier(source, tokenizer), tokenizer


@pytest.mark.parametrize("kind", [*LEAKY, "roberta", "gpt2", "xlnet", "t5"])
def test_models_whose_logits_padding_changes_are_found(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = parts(kind, tmp_path)
    model.train()
    monkeypatch.setattr("lib.evaluation.padding.LONGEST", 10)  # too short for the sparse attention of BigBird
    state = torch.get_rng_state()
    found = try_padding(model, tokenizer, build_collator(tokenizer, "no", CPU), tokenizer.model_max_length)
    assert found == ("padding" if kind in LEAKY else None)
    assert model.training
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("side", ["right", "left"])
def test_logits_without_padding_are_those_of_each_text_alone(side: str, tmp_path: Path) -> None:
    model, tokenizer = parts("fnet", tmp_path)
    model.eval()
    tokenizer.padding_side = side
    texts = ["film", "a plot was", "the film", "good", "a bad film", "dull " * 20]
    with torch.inference_mode():
        alone = torch.cat([model(**tokenizer(text, return_tensors="pt")).logits for text in texts])
        batch = dict(tokenizer(texts, padding=True, return_tensors="pt"))
        found = compute_logits(model, batch, unpadded=True)
        padded = compute_logits(model, batch)
    assert torch.allclose(found, alone, atol=1e-6)
    assert not torch.allclose(padded, alone, atol=1e-2)


def test_a_model_that_mixes_the_texts_of_a_batch_is_found() -> None:
    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
            torch.rand(1)
            values = (input_ids * attention_mask).sum(dim=1, keepdim=True).float()
            return SimpleNamespace(logits=self.weight * (values - values.mean()) + torch.tensor([[1.0, 2.0]]))

    def batch(*rows: list[int]) -> dict[str, torch.Tensor]:
        ids = torch.tensor(rows)
        return {"input_ids": ids, "attention_mask": (ids > 0).long()}

    state = torch.get_rng_state()
    found = find_leak(Mixing(), batch([3, 4]), batch([3, 4], [9, 9]), batch([3, 4, 0, 0], [7, 8, 9, 9]))
    assert found == "batch"
    assert torch.equal(state, torch.get_rng_state())


def test_short_texts_do_not_change_how_big_bird_reads_long_ones(tmp_path: Path) -> None:
    model, _ = parts("big_bird", tmp_path)
    model.eval()
    long = torch.arange(40)[None] % 60 + 5
    with torch.inference_mode():
        first = model(input_ids=long).logits
        model(input_ids=long[:, :4])
        state = torch.get_rng_state()
        again = model(input_ids=long).logits
    assert torch.equal(first, again)
    assert torch.equal(state, torch.get_rng_state())


def test_a_model_that_takes_no_short_text_alone_is_named() -> None:
    class Pooling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
            return SimpleNamespace(logits=nn.functional.max_pool1d(self.weight * input_ids, 4)[:, :1])

    short, long = torch.tensor([[5, 6]]), torch.tensor([[5, 6, 0, 0, 0], [1, 2, 3, 4, 5]])
    alone, twice, padded = (
        {"input_ids": ids, "attention_mask": (ids > 0).long()} for ids in (short, short.repeat(2, 1), long)
    )
    assert find_leak(Pooling(), alone, twice, padded) == "length"
    assert find_leak(Pooling(), alone, twice, twice) is None


def test_canine_whose_numbers_depend_on_padding_is_named(tmp_path: Path) -> None:
    """It pools four characters, so that padding changes nothing where their number is a multiple of four."""
    source = ModelSource(str(any_classifier("canine", tmp_path)))
    tokenizer = load_tokenizer(source)
    model, collator = load_classifier(source, tokenizer), build_collator(tokenizer, "no", CPU)
    assert try_padding(model, tokenizer, collator, tokenizer.model_max_length) == "length"


class Plain(tuple):
    """The output of a backbone without names, with what a head asks of it."""

    hidden_states = attentions = None


@pytest.mark.parametrize("error", [None, AttributeError, KeyError, TypeError])
def test_a_backbone_of_another_form_is_refused_in_one_row(
    error: type[Exception] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the user's words, whatever it raises for a row, or where it returns a plain tuple."""
    model, tokenizer = parts("roberta", tmp_path)
    forward = model.roberta.forward

    def other(*ids: torch.Tensor, **given: Any) -> Plain:
        if error is not None and "cu_seq_lens_q" in given:
            raise error("last_hidden_state")
        return Plain((forward(*ids, **given).last_hidden_state,))

    monkeypatch.setattr(model.roberta, "forward", other)
    with pytest.raises(UserError, match=r"a model of type roberta cannot .* it fails on them .*last_hidden_state"):
        use_segments(model, tokenizer, build_collator(tokenizer, "no", CPU), 40, "no")


def test_a_wrong_window_longer_than_the_usual_text_of_a_trial_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    special = {"cls_token_id": 0, "sep_token_id": 2}
    folder = save_classifier("modernbert", tmp_path, local_attention=300, global_attn_every_n_layers=2, **special)
    tokenizer = load_tokenizer(source := ModelSource(str(folder)))
    model, collator = load_classifier(source, tokenizer), build_collator(tokenizer, "no", CPU)
    use_segments(model, tokenizer, collator, 600, "no")
    model.config._attn_implementation = "sdpa"
    monkeypatch.setattr(segments, "near", lambda *_: None)  # each token reads all
    with pytest.raises(UserError, match="their logits are others"):
        use_segments(model, tokenizer, collator, 600, "no")
