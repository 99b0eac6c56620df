"""The laws of a model in shards (FSDP2, HSDP): the numbers, checkpoints and results of one process, by the real launcher."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from lib.config.cli import parse_cli
from lib.config.train import TrainConfig
from lib.errors import UserError
from lib.evaluation import padding as padding_check
from lib.model import padding
from lib.model.build import check_trainable
from lib.model.sharding import shard_model
from lib.run.checkpoint import list_checkpoints
from lib.runtime import accelerator
from lib.runtime.atomic import find_damage
from lib.runtime.launch_checks import Sharding
from tests.conftest import WORKER_ENV, Command, read_lines, results_of, sentences, write_csv
from tests.resuming import differences, play
from tests.tiny_models import plain_tokenizer, save_classifier

LAUNCHES = {
    "one": {},
    "fsdp-2": {"processes": 2, "config": "fsdp2.yaml"},
    "fsdp-3": {"processes": 3, "config": "fsdp2.yaml"},
    "hsdp-4": {"processes": 4, "config": "hsdp.yaml"},
}
"""Launches by their names; the one with replicas also runs with shards only."""

WITHOUT_DROPOUT = dict.fromkeys(
    [
        *("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout", "dropout", "attention_dropout"),
        *("seq_classif_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "summary_first_dropout", "pooler_dropout"),
        *("embedding_dropout", "mlp_dropout"),
    ],
    0.0,
)
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "bert": {},
    "roberta": {},
    "deberta-v2": {},
    "modernbert": {"global_attn_every_n_layers": 2, "local_attention": 4, "cls_token_id": 0, "sep_token_id": 2},
    "electra": {},
    "distilbert": {},
    "gpt2": {},
    "llama": {"num_key_value_heads": 1},
    "qwen2": {"num_key_value_heads": 1, "pad_token_id": None},  # as published: its tokenizer knows it
    "qwen3": {"num_key_value_heads": 1, "head_dim": 8},
}
VARIANTS = {
    "freeze": ["--freeze", "1"],
    "freeze backbone": ["--freeze", "backbone"],
    "lora": ["--adapter", "lora"],
    "dora": ["--adapter", "dora"],
    "prefix": ["--adapter", "prefix"],
    "bottleneck": ["--adapter", "bottleneck"],
    "rates": ["--layerwise_lr_decay", "0.5", "--head_learning_rate", "2e-2", "--class_weights", "bad=4", "mixed=0.5"],
    "checkpointing": ["--gradient_checkpointing", "True"],
    "windows": ["--max_length", "8", "--window_stride", "2"],
}
"""Flags by their names; all but one change what is learned."""

AVERAGED = ["--average_checkpoints", "3", "--metric_for_best_model", "loss", "--save_steps", "1", "--epochs", "2"]
AVERAGED += ["--lr", "3e-2", "--lr_scheduler_type", "constant", "--adam_epsilon", "1e-2"]
"""Flags of a run of which a mean of weights is the best model."""

Results = dict[Any, Any]
Train = Callable[..., Results]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sharding")


@pytest.fixture
def train(run: Command, tmp_path: Path) -> Train:
    """`train("fsdp-2", cases)`: what tests/workers/sharded.py saves of the cases."""

    def call(name: str, cases: list[dict[str, Any]]) -> Results:
        plan, out = tmp_path / "plan.json", tmp_path / f"{name}.pt"
        plan.write_text(json.dumps(cases))
        run("tests/workers/sharded.py", plan, out, env=WORKER_ENV, timeout=500, **LAUNCHES[name])
        results = torch.load(out)
        assert results.pop("world_size") == LAUNCHES[name].get("processes", 1)
        assert (
            results.pop("sharding")
            == {
                "one": "None",
                "fsdp-2": "FSDP2: 2 shards",
                "fsdp-3": "FSDP2: 3 shards",
                "hsdp-4": "FSDP2: 2 shards x 2 replicas",
            }[name]
        )
        return results

    return call


def tiny(folder: Path, kind: str) -> Path:
    """A classifier of an architecture without dropout, whose weights do not amplify rounding as larger ones do."""
    path = folder / kind
    if not path.exists():
        settings = ARCHITECTURES.get(kind, {}) | WITHOUT_DROPOUT | {"initializer_range": 0.3}
        save_classifier(kind, path, num_labels=3, **settings)
        if kind in ("gpt2", "llama", "qwen2", "qwen3"):
            plain_tokenizer(path)
    return path


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two trainings have the same losses and weights to 1e-6, and the same gradient norms to 1e-5."""
    assert len(a["losses"]) == len(b["losses"]) > 0
    assert a["weights"].keys() == b["weights"].keys()
    return (
        np.allclose(a["losses"], b["losses"], atol=1e-6, rtol=1e-6)
        and np.allclose(a["norms"], b["norms"], atol=1e-5, rtol=1e-5)
        and all(torch.allclose(weight, b["weights"][name], atol=1e-6, rtol=0) for name, weight in a["weights"].items())
    )


def test_shards_give_the_losses_norms_and_weights_of_whole_models(train: Train, folder: Path) -> None:
    """Two processes with whole models give those of one, by the laws of test_laws.py."""
    flags, lora = ["--model", str(tiny(folder, "roberta"))], ["--adapter", "lora"]
    cases = [
        {"name": "whole", "engine": "plain", "flags": flags, "sizes": [1, 13, 19]},
        {"name": "shards", "flags": flags, "sizes": [1, 13, 19]},
        {"name": "mean", "flags": flags, "sizes": [19], "broken": "mean"},
        {"name": "whole bf16", "engine": "plain", "precision": "bf16", "flags": flags, "sizes": [19]},
        {"name": "shards bf16", "precision": "bf16", "flags": flags, "sizes": [19]},
        {"name": "whole layers", "reshard": "false", "flags": flags, "sizes": [19]},
        {"name": "whole lora", "engine": "plain", "precision": "bf16", "flags": [*flags, *lora], "sizes": [19]},
        {"name": "shards lora", "precision": "bf16", "flags": [*flags, *lora], "sizes": [19]},
    ]
    found = train("fsdp-2", cases)
    for size in (1, 13, 19):  # of 13, one process has three micro-batches and the other two
        assert same(found["whole", size], found["shards", size]), size
    assert not same(found["whole", 19], found["mean", 19])
    assert same(found["whole", 19], found["whole layers", 19])
    assert (found["shards", 19]["freed"], found["whole layers", 19]["freed"]) == (True, False)
    assert found["whole bf16", 19]["losses"] == found["shards bf16", 19]["losses"] != found["shards", 19]["losses"]
    assert found["whole lora", 19]["losses"] == found["shards lora", 19]["losses"]
    assert "not counted" in found["shards", 19]["memory"]
    half = sum(weight.nbytes for weight in found["whole", 19]["weights"].values()) / 2
    assert half <= found["shards", 19]["held"] <= 1.1 * half


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fsdp-2", "fsdp-3", "hsdp-4"])
def test_every_architecture_and_method_is_trained_in_shards_as_by_one_process(
    train: Train, folder: Path, name: str
) -> None:
    models = {kind: ["--model", str(tiny(folder, kind))] for kind in ARCHITECTURES}
    methods = {method: [*models["roberta"], *flags] for method, flags in VARIANTS.items()}
    methods |= {f"gpt2 {method}": [*models["gpt2"], *VARIANTS[method]] for method in ("freeze", "lora")}
    cases: list[dict[str, Any]] = [
        {"name": case, "flags": flags, "sizes": [19] if case != "roberta" else [1, 5, 13, 19, 40]}
        for case, flags in (models | methods).items()
    ]
    reference, found = train("one", cases), train(name, cases)
    assert [key for key in reference if not same(reference[key], found[key])] == []
    assert len({tuple(result["losses"]) for (_, size), result in found.items() if size == 19}) == len(cases) - 1
    if name == "hsdp-4":
        more = [{"name": "shards", "engine": "fsdp", "flags": models["bert"], "sizes": [19]}]
        more += [{"name": "norm", "broken": "norm", "flags": models["bert"], "sizes": [19]}]
        found = train(name, [*cases[:1], *more])
        assert same(reference["bert", 19], found["shards", 19])
        assert not same(reference["bert", 19], found["norm", 19])


@pytest.mark.slow
def test_checkpoint_of_any_engine_and_number_of_processes_is_resumed_by_any_other(
    run: Command, tmp_path: Path, folder: Path
) -> None:
    """A name with `parts` is of a model in shards that is saved in parts, as large ones are."""
    model, flags = tiny(folder, "roberta"), ["--adam_epsilon", "1e-2", "--epochs", "1"]
    engines: dict[str, tuple[dict[str, Any], str | None]] = {
        "one": ({"processes": 1}, None),
        "plain-2": ({"processes": 2, "config": "fsdp2.yaml"}, "plain"),
        "fsdp-2": ({"processes": 2, "config": "fsdp2.yaml"}, None),
        "parts-2": ({"processes": 2, "config": "fsdp2.yaml"}, None),
        "plain-3": ({"processes": 3, "config": "fsdp2.yaml"}, "plain"),
        "fsdp-3": ({"processes": 3, "config": "fsdp2.yaml"}, None),
        "parts-3": ({"processes": 3, "config": "fsdp2.yaml"}, None),
        "fsdp-4": ({"processes": 4, "config": "hsdp.yaml"}, "fsdp"),
        "hsdp-4": ({"processes": 4, "config": "hsdp.yaml"}, None),
        "hsdp-parts-4": ({"processes": 4, "config": "hsdp.yaml"}, None),
    }
    launches = [
        options
        for index, (options, _) in enumerate(engines.values())
        if options not in [other for other, _ in list(engines.values())[:index]]
    ]

    def names(options: dict[str, Any]) -> list[str]:
        return [name for name, (other, _) in engines.items() if other == options]

    def made(name: str, kind: str) -> dict[str, Any]:
        return {
            "folder": f"{name}/{kind}",
            "flags": flags,
            "engine": engines[name][1],
            "parts": "parts" in name,
        }

    for options in launches:
        calls = [
            made(name, kind) | stop
            for name in names(options)
            for kind, stop in (("whole", {}), ("stopped", {"stop": 3}))
        ]
        play(run, tmp_path, model, calls, **options)
    for options in launches:
        calls = []
        for name in names(options):
            for before in engines:
                shutil.copytree(tmp_path / before / "stopped", tmp_path / name / f"after-{before}")
                calls.append(made(name, f"after-{before}"))
        play(run, tmp_path, model, calls, **options)
    whole = tmp_path / "one" / "whole"
    lines, weights = read_lines(whole / "metrics.jsonl"), load_file(whole / "model" / "model.safetensors")
    for name in engines:
        assert not differences(tmp_path / name / "whole", tmp_path / name / f"after-{name}"), name
        for before in engines:
            after = tmp_path / name / f"after-{before}"
            others = read_lines(after / "metrics.jsonl")
            assert [line["step"] for line in others] == [line["step"] for line in lines], after
            for a, b in zip(lines, others, strict=True):
                for key in ("train/loss", "eval/loss"):
                    assert b.get(key) == pytest.approx(a.get(key), abs=1e-6), after
            for file, wanted in load_file(after / "model" / "model.safetensors").items():
                torch.testing.assert_close(wanted, weights[file], atol=1e-6, rtol=0)


def gathered(folder: Path, run: str) -> list[int]:
    """How many tensors each process gathered while it saved and loaded checkpoints in the last call of a run."""
    return [int(file.read_text()) for file in sorted(folder.glob(f"{run}.gathered-*"))]


@pytest.mark.slow
def test_run_whose_shards_are_saved_in_parts_resumes_bit_by_bit_and_no_process_gathers_them(
    run: Command, roberta: Path, tmp_path: Path
) -> None:
    kinds = {"all": [], "frozen": ["--freeze", "1"], "lora": ["--adapter", "lora"], "averaged": AVERAGED}
    kinds["thread"] = ["--async_save", "True"]
    calls: list[dict[str, Any]] = [{"folder": "plain", "flags": ["--epochs", "1"]}]
    for kind, flags in kinds.items():
        call = {"flags": ["--epochs", "1", "--save_steps", "1", *flags], "parts": True}
        calls += [call | {"folder": f"{kind}-whole"}]
        calls += [call | {"folder": f"{kind}-stopped"} | stop for stop in ({"stop": 4}, {})]
    whole = calls[1]
    calls += [whole | {"folder": "broken", "stop": 4}, whole | {"folder": "broken", "broken": "dropout"}]
    calls += [whole | {"folder": "small", "export": 8192}]
    play(run, tmp_path, roberta, calls, 2, "fsdp2.yaml")
    assert min(gathered(tmp_path, "plain")) > 0  # the count would tell
    for kind in kinds:
        whole, stopped = tmp_path / f"{kind}-whole", tmp_path / f"{kind}-stopped"
        assert not differences(whole, stopped), kind
        assert gathered(tmp_path, whole.name) == gathered(tmp_path, stopped.name) == [0, 0], kind
        (checkpoint,) = list_checkpoints(whole / "checkpoints")
        assert find_damage(checkpoint) is None
        found = {path.name for path in checkpoint.iterdir() if path.suffix != ".json"}
        frozen = {"frozen.shards"} if kind == "frozen" else set()
        kept = {"ingredients"} if kind == "averaged" else set()
        assert found == {"best", "model.shards", "optimizer.pt", "optimizer.shards"} | frozen | kept, kind
    assert not differences(tmp_path / "all-whole", tmp_path / "thread-whole")
    assert differences(tmp_path / "all-whole", tmp_path / "broken")
    files = {path.name for path in (tmp_path / "small" / "model").glob("*.safetensors*")}
    assert files == {"model.safetensors.index.json"} | {f"model-{n:05d}-of-00005.safetensors" for n in range(1, 6)}
    weights, small = (
        AutoModelForSequenceClassification.from_pretrained(tmp_path / name / "model").state_dict()
        for name in ("all-whole", "small")
    )
    assert weights.keys() == small.keys()
    assert all(torch.equal(weight, small[name]) for name, weight in weights.items())


@pytest.mark.slow
def test_error_of_the_disk_of_one_process_ends_the_run_with_one_message_and_leaves_no_checkpoint_in_parts(
    run: Command, folder: Path, tmp_path: Path
) -> None:
    flags = [*train_flags(tiny(folder, "roberta"), tmp_path, "full"), "--save_steps", 2, "--max_steps", 3]
    fault = json.dumps({"parts": True, "file_bytes": 60_000, "rank": 1})
    options: dict[str, Any] = {"processes": 2, "config": "fsdp2.yaml", "env": WORKER_ENV}
    done = run("tests/workers/faulty.py", fault, *flags, code=1, **options)
    told = "the checkpoint of step 2 could not be saved"
    assert done.stderr.count(told) == 1
    assert "exitcode  : 2" in done.stderr
    checkpoints = tmp_path / "outputs" / "full" / "checkpoints"
    assert list(checkpoints.iterdir()) == []
    run("tests/workers/faulty.py", json.dumps({"parts": True}), *flags, **options)
    saved = list_checkpoints(checkpoints)
    assert saved
    for checkpoint in saved:
        assert find_damage(checkpoint) is None
        assert (checkpoint / "model.shards").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("parts", [False, True])
def test_means_of_weights_in_shards_are_those_of_one_process(
    run: Command, folder: Path, tmp_path: Path, parts: bool
) -> None:
    model = tiny(folder, "roberta")
    play(run, tmp_path, model, [{"folder": "one", "flags": AVERAGED}], 1)
    call = {"flags": AVERAGED, "parts": parts}
    calls = [call | {"folder": "shards"}, call | {"folder": "resumed", "stop": 8}, call | {"folder": "resumed"}]
    play(run, tmp_path, model, calls, 2, "fsdp2.yaml")
    assert not differences(tmp_path / "shards", tmp_path / "resumed")
    one, shards = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "shards"))
    assert len(one["averaged_steps"]) > 1
    assert one["averaged_steps"] == shards["averaged_steps"]
    assert shards["test/loss"] == pytest.approx(one["test/loss"], abs=1e-6)
    weights = [load_file(tmp_path / name / "model" / "model.safetensors") for name in ("one", "shards")]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, atol=1e-6, rtol=0)


@pytest.mark.slow
def test_shards_without_as_many_micro_batches_on_every_process_wait_in_vain(run: Command, folder: Path) -> None:
    """Of 13 samples one process has three micro-batches and the other two; with `pad` the run equals others, see above."""
    plan = folder / "plan.json"
    flags = ["--model", str(tiny(folder, "roberta"))]
    plan.write_text(json.dumps([{"name": "pad", "broken": "pad", "flags": flags, "sizes": [13]}]))
    done = run("tests/workers/sharded.py", plan, folder / "pad.pt", env=WORKER_ENV, code=1, **LAUNCHES["fsdp-2"])
    assert "SIGALRM" in done.stderr
    assert not (folder / "pad.pt").exists()


@pytest.mark.slow
def test_run_in_shards_is_resumed_bit_by_bit(run: Command, roberta: Path, tmp_path: Path) -> None:
    calls: list[dict[str, Any]] = [{"folder": "whole"}, {"folder": "stopped", "stop": 5}, {"folder": "stopped"}]
    play(run, tmp_path, roberta, [call | {"flags": ["--epochs", "1"]} for call in calls], 2, "fsdp2.yaml")
    assert not differences(tmp_path / "whole", tmp_path / "stopped")


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--freeze", "1"], ["--adapter", "lora"], ["--adapter", "bottleneck"]])
def test_run_in_shards_with_dropout_resumes_bit_by_bit(
    run: Command, roberta: Path, tmp_path: Path, flags: list[str]
) -> None:
    calls: list[dict[str, Any]] = [{"folder": "whole", "flags": flags}]
    for step in (1, 5, 7):
        calls += [
            {"folder": f"after-{step}", "stop": step, "flags": flags},
            {"folder": f"after-{step}", "flags": flags},
        ]
    calls += [
        {"folder": "broken", "stop": 5, "flags": flags},
        {"folder": "broken", "broken": "dropout", "flags": flags},
    ]
    play(run, tmp_path, roberta, calls, 2, "fsdp2.yaml")
    state = json.loads((list_checkpoints(tmp_path / "whole" / "checkpoints")[0] / "state.json").read_text())
    assert state["settings"]["run/sharding"] == "FSDP2: 2 shards"
    for call in calls[1:]:
        assert bool(differences(tmp_path / "whole", tmp_path / call["folder"])) == (call["folder"] == "broken")


@pytest.mark.slow
@pytest.mark.parametrize("restarts", [0, 1])
def test_process_out_of_memory_ends_the_run_whose_next_start_goes_on_in_smaller_micro_batches(
    run: Command, call: Command, folder: Path, tmp_path: Path, restarts: int
) -> None:
    flags = train_flags(tiny(folder, "roberta"), tmp_path, "whole")
    call("train.py", *flags)
    fault = json.dumps({"do": "oom", "size": 2, "rank": 1, "step": 4, "once": str(tmp_path / "there")})
    flags += ["--run_name", "short", "--save_steps", 2]
    options: dict[str, Any] = {"processes": 2, "config": f"fsdp2.yaml --max_restarts {restarts}"}
    outputs, note = tmp_path / "outputs", tmp_path / "outputs" / "short" / "memory" / "1-micro_batch_positions.json"
    done = run("tests/workers/faulty.py", fault, *flags, env=WORKER_ENV, code=1 - restarts, **options)
    assert "out of memory" in done.stderr
    if not restarts:
        assert note.is_file()
        assert list_checkpoints(outputs / "short" / "checkpoints")[0].name == "step-2"
        done = run("train.py", *flags, env=WORKER_ENV, **options)
    assert "step 2" in done.stdout  # of the checkpoint that it goes on from
    assert not note.exists()
    (checkpoint, *_) = list_checkpoints(outputs / "short" / "checkpoints")
    assert json.loads((checkpoint / "state.json").read_text())["state"]["micro_batch_positions"] > 0
    np.testing.assert_allclose(losses_of(outputs / "short"), losses_of(outputs / "whole"), atol=1e-6, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("restarts", [0, 1])
def test_process_out_of_memory_in_evaluation_ends_the_run_whose_next_start_evaluates_in_smaller_batches(
    run: Command, call: Command, folder: Path, tmp_path: Path, restarts: int
) -> None:
    flags = train_flags(tiny(folder, "roberta"), tmp_path, "whole")
    call("train.py", *flags)
    fault = json.dumps({"do": "eval_oom", "size": 1, "rank": 1, "once": str(tmp_path / "there")})
    flags += ["--run_name", "short", "--save_steps", 2]
    options: dict[str, Any] = {"processes": 2, "config": f"fsdp2.yaml --max_restarts {restarts}"}
    outputs, note = tmp_path / "outputs", tmp_path / "outputs" / "short" / "memory" / "1-eval_batch_size.json"
    done = run("tests/workers/faulty.py", fault, *flags, env=WORKER_ENV, code=1 - restarts, **options)
    assert "--per_device_eval_batch_size" in done.stderr
    if not restarts:
        assert json.loads(note.read_text())["state"] == {"eval_batch_size": 6}
        assert list_checkpoints(outputs / "short" / "checkpoints")[0].name == "step-4"
        done = run("train.py", *flags, env=WORKER_ENV, **options)
    assert "out of memory before: at most 6 samples a forward" in done.stdout
    assert not note.exists()
    (checkpoint, *_) = list_checkpoints(outputs / "short" / "checkpoints")
    assert json.loads((checkpoint / "state.json").read_text())["state"]["eval_batch_size"] == 6
    np.testing.assert_allclose(losses_of(outputs / "short"), losses_of(outputs / "whole"), atol=1e-6, rtol=1e-6)
    one, two = (json.loads((outputs / name / "results.json").read_text()) for name in ("short", "whole"))
    assert one["test/loss"] == pytest.approx(two["test/loss"], abs=1e-6)


def losses_of(folder: Path) -> list[float]:
    return [line["train/loss"] for line in read_lines(folder / "metrics.jsonl")]


def train_flags(model: Path, folder: Path, name: str) -> list[Any]:
    flags: list[Any] = ["--model", model, "--run_name", name]
    for seed, (split, count) in enumerate((("train", 37), ("validation", 13), ("test", 11))):
        flags += [f"--{split}_file", write_csv(folder / f"{split}.csv", sentences(count, seed))]
    flags += ["--lr", "1e-2", "--adam_epsilon", "1e-2", "--bs", 8, "--epochs", 2, "--logging_steps", 1]
    return [*flags, "--mixed_precision", "no", "--report_to", "none"]


@pytest.mark.slow
def test_run_in_shards_leaves_what_a_run_of_one_process_leaves(
    run: Command, call: Command, folder: Path, tmp_path: Path
) -> None:
    model = tiny(folder, "roberta")
    flags = train_flags(model, tmp_path, "shards")
    run("train.py", *flags, "--max_steps", 3, env=WORKER_ENV, processes=2, config="fsdp2.yaml")
    call("train.py", *flags, "--max_steps", 3, "--run_name", "whole")
    whole, shards = (tmp_path / "outputs" / name for name in ("whole", "shards"))
    assert {path.name for path in (shards / "model").iterdir()} == {path.name for path in (whole / "model").iterdir()}
    configs = [json.loads((place / "model" / "config.json").read_text()) for place in (shards, whole)]
    temperatures = [config.pop("calibration_temperature") for config in configs]
    assert configs[0] == configs[1]
    assert temperatures[0] == pytest.approx(temperatures[1], rel=1e-4)
    weights = load_file(whole / "model" / "model.safetensors")
    found = load_file(shards / "model" / "model.safetensors")
    assert weights.keys() == found.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(found[name], weight, atol=1e-6, rtol=0)
    scores = results_of(call("eval.py", "--run", shards, "--report_to", "none"))
    wanted = json.loads((shards / "results.json").read_text())
    assert scores["test/loss"] == pytest.approx(wanted["test/loss"], abs=1e-6)


@pytest.mark.parametrize(
    ("kind", "flags", "words"),
    [
        ("roberta", "--head_solver lbfgs --freeze backbone", "--head_solver"),
        ("roberta", "--compile True", "--compile"),
        ("roberta", "--load_in 4bit --adapter lora", "--load_in"),
        ("opt", "", "opt.*multi_gpu"),
    ],
)
def test_what_does_not_go_with_shards_is_refused_by_name(
    folder: Path, monkeypatch: pytest.MonkeyPatch, kind: str, flags: str, words: str
) -> None:
    monkeypatch.setattr("lib.model.build.uses_gpu", lambda: True)  # --compile is refused on a CPU
    trained = parse_cli(TrainConfig, ["--model", str(tiny(folder, kind)), *flags.split()])
    check_trainable(trained)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=rf"(?s)FSDP.*{words}"):
        check_trainable(trained)


def test_fp16_and_shards_are_refused_by_name(
    call: Command, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on GPUs: on a CPU fp16 is refused before, for want of one."""
    flags = train_flags(tiny(folder, "roberta"), tmp_path, "fp16")
    monkeypatch.setattr(accelerator, "resolve_precision", lambda _: "fp16")
    for name, value in {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    done = call("train.py", *flags, code=2)
    assert "FSDP and fp16 do not go together" in done.stderr
    assert "--mixed_precision bf16" in done.stderr
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize("leak", padding.UNPADDED)
def test_model_that_needs_batches_without_padding_is_refused_in_shards_by_name(
    call: Command, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, leak: str
) -> None:
    flags = train_flags(tiny(folder, "roberta"), tmp_path, "leak")
    monkeypatch.setattr(padding_check, "find_leak", lambda *_: leak)
    monkeypatch.setattr(padding_check, "is_sharded", lambda _: True)
    done = call("train.py", *flags, code=2)
    assert "FSDP and roberta do not go together: padding changes its logits" in done.stderr
    assert "accelerate_configs/multi_gpu.yaml" in done.stderr
    assert not (tmp_path / "outputs").exists()


def test_lack_of_memory_in_shards_is_not_taken_for_a_length_that_the_model_does_not_take(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other processes would wait for this one's next forward."""
    model = AutoModelForSequenceClassification.from_pretrained(tiny(folder, "roberta"))

    def no_memory(*_: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(padding, "is_sharded", lambda _: True)
    monkeypatch.setattr(padding, "compute_logits", no_memory)
    with pytest.raises(torch.OutOfMemoryError):
        padding.find_leak(model, {}, {}, {})


def test_model_whose_layers_are_not_found_is_refused_by_name(folder: Path) -> None:
    save_classifier("albert", folder / "albert", num_labels=3, embedding_size=8)
    model = AutoModelForSequenceClassification.from_pretrained(folder / "albert")
    with pytest.raises(UserError, match="FSDP: AlbertModel"):
        shard_model(model, Sharding(2), torch.device("cpu"))
