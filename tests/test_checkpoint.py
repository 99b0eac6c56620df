"""The best model on disk: whole, restorable, and usable without this project."""

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from transformers import AutoModelForSequenceClassification, PreTrainedModel, pipeline

from lib.checkpoint import publish_model, restore_model
from lib.config import ModelConfig, UserError
from lib.modeling import build_model, load_tokenizer
from lib.plan import State

NAMES = ["terrible", "fine", "größer"]
EVALUATED = State(step=3, best_metric=0.5, best_step=3)


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def build(folder: Path, seed: int = 0) -> PreTrainedModel:
    """A classifier with the architecture in `folder` and random weights that depend on `seed`."""
    config = ModelConfig(model=str(folder))
    model, _ = build_model(config, NAMES, load_tokenizer(config))
    torch.manual_seed(seed)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return model


def publish(accelerator: Accelerator, model: PreTrainedModel, source: Path, folder: Path) -> None:
    publish_model(accelerator, model, load_tokenizer(ModelConfig(model=str(source))), folder)


def equal_weights(first: PreTrainedModel, second: PreTrainedModel) -> bool:
    weights = second.state_dict()
    return all(torch.equal(weight, weights[name]) for name, weight in first.state_dict().items())


def test_restored_weights_equal_the_published_ones(accelerator: Accelerator, roberta: Path, tmp_path: Path) -> None:
    best, later = build(roberta, seed=1), build(roberta, seed=2)
    publish(accelerator, best, roberta, tmp_path / "model")
    assert not equal_weights(best, later)
    restore_model(accelerator, later, tmp_path / "model", EVALUATED)
    assert equal_weights(best, later)


def test_a_prepared_model_is_published_and_restored_in_float32(
    accelerator: Accelerator, roberta: Path, tmp_path: Path
) -> None:
    model = accelerator.prepare_model(build(roberta, seed=1))
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    publish(accelerator, model, roberta, tmp_path / "model")
    restore_model(accelerator, model, tmp_path / "model", EVALUATED)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "model").dtype == torch.float32


def test_publishing_replaces_the_folder_whole(accelerator: Accelerator, roberta: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    first, second = build(roberta, seed=1), build(roberta, seed=2)
    publish(accelerator, first, roberta, folder)
    (folder / "left_over.txt").write_text("of the model before")
    publish(accelerator, second, roberta, folder)
    assert equal_weights(AutoModelForSequenceClassification.from_pretrained(folder), second)
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {file.name for file in folder.iterdir()}
    assert not (folder / "left_over.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_publishing_clears_what_an_interrupted_one_left(
    accelerator: Accelerator, roberta: Path, tmp_path: Path
) -> None:
    for name in (".tmp-model", ".old-model"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half.txt").write_text("written")
    publish(accelerator, build(roberta), roberta, tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert not (tmp_path / "model" / "half.txt").exists()


def test_a_model_that_cannot_be_written_leaves_the_one_before(
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


def test_a_run_that_diverged_has_nothing_to_restore(accelerator: Accelerator, roberta: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"training diverged: .*lower --learning_rate"):
        restore_model(accelerator, build(roberta), tmp_path / "model", State(step=3, best_metric=None))


def test_a_published_model_works_with_a_plain_pipeline_under_its_label_names(
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
