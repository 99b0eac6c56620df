"""Attention in training on a CPU: results and gradients of its formula and of PyTorch's, and what is left to PyTorch."""

import math

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoConfig, AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import AttentionInterface

from lib.runtime.cpu.attention import attention_forward, fast_attention
from lib.runtime.cpu.kernels import use_cpu_kernels
from tests.tiny_models import ENCODER

BATCH, HEADS, POSITIONS, WIDTH = 3, 2, 7, 5
SHAPE = ENCODER | {"initializer_range": 0.02}


def inputs(dtype=torch.float32, keys=POSITIONS, value_width=WIDTH):
    """Queries, keys and values as models hand them over, non-contiguous views, and a mask of some keys."""
    torch.manual_seed(0)
    shapes = [(BATCH, POSITIONS, HEADS, WIDTH), (BATCH, keys, HEADS, WIDTH), (BATCH, keys, HEADS, value_width)]
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


def is_ours(result):
    """Whether `Attention` computed `result`, by the graph of its gradients."""
    nodes = [result.grad_fn]
    for node in nodes:
        nodes += [before for before, _ in node.next_functions if before is not None]
    return any(node.name() == "AttentionBackward" for node in nodes)


def assert_like_pytorch(tensors, mask, ours=True, **settings):
    """Result and gradients are those of `scaled_dot_product_attention`; `ours` tells whose function computed them."""
    found, _ = attention_forward(module(), *tensors, mask, **settings)
    wanted = scaled_dot_product_attention(*tensors, attn_mask=mask, scale=settings.get("scaling")).transpose(1, 2)
    assert is_ours(found) == ours
    torch.testing.assert_close(found, wanted)
    for mine, other in zip(gradients(found, tensors), gradients(wanted, tensors), strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("scaling", [None, 0.3])
@pytest.mark.parametrize("masked", [True, False])
def test_result_and_gradients_without_dropout_are_those_of_pytorch(masked, scaling):
    tensors, mask = inputs()
    assert_like_pytorch(tensors, mask if masked else None, scaling=scaling)


@pytest.mark.parametrize("keys", [POSITIONS + 4, POSITIONS - 3])
@pytest.mark.parametrize("masked", [True, False])
def test_keys_may_outnumber_queries_or_be_fewer(keys, masked):
    """Prefix tuning puts learned keys and values before those of the text: the mask is then wider than high."""
    tensors, mask = inputs(keys=keys)
    assert_like_pytorch(tensors, mask if masked else None)


def test_values_may_have_another_width_than_keys():
    tensors, mask = inputs(value_width=WIDTH + 3)
    assert_like_pytorch(tensors, mask)


@pytest.mark.parametrize(
    "shape",
    [(POSITIONS, POSITIONS), (1, POSITIONS), (HEADS, 1, POSITIONS), (BATCH, HEADS, POSITIONS, POSITIONS)],
)
def test_every_boolean_mask_that_broadcasts_is_applied(shape):
    tensors, _ = inputs()
    torch.manual_seed(3)
    mask = torch.rand(shape) < 0.7
    mask[..., 0] = True
    assert_like_pytorch(tensors, mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_query_that_may_read_no_key_gets_zeros_and_gives_no_gradient(dtype):
    """The padding of a text that is padded on the left, under a causal mask."""
    tensors, mask = inputs(dtype)
    mask[0, :, :2] = False
    found, _ = attention_forward(module(), *tensors, mask)
    wanted = scaled_dot_product_attention(*tensors, attn_mask=mask).transpose(1, 2)
    assert is_ours(found)
    assert bool((found[0, :2] == 0).all())
    assert bool((wanted[0, :2] == 0).all())
    assert bool((gradients(found, tensors)[0][0, :, :2] == 0).all())
    assert bool((gradients(wanted, tensors)[0][0, :, :2] == 0).all())


def test_dropout_zeroes_weights_and_scales_the_rest():
    (query, key, value), mask = inputs()
    torch.manual_seed(2)
    found, _ = attention_forward(module(), query, key, value, mask, dropout=0.3, scaling=0.4)
    torch.manual_seed(2)
    kept = torch.empty(BATCH, HEADS, POSITIONS, POSITIONS).bernoulli_(0.7)
    scores = (query @ key.transpose(2, 3) * 0.4).masked_fill(~mask, -math.inf)
    wanted = (torch.softmax(scores, -1) * kept / 0.7 @ value).transpose(1, 2)
    assert is_ours(found)
    assert 0 < (kept == 0).float().mean() < 0.6
    torch.testing.assert_close(found, wanted)
    for mine, other in zip(*(gradients(result, (query, key, value)) for result in (found, wanted)), strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("masked", [True, False])
def test_gradients_can_be_differentiated_again(masked):
    """As PyTorch's can with dropout; here its dropout is so small that no weight is dropped."""
    tensors, mask = inputs()
    mask = mask if masked else None
    found, _ = attention_forward(module(), *tensors, mask, dropout=1e-9)
    wanted, _ = sdpa_attention_forward(module(), *tensors, mask, dropout=1e-9)
    assert is_ours(found)
    second = []
    for result in (found, wanted):
        first = torch.autograd.grad(result.square().sum(), tensors, create_graph=True)
        second.append(torch.autograd.grad(sum(gradient.square().sum() for gradient in first), tensors))
    for mine, other in zip(*second, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("masked", [True, False])
def test_bf16_is_as_near_to_float32_as_pytorch(masked):
    tensors, mask = inputs()
    mask = mask if masked else None
    exact = scaled_dot_product_attention(*tensors, attn_mask=mask)
    half = [tensor.detach().bfloat16().requires_grad_() for tensor in tensors]
    mine, theirs = attention_forward(module(), *half, mask)[0], scaled_dot_product_attention(*half, attn_mask=mask)
    assert is_ours(mine)
    mine = mine.transpose(1, 2)
    assert mine.dtype == torch.bfloat16
    wanted = [exact, *gradients(exact, tensors)]
    for truth, ours_, theirs_ in zip(
        wanted, [mine, *gradients(mine, half)], [theirs, *gradients(theirs, half)], strict=True
    ):
        limit = max(2 * (theirs_ - truth).abs().max().item(), 2**-8 * truth.abs().max().item())
        assert (ours_ - truth).abs().max() <= limit


class Subclass(torch.Tensor):
    """A tensor with a type of its own, as libraries of quantization or sharding have them."""


@pytest.mark.parametrize(
    "change",
    [
        {"attention_mask": torch.zeros(BATCH, 1, POSITIONS, POSITIONS)},
        {"attention_mask": None, "is_causal": True},
        {"position_bias": torch.zeros(1, HEADS, POSITIONS, POSITIONS)},
        {"position_bias": torch.zeros(1, HEADS, POSITIONS, POSITIONS, requires_grad=True)},
        {"training": False},
        {"keys": 400},
        {"frozen": True},
        {"dtype": torch.float64},
        {"dtype": torch.float16},
        {"dropout": 1.0},
        {"one": "key and value", "attention_mask": None},
        {"subclass": True},
    ],
    ids=[
        "float mask",
        "implied causal mask",
        "position bias",
        "learned position bias",
        "evaluation",
        "long text",
        "no gradients",
        "float64",
        "float16",
        "all dropped",
        "keys that broadcast over the batch",
        "subclass of Tensor",
    ],
)
def test_everything_else_is_left_to_transformers(change):
    change = dict(change)
    tensors, mask = inputs(change.pop("dtype", torch.float32), keys=change.pop("keys", POSITIONS))
    if change.pop("frozen", False):
        tensors = [tensor.detach() for tensor in tensors]
    if change.pop("one", None):
        tensors[1:] = [tensor[:1] for tensor in tensors[1:]]
    if change.pop("subclass", False):
        tensors = [tensor.as_subclass(Subclass) for tensor in tensors]
    part = module().train(change.pop("training", True))
    settings = {"attention_mask": mask} | change
    found, _ = attention_forward(part, *tensors, **settings)
    wanted, _ = sdpa_attention_forward(part, *tensors, **settings)
    assert found.grad_fn is None or not is_ours(found)
    assert type(found) is type(wanted)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_float64_and_integers_get_pytorch_answer(dropout):
    (query, key, value), mask = inputs(torch.float64)
    found, _ = attention_forward(module(), query, key, value, mask, dropout=dropout)
    assert found.dtype == torch.float64
    found.sum().backward()
    whole = [tensor.detach().long() for tensor in (query, key, value)]
    with pytest.raises(RuntimeError):
        attention_forward(module(), *whole, mask, dropout=dropout)


@pytest.mark.parametrize("softcap", [30.0, 0.0])
def test_attention_refuses_what_transformers_refuses(softcap):
    tensors, mask = inputs()
    with pytest.raises(ValueError, match="softcap"):
        attention_forward(module(), *tensors, mask, softcap=softcap)


def test_fewer_heads_of_keys_than_of_queries_are_left_to_transformers():
    (query, key, value), mask = inputs()
    part = module()
    part.num_key_value_groups = HEADS
    settings = {"attention_mask": mask, "dropout": 0.0}
    found, _ = attention_forward(part, query, key[:, :1], value[:, :1], **settings)
    wanted, _ = sdpa_attention_forward(part, query, key[:, :1], value[:, :1], **settings)
    assert not is_ours(found)
    assert torch.equal(found, wanted)


def test_torch_func_and_forward_derivatives_are_left_to_pytorch():
    (query, key, value), mask = inputs()
    query, key, value = (tensor.detach() for tensor in (query, key, value))

    def loss(function, states):
        return function(module(), states, key, value, mask, dropout=1e-9)[0].square().sum()

    found, wanted = (
        torch.func.grad(lambda states, function=function: loss(function, states))(query)
        for function in (attention_forward, sdpa_attention_forward)
    )
    torch.testing.assert_close(found, wanted)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(query, torch.ones_like(query))
        found, wanted = (
            torch.autograd.forward_ad.unpack_dual(loss(function, dual)).tangent
            for function in (attention_forward, sdpa_attention_forward)
        )
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["modernbert", "qwen2"])
def test_models_that_rotate_queries_in_float32_train_in_bf16(kind, dropout):
    """Under autocast their queries and keys are float32 and their values bf16."""
    shape = SHAPE | {"num_labels": 3, "attention_dropout": dropout}
    shape |= {"num_key_value_heads": 2} if kind == "qwen2" else {"cls_token_id": 0, "sep_token_id": 2}
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(kind, **shape)).train()
    with torch.autocast("cpu", torch.bfloat16):
        (ours, *mine), (_, *other) = loss_and_gradients_with_each(model)
    assert is_ours(ours)
    if not dropout:
        mine, other = (torch.cat([gradient.flatten() for gradient in gradients]) for gradients in (mine, other))
        torch.testing.assert_close(mine, other, rtol=0.05, atol=0.02 * other.abs().max().item())


def test_loss_and_gradients_of_a_model_are_those_of_transformers_attention():
    config = BertConfig(**SHAPE, num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    torch.manual_seed(0)
    mine, other = loss_and_gradients_with_each(BertForSequenceClassification(config).train())
    assert is_ours(mine[0])
    for found, wanted in zip(mine, other, strict=True):
        torch.testing.assert_close(found, wanted)


def loss_and_gradients_with_each(model):
    """Loss and gradients of a batch with padding, by our attention and by transformers'."""
    ids = torch.randint(3, 50, (4, 9))
    ids[:2, 6:] = SHAPE["pad_token_id"]
    mask = (ids != SHAPE["pad_token_id"]).long()
    use_cpu_kernels(False)

    def compute():
        model.zero_grad()
        torch.manual_seed(1)
        loss = model(input_ids=ids, attention_mask=mask, labels=torch.tensor([0, 1, 2, 0])).loss
        with torch.autocast("cpu", enabled=False):
            loss.backward(retain_graph=True)
        return [loss, *(p.grad for p in model.parameters() if p.grad is not None)]

    with fast_attention():
        ours = compute()
    return ours, compute()


@pytest.mark.usefixtures("no_kernels")
def test_attention_that_a_program_has_registered_itself_stays():
    def own(*_, **__):
        raise NotImplementedError

    AttentionInterface.register("sdpa", own)
    try:
        with fast_attention():
            assert AttentionInterface()["sdpa"] is own
        assert AttentionInterface()["sdpa"] is own
    finally:
        AttentionInterface.register("sdpa", sdpa_attention_forward)
