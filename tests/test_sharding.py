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

from lib.run.checkpoint import list_checkpoints
from tests.conftest import WORKER_ENV, Command, read_lines
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
    "qwen2": {"num_key_value_heads": 1},
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
    """A classifier of an architecture without dropout."""
    path = folder / kind
    if not path.exists():
        save_classifier(kind, path, num_labels=3, **ARCHITECTURES[kind], **WITHOUT_DROPOUT)
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
    flags = ["--model", str(tiny(folder, "roberta"))]
    cases = [
        {"name": "whole", "engine": "plain", "flags": flags, "sizes": [1, 5, 19]},
        {"name": "shards", "flags": flags, "sizes": [1, 5, 19]},
        {"name": "mean", "flags": flags, "sizes": [19], "broken": "mean"},
        {"name": "whole bf16", "engine": "plain", "precision": "bf16", "flags": flags, "sizes": [19]},
        {"name": "shards bf16", "precision": "bf16", "flags": flags, "sizes": [19]},
    ]
    found = train("fsdp-2", cases)
    for size in (1, 5, 19):
        assert same(found["whole", size], found["shards", size]), size
    assert not same(found["whole", 19], found["mean", 19])
    assert found["whole bf16", 19]["losses"] == found["shards bf16", 19]["losses"] != found["shards", 19]["losses"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fsdp-2", "fsdp-3", "hsdp-4"])
def test_every_architecture_and_method_is_trained_in_shards_as_by_one_process(
    train: Train, folder: Path, name: str
) -> None:
    models = {kind: ["--model", str(tiny(folder, kind))] for kind in ARCHITECTURES}
    methods = {method: [*models["roberta"], *flags] for method, flags in VARIANTS.items()}
    methods |= {f"gpt2 {method}": [*models["gpt2"], *VARIANTS[method]] for method in ("freeze", "lora")}
    cases: list[dict[str, Any]] = [
        {"name": case, "flags": flags, "sizes": [19] if case != "roberta" else [1, 5, 19, 40]}
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
    model, flags = tiny(folder, "roberta"), ["--adam_epsilon", "1e-2", "--epochs", "1"]
    engines: dict[str, tuple[dict[str, Any], str | None]] = {
        "one": ({"processes": 1}, None),
        "plain-2": ({"processes": 2, "config": "fsdp2.yaml"}, "plain"),
        "fsdp-2": ({"processes": 2, "config": "fsdp2.yaml"}, None),
        "plain-3": ({"processes": 3, "config": "fsdp2.yaml"}, "plain"),
        "fsdp-3": ({"processes": 3, "config": "fsdp2.yaml"}, None),
        "fsdp-4": ({"processes": 4, "config": "hsdp.yaml"}, "fsdp"),
        "hsdp-4": ({"processes": 4, "config": "hsdp.yaml"}, None),
    }
    launches = [
        options
        for index, (options, _) in enumerate(engines.values())
        if options not in [other for other, _ in list(engines.values())[:index]]
    ]

    def names(options: dict[str, Any]) -> list[str]:
        return [name for name, (other, _) in engines.items() if other == options]

    for options in launches:
        calls = [
            {"folder": f"{name}/{kind}", "flags": flags, "engine": engines[name][1]} | stop
            for name in names(options)
            for kind, stop in (("whole", {}), ("stopped", {"stop": 3}))
        ]
        play(run, tmp_path, model, calls, **options)
    for options in launches:
        calls = []
        for name in names(options):
            for before in engines:
                shutil.copytree(tmp_path / before / "stopped", tmp_path / name / f"after-{before}")
                calls.append({"folder": f"{name}/after-{before}", "flags": flags, "engine": engines[name][1]})
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
