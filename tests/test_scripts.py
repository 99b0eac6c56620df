"""train.py and eval.py as users run them: own files, export, scoring, trackers, launch mistakes."""

import glob
import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from transformers import pipeline

from lib.config.sections import flatten
from lib.config.train import TrainConfig
from tests.conftest import ROOT, read_lines, results_of, sentences, tiny_roberta, write_csv

LAUNCH_CONFIGS = sorted((ROOT / "accelerate_configs").glob("*.yaml"))


def file_flags(folder: Path, model: Path, name: str = "run") -> list:
    """Flags of a run on hand-made files that learns its task in seconds."""
    splits = {
        role: write_csv(folder / f"{role}.csv", sentences(n, n)) for role, n in (("train", 96), ("validation", 29))
    }
    flags = [item for role, path in splits.items() for item in (f"--{role}_file", path)]
    flags += ["--test_file", write_csv(folder / "test.csv", sentences(31, 7)), "--model", model, "--run_name", name]
    return [*flags, "--lr", "1e-2", "--bs", "8", "--epochs", "8", "--logging_steps", "6", "--mixed_precision", "no"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, roberta):
    """A finished run of one process with W&B offline: (folder of the run, process, flags)."""
    import os
    import subprocess
    import sys

    folder = tmp_path_factory.mktemp("trained")
    flags = file_flags(folder, roberta)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", ROOT / "train.py", *flags]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        list(map(str, command)), cwd=folder, env=environment, capture_output=True, text=True, timeout=150
    )
    assert done.returncode == 0, done.stderr
    return folder / "outputs" / "run", done, flags


def test_a_run_on_hand_made_files_learns_and_reports(trained):
    folder, done, _ = trained
    results = results_of(done)
    assert results == json.loads((folder / "results.json").read_text())
    assert results["test/accuracy"] > 0.55
    assert results["steps"] == 96
    assert results["samples_seen"] == 8 * 96
    assert results["run/num_processes"] == 1
    assert {"config.yaml", "metrics.jsonl", "results.json", "model", "eval-test"} <= {p.name for p in folder.iterdir()}


def test_the_share_of_padding_of_each_choice_is_told_before_the_first_step(trained):
    _, done, _ = trained
    (row,) = re.findall(r"^padding +(.*)", done.stdout, re.MULTILINE)
    share = r"([\d.]+)%"
    pattern = rf"{share} of the positions in training \(group_by_length\), {share} in evaluation; it would be: "
    shares = re.fullmatch(rf"{pattern}random {share}, pad_to_max_length {share}", row).groups()
    grouped, evaluated, mixed, fixed = map(float, shares)
    assert 0 < evaluated < fixed
    assert 0 < grouped < mixed < fixed < 100


def test_every_logged_step_is_there_once_and_in_order(trained):
    folder, _, _ = trained
    lines = read_lines(folder / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(6, 97, 6))
    assert all(
        list(line)[:2] == ["step", "samples_seen"] and line["samples_seen"] == 8 * line["step"] for line in lines
    )
    assert [line["step"] for line in lines if "eval/accuracy" in line] == list(range(12, 97, 12))


def test_the_configuration_is_saved_with_every_option(trained):
    folder, _, _ = trained
    assert set(yaml.safe_load((folder / "config.yaml").read_text())) == set(flatten(TrainConfig()))


def test_the_export_works_in_a_pipeline_with_the_names_of_the_data(trained):
    folder, _, _ = trained
    classify = pipeline("text-classification", model=str(folder / "model"))
    rows = read_lines(folder / "eval-test" / "predictions.jsonl")
    for row in rows[:8]:
        answer = classify(row["text"])[0]
        assert answer["label"] == row["predicted"]
        assert answer["score"] == pytest.approx(max(row["probabilities"].values()), abs=1e-4)
    assert {row["gold"] for row in rows} == {"bad", "good", "mixed"}


@pytest.mark.parametrize(("processes", "batch_size"), [(None, 64), (2, 5)])
def test_scoring_a_run_gives_the_numbers_of_training_and_one_file_for_any_layout(trained, run, processes, batch_size):
    folder, done, _ = trained
    out = folder / f"again-{processes}"
    flags = ["--run", folder, "--output_dir", out, "--per_device_eval_batch_size", batch_size]
    flags += ["--pad_to_max_length"] if processes else []
    scored, results = results_of(run("eval.py", *flags, processes=processes)), results_of(done)
    assert scored["run/num_processes"] == (processes or 1)
    for name in ("test/loss", "test/accuracy", "test/f1_macro"):
        assert scored[name] == pytest.approx(results[name], abs=1e-6)
    assert scored["run/data_fingerprint"] != ""
    before, after = (read_lines(path / "predictions.jsonl") for path in (folder / "eval-test", out))
    assert [row["index"] for row in after] == list(range(31))
    for a, b in zip(before, after, strict=True):
        assert (a["text"], a["gold"], a["predicted"]) == (b["text"], b["gold"], b["predicted"])
        assert a["probabilities"] == pytest.approx(b["probabilities"], abs=1e-5)


def test_a_classifier_is_scored_on_other_data_with_its_own_order_of_labels(trained, run, tmp_path):
    folder, _, _ = trained
    rows = [row for row in sentences(12, 3) if row[1] != "mixed"][::-1]
    done = run("eval.py", "--model", folder / "model", "--test_file", write_csv(tmp_path / "t.csv", rows))
    assert results_of(done)["samples"] == 8
    predictions = read_lines(next((tmp_path / "outputs").glob("eval-*")) / "predictions.jsonl")
    assert [row["gold"] for row in predictions] == [label for _, label in rows]


def test_an_offline_wandb_run_lies_in_the_folder_of_the_run_and_says_how_to_upload(trained):
    folder, done, _ = trained
    assert len(glob.glob(str(folder / "wandb" / "offline-run-*"))) == 1
    assert "wandb sync" in done.stderr


def test_tensorboard_gets_a_run(run, roberta, tmp_path):
    run("train.py", *file_flags(tmp_path, roberta), "--report_to", "tensorboard", "--epochs", 1)
    assert glob.glob(str(tmp_path / "outputs/run/**/events.out.tfevents*"), recursive=True)


def test_two_processes_make_one_tracker_run(run, roberta, tmp_path):
    run("train.py", *file_flags(tmp_path, roberta), "--epochs", 1, processes=2)
    assert len(glob.glob(str(tmp_path / "outputs/run/wandb/offline-run-*"))) == 1


def test_a_wandb_server_that_refuses_connections_does_not_stop_a_run(run, roberta, tmp_path):
    env = {"WANDB_MODE": "online", "WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9"}
    done = run("train.py", *file_flags(tmp_path, roberta), "--epochs", 1, env=env)
    assert results_of(done)["steps"] == 12
    assert "offline" in done.stderr


def test_early_stopping_ends_a_run_that_no_longer_gets_better(run, roberta, tmp_path):
    flags = [*file_flags(tmp_path, roberta), "--lr", "1e-12", "--eval_steps", 2, "--early_stopping_patience", 2]
    done = run("train.py", *flags, "--report_to", "none")
    assert results_of(done)["steps"] == 6
    assert "stopped early" in done.stderr


def test_a_frozen_backbone_stays_as_it_was_and_the_head_learns(run, roberta, tmp_path):
    from transformers import AutoModel, AutoModelForSequenceClassification

    run("train.py", *file_flags(tmp_path, roberta), "--freeze", "backbone", "--report_to", "none", "--epochs", 1)
    trained = AutoModelForSequenceClassification.from_pretrained(tmp_path / "outputs/run/model")
    before = AutoModel.from_pretrained(roberta, add_pooling_layer=False).state_dict()
    for name, weight in trained.roberta.state_dict().items():
        assert torch.equal(weight, before[name])


def test_pairs_train_end_to_end(run, roberta, tmp_path):
    rows = [(a[0], b[0], str(int(a[1] == b[1]))) for a, b in zip(sentences(40, 1), sentences(40, 2)[1:], strict=False)]
    rows += [(a[0], b[0], str(int(a[1] == b[1]))) for a, b in zip(sentences(30, 3), sentences(30, 4), strict=True)]
    train = write_csv(tmp_path / "pairs.csv", rows, ("premise", "hypothesis", "label"))
    flags = [
        "--train_file",
        train,
        "--model",
        roberta,
        "--text_columns",
        "premise",
        "hypothesis",
        "--run_name",
        "pairs",
    ]
    done = run("train.py", *flags, "--report_to", "none", "--epochs", 1, "--metrics", "accuracy", "f1")
    assert "held out" in done.stdout
    assert {"eval/accuracy", "eval/f1"} <= set(results_of(done))
    assert isinstance(read_lines(tmp_path / "outputs/pairs/eval-validation/predictions.jsonl")[0]["text"], list)


def test_a_bf16_checkpoint_is_trained_and_exported_in_float32(run, tmp_path):
    from safetensors.torch import load_file
    from transformers import AutoModel

    source = tiny_roberta(tmp_path / "bf16")
    AutoModel.from_pretrained(source, add_pooling_layer=False).to(torch.bfloat16).save_pretrained(source)
    flags = [*file_flags(tmp_path, source), "--report_to", "none", "--epochs", 1, "--mixed_precision", "bf16"]
    assert results_of(run("train.py", *flags))["run/mixed_precision"] == "bf16"
    weights = load_file(tmp_path / "outputs/run/model/model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}


def test_two_processes_that_each_believe_to_be_alone_are_stopped(run, roberta, tmp_path):
    env = {"ACCELERATE_USE_CPU": "false"}
    done = run("train.py", *file_flags(tmp_path, roberta), processes=2, code=1, env=env)
    assert "each believes it is alone" in done.stderr
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize("path", LAUNCH_CONFIGS, ids=lambda path: path.stem)
def test_launch_configurations_hold_only_topology_that_the_launcher_reads(path):
    settings = yaml.safe_load(path.read_text())
    read = {"compute_environment", "distributed_type", "use_cpu", "num_processes", "num_machines", "machine_rank"}
    assert set(settings) <= read | {"main_process_port", "mixed_precision"}
    assert settings.get("main_process_port", 0) == 0
    assert all("#" in line or ":" not in line for line in path.read_text().splitlines() if "distributed_type" in line)


def test_there_is_a_launch_configuration_for_each_kind_of_machine():
    assert {"cpu", "single_gpu", "multi_gpu"} <= {path.stem for path in LAUNCH_CONFIGS}


def test_the_cpu_configuration_runs_one_process_on_the_cpu(run, roberta, tmp_path):
    import os
    import subprocess
    import sys

    flags = [*file_flags(tmp_path, roberta), "--report_to", "none", "--max_steps", "1"]
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        ROOT / "accelerate_configs/cpu.yaml",
    ]
    done = subprocess.run(
        list(map(str, [*command, ROOT / "train.py", *flags])),
        cwd=tmp_path,
        env=dict(os.environ),
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert done.returncode == 0, done.stderr
    assert results_of(done)["run/device"].startswith("CPU")


def test_more_epochs_are_another_experiment_and_need_a_word(run, roberta, tmp_path):
    flags = [*file_flags(tmp_path, roberta), "--report_to", "none", "--run_name", "longer", "--logging_steps", 1]
    first = results_of(run("train.py", *flags, "--epochs", 1))
    refused = run("train.py", *flags, "--epochs", 2, code=2).stderr
    assert "num_train_epochs: 1.0 there, 2.0 now" in refused
    assert "changes the learning rate of every step" in refused
    assert "--allow_changes" in refused
    done = run("train.py", *flags, "--epochs", 2, "--allow_changes")
    assert f"resumed from {tmp_path}" in done.stdout or "resumed from outputs/longer/checkpoints/step-" in done.stdout
    second = results_of(done)
    assert second["steps"] == 2 * first["steps"]
    steps = [line["step"] for line in read_lines(tmp_path / "outputs" / "longer" / "metrics.jsonl")]
    assert steps == list(range(1, second["steps"] + 1))
    again = run("train.py", *flags, "--epochs", 2)
    assert "bit by bit" in again.stdout
    assert {k: v for k, v in results_of(again).items() if "/" not in k or k.startswith(("eval", "test"))} == {
        k: v for k, v in second.items() if "/" not in k or k.startswith(("eval", "test"))
    }
