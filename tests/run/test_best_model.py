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
from lib.run.resume import clean_up
from lib.runtime.atomic import write_manifest
from lib.training.state import State
from tests.conftest import Command, read_lines, results_of, sentences, write_csv
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


def test_restored_thresholds_and_temperature_are_those_of_the_published_model_or_none(
    accelerator: Accelerator, roberta: Path, tmp_path: Path
) -> None:
    best, later, old = ({"thresholds": [x, 1 - x, x], "calibration_temperature": 4 * x} for x in (1 / 3, 0.4, 0.0))
    model = build(roberta)
    for number, published in enumerate([best, {"thresholds": old["thresholds"]}, {"calibration_temperature": 2.0}, {}]):
        vars(model.config).update(published)
        publish(accelerator, model, roberta, tmp_path / f"{number}")
        vars(model.config).update(later)
        restore_model(accelerator, model, tmp_path / f"{number}", EVALUATED)
        assert {name: vars(model.config)[name] for name in best if name in vars(model.config)} == published
        for name in best:
            vars(model.config).pop(name, None)


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


def test_start_deletes_what_a_killed_one_left_and_nothing_of_others(tmp_path: Path) -> None:
    for name in (".tmp-model-abc", ".old-model-abc", "heartbeats"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0").write_text("written")
    for name in (".tmp-model-abc", ".old-model-abc"):
        write_manifest(tmp_path / name, {})
    for name in (".tmp-mine", "heartbeats"):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "notes").write_text("notes")
    clean_up(tmp_path)
    left = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*"))
    assert left == [".tmp-mine", ".tmp-mine/notes", "heartbeats", "heartbeats/notes"]


def test_failed_write_of_a_model_leaves_the_previous_one(
    accelerator: Accelerator, roberta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = build(roberta, seed=1), build(roberta, seed=2)
    publish(accelerator, first, roberta, tmp_path / "model")

    def disk_is_full(folder: Path, **_: object) -> None:
        (Path(folder) / "half").write_text("half")
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


def test_run_whose_metric_is_never_defined_keeps_the_model_of_the_lowest_loss_and_says_so(
    call: Command, roberta: Path, tmp_path: Path
) -> None:
    train = write_csv(tmp_path / "train.csv", [(text, row / 7) for row, (text, _) in enumerate(sentences(24))])
    alike = write_csv(tmp_path / "dev.csv", [("a film", number) for number in (0.5, 1.5, 2.5)])
    flags = ["--model", roberta, "--train_file", train, "--validation_file", alike, "--report_to", "none"]
    flags += ["--output_dir", "out", "--lr", 0.1, "--max_steps", 4, "--eval_steps", 1, "--mixed_precision", "no"]
    done = call("train.py", *flags)
    losses = {line["step"]: line["eval/loss"] for line in read_lines(tmp_path / "out" / "metrics.jsonl")}
    results = results_of(done)
    assert (results["eval/pearson"], results["chosen_by"]) == ("NaN", "loss")
    assert (results["best_step"], results["eval/loss"]) == min(losses.items(), key=lambda item: item[1])
    assert "pearson is not defined" in done.stderr
    assert "by its loss" in (tmp_path / "out" / "model" / "README.md").read_text()
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "model").num_labels == 1


def test_validation_numbers_that_are_all_equal_are_refused_before_the_first_step(
    call: Command, roberta: Path, tmp_path: Path
) -> None:
    train = write_csv(tmp_path / "train.csv", [(text, row / 7) for row, (text, _) in enumerate(sentences(24))])
    equal = write_csv(tmp_path / "dev.csv", [(text, 0.5) for text, _ in sentences(6)])
    flags = ["--model", roberta, "--train_file", train, "--validation_file", equal, "--report_to", "none"]
    done = call("train.py", *flags, "--output_dir", "out", "--max_steps", 1, code=2)
    assert "pearson" in done.stderr
    assert "--metric_for_best_model loss" in done.stderr
    assert not (tmp_path / "out").exists()
    call("train.py", *flags, "--output_dir", "out", "--max_steps", 1, "--metric_for_best_model", "loss")
    assert (tmp_path / "out" / "model" / "config.json").exists()
