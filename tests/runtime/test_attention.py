"""Attention of training on a CPU gives the numbers and gradients of its formula and of PyTorch's, where it is used."""

import math

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoConfig, AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import AttentionInterface

from lib.runtime.cpu import attention as ours
from lib.runtime.cpu.attention import Attention, attention_forward, use_fast_attention
from tests.tiny_models import ENCODER

BATCH, HEADS, POSITIONS, WIDTH = 3, 2, 7, 5
SHAPE = ENCODER | {"initializer_range": 0.02}


@pytest.fixture
def fast(monkeypatch):
    """Ours is in use within the test only; counts its calls."""
    calls = []
    apply = Attention.apply
    monkeypatch.setattr(ours.Attention, "apply", lambda *arguments: (calls.append(1), apply(*arguments))[1])
    use_fast_attention()
    yield calls
    AttentionInterface.register("sdpa", sdpa_attention_forward)


def inputs(dtype=torch.float32, keys=POSITIONS):
    """Queries, keys and values as models hand them over, views of what lies otherwise in memory, and which positions count."""
    torch.manual_seed(0)
    shapes = ((BATCH, POSITIONS, HEADS, WIDTH), (BATCH, keys, HEADS, WIDTH), (BATCH, keys, HEADS, WIDTH))
    tensors = [torch.randn(shape, dtype=dtype).transpose(1, 2).requires_grad_() for shape in shapes]
    mask = torch.ones(BATCH, 1, POSITIONS, keys, dtype=torch.bool)
    mask[1, ..., -2:] = False
    return tensors, mask


def gradients(result, tensors):
    torch.manual_seed(1)
    return torch.autograd.grad(result, tensors, torch.randn(result.shape).to(result.dtype))


def module(causal=False):
    part = nn.Identity()
    part.is_causal = causal
    return part.train()


@pytest.mark.parametrize("scaling", [None, 0.3])
@pytest.mark.parametrize("masked", [True, False])
def test_without_dropout_it_is_pytorch_s(masked, scaling, fast):
    tensors, mask = inputs()
    mask = mask if masked else None
    found, _ = attention_forward(module(), *tensors, mask, scaling=scaling)
    wanted = scaled_dot_product_attention(*tensors, attn_mask=mask, scale=scaling).transpose(1, 2)
    assert fast
    torch.testing.assert_close(found, wanted)
    for mine, other in zip(gradients(found, tensors), gradients(wanted, tensors), strict=True):
        torch.testing.assert_close(mine, other)


def test_dropout_takes_weights_away_and_makes_up_for_them():
    (query, key, value), mask = inputs()
    bias = torch.where(mask, 0.0, -math.inf)
    torch.manual_seed(2)
    found = Attention.apply(query, key, value, bias, 0.4, 0.3)
    torch.manual_seed(2)
    kept = torch.empty(BATCH, HEADS, POSITIONS, POSITIONS).bernoulli_(0.7)
    wanted = torch.softmax(query @ key.transpose(2, 3) * 0.4 + bias, -1) * kept / 0.7 @ value
    assert 0 < (kept == 0).float().mean() < 0.6
    torch.testing.assert_close(found, wanted)
    for mine, other in zip(*(gradients(result, (query, key, value)) for result in (found, wanted)), strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("masked", [True, False])
def test_in_bf16_it_is_as_near_to_float32_as_pytorch_s(masked, fast):
    tensors, mask = inputs()
    mask = mask if masked else None
    exact = scaled_dot_product_attention(*tensors, attn_mask=mask)
    half = [tensor.detach().bfloat16().requires_grad_() for tensor in tensors]
    mine, theirs = attention_forward(module(), *half, mask)[0], scaled_dot_product_attention(*half, attn_mask=mask)
    assert fast
    mine = mine.transpose(1, 2)
    assert mine.dtype == torch.bfloat16
    wanted = [exact, *gradients(exact, tensors)]
    for truth, ours_, theirs_ in zip(
        wanted, [mine, *gradients(mine, half)], [theirs, *gradients(theirs, half)], strict=True
    ):
        limit = max(2 * (theirs_ - truth).abs().max().item(), 2**-8 * truth.abs().max().item())
        assert (ours_ - truth).abs().max() <= limit


@pytest.mark.parametrize(
    "change",
    [
        {"attention_mask": torch.zeros(BATCH, 1, POSITIONS, POSITIONS)},
        {"attention_mask": None, "is_causal": True},
        {"position_bias": torch.zeros(1, HEADS, POSITIONS, POSITIONS)},
        {"training": False},
        {"keys": 400},
        {"frozen": True},
    ],
    ids=["a mask of numbers", "an implied mask", "a bias", "no training", "long texts", "no gradients"],
)
def test_all_else_is_left_to_transformers(change, fast):
    tensors, mask = inputs(keys=change.pop("keys", POSITIONS))
    if change.pop("frozen", False):
        tensors = [tensor.detach() for tensor in tensors]
    part = module().train(change.pop("training", True))
    settings = {"attention_mask": mask} | change
    found, _ = attention_forward(part, *tensors, **settings)
    wanted, _ = sdpa_attention_forward(part, *tensors, **settings)
    assert not fast
    assert torch.equal(found, wanted)


def test_what_transformers_refuses_is_refused(fast):
    tensors, mask = inputs()
    with pytest.raises(ValueError, match="softcap"):
        attention_forward(module(), *tensors, mask, softcap=30.0)


def test_fewer_heads_of_keys_than_of_queries_are_left_to_transformers(fast):
    (query, key, value), mask = inputs()
    part = module()
    part.num_key_value_groups = HEADS
    settings = {"attention_mask": mask, "dropout": 0.0}
    found, _ = attention_forward(part, query, key[:, :1], value[:, :1], **settings)
    wanted, _ = sdpa_attention_forward(part, query, key[:, :1], value[:, :1], **settings)
    assert not fast
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["modernbert", "qwen2"])
def test_models_that_rotate_queries_in_float32_learn_in_bf16(kind, dropout, fast):
    """Under autocast their queries and keys are float32 and their values bf16."""
    shape = SHAPE | {"num_labels": 3, "attention_dropout": dropout}
    shape |= {"num_key_value_heads": 2} if kind == "qwen2" else {"cls_token_id": 0, "sep_token_id": 2}
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(kind, **shape)).train()
    with torch.autocast("cpu", torch.bfloat16):
        (_, *mine), (_, *other) = learnt_with_either(model)
    assert len(fast) == 2  # one a layer
    if not dropout:
        mine, other = (torch.cat([gradient.flatten() for gradient in gradients]) for gradients in (mine, other))
        torch.testing.assert_close(mine, other, rtol=0.05, atol=0.02 * other.abs().max().item())


def test_a_model_learns_the_same_with_either(fast):
    config = BertConfig(**SHAPE, num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    torch.manual_seed(0)
    mine, other = learnt_with_either(BertForSequenceClassification(config).train())
    assert len(fast) == 2  # one a layer
    for found, wanted in zip(mine, other, strict=True):
        torch.testing.assert_close(found, wanted)


def learnt_with_either(model):
    """Loss and gradients of a batch with padding, by ours and by transformers' attention."""
    ids = torch.randint(3, 50, (4, 9))
    ids[:2, 6:] = SHAPE["pad_token_id"]
    mask = (ids != SHAPE["pad_token_id"]).long()
    found = []
    for function in (attention_forward, sdpa_attention_forward):
        AttentionInterface.register("sdpa", function)
        model.zero_grad()
        torch.manual_seed(1)
        loss = model(input_ids=ids, attention_mask=mask, labels=torch.tensor([0, 1, 2, 0])).loss
        with torch.autocast("cpu", enabled=False):
            loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    return found
