"""The model card: scores as the run has them, metadata that the Hub reads, and no path of the machine."""

import re

import pytest
from huggingface_hub import ModelCard

from lib.config.sections import CLASSIFICATION, MULTI_LABEL, DataConfig, ModelConfig, flatten
from lib.config.train import TrackingConfig, TrainConfig
from lib.errors import printable
from lib.model.card import write_model_card

RECORD = {
    "run/label_names": ["bad", "good"],
    "run/parameters": 22_713_986,
    "run/trainable_parameters": 770,
    "run/num_processes": 2,
    "run/mixed_precision": "bf16",
    "run/version_torch": "2.13.0",
    "run/version_transformers": "5.23.0",
    "run/git_commit": "0123abc",
}
RESULTS = {
    "eval/loss": 0.41234567,
    "eval/accuracy": 0.81251,
    "test/loss": 0.5,
    "test/accuracy": 0.7901234,
    "test/f1_macro": "NaN",
    "best_step": 40,
    "steps": 60,
    "samples_seen": 1920,
    "train_seconds": 12.5,
}


def settings(model: str = "minilm", **data) -> dict:
    config = TrainConfig(ModelConfig(model=model), DataConfig(**data), tracking=TrackingConfig(run_name="my-run"))
    return flatten(config) | RECORD


def card(tmp_path, name="movie_reviews", **options) -> tuple[ModelCard, str]:
    write_model_card(tmp_path, name, settings(**options), RESULTS)
    return ModelCard.load(tmp_path / "README.md"), (tmp_path / "README.md").read_text()


def test_every_score_is_in_the_metadata_and_in_the_text(tmp_path):
    loaded, text = card(tmp_path)
    found = {(item.dataset_split, item.metric_type): item.metric_value for item in loaded.data.eval_results}
    assert found == {
        ("validation", "loss"): 0.412346,
        ("validation", "accuracy"): 0.81251,
        ("test", "loss"): 0.5,
        ("test", "accuracy"): 0.790123,
    }
    for number in ("0.4123", "0.8125", "0.5000", "0.7901", "40 of 60 steps"):
        assert number in text


def test_metadata_names_base_model_task_and_data(tmp_path):
    loaded, text = card(tmp_path, "ag_news", model="user/base", dataset="fancyzhx/ag_news")
    data = loaded.data
    assert (data.base_model, data.datasets, data.pipeline_tag) == (
        "user/base",
        ["fancyzhx/ag_news"],
        "text-classification",
    )
    assert (data.library_name, data.model_name, data.metrics) == ("transformers", "my-run", ["accuracy"])
    assert "user/base, fine-tuned on ag_news" in text


@pytest.mark.parametrize(
    ("model", "name", "base"),
    [
        ("minilm", "sentence-transformers/all-MiniLM-L6-v2", "sentence-transformers/all-MiniLM-L6-v2"),
        ("roberta-base", "roberta-base", "roberta-base"),
        ("/secret/place/mine", "mine", None),
        ("../mine", "mine", None),
    ],
)
def test_base_model_is_named_and_paths_of_the_machine_are_left_out(tmp_path, model, name, base):
    loaded, text = card(tmp_path, "reviews", model=model, train_file="/secret/data/reviews.csv")
    assert loaded.data.base_model == base
    assert f"{name}, fine-tuned on reviews" in text
    assert "secret" not in text
    assert ".." not in text


def test_folder_that_looks_like_a_hub_id_is_not_a_base_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "mine").mkdir(parents=True)
    assert card(tmp_path, model="models/mine")[0].data.base_model is None


def test_options_and_training_facts_are_in_the_text(tmp_path):
    _, text = card(tmp_path)
    rows = [line.strip("| ").split(" | ") for line in text.splitlines()]
    options = {"learning_rate": "5e-05", "train_batch_size": "32", "seed": "42", "max_length": "128"}
    assert options.items() <= dict(row for row in rows if len(row) == 2).items()
    for fact in (
        "770 of 22,713,986 parameters",
        "1,920 samples",
        "2 process(es), precision bf16",
        "torch 2.13.0",
        "0123abc",
    ):
        assert fact in text
    assert "`bad`, `good`" in text


def test_overlap_of_the_movie_reviews_with_other_data_is_mentioned(tmp_path):
    assert "overlap with rotten_tomatoes and SST" in card(tmp_path)[1]
    assert "overlap" not in card(tmp_path, "reviews", train_file="reviews.csv")[1]


def test_run_without_scores_has_a_card(tmp_path):
    write_model_card(tmp_path, "reviews", settings(train_file="reviews.csv"), {"steps": 1})
    assert ModelCard.load(tmp_path / "README.md").data.eval_results is None


def test_names_on_the_card_are_code_whatever_they_hold(tmp_path):
    names = ["a|b", "`c`", "<b>d</b>", "e\nf", "正面"]
    write_model_card(tmp_path, "<i>reviews", settings() | {"run/label_names": names}, RESULTS)
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert r"`a|b`, `` `c` ``, `<b>d</b>`, `e\nf`, `正面`" in text
    assert "fine-tuned on &lt;i&gt;reviews" in text
    multi = settings() | {"run/label_names": names, "run/problem_type": MULTI_LABEL}
    write_model_card(tmp_path, "reviews", multi, RESULTS, [0.5] * 5)
    rows = [line for line in (tmp_path / "README.md").read_text(encoding="utf-8").splitlines() if "0.5000 |" in line]
    assert r"| `a\|b` | 0.5000 |" in rows


@pytest.mark.parametrize(("problem", "function"), [(CLASSIFICATION, "softmax"), (MULTI_LABEL, "sigmoid")])
def test_card_says_how_probabilities_and_answers_follow_from_the_logits(tmp_path, problem, function):
    record = settings() | {"run/problem_type": problem}
    write_model_card(tmp_path, "reviews", record, RESULTS, [0.7, 0.3], 1.25)
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert f"{function}(logits / 1.25" in text
    assert "calibration_temperature" in text
    assert "0.3000" in text
    write_model_card(tmp_path, "reviews", record, RESULTS)
    assert "temperature" not in (tmp_path / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("problem", [CLASSIFICATION, MULTI_LABEL])
def test_card_of_thousands_of_labels_is_short_and_says_how_many_there_are(tmp_path, problem):
    names = [f"label {number}" * 40 for number in range(5000)]
    thresholds = [0.5] * 5000 if problem == MULTI_LABEL else []
    record = settings() | {"run/label_names": names, "run/problem_type": problem}
    write_model_card(tmp_path, "reviews", record, RESULTS, thresholds)
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert len(text) < 20_000
    assert "4,900 more" in text


def test_text_of_others_on_the_card_is_no_link_picture_html_or_metadata(tmp_path):
    name = "![x](http://evil/x.png) [a](b) `c` <b> | d\n---\nlicense: mit"
    options = settings() | {"run_name": name, "class_weights": (f"{name}=2",), "run/label_names": [name, "good"]}
    write_model_card(tmp_path, name, options, RESULTS)
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    loaded = ModelCard.load(tmp_path / "README.md")
    assert loaded.data.license is None
    assert loaded.data.model_name == printable(name)
    body = text.split("\n---\n", 1)[1]
    assert "\nlicense: mit" not in body
    without_code = re.sub(r"(?<!\\)(`+)(?!`).+?(?<!`)\1(?!`)", "", body)
    assert not re.search(r"(?<!\\)[\[\]]|<", without_code)
