"""The best model on disk: whole, restorable, and usable without this project."""

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from transformers import AutoModelForSequenceClassification, pipeline

from lib.config.sections import ModelConfig
from lib.errors import UserError
from lib.model.load import load_tokenizer
from lib.run.best_model import restore_model
from lib.training.state import State
from tests.resuming import NAMES, build, equal_weights, publish

EVALUATED = State(step=3, best_metric=0.5, best_step=3)


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def test_restored_weights_equal_the_published_ones(accelerator: Accelerator, roberta: Path, tmp_path: Path) -> None:
    best, later = build(roberta, seed=1), build(roberta, seed=2)
    publish(accelerator, best, roberta, tmp_path / "model")
    assert not equal_weights(best, later)
    restore_model(accelerator, later, tmp_path / "model", EVALUATED)
    assert equal_weights(best, later)


def test_prepared_model_is_published_and_restored_in_float32(
    accelerator: Accelerator, roberta: Path, tmp_path: Path
) -> None:
    model = accelerator.prepare_model(build(roberta, seed=1))
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    publish(accelerator, model, roberta, tmp_path / "model")
    restore_model(accelerator, model, tmp_path / "model", EVALUATED)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "model").dtype == torch.float32


def test_publishing_replaces_the_whole_folder(accelerator: Accelerator, roberta: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    first, second = build(roberta, seed=1), build(roberta, seed=2)
    publish(accelerator, first, roberta, folder)
    (folder / "left_over.txt").write_text("of the model before")
    publish(accelerator, second, roberta, folder)
    assert equal_weights(AutoModelForSequenceClassification.from_pretrained(folder), second)
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {file.name for file in folder.iterdir()}
    assert not (folder / "left_over.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_publishing_deletes_leftovers_of_an_interrupted_one(
    accelerator: Accelerator, roberta: Path, tmp_path: Path
) -> None:
    for name in (".tmp-model", ".old-model"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half.txt").write_text("written")
    publish(accelerator, build(roberta), roberta, tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert not (tmp_path / "model" / "half.txt").exists()


def test_failed_write_of_a_model_leaves_the_previous_one(
    accelerator: Accelerator, roberta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = build(roberta, seed=1), build(roberta, seed=2)
    publish(accelerator, first, roberta, tmp_path / "model")

    def disk_is_full(folder: Path, **_: object) -> None:
        Path(folder).mkdir()
        raise OSError("no space left on device")

    monkeypatch.setattr(second, "save_pretrained", disk_is_full)
    with pytest.raises(UserError, match="no space left"):
        publish(accelerator, second, roberta, tmp_path / "model")
    assert equal_weights(AutoModelForSequenceClassification.from_pretrained(tmp_path / "model"), first)


def test_diverged_run_has_no_model_to_restore(accelerator: Accelerator, roberta: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"training diverged: .*lower --learning_rate"):
        restore_model(accelerator, build(roberta), tmp_path / "model", State(step=3, best_metric=None))


def test_published_model_works_in_a_plain_pipeline_with_its_label_names(
    accelerator: Accelerator, roberta: Path, tmp_path: Path
) -> None:
    model = build(roberta, seed=1)
    publish(accelerator, model, roberta, tmp_path / "model")
    classify = pipeline("text-classification", model=str(tmp_path / "model"), device="cpu")
    texts = ["a good film", "the plot was very dull and awful"]
    inputs = load_tokenizer(ModelConfig(model=str(roberta)))(texts, padding=True, return_tensors="pt")
    model.eval()
    with torch.inference_mode():
        expected = model(**inputs).logits.softmax(dim=1)
    for answers, probabilities in zip(classify(texts, top_k=None), expected.tolist(), strict=True):
        scores = {answer["label"]: answer["score"] for answer in answers}
        assert scores == pytest.approx(dict(zip(NAMES, probabilities, strict=True)), abs=1e-5)
