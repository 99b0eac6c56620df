"""docs/note.md: every predict.py command runs as it stands, and the code for metrics gives the numbers of eval.py."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest

import predict
from lib.config.cli import parse_cli
from lib.config.predict import PredictConfig
from lib.config.sections import EVAL_SAMPLES
from lib.config.train import TrainConfig
from lib.data.load import load_data
from lib.evaluation.batch_size import BatchSize
from lib.evaluation.predictions import Predictions
from lib.evaluation.scores import compute_metrics
from lib.model.load import build_model, load_tokenizer, summarize_weight_names
from lib.run.record import evaluation_padding, padding_shares
from tests import tiny_models
from tests.conftest import ROOT, read_lines, sentences, write_csv

NOTE = (ROOT / "docs" / "note.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"(?:[A-Z_]+=\w+ )*(?:python|accelerate launch[^`|\n]*) predict\.py [^`|\n]+", NOTE)
STAND_INS = {
    "outputs/movies": "classifier",
    "distilbert/distilbert-base-uncased-finetuned-sst-2-english": "classifier",
    "distilbert/distilroberta-base": "masked",
    "dbmdz/bert-large-cased-finetuned-conll03-english": "tagger",
    "distilbert/distilbert-base-cased-distilled-squad": "reader",
    "sshleifer/distilbart-cnn-12-6": "bart",
    "openai-community/gpt2": "decoder",
    "google-t5/t5-base": "t5",
    "facebook/bart-large-mnli": "entailer",
}
REVIEWS = sentences(17)
SECTIONS = (
    *("pipeline", "AutoTokenizer", "AutoModel", "AutoModelForSequenceClassification", "Config", "datasets"),
    *("Dynamic padding", "Trainer", "evaluate", "The complete script", "Adapter", "Mirrors, local folders, the cache"),
)
TRAININGS = re.findall(r"accelerate launch train\.py( [^`|\n]+)", NOTE)


def flags_of(command: str) -> list[str]:
    words = shlex.split(command)
    return words[[word.endswith("predict.py") for word in words].index(True) + 1 :]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files of the page and a tiny model under each name: a folder takes precedence over the Hub."""
    folder = tmp_path_factory.mktemp("note")
    for name, kind in STAND_INS.items():
        getattr(tiny_models, kind)(folder / name)
    write_csv(folder / "reviews.csv", REVIEWS)
    (folder / "article.txt").write_text(" ".join(text for text, _ in REVIEWS) + "\n")
    (folder / "lib").symlink_to(ROOT / "lib")
    return folder


@pytest.fixture
def there(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(place)
    return place


def test_each_section_of_the_note_has_a_table_with_a_command():
    parts = dict(part.split("\n", 1) for part in NOTE.split("\n## ")[1:])
    assert set(SECTIONS) <= set(parts)
    for name in SECTIONS:
        assert re.search(r"^\|.*`[^`]*(\.py|evaluate\.)[^`]*`", parts[name], re.MULTILINE), name


@pytest.mark.parametrize("flags", TRAININGS)
def test_training_command_parses_and_its_overrides_take_effect(flags, monkeypatch):
    """That it trains is tested where its options are; here, that no name on the page is stale."""
    monkeypatch.chdir(ROOT)
    config = parse_cli(TrainConfig, shlex.split(flags))
    assert config != TrainConfig()
    if config.model.config_overrides:
        names = ["a", "b"]
        model, weights = build_model(config.model, names, load_tokenizer(config.model))
        assert (
            dict(change.split("=") for change in config.model.config_overrides).items()
            <= {name: str(value) for name, value in model.config.to_dict().items()}.items()
        )
        assert bool(weights.unused) != config.model.from_scratch


def test_start_block_on_the_page_is_that_of_its_command():
    flags = next(flags for flags in TRAININGS if "hidden_dropout_prob" in flags)
    config = parse_cli(TrainConfig, shlex.split(flags)).model
    _, weights = build_model(config, ["a", "b"], load_tokenizer(config))
    assert f"new weights  {summarize_weight_names(weights.new)} (" in NOTE
    assert f"left out     {summarize_weight_names(weights.unused)} (" in NOTE


def test_padding_shares_on_the_page_are_those_of_the_data():
    config = TrainConfig()
    data = load_data(config.data, load_tokenizer(config.model), splits=("train", "validation"))
    shares = padding_shares(config.training, data)
    assert f"{len(data.lengths['train']):,} texts" in NOTE
    for name, share in shares.items():
        assert re.search(rf"`.*{name}`.* \| {100 * share:.1f} % \|", NOTE), name
    evaluation = 100 * evaluation_padding(data, BatchSize(EVAL_SAMPLES))
    assert f"{len(data.lengths['validation']):,} validation texts has {evaluation:.1f} % of padding" in NOTE


def test_page_has_a_command_for_each_task():
    tasks = {parse_cli(PredictConfig, flags_of(command)).task for command in COMMANDS}
    assert len(tasks) == 9
    assert len(COMMANDS) >= 15


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.strip()[-60:])
def test_predict_command_runs_as_it_stands(there, capsys, command):
    config = parse_cli(PredictConfig, [*flags_of(command), "--mixed_precision", "no"])
    predict.main(config)
    assert capsys.readouterr().out or (config.output and Path(config.output).stat().st_size)


def test_metrics_by_hand_equal_those_of_eval_py(there, capsys):
    (command,) = [command for command in COMMANDS if "logits.jsonl" in command]
    predict.main(parse_cli(PredictConfig, [*flags_of(command), "--mixed_precision", "no"]))
    (recipe,) = re.findall(r"```python\n(.*?)```", NOTE, re.DOTALL)
    namespace: dict = {}
    exec(compile(recipe, "docs/note.md", "exec"), namespace)  # the page is ours
    names = ["bad", "good", "mixed"]
    logits = np.array([list(row["logits"].values()) for row in read_lines(there / "logits.jsonl")])
    labels = np.array([names.index(label) for _, label in REVIEWS])
    metrics = ["accuracy", "matthews_correlation", "cohen_kappa", "f1_macro"]
    wanted = compute_metrics(Predictions(logits, labels, np.zeros(len(labels))), metrics)
    found = namespace["scores"]
    assert found == pytest.approx({"f1" if n == "f1_macro" else n: wanted[n] for n in metrics})
    assert 0 < found["accuracy"] < 1
    assert "accuracy" in capsys.readouterr().out
