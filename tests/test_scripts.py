"""train.py and eval.py as users run them: own files, export, scoring, trackers, mistakes of the launch."""

import json
import re
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForSequenceClassification, pipeline

from lib.config.sections import flatten
from lib.config.train import TrainConfig
from tests.conftest import ROOT, launch, read_lines, results_of, sentences, tiny_roberta, write_csv

LAUNCH_CONFIGS = sorted((ROOT / "accelerate_configs").glob("*.yaml"))


def file_flags(folder: Path, model: Path) -> list:
    """Flags of a run that learns from made-up files in seconds."""
    flags: list = ["--model", model, "--run_name", "run"]
    for seed, (split, count) in {96: ("train", 96), 29: ("validation", 29), 7: ("test", 31)}.items():
        flags += [f"--{split}_file", write_csv(folder / f"{split}.csv", sentences(count, seed))]
    return [*flags, "--lr", "1e-2", "--bs", 8, "--epochs", 8, "--logging_steps", 6, "--mixed_precision", "no"]


# ---------------------------------------------------------------------------------------------------- one run


@pytest.fixture(scope="module")
def trained(tmp_path_factory, roberta) -> tuple[Path, CompletedProcess]:
    """The folder of a finished run, trained through the launcher with W&B offline, and what it printed."""
    folder = tmp_path_factory.mktemp("trained")
    done = launch("train.py", *file_flags(folder, roberta), cwd=folder, processes=1)
    return folder / "outputs" / "run", done


def test_run_learns_and_reports(trained):
    folder, done = trained
    results = results_of(done)
    assert results == json.loads((folder / "results.json").read_text())
    assert results["test/accuracy"] > 0.55
    assert results["steps"] == 96
    assert results["samples_seen"] == 8 * 96
    assert results["run/num_processes"] == 1
    assert {"config.yaml", "metrics.jsonl", "results.json", "model", "eval-test"} <= {p.name for p in folder.iterdir()}


def test_padding_is_reported_beside_that_of_other_strategies(trained):
    _, done = trained
    (row,) = re.findall(r"^padding .*", done.stdout, re.MULTILINE)
    grouped, evaluated, random, fixed = map(float, re.findall(r"([\d.]+)%", row))
    assert 0 < evaluated < fixed
    assert 0 < grouped < random < fixed < 100


def test_every_logged_step_is_in_metrics_jsonl_once_and_in_order(trained):
    folder, _ = trained
    lines = read_lines(folder / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(6, 97, 6))
    assert [line["samples_seen"] for line in lines] == [8 * line["step"] for line in lines]
    assert [line["step"] for line in lines if "eval/accuracy" in line] == list(range(12, 97, 12))


def test_saved_configuration_has_every_option(trained):
    folder, _ = trained
    assert set(yaml.safe_load((folder / "config.yaml").read_text())) == set(flatten(TrainConfig()))


def test_exported_model_gives_the_same_answers_in_a_pipeline(trained):
    folder, _ = trained
    classify = pipeline("text-classification", model=str(folder / "model"))
    rows = read_lines(folder / "eval-test" / "predictions.jsonl")
    for row in rows[:8]:
        answer = classify(row["text"])[0]
        assert answer["label"] == row["predicted"]
        assert answer["score"] == pytest.approx(max(row["probabilities"].values()), abs=1e-4)
    assert {row["gold"] for row in rows} == {"bad", "good", "mixed"}


def test_offline_wandb_run_is_in_the_run_folder_and_can_be_uploaded(trained):
    folder, done = trained
    assert len(list(folder.glob("wandb/offline-run-*"))) == 1
    assert "wandb sync" in done.stderr


@pytest.mark.parametrize(("processes", "batch_size"), [(None, 64), (2, 5)])
def test_eval_gives_the_numbers_of_training(trained, run, call, processes, batch_size):
    folder, done = trained
    out = folder / f"again-{processes}"
    flags = ["--run", folder, "--output_dir", out, "--per_device_eval_batch_size", batch_size]
    again = run("eval.py", *flags, "--pad_to_max_length", processes=2) if processes else call("eval.py", *flags)
    scored, results = results_of(again), results_of(done)
    assert scored["run/num_processes"] == (processes or 1)
    for name in ("test/loss", "test/accuracy", "test/f1_macro"):
        assert scored[name] == pytest.approx(results[name], abs=1e-6)
    assert scored["run/data_fingerprint"] != ""
    before, after = (read_lines(path / "predictions.jsonl") for path in (folder / "eval-test", out))
    assert [row["index"] for row in after] == list(range(31))
    for a, b in zip(before, after, strict=True):
        assert (a["text"], a["gold"], a["predicted"]) == (b["text"], b["gold"], b["predicted"])
        assert a["probabilities"] == pytest.approx(b["probabilities"], abs=1e-5)


def test_model_is_scored_on_other_data_with_its_own_label_order(trained, run, tmp_path):
    folder, _ = trained
    rows = [row for row in sentences(12, 3) if row[1] != "mixed"][::-1]
    done = run("eval.py", "--model", folder / "model", "--test_file", write_csv(tmp_path / "t.csv", rows))
    assert results_of(done)["samples"] == 8
    predictions = read_lines(next((tmp_path / "outputs").glob("eval-*")) / "predictions.jsonl")
    assert [row["gold"] for row in predictions] == [label for _, label in rows]


# ---------------------------------------------------------------------------------------------------- trackers


def test_tensorboard_gets_a_run(call, roberta, tmp_path):
    call("train.py", *file_flags(tmp_path, roberta), "--report_to", "tensorboard", "--epochs", 1)
    assert list((tmp_path / "outputs" / "run").rglob("events.out.tfevents*"))


IMPATIENT = """
import runpy, sys
from lib.run import tracking

assert tracking.WANDB_INIT_SECONDS > 2
tracking.WANDB_INIT_SECONDS = 2
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""


@pytest.mark.slow
def test_wandb_server_that_refuses_connections_does_not_stop_a_run(run, roberta, tmp_path):
    (tmp_path / "impatient.py").write_text(IMPATIENT)
    env = {"WANDB_MODE": "online", "WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9"}
    flags = [*file_flags(tmp_path, roberta), "--epochs", 1]
    done = run(tmp_path / "impatient.py", ROOT / "train.py", *flags, env=env | {"PYTHONPATH": str(ROOT)})
    assert results_of(done)["steps"] == 12
    assert "offline" in done.stderr


# ---------------------------------------------------------------------------------------------------- options


def test_early_stopping_ends_a_run_that_no_longer_improves(call, roberta, tmp_path):
    flags = [*file_flags(tmp_path, roberta), "--lr", "1e-12", "--eval_steps", 2, "--early_stopping_patience", 2]
    done = call("train.py", *flags, "--report_to", "none")
    assert results_of(done)["steps"] == 6
    assert "stopped early" in done.stderr


def test_frozen_backbone_stays_the_same_and_the_head_learns(call, roberta, tmp_path):
    call("train.py", *file_flags(tmp_path, roberta), "--freeze", "backbone", "--report_to", "none", "--epochs", 1)
    trained = AutoModelForSequenceClassification.from_pretrained(tmp_path / "outputs/run/model")
    before = AutoModel.from_pretrained(roberta, add_pooling_layer=False).state_dict()
    for name, weight in trained.roberta.state_dict().items():
        assert torch.equal(weight, before[name])
    assert trained.classifier.out_proj.bias.any()  # 0 before training


def test_text_pairs_are_trained_on(call, roberta, tmp_path):
    rows = [(a[0], b[0], str(int(a[1] == b[1]))) for a, b in zip(sentences(40, 1), sentences(40, 2)[1:], strict=False)]
    rows += [(a[0], b[0], str(int(a[1] == b[1]))) for a, b in zip(sentences(30, 3), sentences(30, 4), strict=True)]
    train = write_csv(tmp_path / "pairs.csv", rows, ("premise", "hypothesis", "label"))
    flags = ["--train_file", train, "--model", roberta, "--text_columns", "premise", "hypothesis"]
    flags += ["--run_name", "pairs", "--report_to", "none", "--epochs", 1, "--metrics", "accuracy", "f1"]
    done = call("train.py", *flags, "--mixed_precision", "no")
    assert "held out" in done.stdout
    assert {"eval/accuracy", "eval/f1"} <= set(results_of(done))
    assert isinstance(read_lines(tmp_path / "outputs/pairs/eval-validation/predictions.jsonl")[0]["text"], list)


def test_bf16_checkpoint_is_trained_and_exported_in_float32(call, tmp_path):
    source = tiny_roberta(tmp_path / "bf16")
    AutoModel.from_pretrained(source, add_pooling_layer=False).to(torch.bfloat16).save_pretrained(source)
    flags = [*file_flags(tmp_path, source), "--report_to", "none", "--epochs", 1, "--mixed_precision", "bf16"]
    assert results_of(call("train.py", *flags))["run/mixed_precision"] == "bf16"
    weights = load_file(tmp_path / "outputs/run/model/model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}


def test_more_epochs_in_the_same_folder_are_refused_unless_allowed(call, roberta, tmp_path):
    flags = [*file_flags(tmp_path, roberta), "--report_to", "none", "--logging_steps", 1]
    first = results_of(call("train.py", *flags, "--epochs", 1))
    refused = call("train.py", *flags, "--epochs", 2, code=2).stderr
    assert "num_train_epochs: 1.0 there, 2.0 now" in refused
    assert "learning rate of every step" in refused
    assert "--allow_changes" in refused
    done = call("train.py", *flags, "--epochs", 2, "--allow_changes")
    assert re.search(r"resumed from .*checkpoints/step-", done.stdout)
    second = results_of(done)
    assert second["steps"] == 2 * first["steps"]
    steps = [line["step"] for line in read_lines(tmp_path / "outputs" / "run" / "metrics.jsonl")]
    assert steps == list(range(1, second["steps"] + 1))
    assert results_of(call("train.py", *flags, "--epochs", 2)) == second


# ---------------------------------------------------------------------------------------------------- launching


def test_two_processes_for_gpus_that_are_not_there_are_refused_with_the_line_for_a_cpu(run, roberta, tmp_path):
    env = {"ACCELERATE_USE_CPU": "false"}
    done = run("train.py", *file_flags(tmp_path, roberta), processes=2, code=1, env=env)
    assert "--multi_gpu of the launcher" in done.stderr
    assert "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2" in done.stderr
    assert not (tmp_path / "outputs").exists()


def test_there_is_a_launch_configuration_for_each_kind_of_machine():
    assert {"cpu", "single_gpu", "multi_gpu"} <= {path.stem for path in LAUNCH_CONFIGS}


@pytest.mark.parametrize("path", LAUNCH_CONFIGS, ids=lambda path: path.stem)
def test_launch_configuration_has_only_keys_of_the_launcher(path):
    settings = yaml.safe_load(path.read_text())
    known = {"compute_environment", "distributed_type", "use_cpu", "num_processes", "num_machines", "machine_rank"}
    sharding = {"fsdp_config", "parallelism_config"} if settings["distributed_type"] == "FSDP" else set()
    assert set(settings) <= known | {"main_process_port", "mixed_precision"} | sharding
    assert settings.get("main_process_port", 0) == 0


def test_cpu_configuration_runs_one_process_on_the_cpu(run, roberta, tmp_path):
    launcher = tmp_path / "launcher.py"
    launcher.write_text("from accelerate.commands.launch import main; main()")
    flags = [*file_flags(tmp_path, roberta), "--report_to", "none", "--max_steps", 1]
    config = ["--config_file", ROOT / "accelerate_configs" / "cpu.yaml"]
    done = run(launcher, *config, ROOT / "train.py", *flags, env={"ACCELERATE_USE_CPU": ""})
    assert results_of(done)["run/device"].startswith("CPU")
