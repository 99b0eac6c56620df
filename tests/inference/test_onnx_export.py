"""An exported graph equals PyTorch for any batch and length, or is not written."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lib.errors import UserError
from lib.inference import onnx_export
from lib.inference.onnx_export import export_onnx
from tests import tiny_models
from tests.predicting import load

onnxruntime = pytest.importorskip("onnxruntime", reason="the onnx extra is not installed")


def export(task, folder):
    return export_onnx(task.model, task.tokenizer, folder)


@pytest.fixture
def task(tmp_path):
    """A classifier from a folder with a model card."""
    folder = tiny_models.classifier(tmp_path / "model")
    (folder / "README.md").write_text("the card")
    return load("--model", folder)


def test_exported_logits_equal_pytorch_for_any_batch_and_length(task, tmp_path):
    difference = export(task, tmp_path / "onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "onnx" / "model.onnx"))
    assert [item.shape for item in session.get_inputs()] == [["batch", "sequence"]] * 2
    assert [item.name for item in session.get_outputs()] == ["logits"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "onnx")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    for texts in (["film"], ["a dull film " * 9, "good", ""], ["the plot was quite bad"] * 7):
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        (found,) = session.run(None, {name: values.numpy() for name, values in batch.items()})
        with torch.no_grad():
            wanted = model(**batch).logits.numpy()
        np.testing.assert_allclose(found, wanted, atol=1e-5)
        assert np.abs(wanted).max() > 0.1
    assert difference < 1e-5
    names = {path.name for path in (tmp_path / "onnx").iterdir()}
    assert {"model.onnx", "config.json", "tokenizer.json", "README.md"} <= names
    assert json.loads((tmp_path / "onnx" / "config.json").read_text())["id2label"]["1"] == "good"


@pytest.mark.parametrize("method", ["bottleneck", "lora"])
def test_adapter_is_exported_with_its_base_model(tmp_path, method):
    folder, model, tokenizer = tiny_models.adapter(tmp_path, method)
    assert export(load("--model", folder), tmp_path / "onnx") < 1e-5
    session = onnxruntime.InferenceSession(str(tmp_path / "onnx" / "model.onnx"))
    batch = tokenizer(["a dull film", "good"], padding=True, return_tensors="pt")
    (found,) = session.run(None, {name: values.numpy() for name, values in batch.items()})
    with torch.no_grad():
        np.testing.assert_allclose(found, model.eval()(**batch).logits.numpy(), atol=1e-5)
    assert (tmp_path / "onnx" / "README.md").read_text() == "the card of the adapter"


@pytest.mark.slow
def test_graph_that_differs_from_pytorch_is_not_written(task, tmp_path):
    """Here the exported model lacks what a hook adds in PyTorch."""
    hook = lambda module, inputs, output: output + (0.0 if torch.compiler.is_exporting() else 0.01)  # noqa: E731
    task.model.classifier.out_proj.register_forward_hook(hook)
    with pytest.raises(RuntimeError, match=r"differ by \d\.\de-0[23]"):
        export(task, tmp_path / "onnx")
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


def test_folder_in_use_is_refused(task, tmp_path):
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "mine.txt").write_text("")
    with pytest.raises(UserError, match="not empty; name another"):
        export(task, tmp_path / "onnx")


def test_missing_packages_are_reported_with_the_command(task, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_export, "PACKAGES", ("onnx", "no_such_runtime"))
    with pytest.raises(UserError, match="not installed: no_such_runtime; run: pip install"):
        export(task, tmp_path / "onnx")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "task", "outputs"),
    [
        ("reader", "question-answering", ["start_logits", "end_logits"]),
        ("tagger", "ner", ["logits"]),
        ("masked", "fill-mask", ["logits"]),
    ],
)
def test_models_of_other_tasks_are_exported(tmp_path, kind, task, outputs):
    folder = getattr(tiny_models, kind)(tmp_path / "model")
    assert export(load("--model", folder, "--task", task), tmp_path / "onnx") < 1e-5
    session = onnxruntime.InferenceSession(str(tmp_path / "onnx" / "model.onnx"))
    assert [item.name for item in session.get_outputs()] == outputs


@pytest.mark.slow
def test_minilm_is_exported_as_an_encoder(tmp_path):
    assert export(load("--task", "feature-extraction"), tmp_path / "onnx") < 1e-5
    session = onnxruntime.InferenceSession(str(tmp_path / "onnx" / "model.onnx"))
    assert session.get_outputs()[0].name == "last_hidden_state"
