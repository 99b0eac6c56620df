"""The comparison with peers: each peer runs and measures itself, FLOPs are PyTorch's count, the table says what was measured."""

import json
import math
import subprocess
import sys
from argparse import Namespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForSequenceClassification, BertConfig, RobertaConfig

import eval as eval_script
from benchmarks import bench, contenders, limited_link, manual_loop, note_script, step_profile, trainer
from benchmarks.comparison import ROWS, Outcome, compare, measure_rows, ratio_rows, seconds_to_accuracy
from benchmarks.flops import forward_flops, matmul_rates
from benchmarks.measuring import Measures
from benchmarks.plot import plot
from lib.config.cli import parse_cli
from lib.config.eval import EvalConfig
from lib.config.train import TrainConfig
from tests.conftest import ROOT, sentences
from tests.tiny_models import ENCODER, classifier

COUNTS = {"train": 37, "validation": 13, "test": 11}
WORDS = {"epochs": "one epoch", "head_epochs": "20 epochs", "fast": "bf16"}


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> contenders.Setting:
    """Files and a tiny classifier, laid out as benchmarks/materials.py does."""
    folder = tmp_path_factory.mktemp("material")
    names = ("bad", "good", "mixed")
    (folder / "data").mkdir()
    for seed, (split, count) in enumerate(COUNTS.items()):
        rows = [
            {"text": text, "label": names.index(label), "label_text": label} for text, label in sentences(count, seed)
        ]
        (folder / "data" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    classifier(folder / "model")
    return contenders.Setting(folder, epochs=2, batch_size=8, max_length=32)


# ---------------------------------------------------------------------------------------------------- peers

PEERS = {
    "note's script": note_script.main,
    "manual loop": manual_loop.main,
    "Trainer, grouped": trainer.main,
    "Trainer, fp32": trainer.main,
}


@pytest.mark.parametrize("name", PEERS)
def test_each_peer_trains_and_measures_itself(name, material, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    command = contenders.CONTENDERS[name](material, 0, tmp_path)
    if name == "note's script":  # its five classes are of SetFit/sst5, and so are those of our data
        command += ["--model", str(classifier(tmp_path / "model", num_labels=5))]
    monkeypatch.setattr(sys, "argv", command)
    PEERS[name]()
    measures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert measures["train_samples"] == 2 * COUNTS["train"]
    assert measures["train_seconds"] > 0
    assert measures["eval_seconds"] > 0
    moments = [moment for moment, _ in measures["evaluations"]]
    assert len(moments) == 2
    assert measures["first_step_at"] < moments[0] < moments[1]
    assert all(0 <= accuracy <= 1 for _, accuracy in measures["evaluations"])
    assert 0 < measures["padding_share"] < 0.9
    assert 0.05 < measures["peak_memory_gib"] < 50


def test_manual_loop_scores_every_sample(material, tmp_path, monkeypatch, capsys):
    command = contenders.CONTENDERS["manual loop: scoring"](material, 0, tmp_path)
    monkeypatch.setattr(sys, "argv", command)
    manual_loop.main()
    measures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (measures["eval_samples"], measures["train_samples"]) == (COUNTS["train"], 0)


def test_only_the_head_of_the_note_s_model_learns(material, tmp_path, monkeypatch):
    options = Namespace(model=material.model, data=material.data, epoch=1, bs=8, lr=9.9, max_length=32)
    subject = note_script.Classifier(options)
    before = {name: weight.detach().clone() for name, weight in subject.model.named_parameters()}
    subject.train()
    changed = {name for name, weight in subject.model.named_parameters() if not torch.equal(weight, before[name])}
    assert changed
    assert all(name.startswith("classifier.") for name in changed)


def test_padding_is_counted_as_the_batches_have_it():
    measures = Measures()
    collate = measures.counting(lambda rows: {"attention_mask": torch.tensor(rows)})
    collate([[1, 1, 1], [1, 0, 0]])
    collate([[1, 1]])
    report = json.loads(measures.report())
    assert report["padding_share"] == pytest.approx(2 / 8)
    assert report["train_samples"] == 3


@pytest.mark.slow
def test_ours_is_measured_through_the_real_command(material, tmp_path):
    measures = contenders.run("ours: start", material, 0, tmp_path)
    assert 8 < measures["train_samples"] <= 16  # two steps, one of them perhaps of the short batch
    ((evaluated, accuracy),) = measures["evaluations"]
    assert 0 < measures["first_step_at"] < evaluated < measures["whole_seconds"]
    assert 0 <= accuracy <= 1
    assert 0 < measures["padding_share"] < 0.9
    assert measures["peak_memory_gib"] > 0.05


def test_our_scoring_is_timed_from_tokens_to_results(material, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    _, *flags = contenders.CONTENDERS["ours: scoring"](material, 0, tmp_path)
    eval_script.main(parse_cli(EvalConfig, [*flags, "--mixed_precision", "no"]))  # as all tests of this process
    measures = contenders.read_ours(tmp_path / "run", "")
    assert measures["eval_samples"] == COUNTS["train"]
    assert 0 < measures["eval_seconds"] < 60


@pytest.mark.parametrize("name", [name for name in contenders.CONTENDERS if "ours" in name and name != "ours: scoring"])
def test_our_commands_are_valid_and_of_the_peers_settings(name, material, tmp_path):
    command = contenders.CONTENDERS[name](material, 7, tmp_path)
    config = parse_cli(TrainConfig, command[command.index(str(ROOT / "train.py")) + 1 :])
    assert (config.training.train_batch_size, config.training.seed, config.data.max_length) == (8, 7, 32)
    assert config.tracking.report_to == "none"
    assert config.model.freeze == ("backbone" if name == "ours: head" else None)


LINKED = [name for name in contenders.CONTENDERS if name.startswith("limited link")]


@pytest.mark.slow
def test_all_ways_to_sum_over_a_limited_link_learn_the_same(material, tmp_path):
    """Two processes in two network namespaces."""
    if reason := limited_link.unavailable():
        pytest.skip(reason)
    found, learned = [], []
    for name in LINKED:
        command = contenders.CONTENDERS[name](material, 0, tmp_path)
        flags = ["--lr", "1e-2", "--adam_epsilon", "1e-2", "--lr_scheduler_type", "linear", "--warmup_steps", "5"]
        command += [*flags, "--mixed_precision", "no", "--weights", str(tmp_path / "weights.pt")]
        done = subprocess.run([sys.executable, *command], cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout.splitlines()[-1]))
        learned.append(torch.load(tmp_path / "weights.pt"))
    assert len({measures["train_samples"] for measures in found}) == 1
    assert all(measures["train_seconds"] > 0 for measures in found)
    first = AutoModelForSequenceClassification.from_pretrained(material.model).parameters()
    assert max(float((a - b.detach()).abs().max()) for a, b in zip(learned[0], first, strict=True)) > 1e-2
    for name, other in zip(LINKED[1:], learned[1:], strict=True):
        torch.testing.assert_close(other, learned[0], atol=1e-5, rtol=0, msg=lambda text, name=name: f"{name}: {text}")


def test_rows_that_the_machine_cannot_show_are_skipped_with_a_word(command, monkeypatch, capsys):
    monkeypatch.setattr(bench, "unavailable", lambda: "no root")
    assert command("--only", "manual", "overlap", "ddp", "--repeats", "1") == [("manual loop", 0), ("ours: full", 0)]
    told = capsys.readouterr().err
    assert all(f"row {row} is skipped" in told for row in ("overlap", "ddp"))
    assert "no root" in told
    assert command("--only", "manual", "processes", "--device", "cuda", "--repeats", "1") == [
        ("manual loop", 0),
        ("ours: full", 0),
    ]
    assert "row processes is skipped" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="no row is left"):
        command("--only", "ddp")


def test_failing_contender_is_named_with_its_last_output(material, tmp_path):
    broken = contenders.Setting(tmp_path / "nowhere")
    with pytest.raises(contenders.RunFailed, match=r"(?s)ours: head ended with code 2.*nowhere"):
        contenders.run("ours: head", broken, 0, tmp_path / "out")


# ---------------------------------------------------------------------------------------------------- FLOPs


@pytest.mark.parametrize("kind", [BertConfig, RobertaConfig])
def test_useful_flops_are_those_pytorch_counts_and_training_takes_three_times_as_many(kind):
    config = kind(**ENCODER, num_labels=5)
    model = AutoModelForSequenceClassification.from_config(config, attn_implementation="eager")
    ids = torch.randint(5, 100, (3, 11))
    counter = FlopCounterMode(display=False)
    with counter:
        loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=torch.tensor([0, 1, 4])).loss
    forward = counter.get_total_flops()
    assert forward_flops(model, [11] * 3) == forward
    with counter:
        loss.backward()
    assert counter.get_total_flops() == 2 * forward


def test_useful_flops_of_texts_add_up():
    model = AutoModelForSequenceClassification.from_config(RobertaConfig(**ENCODER))
    assert forward_flops(model, [3, 9]) == forward_flops(model, [3]) + forward_flops(model, [9])


def test_matrix_product_rate_is_measured_for_each_precision(monkeypatch):
    monkeypatch.setattr("benchmarks.flops.SECONDS", 0.001)
    rates = matmul_rates(16, 32, 8, torch.device("cpu"))
    assert set(rates) == {"fp32", "fp32 fast", "bf16"}
    assert all(math.isfinite(rate) and rate > 0 for rate in rates.values())
    assert torch.get_float32_matmul_precision() == "highest"


# ---------------------------------------------------------------------------------------------------- table and plot


def made_up(name: str, repeat: int, **measures) -> dict:
    shared = {"kind": "full", "samples": 100, "evaluations": [], "whole_seconds": 50.0}
    return {"name": name, "repeat": repeat} | shared | measures


def test_ratio_is_that_of_medians_and_its_range_that_of_pairs():
    runs = [made_up("ours: full", i, train_seconds=value) for i, value in enumerate([1.0, 2.0, 4.0])]
    runs += [made_up("manual loop", i, train_seconds=value) for i, value in enumerate([10.0, 10.0, 12.0, 99.0])]
    outcome = compare("manual", runs)
    assert outcome is not None
    assert outcome.ratio == 10.0 / 2.0
    assert outcome.ratios == [10.0, 5.0, 3.0]  # the fourth has no partner yet
    (line,) = ratio_rows([outcome], WORDS)[1:]
    assert line[2:] == ["2.0 [1.0..4.0]", "10.0 [10.0..12.0]", "**5.0** [3.0..10.0]", "4", "7", "3"]
    assert compare("trainer", runs) is None


def test_time_to_accuracy_is_when_a_run_first_had_what_the_note_s_script_ends_with():
    note = made_up("note's script", 0, evaluations=[(10, 0.3), (20, 0.5), (30, 0.6), (40, 0.5)])
    assert seconds_to_accuracy(note, note) == 20
    assert seconds_to_accuracy(made_up("ours: head", 0, evaluations=[(3, 0.4), (4, 0.55)]), note) == 4
    never = made_up("ours: head", 0, evaluations=[(3, 0.4)])
    outcome = compare("accuracy_first", [note, never])
    assert outcome is not None
    assert (outcome.ours, outcome.missed) == ([], 1)
    assert ratio_rows([outcome], WORDS)[1][4] == "not reached"


def test_time_to_accuracy_is_compared_with_the_end_and_the_first_time_of_the_note_s_script():
    note = made_up("note's script", 0, evaluations=[(10, 0.3), (20, 0.5), (30, 0.6), (40, 0.5)])
    ours = made_up("ours: head", 0, evaluations=[(3, 0.4), (4, 0.55), (5, 0.2)])
    for name, ratio in (("accuracy", 10), ("accuracy_first", 5)):
        outcome = compare(name, [note, ours])
        assert outcome is not None
        assert outcome.ratio == ratio


def test_share_of_the_product_rate_is_useful_flops_per_second():
    runs = [
        made_up("manual loop", 0, train_seconds=10.0, train_samples=200, eval_seconds=2.0, eval_samples=50),
        made_up("ours: scoring", 0, eval_seconds=2.0, eval_samples=100),
    ]
    head, training, scoring = measure_rows(runs, {"full": {"train": 1e9}}, rate=2e9)
    assert (training[3], training[4], training[-1]) == ("20", "25", "30%")  # 2 epochs x 3 x 1e9 / 10 s / 2e9
    assert (scoring[4], scoring[-1]) == ("50", "25%")
    assert len({len(head), len(training), len(scoring)}) == 1


def test_plot_shows_every_measured_row(tmp_path):
    outcomes = [Outcome(name, row, [2.0, 2.5], [9.0, 12.0]) for name, row in ROWS.items()]
    outcomes.append(Outcome("head", ROWS["head"], [], [], missed=1))
    plot(outcomes, WORDS, "a machine", tmp_path / "speed.png")
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "speed.png").stat().st_size > 20_000


# ---------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def command(tmp_path, monkeypatch):
    """The command with contenders that only leave their name; gives the calls made."""
    calls: list[tuple[str, int]] = []

    def pretend(name, setting, seed, out):
        calls.append((name, seed))
        out.mkdir(parents=True)
        if len(calls) == limit["stop"]:
            raise KeyboardInterrupt
        measures = {"train_seconds": 2.0 + seed, "train_samples": 64, "eval_samples": 7, "evaluations": []}
        return measures | {"whole_seconds": 9.0}

    limit = {"stop": -1}
    materials = {
        "samples": {"train": 64, "validation": 32, "test": 32},
        "forward_flops": {"train": 1e9},
        "matmul_rates": {"fp32": 1e11, "bf16": 1e10},
        "machine": {"device": "a CPU", "threads": 2, "fast_bf16": False, "versions": {"torch": "2"}, "python": "3"},
    }
    monkeypatch.setattr(bench, "run", pretend)
    monkeypatch.setattr(bench, "make_materials", lambda part, options: materials)

    def call(*flags: str, stop: int = -1) -> list[tuple[str, int]]:
        calls.clear()
        limit["stop"] = stop
        monkeypatch.setattr(sys, "argv", ["bench.py", "--folder", str(tmp_path), *flags])
        bench.main()
        return list(calls)

    return call


def test_peers_and_ours_take_turns_and_what_is_finished_is_not_repeated(command, tmp_path, capsys):
    flags = ("--only", "manual", "trainer", "--repeats", "2")
    turn = ["manual loop", "ours: full", "Trainer, grouped"]
    wanted = [(name, repeat) for repeat in range(2) for name in turn]
    assert command(*flags, stop=5) == wanted[:5]  # stopped in the middle of the fifth run
    partial = capsys.readouterr().out
    assert "manual Accelerate loop" in partial
    assert command(*flags, "--resume") == wanted[4:]
    assert "**1.0** [1.0..1.0] | 4 | 7 | 2 |" in capsys.readouterr().out
    assert command(*flags, "--resume", "--samples", "99") == wanted  # other data, other runs
    assert command(*flags, "--resume") == []
    assert command(*flags) == wanted
    results = json.loads((tmp_path / "results.json").read_text())
    assert [row["name"] for row in results["rows"]] == ["manual", "trainer"]
    assert len(results["runs"]) == 6
    assert (tmp_path / "RESULTS.md").read_text().startswith("# Speed")


def test_every_row_names_contenders_that_are_there():
    assert {name for row in ROWS.values() for name in (row.ours, row.peer)} == set(contenders.CONTENDERS)
    assert (ROOT / "benchmarks" / "materials.py").exists()


def test_profile_of_a_step_counts_what_a_ready_mask_and_a_replay_leave_out(material, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    files = [
        part
        for split in ("train", "validation")
        for part in (f"--{split}_file", material.folder / "data" / f"{split}.jsonl")
    ]
    flags = list(map(str, ["--model", material.folder / "model", *files]))
    own, ready, _, replayed = (step_profile.count_step("no", way, flags) for way in step_profile.WAYS)
    assert (own["reads"], ready["reads"], replayed["reads"]) == (1, 0, 0)
    assert replayed["operations"] < ready["operations"] / 5 < own["operations"] / 5
    bf16 = step_profile.count_step("bf16", "the mask is ready", flags)
    assert bf16["casts"] > ready["casts"] + 20
    assert (bf16["copies"], bf16["views"]) == (ready["copies"], ready["views"])
    assert step_profile.count_step("bf16", "--bf16_weights True", flags)["casts"] < bf16["casts"] / 2
