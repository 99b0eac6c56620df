"""--compile: the same run up to rounding, few compiled programs, and weights saved under their own names."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch._dynamo
import torch._inductor.config
from safetensors.torch import load_file
from torch._dynamo.utils import counters
from torch.fx.experimental import _config as symbols
from transformers import AutoModelForSequenceClassification

from lib.errors import UserError
from lib.model import compilation
from lib.model.compilation import check_place, compile_layers
from lib.model.layers import freeze
from lib.runtime.precision import uses_gpu
from tests.conftest import read_lines
from tests.resuming import differences, play
from tests.tiny_models import build_from

SHAPES = [(8, 16), (8, 8), (5, 17), (16, 16), (3, 31), (1, 9), (2, 40), (9, 33), (32, 32)]


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Graphs are traced as usual, then run by PyTorch's own kernels: without a compiler it takes seconds, not minutes."""
    compiled = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **how: compiled(self, backend="aot_eager", **how))
    monkeypatch.setattr(compilation, "check_compiler", lambda _: None)
    torch._dynamo.reset(), counters.clear()
    with torch._dynamo.config.patch(recompile_limit=8), torch._inductor.config.patch(fallback_random=False):
        duck = symbols.use_duck_shape
        yield
        symbols.use_duck_shape = duck
    torch._dynamo.reset()


def steps(folder: Path, compiled: bool) -> tuple[list[float], torch.Tensor]:
    """Losses and weights of steps on batches of all shapes, with and without padding, with evaluations in between."""
    torch.manual_seed(0)
    model, _ = build_from(folder)
    compile_layers(model, compiled, torch.device("cpu"))
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=1e-3), []
    for index, shape in enumerate(SHAPES):
        generator = torch.Generator().manual_seed(index)
        ids = torch.randint(5, 100, shape, generator=generator)
        mask = torch.ones_like(ids)
        mask[0, shape[1] - index :] = 0
        torch.manual_seed(index)
        loss = model.train()(input_ids=ids, attention_mask=mask).logits.square().mean()
        loss.backward()
        optimizer.step(), optimizer.zero_grad()
        with torch.inference_mode():
            losses += [loss.item(), model.eval()(input_ids=ids, attention_mask=mask).logits.sum().item()]
    assert not any("_orig_mod" in name for name in model.state_dict())
    return losses, torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_compiled_losses_and_weights_equal_uncompiled_ones_with_few_programs(roberta_without_dropout, uncompiled):
    losses, weights = steps(roberta_without_dropout, compiled=False)
    assert not counters["stats"]
    others, compiled = steps(roberta_without_dropout, compiled=True)
    assert others == pytest.approx(losses, abs=1e-4, rel=1e-5)
    torch.testing.assert_close(compiled, weights, atol=1e-5, rtol=0)
    assert (
        1 <= counters["stats"]["unique_graphs"] <= 8
    )  # training or evaluation, with or without a mask, one text or more
    assert not counters["graph_break"]


def test_frozen_layers_are_not_compiled(roberta, uncompiled):
    model, _ = build_from(roberta)
    freeze(model, "1")
    compile_layers(model, True, torch.device("cpu"))
    assert [layer._compiled_call_impl is not None for layer in model.roberta.encoder.layer] == [False, True]
    freeze(model, "backbone")
    with pytest.raises(UserError, match=r"--compile .* trained"):
        compile_layers(model, True, torch.device("cpu"))


def test_on_a_cpu_it_is_refused_before_data_is_read(call, roberta, tmp_path):
    files = ["--train_file", tmp_path / "missing.csv", "--report_to", "none"]
    done = call("train.py", "--model", roberta, *files, "--compile", code=2)
    assert "error: --compile needs a GPU" in done.stderr
    assert "Leave it out, and add --allow_changes to go on with a run that was begun with it" in done.stderr


def test_it_is_not_refused_on_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    check_place(uses_gpu())


def test_missing_compiler_stops_the_run_before_it_starts(roberta):
    model, _ = build_from(roberta)
    with (
        torch._inductor.config.patch({"cpp.cxx": (None, "/missing/g++")}),
        pytest.raises(UserError, match=r"(?s)--compile: torch.compile does not work here.*apt-get install g\+\+"),
    ):
        compile_layers(model, True, torch.device("cpu"))


def test_compiler_that_is_turned_off_is_no_silent_run_without_it(roberta):
    model, _ = build_from(roberta)
    with torch._dynamo.config.patch(disable=True), pytest.raises(UserError, match="TORCH_COMPILE_DISABLE"):
        compile_layers(model, True, torch.device("cpu"))


@pytest.mark.slow
def test_compiled_run_resumes_bitwise_and_saves_a_plain_model(run, roberta, tmp_path):
    for compiled in ([], ["--compile"]):
        name = "compiled" if compiled else "plain"
        play(run, tmp_path, roberta, [{"folder": name, "flags": compiled}], 1)
    play(run, tmp_path, roberta, [{"folder": "resumed", "stop": 5, "flags": ["--compile"]}], 1)
    play(run, tmp_path, roberta, [{"folder": "resumed", "flags": ["--compile"]}], 1)  # a new process compiles again
    assert not differences(tmp_path / "compiled", tmp_path / "resumed")
    plain, compiled = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("plain", "compiled"))
    assert plain.keys() == compiled.keys()
    for name, weight in plain.items():  # dropout has the same random numbers
        torch.testing.assert_close(compiled[name], weight, atol=1e-5, rtol=0)
    _, loading = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "compiled" / "model", output_loading_info=True
    )
    assert not any(loading.values())
    losses = [
        [line["train/loss"] for line in read_lines(tmp_path / n / "metrics.jsonl")] for n in ("plain", "compiled")
    ]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


@pytest.mark.slow
def test_compiled_run_of_two_processes_ends_with_its_best_model(run, roberta, tmp_path):
    play(run, tmp_path, roberta, [{"folder": "compiled", "flags": ["--max_steps", "4", "--compile", "True"]}], 2)
    assert json.loads((tmp_path / "compiled" / "results.json").read_text())["run/num_processes"] == 2
    _, loading = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "compiled" / "model", output_loading_info=True
    )
    assert not any(loading.values())
