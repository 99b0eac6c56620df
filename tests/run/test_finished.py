"""What a run resolved is what eval.py and predict.py use: columns, length, windows, thresholds, metrics, numbers."""

import json
import os
import shutil
from pathlib import Path
from unittest import mock

import pytest

from lib.config.cli import dump_config, parse_cli
from lib.config.eval import EvalConfig
from lib.config.sections import ModelSource
from lib.config.train import TrainConfig, TrainingConfig
from lib.data.trained_on import UNKNOWN, read_trained_on
from lib.evaluation.batch_size import BatchSize
from lib.run.finished import eval_folder, find_model
from tests import tiny_models
from tests.conftest import call_script, read_lines, results_of, sentences, tiny_roberta, write_csv

QUICK = ["--report_to", "none", "--max_steps", 2, "--mixed_precision", "no"]
HEADER = ("text", "label", "label_text", "review", "rest", "bad", "good", "stars")
"""`text` and `label` are what a script guesses; the runs below read other columns."""

KINDS: dict[str, list] = {
    "single_label": ["--text_columns", "review", "--label_column", "label_text", "--max_length", 6],
    "multi_label": ["--text_columns", "review", "--label_columns", "bad", "good"],
    "regression": ["--text_columns", "review", "--label_column", "stars", "--problem_type", "regression"],
    "pairs": ["--text_columns", "review", "rest", "--label_column", "label_text"],
    "windows": ["--text_columns", "review", "--label_column", "label_text", "--max_length", 8, "--window_stride", 2],
    "adapter": [
        "--text_columns",
        "review",
        "--label_column",
        "label_text",
        "--adapter",
        "bottleneck",
        "--max_length",
        7,
    ],
}


def write_table(path: Path, count: int, seed: int) -> Path:
    rows = []
    for index, (text, label) in enumerate(sentences(count, seed)):
        flags = (int(label == "bad"), int(label != "bad" or index % 4 == 0))
        words = text.split()
        rows.append((f"other {index}", "xy"[index % 2], label, text, " ".join(words[:3]), *flags, index % 5 + 0.5))
    return write_csv(path, rows, HEADER)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    for name, count, seed in (("train", 60, 0), ("validation", 24, 1), ("test", 30, 2)):
        write_table(folder / f"{name}.csv", count, seed)
    tiny_roberta(folder / "base", dropout=0.0, initializer_range=0.3)
    return folder


def train(files: Path, run: str, *flags: object) -> Path:
    data = [part for name in ("train", "validation", "test") for part in (f"--{name}_file", files / f"{name}.csv")]
    call_script("train.py", "--model", files / "base", *data, *QUICK, "--output_dir", files / run, *flags, cwd=files)
    return files / run


@pytest.fixture(scope="module")
def single_label(files: Path) -> Path:
    return train(files, "single_label", *KINDS["single_label"])


def values(rows: list[dict]) -> list[float]:
    """All probabilities, or numbers, of the rows in one list."""
    return [v for r in rows for v in r.get("probabilities", {"": r.get("predicted", r.get("score"))}).values()]


def score(*flags: object, cwd: Path) -> tuple[dict, list[dict], str]:
    """Results, predictions and output of eval.py in float32."""
    flags = (*flags, "--mixed_precision", "no", "--bootstrap_samples", 2)
    done = call_script("eval.py", *flags, cwd=cwd)
    folder = Path(done.stdout.split("written to ")[-1].split(": report.json")[0])
    return results_of(done), read_lines(cwd / folder / "predictions.jsonl"), done.stdout


@pytest.mark.parametrize("kind", KINDS)
def test_all_scripts_give_a_row_the_same_numbers(kind: str, files: Path, tmp_path: Path, request) -> None:
    folder = request.getfixturevalue(kind) if kind == "single_label" else train(files, kind, *KINDS[kind])
    trained = read_lines(folder / "eval-test" / "predictions.jsonl")
    results = json.loads((folder / "results.json").read_text())
    tested = {name: value for name, value in results.items() if name.startswith("test/")}
    moved = shutil.copytree(folder / "model", tmp_path / "moved")  # as if downloaded: nothing of the run is beside it
    for flags in (["--run", folder], ["--model", folder], ["--model", moved]):
        scored, rows, _ = score(*flags, "--test_file", files / "test.csv", cwd=tmp_path)
        assert [(row["text"], row["gold"]) for row in rows] == [(row["text"], row["gold"]) for row in trained]
        assert values(rows) == pytest.approx(values(trained), abs=1e-5)
        assert {name: scored[name] for name in tested} == pytest.approx(tested, abs=1e-4)
    for model in (folder, moved):
        flags = ["--model", model, "--input", files / "test.csv", "--output", "rows.jsonl", "--mixed_precision", "no"]
        call_script("predict.py", *flags, cwd=tmp_path)
        rows = read_lines(tmp_path / "rows.jsonl")
        assert values(rows) == pytest.approx(values(trained), abs=1e-5)
        if kind == "multi_label":
            record, config = (json.loads((folder / n).read_text()) for n in ("record.json", "model/config.json"))
            assert (
                list(record["thresholds"].values()) == config["thresholds"] == list(results["run/thresholds"].values())
            )
            assert [sorted(row["labels"]) for row in rows] == [sorted(row["predicted"]) for row in trained]


def test_runs_on_other_columns_of_one_file_keep_their_own(files: Path, single_label: Path, tmp_path: Path) -> None:
    other = train(files, "guessed")
    for split in ("test", "validation"):
        flags = [f"--{split}_file", files / f"{split}.csv", "--split", split]
        for run, start in ((other, "other"), (single_label, "")):
            _, rows, _ = score("--run", run, *flags, cwd=tmp_path)
            assert all(row["text"].startswith("other") == bool(start) for row in rows)
            assert {row["gold"] for row in rows} == ({"x", "y"} if start else {"bad", "good", "mixed"})


def test_columns_that_the_data_lack_are_named(files: Path, single_label: Path, tmp_path: Path) -> None:
    rows = [(text, label) for text, label in sentences(9, 5)]
    plain = write_csv(tmp_path / "plain.csv", rows)
    _, scored, said = score("--run", single_label, "--test_file", plain, cwd=tmp_path)
    assert [row["text"] for row in scored] == [text for text, _ in rows]
    assert "review" in said
    assert "label_text" in said
    done = call_script("predict.py", "--model", single_label, "--input", plain, cwd=tmp_path)
    assert "review" in done.stderr
    done = call_script("predict.py", "a film", "--model", single_label, cwd=tmp_path)
    assert "review" not in done.stderr


@pytest.mark.parametrize("script", ["eval.py", "predict.py"])
def test_one_text_in_place_of_a_pair_is_refused_unless_it_is_named(script: str, files: Path, tmp_path: Path) -> None:
    folder = files / "pairs"
    if not folder.exists():
        train(files, "pairs", *KINDS["pairs"])
    flag = {"eval.py": "--test_file", "predict.py": "--input"}[script]
    flags = [
        "--model",
        folder / "model",
        flag,
        write_csv(tmp_path / "t.csv", sentences(9, 5)),
        "--mixed_precision",
        "no",
    ]
    refused = call_script(script, *flags, cwd=tmp_path, code=2)
    assert all(word in refused.stderr for word in ("review rest", "--text_columns"))
    named = call_script(script, *flags, "--text_columns", "text", cwd=tmp_path)
    assert "review rest" in named.stdout + named.stderr


def test_model_that_is_trained_again_forgets_how_it_was_trained_before(files: Path, single_label: Path) -> None:
    again = train(files, "again", "--model", single_label / "model", "--max_length", 9, "--pad_to_max_length")
    stored = json.loads((again / "model" / "config.json").read_text())["trained_on"]
    assert (stored["text_columns"], stored["label_columns"], stored["max_length"]) == (["text"], ["label"], 9)
    scored, _, _ = score("--model", again / "model", "--test_file", files / "test.csv", cwd=files)
    assert scored["run/pad_to_max_length"]


@pytest.mark.parametrize(
    "stored", [None, "IMDB", {"dataset": "x"}, {"max_length": "9"}, {"metrics": [1]}, {"text_columns": []}]
)
def test_model_of_others_is_scored_with_what_is_guessed(stored: object, single_label: Path, tmp_path: Path) -> None:
    """Also one whose config.json means something else by the name."""
    model = shutil.copytree(single_label / "model", tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    known = config.pop("trained_on")
    if stored is not None:
        config["trained_on"] = known | stored if isinstance(stored, dict) and "dataset" not in stored else stored
    (model / "config.json").write_text(json.dumps(config))
    assert read_trained_on(model / "config.json") == UNKNOWN
    scored, _, _ = score("--model", model, "--test_file", write_csv(tmp_path / "t.csv", sentences(9, 5)), cwd=tmp_path)
    assert (scored["run/text_columns"], scored["run/max_length"]) == (["text"], 64)  # all that the model takes


def test_another_length_than_in_the_training_is_said(single_label: Path, files: Path, tmp_path: Path) -> None:
    test = ["--model", single_label / "model", "--test_file", files / "test.csv"]
    usual, _, said = score(*test, cwd=tmp_path)
    assert usual["run/max_length"] == 6
    assert "warning" not in said
    other, _, said = score(*test, "--max_length", 9, cwd=tmp_path)
    assert other["run/max_length"] == 9
    assert "at most 6 tokens" in said


@pytest.mark.parametrize(("run", "here"), [("no", "no"), ("bf16", "bf16"), ("fp16", "auto")])
def test_precision_is_that_of_the_run_if_the_machine_has_it(
    single_label: Path, tmp_path: Path, run: str, here: str
) -> None:
    folder = shutil.copytree(single_label, tmp_path / "run")
    results = json.loads((folder / "results.json").read_text()) | {"run/mixed_precision": run}
    (folder / "results.json").write_text(json.dumps(results))
    with mock.patch.dict(os.environ, {"ACCELERATE_USE_CPU": "true"}):
        for model in (folder, folder / "model"):
            assert find_model(ModelSource(str(model)), "auto").precision == here
            assert find_model(ModelSource(str(model)), "no").precision == "no"


@pytest.mark.parametrize(
    "content", ["", '{"test/loss": 0.', "[]", "{}", '{"run/mixed_precision": "fp8"}', '{"run/mixed_precision": {}}']
)
def test_damaged_results_of_a_run_stop_nobody_who_uses_its_model(
    single_label: Path, tmp_path: Path, content: str
) -> None:
    folder = shutil.copytree(single_label, tmp_path / "run")
    (folder / "results.json").write_text(content)
    assert find_model(ModelSource(str(folder)), "auto").precision == "auto"


@pytest.mark.parametrize("content", ["model: [", "not_an_option: 1\n", "attn_implementation: fast\n", "\0"])
def test_damaged_options_of_a_run_stop_nobody_who_uses_its_model(
    single_label: Path, tmp_path: Path, content: str
) -> None:
    folder = shutil.copytree(single_label, tmp_path / "run")
    (folder / "config.yaml").write_text(content)
    for model in (folder, folder / "model"):
        assert find_model(ModelSource(str(model)), "auto").source.attn_implementation == "auto"


def test_metrics_are_those_of_the_run_unless_named(files: Path, single_label: Path, tmp_path: Path) -> None:
    run = train(files, "metrics", *KINDS["single_label"], "--metrics", "matthews_correlation")
    test = ["--model", run / "model", "--test_file", files / "test.csv"]
    assert score(*test, cwd=tmp_path)[0]["run/metrics"] == ["matthews_correlation"]
    assert score(*test, "--metrics", "recall_macro", cwd=tmp_path)[0]["run/metrics"] == ["recall_macro"]


@pytest.mark.parametrize("resumed", [False, True])
def test_run_of_an_earlier_version_is_scored_as_before(
    single_label: Path, files: Path, tmp_path: Path, resumed: bool
) -> None:
    """There is no record in its model; in its folder there is one only if it was resumed."""
    run = shutil.copytree(single_label, tmp_path / "run")
    config = json.loads((run / "model" / "config.json").read_text())
    del config["trained_on"]
    (run / "model" / "config.json").write_text(json.dumps(config))
    if resumed:
        yaml = (run / "config.yaml").read_text()
        (run / "config.yaml").write_text(yaml.replace("label_column: label_text", "label_column: null"))  # guessed
    else:
        (run / "record.json").unlink()
    before = read_lines(single_label / "eval-test" / "predictions.jsonl")
    assert score("--run", run, "--test_file", files / "test.csv", cwd=tmp_path)[1] == before
    inner, outer = (find_model(ModelSource(str(model)), "no") for model in (run / "model", run))
    assert inner.trained_on == outer.trained_on
    assert inner.trained_on.max_length == 6


# ---------------------------------------------------------------------------------------------------- folders


def report_folder(*flags: object) -> Path:
    return eval_folder(parse_cli(EvalConfig, list(map(str, flags))))


def test_reports_of_different_models_and_data_are_in_different_folders(single_label: Path, tmp_path: Path) -> None:
    for name in ("a/model", "b/model", "c/a/model"):
        (tmp_path / name).mkdir(parents=True)
    models = [tmp_path / "a/model", tmp_path / "b/model", tmp_path / "c/a/model", "user/model", "other/model", "model"]
    tests = ["--test_file", "x/t.csv"], ["--test_file", "y/t.csv"], ["--dataset", "u/t"], ["--dataset", "v/t"]
    found = [report_folder("--model", model, *test) for model in models for test in tests]
    found += [report_folder("--run", single_label, *test) for test in tests]
    found += [report_folder("--run", single_label), report_folder("--run", single_label, "--split", "validation")]
    own = [["--threshold", *given] for given in (["0.3"], ["0.25"], ["bad=0.3"], ["bad=0.25"], ["0.3", "good=0.25"])]
    for place in (["--model", models[0], *tests[0]], ["--run", single_label], ["--run", single_label, *tests[0]]):
        found += [report_folder(*place, *threshold) for threshold in own]
    assert len(set(found)) == len(found)
    assert report_folder("--run", single_label, "--threshold", "0.30").name == "eval-test-threshold0.3"
    named = {report_folder("--run", single_label, "--threshold", *given) for given in (["a=0", "b=1"], ["b=1", "a=0"])}
    assert len(named) == 1
    assert report_folder("--run", single_label) == single_label / "eval-test"
    assert report_folder("--model", models[0], *tests[0]) == report_folder("--model", models[0], *tests[0])


@pytest.mark.parametrize("link", ["eval-test", "eval-test/report.json", "eval-test/.lock"])
def test_report_follows_no_link_out_of_the_folder_of_a_run(single_label: Path, tmp_path: Path, link: str) -> None:
    folder, mine = shutil.copytree(single_label, tmp_path / "run"), tmp_path / "mine"
    shutil.rmtree(folder / "eval-test")
    mine.mkdir()
    (mine / "notes.txt").write_text("mine")
    (folder / link).parent.mkdir(exist_ok=True)
    (folder / link).symlink_to(mine if link == "eval-test" else mine / "notes.txt")
    refused = call_script("eval.py", "--run", folder, cwd=tmp_path, code=2).stderr
    assert f"{link} is a link" in refused
    assert "--output_dir" in refused
    assert [path.name for path in mine.iterdir()] == ["notes.txt"]
    assert (mine / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("results", "flag", "size"),
    [
        ({"run/eval_positions": 500}, None, BatchSize(500, "positions")),
        ({"run/mixed_precision": "bf16"}, 32, BatchSize(32)),
        ({"run/mixed_precision": "bf16"}, None, BatchSize(64)),
        (None, None, None),
        (None, 32, BatchSize(32)),
    ],
)
def test_what_a_run_was_scored_with_is_found(
    results: dict | None, flag: int | None, size: BatchSize | None, tmp_path: Path
) -> None:
    """Positions where it counted them, else samples: by its flag, or 64, as every run before positions were counted."""
    tiny_models.classifier(tmp_path / "run" / "model")
    config = TrainConfig(training=TrainingConfig(per_device_eval_batch_size=flag))
    (tmp_path / "run" / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    if results is not None:
        (tmp_path / "run" / "results.json").write_text(json.dumps(results))
    for folder in (tmp_path / "run", tmp_path / "run" / "model"):
        assert find_model(ModelSource(str(folder)), "no").eval_size == size
    copied = shutil.copytree(tmp_path / "run" / "model", tmp_path / "alone")
    assert find_model(ModelSource(str(copied)), "no").eval_size is None
