"""A merged adapter is an ordinary model with the logits of base model and adapter, or is refused."""

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lib.errors import UserError
from lib.inference.merged_export import export_merged
from tests import tiny_models
from tests.predicting import load


@pytest.mark.parametrize("method", ["lora", "dora", "ia3"])
def test_merged_model_is_a_plain_one_with_the_logits_of_the_adapter(method, tmp_path):
    task = load("--model", tiny_models.adapter(tmp_path, method)[0])
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
    task = load("--model", tiny_models.adapter(tmp_path, method)[0])
    with pytest.raises(UserError, match=r"cannot be merged.*lora"):
        export_merged(task.model, task.tokenizer, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_model_without_adapter_and_folder_in_use_are_refused(tmp_path):
    task = load("--model", tiny_models.classifier(tmp_path / "model"))
    with pytest.raises(UserError, match="no adapter"):
        export_merged(task.model, task.tokenizer, tmp_path / "merged")
    with pytest.raises(UserError, match="not empty; name another"):
        export_merged(task.model, task.tokenizer, tmp_path / "model")
