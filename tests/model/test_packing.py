"""Texts in one row without padding get the logits and the gradients that each gets alone, for any mixture of lengths."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification

from lib.data.packing import pack
from lib.model.forward import compute_logits
from lib.model.recomputation import recompute_layers
from lib.runtime import segments
from tests.tiny_models import SETTINGS, adapter

LENGTHS = ([1, 5, 40, 3, 17, 60, 60, 2], [60] * 4, [1, 1, 1], [33], list(range(1, 30)))
LOCAL = {"local_attention": 8, "global_attn_every_n_layers": 2}
KINDS: dict[str, dict[str, Any]] = {
    "bert": {},
    "roberta": {},
    "xlm-roberta": {},
    "electra": {},
    "distilbert": {},
    "modernbert": LOCAL,
    "modernbert of means": LOCAL | {"classifier_pooling": "mean"},
}


def build(name: str) -> Any:
    """A classifier with random weights that attends by segments, in float64 and eval mode: what differs is not rounding."""
    torch.manual_seed(0)
    kind = name.split()[0]
    settings = SETTINGS.get(kind, SETTINGS["roberta"]) | KINDS[name]
    special = {"cls_token_id": 0, "sep_token_id": 2} if kind == "modernbert" else {}
    config = AutoConfig.for_model(kind, **settings, **special, num_labels=3)
    model = AutoModelForSequenceClassification.from_config(config).double().eval()
    model.config._attn_implementation = segments.NAME
    return model


def padded(model: Any, lengths: list[int], side: str = "right") -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 128, (len(lengths), max(lengths)), generator=generator)
    places = torch.arange(max(lengths))
    sizes = torch.tensor(lengths)[:, None]
    mask = places < sizes if side == "right" else places >= max(lengths) - sizes
    batch = {"input_ids": torch.where(mask, ids, 1), "attention_mask": mask.long()}
    if model.config.model_type in ("bert", "electra"):
        batch["token_type_ids"] = torch.randint(0, 2, ids.shape, generator=generator) * mask
    return batch


@pytest.mark.parametrize("name", KINDS)
def test_logits_in_one_row_are_those_of_each_text_alone(name: str) -> None:
    model = build(name)
    for lengths in LENGTHS:
        batch = padded(model, lengths)
        with torch.inference_mode():
            alone, together = compute_logits(model, batch, unpadded=True), compute_logits(model, pack(batch))
        assert together.shape == (len(lengths), 3)
        assert torch.allclose(together, alone, rtol=1e-6, atol=1e-6)
        if len(lengths) > 3:
            assert alone.std(dim=0).min() > 0.01


@pytest.mark.parametrize("name", KINDS)
def test_logits_in_float32_are_equal_up_to_rounding(name: str) -> None:
    model = build(name).float()
    batch = padded(model, LENGTHS[0])
    with torch.inference_mode():
        alone, together = compute_logits(model, batch), compute_logits(model, pack(batch))
    assert (together - alone).abs().max() <= 2e-6 * alone.abs().max()


@pytest.mark.parametrize("name", KINDS)
def test_gradients_in_one_row_are_those_of_a_padded_batch(name: str) -> None:
    """Without dropout; recomputed layers get the segments again."""
    model = build(name)
    batch = padded(model, LENGTHS[0])

    def gradients(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        model.zero_grad()
        nn.functional.cross_entropy(compute_logits(model, inputs), torch.arange(8) % 3, reduction="sum").backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    wanted, found = gradients(batch), gradients(pack(batch))
    assert wanted.keys() == found.keys()
    for parameter, gradient in wanted.items():
        assert (found[parameter] - gradient).abs().max() <= 1e-6 * max(1, gradient.abs().max()), parameter
    recompute_layers(model, wanted=True)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    again = gradients(pack(batch))
    assert all((again[n] - g).abs().max() <= 1e-6 * max(1, g.abs().max()) for n, g in wanted.items())


@pytest.mark.parametrize("side", ["left", "right"])
def test_texts_that_are_padded_on_either_side_make_the_same_row(side: str) -> None:
    model = build("roberta")
    batch = padded(model, [3, 1, 5], side)
    row = pack(batch)
    assert row["cu_seqlens"].tolist() == [0, 3, 4, 9]
    assert row["position_ids"].tolist() == [[0, 1, 2, 0, 0, 1, 2, 3, 4]]
    assert row["input_ids"][0].tolist() == batch["input_ids"][batch["attention_mask"].bool()].tolist()
    assert "attention_mask" not in row


def test_the_kernel_of_a_gpu_is_given_what_pytorch_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU: a stand-in computes what varlen_attn promises for (tokens, heads, width) and a window (left, right)."""
    calls = []

    def varlen_attn(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cu_seq_q: torch.Tensor,
        cu_seq_k: torch.Tensor,
        max_q: int,
        max_k: int,
        *,
        scale: float,
        window_size: tuple[int, int],
    ) -> torch.Tensor:
        assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
        lengths = cu_seq_q.diff()
        assert max_q == max_k == lengths.max()
        text = torch.arange(len(lengths)).repeat_interleave(lengths)
        places = torch.arange(len(q))
        away = places[None] - places[:, None]
        left, right = window_size
        allowed = text[:, None] == text[None]
        allowed &= ((left < 0) | (away >= -left)) & ((right < 0) | (away <= right))
        scores = torch.einsum("qhd,khd->hqk", q, k) * scale
        weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
        calls.append(window_size)
        return torch.einsum("hqk,khd->qhd", weights, v)

    model = build("modernbert")
    batch = padded(model, LENGTHS[0])
    with torch.inference_mode():
        wanted = compute_logits(model, pack(batch))
        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
        monkeypatch.setattr(segments, "has_kernel", lambda *_: True)
        found = compute_logits(model, pack(batch))
    assert torch.allclose(found, wanted, rtol=1e-6, atol=1e-6)
    assert set(calls) == {(-1, -1), (4, 4)}
    query = torch.zeros(1, 2, 3, 8)
    with pytest.raises(ValueError, match="no dropout"):
        segments.segment_attention(model, query, query, query, None, dropout=0.1, cu_seq_lens_q=torch.tensor([0, 3]))


@pytest.mark.parametrize("method", ["lora", "bottleneck"])
def test_an_adapter_has_the_logits_and_gradients_of_a_padded_batch(method: str, tmp_path: Path) -> None:
    _, model, _ = adapter(tmp_path, method)
    model.double().eval()
    model.config._attn_implementation = segments.NAME
    batch, found = padded(model, LENGTHS[0]), []
    with torch.inference_mode():
        alone = compute_logits(model, batch, unpadded=True)
    for inputs in (batch, pack(batch)):
        model.zero_grad()
        logits = compute_logits(model, inputs)
        assert torch.allclose(logits, alone, rtol=1e-6, atol=1e-6)
        nn.functional.cross_entropy(logits, torch.arange(8) % 3, reduction="sum").backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})
    wanted, packed = found
    assert any(method in name.lower() or "adapter" in name.lower() for name in wanted)
    assert wanted.keys() == packed.keys()
    for name, gradient in wanted.items():
        assert gradient.abs().max() > 0
        assert (packed[name] - gradient).abs().max() <= 1e-6 * max(1, gradient.abs().max()), name
