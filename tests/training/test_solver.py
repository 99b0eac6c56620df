"""--head_solver: the head of any architecture computes scikit-learn's solution, alone and on several processes."""

import dataclasses
import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from transformers import AutoModel

from lib.config.cli import parse_cli
from lib.config.sections import DataConfig, ModelConfig
from lib.config.train import ObjectiveConfig, TrainConfig, TrainingConfig
from lib.errors import UserError
from lib.evaluation.linear import STRENGTHS
from lib.evaluation.scores import Metrics
from lib.training.frozen import solver
from lib.training.frozen.solver import solve_head
from tests.conftest import read_lines, results_of, sentences, write_csv
from tests.resuming import run_flags
from tests.stepping import METRICS, build_experiment
from tests.tiny_models import any_classifier

NAMES = ("bad", "good", "mixed")
WITH_MEANS = ["bert", "roberta", "electra"]
WITH_IDENTITY = ["distilbert", "deberta", "albert"]
WITHOUT = ["modernbert", "modernbert-mean", "gpt2", "llama"]
SOLVED = ["--freeze", "backbone", "--head_solver", "lbfgs"]


@pytest.fixture(autouse=True)
def fresh_accelerator():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def settings(model: Path, tmp_path: Path, **data: Any) -> TrainConfig:
    counts = {"train": 45, "validation": 12, "test": 5}
    files = {f"{role}_file": str(write_csv(tmp_path / f"{role}.csv", sentences(n, n))) for role, n in counts.items()}
    return TrainConfig(
        model=ModelConfig(model=str(model), freeze="backbone", head_solver="lbfgs"),
        data=DataConfig(**files, **data),
        training=TrainingConfig(per_device_eval_batch_size=4),
        mixed_precision="no",
    )


def solve(config: TrainConfig, monkeypatch: pytest.MonkeyPatch, place: int | None = None) -> SimpleNamespace:
    """Solve as train.py does, for the vectors at `place` of the names if given; what was installed, and the model's logits."""
    found, order = SimpleNamespace(), itertools.count()
    install, choose = solver.Head.install, solver.choose_best

    def spy(head: Any, chosen: str, solution: Any) -> None:
        found.head, found.name, found.solution = head, chosen, solution
        install(head, chosen, solution)

    def prefer(predictions: Any, metric: str) -> tuple[int, float]:
        number, value = choose(predictions, metric)
        return number, value if place is None else -abs(place - next(order))

    AcceleratorState._reset_state(reset_partial_state=True)
    experiment = build_experiment(config, Accelerator(cpu=True, mixed_precision=config.mixed_precision))
    learner, batches = experiment.learner, experiment.batches
    before = {key: tensor.clone() for key, tensor in learner.model.state_dict().items()}
    with monkeypatch.context() as patch:
        patch.setattr(solver.Head, "install", spy)
        patch.setattr(solver, "choose_best", prefer)
        solve_head(learner, batches, METRICS)
    found.changed = {key for key, tensor in learner.model.state_dict().items() if not torch.equal(tensor, before[key])}
    found.logits = learner.evaluate(batches.split("validation"), METRICS).predictions.logits
    found.state, found.values = learner.state, learner.meter.read()
    found.data, found.batches, found.learner = batches.data, batches, learner
    return found


@pytest.mark.parametrize(
    ("name", "place"),
    [
        *((name, 0) for name in ("bert", *WITHOUT)),
        *((name, 1) for name in ("roberta", *WITH_IDENTITY)),
        *(("electra", 2), ("bert", 3), ("roberta", 3)),
    ],
)
def test_model_computes_the_solution_for_the_vectors_it_was_found_on(name, place, tmp_path, monkeypatch):
    kept: dict[str, np.ndarray] = {}
    read = solver.read_vectors

    def keep(learner: Any, batches: Any, head: Any, split: str) -> np.ndarray:
        kept[split] = read(learner, batches, head, split)
        assert len(head.names) == (4 if name in WITH_MEANS else 2 if name in WITH_IDENTITY else 1)
        return kept[split]

    monkeypatch.setattr(solver, "read_vectors", keep)
    model = any_classifier(name, tmp_path / "model", 4 if name in WITH_MEANS else 2)
    found = solve(settings(model, tmp_path), monkeypatch, place)
    assert found.name == found.head.names[place]
    vectors = kept["validation"][:, place]
    assert vectors.std(axis=0).mean() > 0.1
    np.testing.assert_allclose(found.logits, found.solution(vectors), atol=5e-3, rtol=1e-3)
    if place < 2:  # nothing below the head is changed
        layers = {found.head.last, *([found.head.square] if place else [])}
        ours = {key for key, module in found.learner.model.named_modules() if module in layers}
        assert {key.rpartition(".")[0] for key in found.changed} == ours
    assert found.state.step == 1
    assert found.state.samples_seen == 45
    assert 0 < found.values["train/loss"] < np.log(3)


def test_mean_after_a_layer_is_that_of_the_pretrained_model(tmp_path, monkeypatch):
    folder = any_classifier("bert", tmp_path / "model", 4)
    kept: list[np.ndarray] = []
    read = solver.read_vectors
    monkeypatch.setattr(solver, "read_vectors", lambda *given: kept.append(read(*given)) or kept[-1])
    found = solve(settings(folder, tmp_path), monkeypatch, 3)
    assert found.name.endswith("layer 3")
    backbone = AutoModel.from_pretrained(folder).eval()
    for ids, vector in zip(found.data.tokens["validation"]["input_ids"][:], kept[1][:, 3], strict=True):
        with torch.no_grad():
            mean = backbone(torch.tensor([ids]), output_hidden_states=True).hidden_states[3][0].mean(dim=0)
        assert np.corrcoef(mean, vector)[0, 1] > 0.99


def test_logits_are_those_of_scikit_learn_on_the_first_token_of_the_pretrained_model(tmp_path, monkeypatch):
    folder = any_classifier("roberta", tmp_path / "model")
    found = solve(settings(folder, tmp_path), monkeypatch, 1)
    backbone = AutoModel.from_pretrained(folder).eval()
    vectors = {}
    for split in ("train", "validation"):
        ids = found.data.tokens[split]["input_ids"][:]
        with torch.no_grad():
            states = [backbone(input_ids=torch.tensor([row])).last_hidden_state[0, 0] for row in ids]
        vectors[split] = torch.stack(states).numpy().astype(np.float64)
    scaler = StandardScaler().fit(vectors["train"])
    expected = []
    for strength in STRENGTHS:
        model = LogisticRegression(C=strength / 45, max_iter=300)
        model.fit(scaler.transform(vectors["train"]), found.data.labels("train"))
        expected.append(model.predict_proba(scaler.transform(vectors["validation"])))
    probabilities = torch.tensor(found.logits).softmax(dim=1).numpy()
    assert min(abs(probabilities - one).max() for one in expected) < 5e-3


def test_text_in_windows_has_the_mean_of_their_logits(tmp_path, monkeypatch):
    config = settings(any_classifier("roberta", tmp_path / "model"), tmp_path, max_length=8, window_stride=2)
    kept: list[np.ndarray] = []
    read = solver.read_vectors
    monkeypatch.setattr(solver, "read_vectors", lambda *given: kept.append(read(*given)) or kept[-1])
    found = solve(config, monkeypatch, 1)
    assert max(found.data.tokens["validation"]["num_windows"]) > 1
    np.testing.assert_allclose(found.logits, found.solution(kept[1][:, 1]), atol=5e-3, rtol=1e-3)


@pytest.mark.parametrize("problem", ["regression", "multi_label_classification", "balanced classes"])
def test_every_problem_type_is_solved_the_same_way_each_time(problem, tmp_path, monkeypatch):
    config = settings(any_classifier("bert", tmp_path / "model"), tmp_path)
    if problem == "balanced classes":
        config = dataclasses.replace(config, objective=ObjectiveConfig(class_weights=("balanced",)))
    else:
        for split, size in (("train", 45), ("validation", 12), ("test", 5)):
            rows = [(text, float(label == "good"), 0.5 * (label != "bad")) for text, label in sentences(size, size)]
            if problem == "regression":
                write_csv(tmp_path / f"{split}.csv", [(text, good + half) for text, good, half in rows])
            else:
                header = ("text", "is_good", "is_not_bad")
                write_csv(tmp_path / f"{split}.csv", [(t, int(g), int(h > 0)) for t, g, h in rows], header)
        columns = None if problem == "regression" else ("is_good", "is_not_bad")
        data = dataclasses.replace(config.data, problem_type=problem, label_columns=columns)
        config = dataclasses.replace(config, data=data)
    metric = {"regression": "mse", "multi_label_classification": "f1_macro"}.get(problem, "accuracy")
    monkeypatch.setattr("tests.training.test_solver.METRICS", Metrics((metric,), metric))
    first, again = (solve(config, monkeypatch) for _ in range(2))
    assert np.array_equal(first.solution.weight, again.solution.weight)
    assert np.array_equal(first.logits, again.logits)
    if problem == "balanced classes":
        assert first.batches.weights is not None
    assert first.values["train/loss"] < {"regression": 0.4, "multi_label_classification": 0.69}.get(problem, np.log(3))


def test_head_of_another_form_is_refused_and_so_is_too_little_memory(tmp_path, monkeypatch):
    config = settings(any_classifier("bert", tmp_path / "model"), tmp_path)
    little = dataclasses.replace(config, training=TrainingConfig(feature_cache_gib=1e-6))
    with pytest.raises(UserError, match="--feature_cache_gib"):
        solve(little, monkeypatch)
    monkeypatch.setattr(solver, "same_logits", lambda *_: False)
    with pytest.raises(UserError, match="not one linear layer"):
        solve(config, monkeypatch)


@pytest.mark.parametrize("soft", ["train", "validation"])
def test_soft_labels_are_refused_in_train_and_scored_elsewhere(soft, tmp_path, monkeypatch):
    config = settings(any_classifier("bert", tmp_path / "model"), tmp_path, soft_labels=("p",))
    rows = [(text, *(0.6 if name == label else 0.2 for name in NAMES)) for text, label in sentences(12, 1)]
    write_csv(tmp_path / f"{soft}.csv", rows, ("text", *(f"p/{name}" for name in NAMES)))
    find, asked = solver.find_head, []
    monkeypatch.setattr(solver, "find_head", lambda *given: asked.append(1) or find(*given))
    if soft == "train":
        with pytest.raises(UserError, match=r"--head_solver.*--soft_labels"):
            solve(config, monkeypatch)
        assert not asked
    else:
        found = solve(config, monkeypatch)
        assert found.data.is_soft("validation")
        assert found.state.step == 1


def test_every_process_beats_and_can_stop_before_each_strength(tmp_path, monkeypatch):
    config = settings(any_classifier("roberta", tmp_path / "model"), tmp_path)
    experiment = build_experiment(config, Accelerator(cpu=True, mixed_precision="no"))
    seen: dict[str, list[str]] = {}
    agree, fit, shared = solver.agree_to_stop, solver.fit_linear, []
    for process in ("main", "other"):
        log = seen.setdefault(process, [])

        def logged_fit(*given: Any, log: list[str] = log) -> Any:
            for solution in fit(*given):
                log.append("fit")
                yield solution

        with monkeypatch.context() as patch:
            patch.setattr(solver, "beat", log.append)
            patch.setattr(
                solver, "agree_to_stop", lambda accelerator, log=log: log.append("agree") or agree(accelerator)
            )
            patch.setattr(solver, "fit_linear", logged_fit)
            if process == "other":
                patch.setattr(Accelerator, "is_main_process", False)
            patch.setattr(solver, "broadcast_object_list", lambda found: shared.append(found) or shared[0])
            solve_head(experiment.learner, experiment.batches, METRICS)
    assert seen["other"] == [event for event in seen["main"] if event != "fit"]
    phases, agreed, solved = np.array(seen["main"]).reshape(-1, 3).T
    assert len(set(phases)) == len(phases) >= 2 * len(STRENGTHS)
    assert set(agreed) == {"agree"}
    assert set(solved) == {"fit"}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--head_solver", "lbfgs"], "--freeze backbone"),
        ([*SOLVED, "--lr", "1e-3"], "--learning_rate has no effect"),
        ([*SOLVED, "--epochs", "5"], "--num_train_epochs has no effect"),
        ([*SOLVED, "--label_smoothing_factor", "0.1"], "--label_smoothing_factor has no effect"),
        ([*SOLVED, "--pause_at_step", "3"], "--pause_at_step has no effect"),
    ],
)
def test_options_of_training_by_steps_are_refused(flags, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_cli(TrainConfig, flags)
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err


@pytest.mark.slow
def test_run_equals_one_on_two_processes_and_one_that_ended_before_its_report(run, roberta_without_dropout, tmp_path):
    env = {"HF_DATASETS_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    given = run_flags(tmp_path, roberta_without_dropout)
    kept = ("--model", "--train_file", "--validation_file", "--test_file", "--mixed_precision", "--report_to")
    flags = [
        item for flag, value in zip(given[::2], given[1::2], strict=True) if flag in kept for item in (flag, value)
    ]
    folders, results = [], []
    for name, processes in (("one", None), ("two", 2)):
        folder = tmp_path / name
        done = run("train.py", *flags, *SOLVED, "--output_dir", folder, processes=processes, env=env)
        results.append(results_of(done))
        folders.append(folder)
        assert results[-1]["run/num_processes"] == (processes or 1)
        assert results[-1]["steps"] == 1
        (line,) = read_lines(folder / "metrics.jsonl")
        assert {"eval/accuracy", "eval/loss", "train/loss"} <= line.keys()
        assert (folder / "model" / "README.md").exists()
    weights = [load_file(folder / "model" / "model.safetensors") for folder in folders]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, atol=1e-3, rtol=1e-3)
    assert results[1]["test/loss"] == pytest.approx(results[0]["test/loss"], abs=1e-4)
    (folders[0] / "results.json").unlink()  # as if it had been killed then: nothing is solved again
    done = run("train.py", *flags, *SOLVED, "--output_dir", folders[0], env=env)
    assert "head on" not in done.stdout
    assert {key: value for key, value in results_of(done).items() if key[:5] in ("test/", "eval/")} == {
        key: value for key, value in results[0].items() if key[:5] in ("test/", "eval/")
    }


def test_size_that_fits_in_memory_is_learned_while_vectors_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = build_experiment(settings(any_classifier("bert", tmp_path / "model"), tmp_path), Accelerator(cpu=True))
    read, sizes = solver.Head.vectors, []

    def short_of_memory(head: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        sizes.append(len(inputs["input_ids"]))
        if len(sizes) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return read(head, inputs)

    monkeypatch.setattr(solver.Head, "vectors", short_of_memory)
    solve_head(experiment.learner, experiment.batches, METRICS)
    assert len(sizes) > 2
    assert experiment.learner.state.eval_batch_size == 2
