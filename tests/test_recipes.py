"""Recipes: each parses, and the note's complete script runs against a Hub that has what it names."""

from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from lib.config.cli import parse_cli
from lib.config.train import TrainConfig
from tests import tiny_models
from tests.conftest import ROOT, Command, read_lines, results_of, sentences, write_csv
from tests.hub_layouts import environment, write_sst5
from tests.loopback_hub import loopback_hub

SST5_HEAD = ROOT / "recipes" / "sst5_head.yaml"
LLM_LORA = ROOT / "recipes" / "llm_lora.yaml"


SWEEP = ROOT / "recipes" / "sweep.yaml"
RECIPES = [path for path in sorted((ROOT / "recipes").glob("*.yaml")) if path != SWEEP]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_parses_and_names_its_data(recipe: Path) -> None:
    assert parse_cli(TrainConfig, ["--config", str(recipe)]).data.dataset


def publish_as_pickle(folder: Path) -> Path:
    """A model with three classes as cardiffnlp published theirs: named LABEL_0, LABEL_1, LABEL_2, its weights a pickle."""
    tiny_models.classifier(folder, **tiny_models.labels([f"LABEL_{number}" for number in range(3)]))
    weights = folder / "model.safetensors"
    torch.save(load_file(weights), folder / "pytorch_model.bin")
    weights.unlink()
    return folder


def test_complete_script_runs_against_a_hub(run: Command, tmp_path: Path) -> None:
    """A new head of five classes on a body that stays as it was, 20 validations, the best model tested."""
    served = publish_as_pickle(tmp_path / "served/models/cardiffnlp/twitter-roberta-base-sentiment")
    write_sst5(tmp_path / "served/datasets/SetFit/sst5")
    flags = ["--config", SST5_HEAD, "--report_to", "none", "--run_name", "note", "--mixed_precision", "no"]
    flags += ["--save_steps", 1000, "--warmup_steps", 40]  # all steps of so little data
    with loopback_hub(tmp_path / "served") as hub:
        done = run("train.py", *flags, env=environment(hub.endpoint, tmp_path), timeout=400)
    results = results_of(done)
    assert "new weights  classifier.out_proj.bias, classifier.out_proj.weight" in done.stdout
    lines = [line for line in read_lines(tmp_path / "outputs/note/metrics.jsonl") if "eval/accuracy" in line]
    assert len(lines) == 20
    assert results["eval/accuracy"] == max(line["eval/accuracy"] for line in lines)
    assert results["steps"] == 20 * 2
    rates = [line["train/learning_rate"] for line in lines]
    assert rates == sorted(rates)
    assert rates[-1] == pytest.approx(1e-3 * 39 / 40, rel=0.05)
    before = torch.load(served / "pytorch_model.bin", weights_only=True)
    after = load_file(tmp_path / "outputs/note/model/model.safetensors")
    assert after["classifier.out_proj.weight"].shape[0] == 5
    body = [name for name in before if name.startswith("roberta.")]
    assert len(body) > 30
    assert all(torch.equal(before[name], after[name]) for name in body)
    assert not torch.equal(before["classifier.dense.weight"], after["classifier.dense.weight"])


@pytest.mark.parametrize("more", [(), ("--load_in", "4bit")], ids=["bf16", "4bit"])
def test_recipe_of_a_decoder_trains_a_tiny_one(call: Command, tmp_path: Path, more: tuple[str, ...]) -> None:
    """On all linear layers below the head, which learn what words tell the classes."""
    model = tiny_models.any_classifier("llama", tmp_path / "base")
    (tmp_path / "data").mkdir()
    for seed, (role, count) in enumerate((("train", 60), ("validation", 21), ("test", 21))):
        write_csv(tmp_path / "data" / f"{role}.csv", sentences(count, seed))
    flags = ["--config", LLM_LORA, "--model", model, "--dataset", tmp_path / "data", "--run_name", "llm", *more]
    done = call("train.py", *flags, "--report_to", "none", "--mixed_precision", "bf16", "--epochs", 6, "--lr", "5e-3")
    assert "lora of rank 16, alpha 32, on down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj" in done.stdout
    losses = [line["eval/loss"] for line in read_lines(tmp_path / "outputs/llm/metrics.jsonl") if "eval/loss" in line]
    assert losses[-1] < 0.9 * losses[0]
    saved = {
        name.rpartition("lora_")[0] for name in load_file(tmp_path / "outputs/llm/model/adapter_model.safetensors")
    }
    assert len({name for name in saved if name}) == 2 * 7


@pytest.mark.slow
def test_sweep_of_wandb_starts_runs_that_have_folders_of_their_own(run: Command, roberta: Path, tmp_path: Path) -> None:
    """Its agents replace ${env} and the like, and give each parameter as --name=value."""
    sweep = yaml.safe_load(SWEEP.read_text())
    ends = {
        name: [p.get("value"), *p.get("values", []), p.get("min"), p.get("max")]
        for name, p in sweep["parameters"].items()
    }
    assert sweep["command"] == ["${env}", "accelerate", "launch", "${program}", "${args}"]
    assert sweep["program"] == "train.py"
    assert sweep["metric"]["name"] == "eval/accuracy"
    files = [
        f"--{split}_file={write_csv(tmp_path / f'{split}.csv', sentences(12))}" for split in ("train", "validation")
    ]
    for identity, choose in (("first1", min), ("second", max)):
        chosen = [f"--{name}={choose(value for value in values if value is not None)}" for name, values in ends.items()]
        flags = [*chosen, *files, f"--model={roberta}", "--max_steps=2"]
        run(
            "train.py",
            *flags,
            processes=1,
            env={"WANDB_SWEEP_ID": "s1", "WANDB_RUN_ID": identity, "WANDB_SILENT": "true"},
        )
        (folder,) = (tmp_path / "outputs").glob(f"*-{identity}")
        assert list(folder.glob(f"wandb/offline-run-*-{identity}"))
        assert "eval/accuracy" in read_lines(folder / "metrics.jsonl")[-1]
