"""sweep.py: its recipes, the choice among them, runs that fail, sweeps that are killed or share a folder, and real runs."""

import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest

from lib.config.cli import dump_config, parse
from lib.config.sections import flatten
from lib.config.sweep import SweepConfig, build_recipes
from lib.config.train import TrainConfig
from lib.errors import UserError
from lib.evaluation.scores import Metrics
from lib.experiments.sweep import Job, PlannedRun, Sweep, name_recipes
from lib.experiments.sweep_report import learning_curve, write_report
from lib.run.checkpoint import list_checkpoints
from lib.run.record import run_name
from lib.runtime import slots as slots_module
from lib.runtime.signals import Stopped
from lib.runtime.slots import Slot, Slots, find_slots
from tests.conftest import ROOT, read_lines, results_of
from tests.resuming import differences, run_flags

PRETENDED = ROOT / "tests" / "workers" / "pretended_run.py"


def recipes(*flags):
    return build_recipes(parse(SweepConfig, flags))


# ---------------------------------------------------------------------------------------------------- recipes


def test_grid_is_every_combination_of_its_values():
    found = [dict(recipe.varied) for recipe in recipes("--grid", "lr=1e-5,2e-5", "bs=16,32")]
    assert found == [{"lr": a, "bs": b} for a, b in itertools.product(("1e-5", "2e-5"), ("16", "32"))]


def test_search_fills_each_range_evenly_and_more_trials_keep_the_first():
    axes = ("--search", "lr=1e-5:1e-3:log", "warmup_steps=0:0.2", "max_length=16:19:int", "freeze=None,backbone")
    few, many = recipes(*axes, "--trials", "16"), recipes(*axes, "--trials", "64")
    assert many[:16] == few
    rates = sorted(float(dict(recipe.varied)["lr"]) for recipe in many)
    assert rates[0] >= 1e-5
    assert rates[-1] <= 1e-3
    assert sum(rate < 1e-4 for rate in rates) in range(30, 35)  # half of a logarithmic range
    warmups = [float(dict(recipe.varied)["warmup_steps"]) for recipe in many]
    assert sum(value < 0.05 for value in warmups) in range(14, 19)
    assert Counter(dict(r.varied)["max_length"] for r in many).keys() == {"16", "17", "18", "19"}
    assert max(Counter(dict(r.varied)["freeze"] for r in many).values()) <= 34


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--grid", "lrr=1,2"], "--lr"),
        (["--grid", "lr=1e-5,many"], "--learning_rate"),
        (["--grid", "lr=1e-5,1e-5"], "twice"),
        (["--grid", "lr=1e-5", "learning_rate=2e-5"], "twice"),
        (["--grid", "seed=1,2"], "--seeds"),
        (["--grid", "lr"], "option=values"),
        (["--search", "lr=1e-3:1e-5"], "below"),
        (["--search", "lr=0:1:log"], "logarithmic"),
        (["--search", "lr=1e-5:1e-3:cubic"], "low:high"),
        (["--grid", "lr=1e-5", "--search", "bs=8:16:int"], "--grid and --search"),
        (["--halving", "3", "--grid", "lr=1e-5,1e-4"], "--finalists"),
        (["--finalists", "3", "--grid", "lr=1e-5,1e-4"], "nothing to choose"),
        (["--", "--seed", "3"], "--seeds"),
        (["--", "--run-name=x"], "name of its own"),
        (["--gpus", "all of them"], "--gpus"),
        (["--grid", "metrics=[accuracy,f1"], "not closed"),
        (["--grid", 'metrics=[accuracy],"f1'], "not closed"),
        (["--grid", "metrics=[accuracy]f1"], "not closed"),
        (["--grid", "lr=[1e-5,2e-5]"], "takes one value"),
        (["--grid", "metrics=[accuracy,f1],[accuracy,f1]"], "twice"),
        (["--search", "metrics=[accuracy,"], "not closed"),
        (
            ["--search", "max_length=32,64", "--halving", "2", "--", "--freeze", "backbone", "--head_solver", "lbfgs"],
            "--head_solver",
        ),
        (
            ["--grid", "head_solver=None,lbfgs", "--finalists", "1", "--halving", "2", "--", "--freeze", "backbone"],
            "only",
        ),
    ],
)
def test_what_cannot_be_swept_is_refused_and_names_the_option(flags, word):
    with pytest.raises(UserError, match=word):
        recipes(*flags)


def test_values_of_an_option_that_takes_several_stand_in_brackets_and_commas_in_quotes():
    found = recipes("--grid", "metrics=[f1_macro, accuracy],[accuracy]", "config_overrides=num_hidden_layers=1,[]")
    assert [recipe.config(0).metrics for recipe in found[::2]] == [("f1_macro", "accuracy"), ("accuracy",)]
    assert [recipe.config(0).model.config_overrides for recipe in found[:2]] == [("num_hidden_layers=1",), ()]
    both = recipes("--search", "config_overrides=[num_hidden_layers=1,hidden_size=8],[num_hidden_layers=2]", "lr=0:1")
    assert {recipe.config(0).model.config_overrides for recipe in both} == {
        ("num_hidden_layers=1", "hidden_size=8"),
        ("num_hidden_layers=2",),
    }
    quoted = recipes("--grid", 'notes="a, b",c', "--", "--lr", "1")
    assert [recipe.config(0).tracking.notes for recipe in quoted] == ["a, b", "c"]


def test_runs_whose_default_names_are_equal_have_folders_of_their_own_and_others_keep_theirs():
    grid = recipes("--grid", "lr=1e-5,2e-5", "metrics=[f1_macro,accuracy],[accuracy]")
    runs = [PlannedRun(recipe, 3) for recipe in name_recipes(grid)]
    assert len({run.folder for run in runs}) == 4
    assert all(run.folder.name.endswith("-s3") for run in runs)  # what W&B groups by
    assert all(run.config.tracking.run_name == run.folder.name for run in runs)
    (plain,) = name_recipes(recipes("--grid", "lr=1e-5"))
    assert "--run_name" not in PlannedRun(plain, 0).flags


@pytest.mark.parametrize("line", ["pause_at_step: 3", "score_test: false", "fold: 1/2", "seed: 7", "run_name: mine"])
def test_file_of_shared_options_cannot_set_what_a_sweep_sets(tmp_path, line):
    (tmp_path / "recipe.yaml").write_text(f"lr: 1e-3\n{line}\n")
    with pytest.raises(UserError, match=line.partition(":")[0]):
        recipes("--", "--config", str(tmp_path / "recipe.yaml"))
    (tmp_path / "recipe.yaml").write_text("lr: 1e-3\n")
    assert recipes("--", "--config", str(tmp_path / "recipe.yaml"))[0].config(0).optim.learning_rate == 1e-3


def test_runs_that_differ_in_a_setting_of_the_result_have_different_names():
    changed = {
        **{
            "warmup_steps": 0.2,
            "layerwise_lr_decay": 0.9,
            "weight_decay": 0.0,
            "max_grad_norm": 2.0,
            "adam_beta2": 0.98,
        },
        **{
            "head_learning_rate": 1e-3,
            "lr_scheduler_type": "cosine",
            "train_sampling_strategy": "random",
            "eval_steps": 7,
        },
        **{"max_length": 64, "window_stride": 8, "max_train_samples": 100, "label_smoothing_factor": 0.1, "seed": 7},
        **{"early_stopping_patience": 2, "metric_for_best_model": "loss", "mixed_precision": "no", "score_test": False},
    }
    assert changed.keys() <= flatten(TrainConfig()).keys()
    flags = [[f"--{name}", str(value)] for name, value in changed.items()]
    pairs = [[*a, *b] for a, b in itertools.combinations(flags, 2)]
    every = [[], *flags, *pairs, list(itertools.chain(*flags)), list(itertools.chain(*flags[:-1]))]
    names = [run_name(parse(TrainConfig, given)) for given in every]
    assert len(set(names)) == len(every)
    assert max(map(len, names)) < 150
    assert names[0] == "minilm-movie_reviews-lr5e-05-bs32-ep3-s42"


# ---------------------------------------------------------------------------------------------------- pretended runs


class Pretended(Sweep):
    """A sweep of pretended runs: the score of a recipe is its learning rate."""

    metric = "accuracy"

    def read_data(self, config):
        return None

    def metrics(self, run):
        return Metrics(("accuracy",), "accuracy")

    def pause_step(self, run, share):
        return 2 * math.ceil(8 * share / 2)


@pytest.fixture
def pretend(tmp_path, monkeypatch):
    """`pretend(*flags)`: the sweep of these flags, whose runs are pretended."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lib.experiments.sweep.POLL_SECONDS", 0.02)
    monkeypatch.setattr("lib.experiments.sweep.ELSEWHERE_SECONDS", 0.2)

    def command(job):
        score = job.run.config.optim.learning_rate * (-1 if job.run.config.optim.weight_decay == 1 else 1)
        return [sys.executable, str(PRETENDED), *map(str, (job.run.folder, score, job.until or 99, "log.txt"))]

    monkeypatch.setattr(Job, "command", command)

    def make(*flags):
        config = parse(SweepConfig, flags)
        return Pretended(config, build_recipes(config))

    return make


def carry_out(sweep, count=2):
    sweep.open()
    for stage in sweep.stages():
        sweep.run(stage, Slots([], count))
    return write_report(sweep)


def test_halving_pauses_the_worse_and_trains_the_best_with_fresh_seeds(pretend, tmp_path):
    sweep = pretend("--search", "lr=0.1:0.9", "--trials", "9", "--halving", "3", "--finalists", "2", "--seeds", "1")
    carry_out(sweep)
    steps = Counter(line.split()[0] for line in (tmp_path / "log.txt").read_text().splitlines())
    trials = sorted(
        (PlannedRun(recipe, 0, False) for recipe in sweep.recipes), key=lambda run: -float(run.recipe.varied[0][1])
    )
    assert [steps[run.folder.name] for run in trials] == [8, 8, 4, 2, 2, 2, 2, 2, 2]
    finalists = [PlannedRun(run.recipe, 1) for run in trials[:2]]
    assert set(steps) == {run.folder.name for run in [*trials, *finalists]}
    found = json.loads((sweep.folder / "results.json").read_text())
    assert found["best"] == dict(trials[0].recipe.varied)
    assert (found["finished"], found["paused"]) == (4, 7)


def test_failed_run_is_recorded_with_its_reason_and_the_others_go_on(pretend):
    sweep = pretend("--grid", "lr=0.1,0.2", "weight_decay=0,1", "--seeds", "2")
    text = carry_out(sweep)
    records = read_lines(sweep.folder / "runs.jsonl")
    assert Counter(record["status"] for record in records) == {"finished": 4, "failed": 4}
    assert all("too little memory" in record["error"] for record in records if record["status"] == "failed")
    assert "too little memory" in text


def test_table_has_every_seed_of_the_best_recipe_and_simple_methods_beside_it(pretend):
    carry_out(sweep := pretend("--grid", "lr=0.1,0.2", "--seeds", "2"))
    table = [line.split() for line in (sweep.folder / "table.md").read_text().splitlines()]
    assert ["seed", "1", "0.2000", "0.2000"] in table
    assert ["most", "frequent", "answer", "0.0500"] in table
    found = json.loads((sweep.folder / "results.json").read_text())["recipes"]
    assert [group["baselines/most frequent answer/accuracy"]["mean"] for group in found] == [0.05, 0.05]


def test_finished_runs_are_ranked_and_shown_by_the_model_that_they_saved(pretend):
    sweep = pretend("--grid", "lr=0.1,0.2", "--finalists", "1")
    sweep.open()
    jobs = next(sweep.stages())
    sweep.run(jobs, Slots([], 2))
    worse, better = (job.run for job in jobs)
    path = worse.folder / "results.json"  # whose mean of weights is better than each evaluation
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eval/accuracy": 0.9}))
    assert sweep.rank(jobs) == [(0.9, worse), (0.2, better)]
    assert worse.score("accuracy", until=4) == 0.05  # where runs were paused, evaluations are compared
    write_report(sweep)
    assert [line["eval/accuracy"] for line in read_lines(sweep.folder / "runs.jsonl")] == [0.9, 0.2]
    found = json.loads((sweep.folder / "results.json").read_text())
    assert found["best"] == {"lr": "0.1"}
    assert "0.9000" in (sweep.folder / "table.md").read_text()


def test_simple_methods_of_other_recipes_are_named_only_where_the_data_differ(pretend):
    carry_out(sweep := pretend("--grid", "lr=0.1,0.2", "--finalists", "2", "--seeds", "2"))

    def score(run, value):
        path = run.folder / "results.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"baselines/most frequent answer/accuracy": value}))

    for run in sweep.runs:  # trials are scored on validation, finalists on test
        score(run, 0.04 if run.score_test else 0.05)
    assert "other recipes" not in write_report(sweep)
    (sweep.runs[-1].folder / "results.json").unlink()  # of one recipe there is one seed only
    assert "other recipes" not in write_report(sweep)
    score(sweep.runs[-2], 0.5)
    assert "other recipes" in write_report(sweep)


def test_claim_that_a_killed_sweep_left_of_a_finished_run_is_removed(pretend):
    carry_out(sweep := pretend("--grid", "lr=0.1,0.2", "--name", "one"))
    left = sweep.folder / "claims" / sweep.runs[0].folder.name / ".lock"
    left.write_text('{"pid": 0}')
    carry_out(pretend("--grid", "lr=0.1,0.2", "--name", "one"))
    assert not left.exists()


def test_run_that_the_system_killed_is_called_so(pretend, monkeypatch):
    shell(monkeypatch, lr1="echo step 7; kill -9 $$")
    carry_out(sweep := pretend("--grid", "lr=0.1,0.2"))
    errors = [record["error"] for record in read_lines(sweep.folder / "runs.jsonl") if record["status"] == "failed"]
    assert "SIGKILL" in errors[0]


def test_all_runs_failed_is_said_with_the_log(pretend):
    sweep = pretend("--search", "lr=0.1:0.2", "--trials", "2", "--", "--weight_decay", "1", "--max_steps", "1")
    with pytest.raises(UserError, match="logs"):
        carry_out(sweep)


def scores_of(folder):
    """The lines of runs.jsonl."""
    return {record["run"]: record for record in read_lines(folder / "runs.jsonl")}


def fork_sweep(sweep):
    """Carry a sweep out in a process of its own; its process id."""
    child = os.fork()
    if child == 0:
        try:
            carry_out(sweep)
            os._exit(0)
        finally:
            os._exit(1)
    return child


SEARCH = ("--search", "lr=0.1:0.9", "--trials", "4", "--halving", "2", "--seeds", "2", "--name", "one")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_sweep_killed_again_and_again_ends_like_one_that_was_not(pretend, tmp_path):
    carry_out(pretend(*SEARCH))
    undisturbed = scores_of(tmp_path / "sweeps" / "one")
    (tmp_path / "sweeps").rename(tmp_path / "before")
    (tmp_path / "outputs").rename(tmp_path / "outputs_before")
    for number in range(4):
        child = fork_sweep(pretend(*SEARCH))
        time.sleep(0.3 * (number + 1))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    carry_out(pretend(*SEARCH))
    assert scores_of(tmp_path / "sweeps" / "one") == undisturbed


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_two_sweeps_on_one_folder_train_every_step_once(pretend, tmp_path, monkeypatch):
    flags = ("--grid", "lr=0.1,0.2", "--seeds", "2", "--name", "shared")
    opened = Pretended.open
    monkeypatch.setattr(Pretended, "open", lambda sweep: [opened(sweep) for _ in range(100)])  # many starts at once
    children = [fork_sweep(pretend(*flags)) for _ in range(3)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
    steps = Counter((tmp_path / "log.txt").read_text().splitlines())
    assert set(steps.values()) == {1}
    assert len(steps) == 4 * 8
    assert Counter(r["status"] for r in scores_of(tmp_path / "sweeps" / "shared").values()) == {"finished": 4}


@pytest.mark.parametrize(
    "files",
    [
        {"results.json": "{}"},
        {"table.md": "mine"},
        {"sweep.yaml": "method: grid\n"},
        {"config.yaml": dump_config(TrainConfig())},
    ],
    ids=lambda files: next(iter(files)),
)
def test_files_of_others_in_the_folder_of_a_sweep_are_not_replaced(pretend, tmp_path, files):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match="--output_dir"):
        carry_out(pretend("--grid", "lr=0.1,0.2", "--output_dir", str(tmp_path)))
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == files


@pytest.mark.timeout(60)
def test_folder_that_cannot_be_written_ends_the_sweep_instead_of_waiting(pretend):
    sweep = pretend("--grid", "lr=0.1,0.2")
    sweep.folder.mkdir(parents=True)
    sweep.open()
    (sweep.folder / "claims").write_text("a file")
    with pytest.raises(UserError, match="cannot be written"):
        carry_out(sweep)


def shell(monkeypatch, **scripts):
    """Have the runs of some learning rates, `lr1` for 0.1, be shell scripts in place of the pretended runs."""
    pretended = Job.command

    def command(job):
        name = f"lr{round(10 * job.run.config.optim.learning_rate)}"
        script = f"mkdir -p '{job.run.folder}' && cd '{job.run.folder}' && {scripts.get(name)}"
        return ["sh", "-c", script] if name in scripts else pretended(job)

    monkeypatch.setattr(Job, "command", command)


def test_run_without_a_score_that_can_be_read_is_no_reason_to_end_the_others(pretend, monkeypatch, capsys):
    shell(monkeypatch, lr1=r"printf '\377' > metrics.jsonl; echo '{}' > results.json")
    carry_out(sweep := pretend("--grid", "lr=0.1,0.2,0.3"), count=1)
    records = read_lines(sweep.folder / "runs.jsonl")
    assert [record["eval/accuracy"] for record in records] == [None, 0.2, 0.3]
    assert "no score" in capsys.readouterr().err


@pytest.mark.timeout(60)
def test_runs_save_when_an_error_ends_their_sweep(pretend, tmp_path, monkeypatch):
    save = "trap 'echo > ../../saved; exit 75' TERM; echo > ../../started; while :; do sleep 0.05; done"
    shell(monkeypatch, lr1="while [ ! -e ../../started ]; do sleep 0.05; done; exit 1", lr2=save)

    def broken(*_):
        raise RuntimeError("of the sweep itself")

    monkeypatch.setattr(Pretended, "note", broken)
    with pytest.raises(RuntimeError, match="itself"):
        carry_out(pretend("--grid", "lr=0.1,0.2"))
    assert (tmp_path / "saved").exists()


def test_text_of_users_moves_no_cursor_and_ends_no_block(pretend, monkeypatch, capsys):
    shell(monkeypatch, lr1=r"printf 'error: \033[2J\n'; exit 2")
    monkeypatch.setattr("lib.experiments.sweep_report.format_sweep", lambda *_: "| a ``` b")
    text = carry_out(sweep := pretend("--grid", "lr=0.1,0.2"))
    assert "\x1b" not in text + capsys.readouterr().err
    assert (sweep.folder / "table.md").read_text().splitlines() == ["````", "| a ``` b", "````"]


def test_learning_curve_recovers_a_power_law_and_what_twice_the_data_bring():
    sizes = (100, 200, 400, 800)
    groups = [
        {"settings": {"max_train_samples": str(n)}, "eval/accuracy": {"mean": 0.8 - 0.3 * (n / 100) ** -0.5, "n": 3}}
        for n in sizes
    ]
    found = learning_curve(groups)
    assert found["expected_at_twice"] == pytest.approx(0.8 - 0.3 * 16**-0.5, abs=1e-3)
    assert learning_curve(groups[:2]) is None
    assert learning_curve([group | {"settings": {"lr": "1"}} for group in groups]) is None


# ---------------------------------------------------------------------------------------------------- GPUs


def fake_gpus(folder, monkeypatch, used, programs=()):
    """An nvidia-smi that shows GPUs with this many MiB in use, and programs on some of them."""
    gpus = "\n".join(f"GPU-{number}aaaa, {memory}" for number, memory in enumerate(used))
    listed = "\n".join(f"{number}, GPU-{number}aaaa" for number in range(len(used)))
    apps = "\n".join(f"GPU-{number}aaaa, 4242" for number in programs)
    script = folder / "nvidia-smi"
    answers = {"*compute-apps*": apps, "*memory.used*": gpus, "*": listed}
    branches = "\n".join(f'{pattern}) printf "{text}\\n";;' for pattern, text in answers.items())
    script.write_text(f'#!/bin/sh\ncase "$1" in\n{branches}\nesac\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setattr("lib.runtime.slots.LOCKS", folder)
    for name in ("ACCELERATE_USE_CPU", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)


def test_gpu_with_memory_of_another_program_is_not_taken_though_nothing_computes_on_it(tmp_path, monkeypatch):
    fake_gpus(tmp_path, monkeypatch, [12, 30_000, 12, 12], programs=[2])
    slots = find_slots("all", None)
    first, second = slots.take(), slots.take()
    assert None not in (first, second)
    assert [slot.variables["CUDA_VISIBLE_DEVICES"] for slot in (first, second)] == ["GPU-0aaaa", "GPU-3aaaa"]
    assert slots.take() is None


def test_gpus_are_asked_once_for_a_place_however_many_there_are(tmp_path, monkeypatch):
    fake_gpus(tmp_path, monkeypatch, [30_000] * 8)
    slots, asked = find_slots("all", None), []
    ask = slots_module.ask
    monkeypatch.setattr(slots_module, "ask", lambda query: asked.append(query) or ask(query))
    assert slots.take() is None
    assert len(asked) == len(set(asked))


def test_run_is_alone_though_its_sweep_is_one_of_several_processes(tmp_path, monkeypatch):
    names = ("PMI_SIZE", "RANK", "WORLD_SIZE", "LOCAL_RANK", "WANDB_RUN_ID", "WANDB_NAME", "WANDB_RESUME")
    monkeypatch.setenv("WANDB_RUN_GROUP", "lab")
    for name in names:
        monkeypatch.setenv(name, "4")
    Slot("CPU", {"OMP_NUM_THREADS": "3"}).start(["env"], tmp_path / "log.txt").wait(30)
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert {"OMP_NUM_THREADS=3", "WANDB_RUN_GROUP=lab"} <= {*lines}
    assert not {line.partition("=")[0] for line in lines} & set(names)


def test_two_users_never_get_one_gpu_and_its_lock_ends_with_the_run_not_with_the_sweep(tmp_path, monkeypatch):
    fake_gpus(tmp_path, monkeypatch, [0, 0])
    ours, theirs = find_slots("all", None), find_slots("all", None)
    held = ours.take()
    sleeping = held.start(["sleep", "60"], tmp_path / "log.txt")
    try:
        assert (tmp_path / f"gpu-{held.name}.lock").exists()
        other = theirs.take()
        assert other.name != held.name
        assert theirs.take() is None
    finally:
        sleeping.kill()
        sleeping.wait(30)
    assert theirs.take().name == held.name


@pytest.mark.parametrize(
    ("wanted", "visible", "names", "count"),
    [
        ("all", None, ["GPU-0aaaa", "GPU-1aaaa", "GPU-2aaaa"], 3),
        ("all", "2,0", ["GPU-2aaaa", "GPU-0aaaa"], 2),
        ("all", "GPU-1aaaa", ["GPU-1aaaa"], 1),
        ("free:2", None, ["GPU-0aaaa", "GPU-1aaaa", "GPU-2aaaa"], 2),
        ("2,1", None, ["GPU-2aaaa", "GPU-1aaaa"], 2),
        ("all", "", [], 1),
    ],
)
def test_gpus_are_those_that_the_user_named(tmp_path, monkeypatch, wanted, visible, names, count):
    fake_gpus(tmp_path, monkeypatch, [0, 0, 0])
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    slots = find_slots(wanted, None)
    assert ([gpu.uuid for gpu in slots.gpus], slots.count) == (names, count)


@pytest.mark.parametrize(("wanted", "visible"), [("3", None), ("free:9", None), ("0", "1")])
def test_gpu_that_is_not_there_is_refused(tmp_path, monkeypatch, wanted, visible):
    fake_gpus(tmp_path, monkeypatch, [0, 0, 0])
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(UserError, match="--gpus"):
        find_slots(wanted, None)


def test_cpu_runs_one_at_a_time_by_default_and_shares_its_cores_else(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("lib.runtime.slots.allowed_cores", lambda: 8)
    assert (find_slots("all", None).count, find_slots("all", None).take().variables) == (1, {})
    assert find_slots("all", 4).take().variables == {"OMP_NUM_THREADS": "2"}


# ---------------------------------------------------------------------------------------------------- real runs


def test_paused_run_goes_on_as_if_it_had_never_stopped_bit_by_bit(call, roberta, tmp_path):
    flags = [*run_flags(tmp_path, roberta), "--save_steps", 3]
    whole, paused = tmp_path / "whole", tmp_path / "paused"
    call("train.py", *flags, "--output_dir", whole)
    for step in (3, 3, 7):
        with pytest.raises(Stopped, match=f"--pause_at_step {step}"):
            call("train.py", *flags, "--output_dir", paused, "--pause_at_step", step)
        assert list_checkpoints(paused / "checkpoints")[0].name == f"step-{step}"
    call("train.py", *flags, "--output_dir", paused)
    assert not differences(whole, paused)


def test_test_file_is_not_opened_where_only_validation_is_scored(call, roberta, tmp_path):
    flags = run_flags(tmp_path, roberta)
    (tmp_path / "test.csv").unlink()
    done = call("train.py", *flags, "--score_test", "False", "--output_dir", "run")
    assert "eval/accuracy" in results_of(done)
    assert not [name for name in results_of(done) if name.startswith("test/")]
    call("train.py", *flags, "--output_dir", "other", code=2)


@pytest.mark.slow
def test_sweep_of_real_runs_killed_at_random_equals_one_that_was_not(run, roberta, tmp_path):
    flags = run_flags(tmp_path, roberta)
    lr = flags.index("--lr")
    sweep = [
        "--search",
        "lr=1e-3:1e-1:log",
        "--trials",
        3,
        "--halving",
        2,
        "--seeds",
        1,
        "--",
        *flags[:lr],
        *flags[lr + 2 :],
    ]
    threads = {"OMP_NUM_THREADS": "1"}  # the same ones for every run: sums differ by rounding with their number
    run("sweep.py", "--name", "whole", *sweep, timeout=300, env=threads)
    (tmp_path / "outputs").rename(tmp_path / "undisturbed")
    command = [sys.executable, str(ROOT / "sweep.py"), "--name", "killed", *map(str, sweep)]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true"} | threads
    for number, sent in enumerate((signal.SIGKILL, signal.SIGTERM) * 4):
        process = subprocess.Popen(
            command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        time.sleep(6 + 3 * number)
        process.send_signal(sent)
        process.wait(120)
    run("sweep.py", "--name", "killed", *sweep, timeout=300, env=threads)
    names = {path.name for path in (tmp_path / "undisturbed").iterdir()}
    assert names == {path.name for path in (tmp_path / "outputs").iterdir()}
    finished = [name for name in names if (tmp_path / "undisturbed" / name / "results.json").exists()]
    assert len(finished) == 2
    for name in finished:
        assert not differences(tmp_path / "undisturbed" / name, tmp_path / "outputs" / name)
