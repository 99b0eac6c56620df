"""The forecast of memory counts what training keeps, without data."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from lib.config.sections import AdapterConfig, ModelConfig, ModelSource
from lib.errors import UserError
from lib.model.adapters.adapt import adapt, frozen_layers
from lib.model.forward import compute_logits
from lib.model.frozen_weights import frozen_weights
from lib.model.layers import freeze, set_train_mode
from lib.model.load import build_model, load_tokenizer
from lib.model.recomputation import recompute_layers
from lib.runtime.cpu.kernels import use_cpu_kernels
from lib.runtime.precision import DTYPES, keep_in_dtype
from lib.training.gradients import Gradients
from lib.training.memory_forecast import Forecast, Method, Tally, forecast, lasting_parts, lighter_methods
from lib.training.optimizer import LARGE_TABLE
from lib.training.working_weights import WorkingWeights
from tests.tiny_models import NAMES, any_classifier, build_from, save_classifier, trainable

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def kernels():
    """Those of a training on a CPU, in this test alone."""
    use_cpu_kernels()
    yield
    use_cpu_kernels(False)


def batch(rows: int, padded: bool = False, length: int = 24) -> dict[str, torch.Tensor]:
    """Token ids, of which half of the rows end with padding."""
    ids = torch.arange(rows * length).view(rows, length) % 90 + 5
    inputs = {"input_ids": ids}
    if padded:
        ids[::2, length // 2 :] = 1
        inputs["attention_mask"] = (ids != 1).long()
    return inputs


def saved_bytes(model: nn.Module, inputs: dict[str, torch.Tensor], precision: str) -> int:
    """What autograd saves in a forward on data: all storages but those of the model and of the inputs, each once."""
    held = [*model.parameters(), *model.buffers(), *inputs.values()]
    known, saved = {tensor.untyped_storage().data_ptr() for tensor in held}, dict[int, torch.UntypedStorage]()

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", DTYPES.get(precision), enabled=precision in DTYPES):
        compute_logits(model, inputs)
    return sum(storage.nbytes() for storage in saved.values())


def trained(kind: str, folder: Path) -> Any:
    model, _ = build_from(trainable(kind, folder))
    set_train_mode(model)
    return model


def activations(model: nn.Module, rows: int, precision: str = "bf16") -> int:
    found = forecast(model, batch(rows), CPU, precision).activations
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("kind", "precision", "padded"),
    [
        *(("bert", precision, padded) for precision in ("no", "bf16") for padded in (False, True)),
        *((kind, "bf16", True) for kind in ("distilbert", "gpt2", "llama", "modernbert", "deberta-v2", "electra")),
    ],
)
def test_activations_are_what_autograd_saves_in_a_forward_on_data(
    kind: str, precision: str, padded: bool, tmp_path: Path
) -> None:
    model, inputs = trained(kind, tmp_path), batch(6, padded)
    found = forecast(model, inputs, CPU, precision).activations
    assert found == pytest.approx(saved_bytes(model, inputs, precision), rel=0.01)


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_peak_of_a_step_is_that_of_a_step_on_data(kind: str, tmp_path: Path) -> None:
    model, inputs = trained(kind, tmp_path), batch(6, padded=True)
    expected = forecast(model, inputs, CPU, "bf16").step
    with Tally([*model.parameters(), *model.buffers(), *inputs.values()]) as tally:
        with torch.autocast("cpu", torch.bfloat16):
            logits = compute_logits(model, inputs)
        logits.sum().backward()
    assert expected == pytest.approx(tally.peak, rel=0.05)


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_a_step_with_copies_of_weights_is_that_on_data_and_takes_no_more_than_casting_them(kind, tmp_path) -> None:
    model, inputs = trained(kind, tmp_path), batch(6, padded=True)
    plain, expected = (forecast(model, inputs, CPU, "bf16", copied=copied) for copied in (False, True))
    working, alone = WorkingWeights(model, True), SimpleNamespace(num_processes=1)
    Gradients(alone, model, working)  # type: ignore[arg-type]
    working.refresh()
    with Tally([*model.parameters(), *model.buffers(), *inputs.values(), *working.of.values()]) as tally:
        with torch.autocast("cpu", torch.bfloat16):
            logits = compute_logits(model, inputs)
        logits.sum().backward()
    copies = sum(copy.nbytes for copy in working.of.values())
    assert expected.weights == plain.weights + copies
    kept = sum(copy.nbytes for copy in working.of.values() if copy.ndim == 2)  # no backward reads a bias
    assert expected.activations == plain.activations - kept
    assert expected.step == pytest.approx(tally.peak, rel=0.05)
    assert expected.peak <= plain.peak * 1.02


def test_activations_grow_by_as_much_with_each_row(tmp_path: Path) -> None:
    model = trained("bert", tmp_path)
    one, two, five = (activations(model, rows) for rows in (1, 2, 5))
    assert five - two == 3 * (two - one) > 0


def test_recomputed_layers_keep_less(tmp_path: Path) -> None:
    model = trained("bert", tmp_path)
    before = activations(model, 8)
    assert activations(recompute_layers(model, True), 8) < before / 2


def test_gradients_of_several_micro_batches_are_there_beside_the_activations(tmp_path: Path) -> None:
    model = trained("bert", tmp_path)
    one, two = (forecast(model, batch(8), CPU, "no", has_gradients) for has_gradients in (False, True))
    assert one.step is not None
    assert two.step is not None
    assert two.step >= two.gradients + (two.activations or 0) > one.step


def test_gradient_of_a_large_table_is_there_beside_the_activations(tmp_path: Path) -> None:
    """On a CPU, where AdamW keeps it from step to step."""
    model, _ = build_from(save_classifier("bert", tmp_path, vocab_size=LARGE_TABLE // 16))
    set_train_mode(model)
    found = forecast(model, batch(8), CPU, "no")
    assert found.activations is not None
    assert found.step is not None
    assert found.activations + 4 * LARGE_TABLE <= found.step < found.activations + 4 * LARGE_TABLE * 1.5


def test_counting_changes_neither_the_model_nor_random_numbers(tmp_path: Path) -> None:
    model = trained("bert", tmp_path)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    method = Method(adapter="lora", recomputed=True)
    forecast(method.apply(model, ModelSource(str(tmp_path)), [], "bf16"), batch(2), CPU, "bf16")
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    logits = compute_logits(model, batch(2))
    assert logits.requires_grad
    assert type(logits) is torch.Tensor


class Reader(nn.Module):
    """A model whose code needs the values of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, input_ids: torch.Tensor) -> Any:
        return self.layer(torch.from_numpy(input_ids.numpy()).float())


def test_model_that_needs_data_has_no_figure_for_activations() -> None:
    found = forecast(Reader(), batch(2), CPU, "no")
    assert found == Forecast(40, 40, 80, None, None, fault=found.fault)
    assert found.fault


@pytest.mark.parametrize("method", ["lora", "backbone"])
def test_method_has_the_weights_that_training_by_it_has(method: str, tmp_path: Path) -> None:
    model, info = build_from(trainable("bert", tmp_path), freeze="backbone" if method == "backbone" else None)
    source = ModelSource(str(tmp_path))
    if method == "lora":
        model = adapt(model, AdapterConfig(adapter="lora"), source, info.new)
        keep_in_dtype(frozen_layers(model), "bf16")
    plain, plain_info = build_from(tmp_path)
    wanted = Method(adapter="lora") if method == "lora" else Method(frozen="backbone")
    found = lasting_parts(wanted.apply(plain, source, plain_info.new, "bf16"))
    assert found == lasting_parts(model)
    assert 0 < found.gradients < found.weights / 2


def test_method_that_an_architecture_does_not_have_is_told(tmp_path: Path) -> None:
    model = trained("albert", tmp_path)
    with pytest.raises(UserError, match="--gradient_checkpointing"):
        Method(recomputed=True).apply(model, ModelSource(str(tmp_path)), [], "no")


@pytest.mark.parametrize("load_in", ["4bit", "8bit"])
def test_quantized_layers_are_counted_as_they_are_held(tmp_path, load_in):
    """Their activations are those of a base in bf16; the weights take less."""
    source = ModelSource(str(any_classifier("llama", tmp_path / "llama")))
    found = []
    for frozen in (frozen_weights(None, "bf16", CPU), frozen_weights(load_in, "bf16", CPU)):
        model, _ = build_model(ModelConfig(source.model), NAMES, load_tokenizer(source), frozen=frozen)
        model = adapt(model, AdapterConfig(adapter="lora"), source, [])
        found.append(forecast(model, batch(4), CPU, "bf16"))
    half, quantized = found
    assert quantized.activations == half.activations
    assert quantized.weights < half.weights


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_shapes_of_quantized_layers_take_what_quantized_layers_do(tmp_path, kind):
    """The doctor has no weights to quantize: it counts the shapes of a whole model."""
    source = ModelSource(str(any_classifier(kind, tmp_path / kind)))
    model, info = build_model(ModelConfig(source.model), NAMES, load_tokenizer(source))
    counted = Method(adapter="lora", load_in="4bit").apply(model, source, info.new, "bf16")
    model, info = build_model(
        ModelConfig(source.model), NAMES, load_tokenizer(source), frozen=frozen_weights("4bit", "bf16", CPU)
    )
    real = adapt(model, AdapterConfig(adapter="lora"), source, info.new)
    set_train_mode(real)
    found, wanted = (forecast(each, batch(4), CPU, "bf16") for each in (counted, real))
    assert found.activations == wanted.activations
    assert found.weights == pytest.approx(wanted.weights, rel=0.01)
    assert found.step == pytest.approx(wanted.step, rel=0.01)


def test_lighter_methods_are_those_that_training_would_take(tmp_path: Path) -> None:
    """A frozen part or an adapter is not added to another; layers are not recomputed twice, nor where they cannot be."""
    flags = []
    for kind, frozen in (("bert", False), ("bert", True), ("albert", False)):
        model = trained(kind, tmp_path / f"{kind}{frozen}")
        freeze(model, "embeddings" if frozen else None)
        flags.append([method.flags for method in lighter_methods(model)])
    anew = ["--adapter lora", "--freeze backbone"]
    assert flags == [["--gradient_checkpointing True", *anew], ["--gradient_checkpointing True"], anew]
    assert [method.flags for method in lighter_methods(recompute_layers(trained("bert", tmp_path), True))] == anew
    source = ModelSource(str(tmp_path / "bertFalse"))
    adapted = Method(adapter="lora").apply(trained("bert", tmp_path / "bertFalse"), source, [], "no")
    assert [method.flags for method in lighter_methods(adapted)] == ["--gradient_checkpointing True", "--load_in 4bit"]
    quantized = Method(adapter="lora", load_in="4bit").apply(trained("bert", tmp_path), source, [], "no")
    assert [method.flags for method in lighter_methods(quantized)] == ["--gradient_checkpointing True"]
