"""compare.py on folders of runs: grouping, scores equal to scikit-learn's, refusals."""

import json
import re

import numpy as np
import pytest
from datasets import Dataset
from sklearn import metrics as sk

from lib.config.cli import dump_config
from lib.config.compare import CompareConfig
from lib.config.sections import DataConfig
from lib.config.train import OptimConfig, TrainConfig, TrainingConfig
from lib.data.load import Data
from lib.errors import UserError
from lib.evaluation.report import write_report
from lib.evaluation.scores import compute_metrics
from lib.evaluation.scoring import Scored
from lib.experiments.comparison import compare_groups, ensemble, weighted_score
from lib.experiments.groups import load_groups, load_predictions
from tests.evaluation.samples import class_predictions, label_predictions

NAMES = ("bad", "good", "mixed")


def class_rows(samples, skill, seed):
    """Rows of predictions.jsonl whose gold labels do not depend on `seed`."""
    gold, rng = np.random.default_rng(0).integers(3, size=samples), np.random.default_rng(seed)
    logits = rng.normal(size=(samples, 3)) + skill * np.eye(3)[gold]
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    for index in range(samples):
        listed = dict(zip(NAMES, probabilities[index].round(6).tolist(), strict=True))
        predicted = NAMES[int(logits[index].argmax())]
        yield {"index": index, "text": f"text {index}", "gold": NAMES[gold[index]], "predicted": predicted} | {
            "probabilities": listed
        }


def write_run(folder, rows, seed, lr=2e-5, scores=("accuracy", "f1_macro"), **more):
    (folder / "eval-test").mkdir(parents=True)
    config = TrainConfig(
        data=DataConfig(train_file="train.csv"),
        training=TrainingConfig(seed=seed),
        optim=OptimConfig(learning_rate=lr),
    )
    (folder / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    results = {f"test/{name}": 0.5 for name in ("loss", *scores)} | {"run/data_fingerprint": "1"} | more
    (folder / "results.json").write_text(json.dumps(results))
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "eval-test" / "predictions.jsonl").write_text(lines)
    return folder


@pytest.fixture
def runs(tmp_path):
    """Two recipes with three seeds each, the second one better."""
    for name, lr, skill in (("slow", 2e-5, 0.6), ("fast", 1e-4, 1.6)):
        for seed in (1, 2, 3):
            write_run(tmp_path / name / f"s{seed}", class_rows(300, skill, seed + int(10 * skill)), seed, lr)
    return tmp_path


def test_runs_that_differ_in_the_seed_only_are_one_group_however_they_are_named(runs):
    by_folder = load_groups([str(runs / "slow"), str(runs / "fast")], "test")
    by_pattern = load_groups([str(runs / "slow" / "*"), str(runs / "fast" / "s[123]")], "test")
    one_by_one = load_groups([str(runs / name / f"s{seed}") for name in ("slow", "fast") for seed in (3, 1, 2)], "test")
    for groups in (by_folder, by_pattern, one_by_one):
        assert [group.name for group in groups] == ["baseline", "learning_rate 0.0001"]
        assert [[run.settings["seed"] for run in group.runs] for group in groups] == [[1, 2, 3]] * 2


def identify(folder, weights="a" * 64, dropout=0.1):
    """Write down which model a run began from, as train.py does."""
    files = {"tokenizer.json": "b" * 64}
    record = {"model_sha256": weights, "model_config": {"dropout": dropout, "layers": 2}, "tokenizer_sha256": files}
    (folder / "record.json").write_text(json.dumps(record))


def test_runs_that_began_from_other_weights_or_another_configuration_are_other_groups(runs):
    folders = [runs / name / f"s{seed}" for name in ("slow", "fast") for seed in (1, 2, 3)]
    identify(folders[0])
    names = [group.name for group in load_groups(list(map(str, folders)), "test")]
    assert names == ["baseline", "learning_rate 0.0001"]  # of the other runs it is not known
    for folder in folders:
        identify(folder)
    identify(folders[1], weights="c" * 64)
    identify(folders[2], dropout=0.3)
    names = [group.name for group in load_groups(list(map(str, folders)), "test")]
    assert names == ["baseline", "model_sha256 cccccccc", "model_config dropout 0.3", "learning_rate 0.0001"]


def test_runs_of_the_same_model_in_two_places_are_one_group(runs):
    folders = [runs / name / f"s{seed}" for name in ("slow", "fast") for seed in (1, 2, 3)]
    for folder in folders:
        identify(folder)
    config = folders[1] / "config.yaml"
    config.write_text(re.sub("(?m)^model: .*$", "model: elsewhere", config.read_text()))
    assert "elsewhere" in config.read_text()
    groups = load_groups(list(map(str, folders)), "test")
    assert [group.name for group in groups] == ["baseline", "learning_rate 0.0001"]
    identify(folders[1], weights="c" * 64)
    assert "model elsewhere" in [group.name for group in load_groups(list(map(str, folders)), "test")]


def test_scores_and_interval_of_a_comparison_are_those_of_scikit_learn(runs):
    groups = load_groups([str(runs / "slow"), str(runs / "fast")], "test")
    metrics = ("accuracy", "f1_macro", "f1_weighted", "matthews_correlation", "cohen_kappa")
    compared = compare_groups(groups, CompareConfig(("runs",), metrics=metrics, resamples=50))
    for scored in [run.scored for group in groups for run in group.runs]:
        gold, predicted = scored.gold, scored.predicted
        expected = [
            sk.accuracy_score(gold, predicted),
            sk.f1_score(gold, predicted, average="macro"),
            sk.f1_score(gold, predicted, average="weighted"),
            sk.matthews_corrcoef(gold, predicted),
            sk.cohen_kappa_score(gold, predicted),
        ]
        once = np.ones((1, len(gold)), dtype=np.int64)
        assert [weighted_score(scored, name)(once)[0] for name in metrics] == pytest.approx(expected)
    for metric in compared:
        (found,) = metric.differences
        assert found.value == pytest.approx(metric.groups[1].mean - metric.groups[0].mean)
        assert found.low < found.value < found.high
        assert metric.adjusted[0] < 0.05
        assert metric.groups[0].ensemble > metric.groups[0].mean  # averaging seeds helps
    assert [metric.differences[0].method.split()[0] for metric in compared] == ["seeds", *["Multi-Bootstrap"] * 4]


@pytest.mark.parametrize("seeds", [1, 2, 3])
def test_ensemble_of_two_classes_keeps_the_tuned_thresholds_of_its_seeds(tmp_path, seeds):
    runs = []
    for seed in range(seeds):
        shares = np.random.default_rng(seed).uniform(size=50)
        rows = [
            {
                "text": f"t{index}",
                "gold": "yes",
                "predicted": "yes" if share >= 0.2 else "no",
                "probabilities": {"no": 1 - share, "yes": share},
            }
            for index, share in enumerate(shares)
        ]
        write_run(tmp_path / f"s{seed}", rows, seed)
        runs.append(load_predictions(tmp_path / f"s{seed}" / "eval-test" / "predictions.jsonl"))
    votes, mean = sum(run.predicted for run in runs), sum(run.probabilities[:, 1] for run in runs) / seeds
    expected = np.where(2 * votes == seeds, mean >= 0.5, 2 * votes > seeds)
    assert ensemble(runs).predicted.tolist() == expected.tolist()
    assert expected.sum() > (mean >= 0.5).sum()


def test_a_sample_that_counts_twice_is_scored_as_if_it_stood_there_twice(runs):
    scored = load_groups([str(runs / "slow"), str(runs / "fast")], "test")[0].scored[0]
    times = np.random.default_rng(1).multinomial(300, np.full(300, 1 / 300), size=3)
    for name in ("accuracy", "f1_macro", "matthews_correlation"):
        rows = [np.repeat(np.arange(300), row) for row in times]
        function = {"accuracy": sk.accuracy_score, "matthews_correlation": sk.matthews_corrcoef}.get(
            name, lambda gold, predicted: sk.f1_score(gold, predicted, average="macro", labels=range(3))
        )
        expected = [function(scored.gold[row], scored.predicted[row]) for row in rows]
        assert weighted_score(scored, name)(times) == pytest.approx(expected)


def test_command_prints_the_recipes_and_writes_text_numbers_and_picture(runs, call):
    done = call("compare.py", runs / "slow", runs / "fast", "--output_dir", runs / "out")
    assert "learning_rate 0.0001" in done.stdout
    written = json.loads((runs / "out" / "comparison.json").read_text())
    (accuracy, f1) = written["metrics"]
    assert (accuracy["metric"], f1["metric"]) == ("accuracy", "f1_macro")
    assert accuracy["differences"][0]["p"] < 0.01
    assert (runs / "out" / "comparison.png").stat().st_size > 5000
    assert f"{accuracy['differences'][0]['value']:+.4f}" in (runs / "out" / "comparison.md").read_text()


def test_settings_that_differ_stand_in_a_table_with_the_value_of_each_group(runs, call):
    write_run(runs / "third", class_rows(300, 1, 9), 1, 3e-4)
    lines = [line.split() for line in call("compare.py", "slow", "fast", "third").stdout.splitlines()]
    assert ["setting", "A", "B", "C"] in lines
    assert [line[1:] for line in lines if line[:1] == ["learning_rate"]] == [["2e-05", "0.0001", "0.0003"]]


def test_table_with_stars_has_those_of_the_corrected_p_values(runs, call):
    call("compare.py", runs / "slow", runs / "fast", "--output_dir", runs / "out")
    written = json.loads((runs / "out" / "comparison.json").read_text())
    p_values = [metric["differences"][0]["p_several"] for metric in written["metrics"]]
    rows = [
        line.strip("| ").split(" | ")
        for line in (runs / "out" / "comparison.md").read_text().splitlines()
        if line[:1] == "|"
    ]
    assert rows[0][-2:] == ["accuracy", "f1_macro"]
    stars = [cell.count("*") for cell in rows[3][-2:]]
    assert stars == [sum(p < level for level in (0.05, 0.01, 0.001)) for p in p_values]
    assert min(stars) > 0
    assert not any("*" in cell for cell in rows[2])


def test_smallest_difference_is_named_for_every_method(runs):
    def named(*folders):
        groups = load_groups(list(map(str, folders)), "test")
        return [metric.differences[0].detectable for metric in compare_groups(groups, CompareConfig(("runs",)))]

    found = named(runs / "slow" / "s1", runs / "fast" / "s1") + named(runs / "slow", runs / "fast")
    assert len(found) == 4
    assert all(0.05 < value < 0.2 for value in found)


def test_one_seed_each_is_compared_by_the_exact_mcnemar_test_with_the_bootstrap_interval(runs, call):
    done = call("compare.py", runs / "slow" / "s1", runs / "fast" / "s1", "--metrics", "accuracy")
    assert "McNemar" in done.stdout
    assert "3 to 5 seeds" in done.stdout


def test_numbers_and_multi_label_predictions_are_compared(tmp_path):
    rng = np.random.default_rng(0)
    gold, hot = rng.normal(size=120), rng.random((120, 2)) < 0.5
    for name, noise in (("a", 1.0), ("b", 0.3)):
        for seed in (1, 2):
            lr = 1e-5 if name == "a" else 2e-5
            rows = [{"text": f"t{i}", "gold": g, "predicted": g + noise * rng.normal()} for i, g in enumerate(gold)]
            write_run(tmp_path / "numbers" / f"{name}{seed}", rows, seed, lr, ("pearson", "mse"))
            flips = rng.random((120, 2)) < noise / 3
            rows = [
                {
                    "text": f"t{i}",
                    "gold": [n for n, h in zip("xy", hot[i], strict=True) if h],
                    "predicted": [n for n, h in zip("xy", hot[i] ^ flips[i], strict=True) if h],
                    "probabilities": {n: float(h) for n, h in zip("xy", hot[i] ^ flips[i], strict=True)},
                }
                for i in range(120)
            ]
            write_run(tmp_path / "labels" / f"{name}{seed}", rows, seed, lr, ("average_precision", "f1_micro"))
    for kind, better in (("numbers", {"pearson": 1, "mse": -1}), ("labels", {"average_precision": 1, "f1_micro": 1})):
        groups = load_groups([str(tmp_path / kind)], "test")
        for metric in compare_groups(groups, CompareConfig(("runs",), resamples=100)):
            assert np.sign(metric.differences[0].value) == better[metric.metric]
            assert metric.adjusted[0] < 0.05


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda rows: rows[:-1], "299"),
        (lambda rows: [*rows[:7], rows[7] | {"text": "another"}, *rows[8:]], "sample 8"),
        (
            lambda rows: [*rows[:7], rows[7] | {"gold": "mixed" if rows[7]["gold"] != "mixed" else "bad"}, *rows[8:]],
            "gold",
        ),
        (lambda rows: [row | {"probabilities": {"no": 1.0, **row["probabilities"]}} for row in rows], "labels"),
    ],
)
def test_runs_scored_on_other_samples_or_labels_are_refused(runs, change, named):
    write_run(runs / "other", change(list(class_rows(300, 1, 9))), 1, 3e-4)
    with pytest.raises(UserError, match=named):
        load_groups([str(runs / "slow"), str(runs / "other")], "test")


def test_a_mistake_in_the_arguments_is_refused_by_name(runs):
    write_run(runs / "again", class_rows(300, 1, 9), 2)
    write_run(runs / "damaged", class_rows(300, 1, 9), 4)
    (runs / "damaged" / "eval-test" / "predictions.jsonl").write_text('{"gold": 1\n')
    write_run(runs / "unfinished", class_rows(300, 1, 9), 5)
    (runs / "unfinished" / "results.json").unlink()
    write_run(runs / "retrained", class_rows(300, 1, 9), 6, **{"run/data_fingerprint": "2"})
    slow = str(runs / "slow")
    for arguments, split, named in (
        ([slow], "test", "one recipe"),
        ([slow, str(runs / "again"), str(runs / "fast")], "test", "one seed"),
        ([slow, str(runs / "damaged")], "test", "line 1"),
        ([slow, str(runs / "unfinished")], "test", "not finished"),
        ([slow, str(runs / "retrained"), str(runs / "fast")], "test", "training data differ"),
        ([slow, str(runs / "fast")], "validation", "eval.py --run"),
        ([str(runs / "nowhere*")], "test", "no folder of a run"),
    ):
        with pytest.raises(UserError, match=named):
            load_groups(arguments, split)


@pytest.mark.parametrize("line", ['{"status": "fin', "[1]", '{"run": "x"}', "null"])
def test_torn_and_foreign_files_are_refused_by_name(runs, line):
    (runs / "sweep.yaml").write_text("seeds: 3\n")
    (runs / "runs.jsonl").write_text(line)
    with pytest.raises(UserError, match=r"runs\.jsonl"):
        load_groups([str(runs)], "test")
    (runs / "slow" / "s2" / "results.json").write_text(line if "run" not in line else "{")
    with pytest.raises(UserError, match=r"results\.json"):
        load_groups([str(runs / "slow"), str(runs / "fast")], "test")


@pytest.mark.parametrize("make", [class_predictions, label_predictions], ids=["classes", "labels"])
def test_predictions_of_many_classes_are_read_though_only_the_largest_probabilities_are_written(tmp_path, make):
    predictions, names = make(400, 250), [f"class {number}" for number in range(250)]
    data = Data("made up", {"test": Dataset.from_dict({"text": ["x"] * 400})}, {}, {}, names, ("text",), ())
    write_report(tmp_path, "test", Scored(compute_metrics(predictions, []), predictions), {}, data)
    read = load_predictions(tmp_path / "predictions.jsonl")
    assert read.names == tuple(names)
    assert np.array_equal(read.gold, predictions.labels)
    assert np.array_equal(read.predicted, predictions.predicted)
    assert np.nanmax(read.probabilities, axis=1) == pytest.approx(predictions.probabilities.max(axis=1), abs=1e-6)
    if make is label_predictions:
        with pytest.raises(UserError, match=r"--metrics average_precision .*f1_micro"):
            weighted_score(read, "average_precision")


def test_interval_of_an_accuracy_stays_within_its_limits_with_two_seeds_and_few_samples(tmp_path, call):
    for name, lr, skills in (("slow", 2e-5, (-9, 9)), ("fast", 1e-4, (9, 8))):
        for seed, skill in enumerate(skills):
            write_run(tmp_path / name / f"s{seed}", class_rows(6, skill, seed), seed, lr)
    groups = load_groups([str(tmp_path / "slow"), str(tmp_path / "fast")], "test")
    (metric,) = compare_groups(groups, CompareConfig(("runs",), metrics=("accuracy",), resamples=50))
    assert -1 <= metric.differences[0].low <= metric.differences[0].high <= 1
    assert "cannot show any difference" in call("compare.py", "slow", "fast", "--metrics", "accuracy").stdout
