"""A merged adapter is an ordinary model with the logits of base model and adapter, or is refused."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lib.config.sections import AdapterConfig, ModelConfig
from lib.errors import UserError
from lib.inference.merged_export import export_merged
from lib.model.adapters.adapt import adapt
from lib.model.load import build_model, load_tokenizer
from lib.model.weights import save_model, saved_tensors
from tests import tiny_models
from tests.predicting import load


def trained_adapter(folder: Path, method: str) -> Path:
    """An adapter with random weights over a tiny classifier, saved with its tokenizer and a model card."""
    base = ModelConfig(model=str(tiny_models.classifier(folder / "base")))
    tokenizer = load_tokenizer(base)
    model, weights = build_model(base, tiny_models.NAMES, tokenizer)
    model = adapt(
        model, AdapterConfig(adapter=method, num_virtual_tokens=3 if method == "prompt" else 20), base, weights.new
    )
    with torch.no_grad():
        for parameter in saved_tensors(model).values():
            parameter.normal_(0, 0.5)
    save_model(model, folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "model" / "README.md").write_text("the card of the adapter")
    return folder / "model"


@pytest.mark.parametrize("method", ["lora", "dora", "ia3"])
def test_merged_model_is_a_plain_one_with_the_logits_of_the_adapter(method, tmp_path):
    task = load("--model", trained_adapter(tmp_path, method))
    batch = task.tokenizer(["a dull film", "good"], padding=True, return_tensors="pt")
    with torch.no_grad():
        wanted = task.model(**batch).logits
    assert export_merged(task.model, task.tokenizer, tmp_path / "merged") < 1e-5
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    again = AutoTokenizer.from_pretrained(tmp_path / "merged")(
        ["a dull film", "good"], padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        torch.testing.assert_close(model(**again).logits, wanted, atol=1e-5, rtol=1e-5)
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        assert (base(**batch).logits - wanted).abs().max() > 0.01
    assert model.config.id2label == dict(enumerate(tiny_models.NAMES))
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    assert (tmp_path / "merged" / "README.md").read_text() == "the card of the adapter"


@pytest.mark.parametrize("method", ["bottleneck", "prompt"])
def test_adapter_that_is_no_update_of_weights_is_refused(method, tmp_path):
    task = load("--model", trained_adapter(tmp_path, method))
    with pytest.raises(UserError, match=r"cannot be merged.*lora"):
        export_merged(task.model, task.tokenizer, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_model_without_adapter_and_folder_in_use_are_refused(tmp_path):
    task = load("--model", tiny_models.classifier(tmp_path / "model"))
    with pytest.raises(UserError, match="no adapter"):
        export_merged(task.model, task.tokenizer, tmp_path / "merged")
    with pytest.raises(UserError, match="not empty; name another"):
        export_merged(task.model, task.tokenizer, tmp_path / "model")
