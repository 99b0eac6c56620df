"""The mask of attention made outside the model: the numbers of the model's own mask, without a look at the device."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from lib.config.sections import CLASSIFICATION
from lib.data.loader import Split, build_collator
from lib.evaluation import scoring
from lib.evaluation.batch_size import BatchSize, split_batches
from lib.evaluation.predictions import Predictions
from lib.model.forward import compute_logits
from lib.model.masks import is_padded, reads_ready_mask, with_ready_mask
from lib.runtime.cpu.kernels import use_cpu_kernels
from tests.conftest import tiny_tokenizer
from tests.tiny_models import ENCODER, NAMES, SETTINGS, build_from, labels, save_classifier

EXACT = ("bert", "distilbert", "electra", "roberta", "xlm-roberta")
OTHERS = ("modernbert", "deberta-v2", "gpt2", "camembert", "mpnet", "albert")
MASKS = {
    "padded on the right": [[1] * 9, [1] * 6 + [0] * 3, [1] + [0] * 8],
    "padded on the left": [[1] * 9, [0] * 3 + [1] * 6, [0] * 8 + [1]],
    "not padded": [[1] * 9] * 3,
}


class Count(TorchDispatchMode):
    """Counts the operations within, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.operations[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


def build(kind: str, implementation: str = "") -> Any:
    """A classifier of two layers with random weights, and with dropout, in train mode."""
    torch.manual_seed(0)
    settings = SETTINGS.get(kind, ENCODER) | labels(NAMES)
    config = AutoConfig.for_model(kind, **settings)
    choice = {"attn_implementation": implementation} if implementation else {}
    return AutoModelForSequenceClassification.from_config(config, **choice).train()


def inputs_with(mask: list[list[int]]) -> dict[str, torch.Tensor]:
    ids = torch.randint(5, 100, (3, 9), generator=torch.Generator().manual_seed(1))
    there = torch.tensor(mask)
    return {"input_ids": torch.where(there.bool(), ids, 1), "attention_mask": there}


def learn(model: Any, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Logits and all gradients, with the dropout of one seed."""
    torch.manual_seed(3)
    model.zero_grad()
    logits = compute_logits(model, inputs)
    logits.square().sum().backward()
    return [logits.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels of this project", "kernels of PyTorch"])
@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", EXACT)
def test_logits_and_gradients_are_equal_bit_by_bit(kind, implementation, precision, kernels):
    model = build(kind, implementation)
    assert reads_ready_mask(model)
    use_cpu_kernels(kernels)
    try:
        for name, mask in MASKS.items():
            for training in (True, False):
                model.train(training)
                inputs = inputs_with(mask)
                with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                    own = learn(model, inputs)
                    ready = with_ready_mask(model, inputs, precision, is_padded(inputs))
                    assert ("attention_mask" in ready) == (name != "not padded")
                    assert ready["input_ids"] is inputs["input_ids"]
                    made = learn(model, ready)
                assert len(own) > 10
                assert all(map(torch.equal, made, own)), (name, training)
    finally:
        use_cpu_kernels(False)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", EXACT)
def test_forward_and_backward_read_nothing_from_the_device(kind, implementation):
    """The model's own mask is one read per forward."""
    model, inputs = build(kind, implementation), inputs_with(MASKS["padded on the right"])
    with Count() as own:
        learn(model, inputs)
    assert own.operations["_local_scalar_dense"] == 1
    with Count() as made:
        learn(model, with_ready_mask(model, inputs, "no", is_padded(inputs)))
    assert made.operations["_local_scalar_dense"] == made.operations["nonzero"] == 0


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", EXACT)
def test_evaluation_reads_nothing_from_the_device_and_no_bit_changes(
    kind, implementation, precision, monkeypatch, tmp_path
):
    """Also with the weights of linear layers in bf16, as an evaluation holds them; batches with padding and without."""
    model, accelerator = build(kind, implementation), Accelerator(cpu=True)
    monkeypatch.setattr(type(accelerator), "mixed_precision", precision)
    ids = [[0, *range(5, 5 + length), 2] for length in (1, 1, 4, 9, 2, 7, 3, 12)]
    tokens, size = Dataset.from_dict({"input_ids": ids, "labels": [0, 1, 2, 0, 1, 2, 0, 1]}), BatchSize(3)
    tiny_tokenizer(tmp_path)
    collator = build_collator(AutoTokenizer.from_pretrained(tmp_path), precision, accelerator.device)
    split = Split("test", tokens, np.array(list(map(len, ids))), collator, len(NAMES), CLASSIFICATION)

    def score() -> tuple[Predictions, int]:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"), Count() as count:
            found = scoring.predict(accelerator, model, split, size)
        # In inference mode, what reads a number is seen by its own name.
        return found, sum(count.operations[name] for name in ("_local_scalar_dense", "is_nonzero", "item", "nonzero"))

    made, reads = score()
    assert reads == 1  # the seed of the data loader, of the CPU
    with monkeypatch.context() as patch:
        patch.setattr(scoring, "with_ready_mask", lambda _, inputs, *__: inputs)
        own, reads = score()
    batches = [split.positions[batch].tolist() for batch in split_batches(split, size)]
    assert reads == 1 + len(batches)
    assert {len(set(lengths)) > 1 for lengths in batches} == {True, False}
    assert np.array_equal(made.logits, own.logits)
    assert np.array_equal(made.losses, own.losses)
    assert np.ptp(own.logits, axis=0).min() > 0


@pytest.mark.parametrize("kind", OTHERS)
def test_other_models_make_their_own_mask(kind):
    model, inputs = build(kind), inputs_with(MASKS["not padded"])
    assert not reads_ready_mask(model)
    assert with_ready_mask(model, inputs, "no", is_padded(inputs)) is inputs


def test_mask_of_tokens_is_kept_where_something_else_reads_it():
    inputs = inputs_with(MASKS["padded on the right"])
    model = build("bert")
    cached = inputs | {"rows": torch.arange(3)}
    assert with_ready_mask(model, cached, "no") is cached
    ready = with_ready_mask(model, inputs, "no")
    assert with_ready_mask(model, ready, "no") is ready
    assert is_padded({"attention_mask": torch.ones(2, 3, device="meta")})  # of a GPU: not looked at
    model.config._attn_implementation = "flash_attention_2"
    assert with_ready_mask(model, inputs, "no") is inputs
    model.config._attn_implementation, model.config.is_decoder = "sdpa", True
    assert with_ready_mask(model, inputs, "no") is inputs
    assert with_ready_mask(torch.nn.Linear(1, 1), inputs, "no") is inputs  # no model of transformers


@pytest.mark.parametrize(("method", "exact"), [("lora", True), ("prompt", False), ("prefix", False)])
def test_virtual_tokens_stand_before_those_of_the_mask(method, exact, tmp_path: Path):
    from lib.config.sections import AdapterConfig, ModelConfig
    from lib.model.adapters.adapt import adapt

    folder = save_classifier("roberta", tmp_path)
    model, weights = build_from(folder)
    model = adapt(model, AdapterConfig(adapter=method), ModelConfig(str(folder)), weights.new).train()
    assert reads_ready_mask(model) is exact
    for mask in MASKS.values():
        inputs = inputs_with(mask)
        own, made = learn(model, inputs), learn(model, with_ready_mask(model, inputs, "no", is_padded(inputs)))
        assert all(map(torch.equal, made, own))
