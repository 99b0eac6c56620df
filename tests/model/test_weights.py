"""Weights on disk: a checkpoint is loaded as it was saved, with tied and frozen weights."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lib.errors import UserError
from lib.model.layers import freeze
from lib.model.weights import load_mean, load_weights, save_weights, split_weights
from tests.tiny_models import build_from


class Tied(nn.Module):
    """Tied weights within the frozen part, within the trained part and across them; buffers that training changes."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.table, self.decoder = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
        self.decoder.weight = self.table.weight
        self.table.weight.requires_grad_(False)
        self.low, self.high, self.view = (nn.Linear(4, 4, bias=False) for _ in range(3))
        self.high.weight = self.low.weight
        self.view.weight = nn.Parameter(self.low.weight.data, requires_grad=False)
        self.norm = nn.BatchNorm1d(4)
        self.norm(torch.randn(3, 4))


def same_state(one: nn.Module, two: nn.Module) -> bool:
    first, second = one.state_dict(), two.state_dict()
    return first.keys() == second.keys() and all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_tied_weights_and_buffers_of_trained_parts_are_saved_and_loaded(tmp_path: Path) -> None:
    model, other = Tied(1), Tied(2)
    save_weights(*split_weights(model), tmp_path)
    assert len(load_file(tmp_path / "frozen.safetensors")) == 2
    with torch.no_grad():
        model.low.weight.add_(1)
        model.norm(torch.randn(3, 4))
    save_weights(*split_weights(model), tmp_path)
    assert not same_state(model, other)
    load_weights(other, tmp_path)
    assert same_state(model, other)
    assert other.high.weight is other.low.weight
    assert other.decoder.weight is other.table.weight


def test_mean_of_weights_equals_that_of_numpy_and_counts_are_those_of_the_first(tmp_path: Path) -> None:
    model, files = Tied(1), []
    frozen = model.table.weight.clone()
    for step in range(3):
        with torch.no_grad():
            model.low.weight.add_(torch.randn(4, 4))
        model.norm(torch.randn(3, 4))
        (tmp_path / str(step)).mkdir()
        save_weights(*split_weights(model), tmp_path / str(step))
        files.append(tmp_path / str(step) / "model.safetensors")
    load_mean(model, files[::-1])
    saved, found = [load_file(file) for file in files], model.state_dict()
    for name in saved[0]:
        mean = np.mean([tensors[name].numpy() for tensors in saved], axis=0, dtype=np.float64).astype(np.float32)
        assert np.array_equal(found[name].numpy(), saved[2][name].numpy() if "num_batches" in name else mean), name
    assert not torch.equal(found["norm.running_mean"], saved[2]["norm.running_mean"])
    assert model.norm.num_batches_tracked == 4
    assert torch.equal(model.table.weight, frozen)
    assert model.high.weight is model.low.weight


def test_mean_of_weights_of_another_model_is_refused_by_name(tmp_path: Path) -> None:
    model, less = Tied(1), Tied(1)
    less.norm = nn.BatchNorm1d(4, affine=False)
    files = []
    for name, saved in (("whole", model), ("less", less)):
        (tmp_path / name).mkdir()
        save_weights(*split_weights(saved), tmp_path / name)
        files.append(tmp_path / name / "model.safetensors")
    whole, lacking = files
    for given in ([lacking, lacking], [whole, lacking], [lacking, whole]):
        with pytest.raises(UserError, match=r"norm\.bias, norm\.weight is missing, nothing is unknown"):
            load_mean(model, given)
    with pytest.raises(UserError, match=r"nothing is missing, norm\.bias, norm\.weight is unknown"):
        load_mean(less, [whole, whole])


@pytest.mark.parametrize(("then", "now"), [(None, "backbone"), ("backbone", None), ("1", "embeddings")])
def test_weights_load_when_another_part_was_frozen(
    roberta: Path, tmp_path: Path, then: str | None, now: str | None
) -> None:
    model, other = (build_from(roberta)[0] for _ in range(2))
    for parameter in (*model.parameters(), *other.parameters()):
        nn.init.normal_(parameter)
    freeze(model, then)
    freeze(other, now)
    save_weights(*split_weights(model), tmp_path)
    assert (tmp_path / "frozen.safetensors").exists() == (then is not None)
    load_weights(other, tmp_path)
    assert same_state(model, other)


def test_weights_of_another_model_are_refused_by_name(tmp_path: Path) -> None:
    model, less = Tied(1), Tied(1)
    less.norm = nn.BatchNorm1d(4, affine=False)
    save_weights(*split_weights(less), tmp_path)
    with pytest.raises(UserError, match=r"norm\.bias, norm\.weight is missing, nothing is unknown"):
        load_weights(model, tmp_path)
    save_weights(*split_weights(model), tmp_path)
    with pytest.raises(UserError, match=r"nothing is missing, norm\.bias, norm\.weight is unknown"):
        load_weights(less, tmp_path)
    (tmp_path / "frozen.safetensors").unlink()
    with pytest.raises(UserError, match=r"decoder\.weight|table\.weight"):
        load_weights(model, tmp_path)
