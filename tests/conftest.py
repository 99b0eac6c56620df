"""Tiny models, tiny files, and the scripts: as commands with timeouts, or in the process of the test."""

import contextlib
import functools
import importlib
import io
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import get_type_hints
from unittest import mock

import pytest

ROOT = Path(__file__).resolve().parent.parent
WORKER_ENV = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
"""Environment of the scripts in tests/workers."""

os.environ["WANDB_MODE"] = "offline"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"
# Threads that wait for each other sleep: spinning takes the cores from the tests that run at the same time.
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
# The libraries read these when they are imported: the tests keep their caches away from the user's.
CACHE = tempfile.TemporaryDirectory(prefix="finetune-tests-")
os.environ["HF_DATASETS_CACHE"] = f"{CACHE.name}/datasets"
os.environ["HF_MODULES_CACHE"] = f"{CACHE.name}/modules"

WORDS = [
    *("a", "an", "the", "film", "movie", "plot", "story", "actor", "scene", "was", "is", "felt"),
    *("very", "quite", "not", "good", "great", "fine", "dull", "bad", "awful"),
]


def sentences(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """(text, label) pairs of made-up reviews of 3 to 17 words, with three classes that their words tell."""
    import random

    rng = random.Random(seed)
    cues = {"bad": ["dull", "bad", "awful"], "good": ["good", "great", "fine"], "mixed": ["quite", "not", "very"]}
    rows = []
    for index in range(count):
        label = ("bad", "good", "mixed")[index % 3]
        words = [rng.choice(WORDS[:12]) for _ in range(rng.randint(2, 14))] + [rng.choice(cues[label]), str(index)]
        rng.shuffle(words)
        rows.append((" ".join(words), label))
    return rows


def write_csv(path: Path, rows: Sequence[Sequence[str]], header: Sequence[str] = ("text", "label")) -> Path:
    import csv

    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
    return path


def tiny_tokenizer(folder: Path) -> None:
    """A word-level tokenizer over the words of `sentences`, saved to `folder`."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    vocabulary = {word: number for number, word in enumerate([*special, *WORDS, *map(str, range(64))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    names = {"bos_token": "<s>", "eos_token": "</s>", "cls_token": "<s>", "sep_token": "</s>"}
    names |= {"pad_token": "<pad>", "unk_token": "<unk>", "mask_token": "<mask>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **names).save_pretrained(folder)


def tiny_roberta(folder: Path, dropout: float = 0.1, **settings: object) -> Path:
    """A RoBERTa of two layers with random weights and a tokenizer, saved to `folder` as a pretrained model."""
    import torch
    from transformers import RobertaConfig, RobertaModel

    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=128,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=80,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
        **settings,
    )
    RobertaModel(config, add_pooling_layer=False).save_pretrained(folder)
    tiny_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def roberta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_roberta(tmp_path_factory.mktemp("roberta"))


@pytest.fixture(scope="session")
def roberta_without_dropout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Larger weights: with the usual 0.02 all texts look alike to so small a model, and tolerances would be empty.
    return tiny_roberta(tmp_path_factory.mktemp("roberta_without_dropout"), dropout=0.0, initializer_range=0.3)


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Empty caches, no token, and a process that may ask the Hub."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    settled = ("ENDPOINT", "HUGGINGFACE_CO_URL_TEMPLATE", "HF_HUB_DISABLE_IMPLICIT_TOKEN", "DOWNLOAD_CHUNK_SIZE")
    for name in settled:
        monkeypatch.setattr(constants, name, getattr(constants, name))  # restored, whatever a test settles
    for name in ("OFFLINE", "CACHE", "DISABLE_IMPLICIT_TOKEN", "DISABLE_XET"):
        monkeypatch.setenv(f"HF_HUB_{name}", "")
        monkeypatch.delenv(f"HF_HUB_{name}")
    for name in ("HF_ENDPOINT", "HF_TOKEN"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "tables"))


@pytest.fixture
def served(roberta: Path, tmp_path: Path) -> Path:
    """A Hub's repositories: user/tiny and SetFit/sst5."""
    import shutil

    from tests.hub_layouts import write_sst5

    shutil.copytree(roberta, tmp_path / "served" / "models" / "user" / "tiny")
    write_sst5(tmp_path / "served" / "datasets" / "SetFit" / "sst5")
    return tmp_path / "served"


@pytest.fixture
def sockets(monkeypatch: pytest.MonkeyPatch) -> list:
    """Every address that somebody connects to or looks up; no connection is made."""
    import socket

    asked: list = []

    def refuse(*arguments: object, **_: object) -> None:
        asked.append(arguments)
        raise OSError("no network in this test")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    return asked


Command = Callable[..., subprocess.CompletedProcess]


def launch(
    script: object,
    *flags: object,
    cwd: Path,
    processes: int | None = None,
    code: int = 0,
    timeout: int = 150,
    env: dict[str, str] | None = None,
    stdin: str | None = None,
    config: str | None = None,
) -> subprocess.CompletedProcess:
    """Run a script of the project, or any Python file, as users do, and check its exit code.

    Without `processes` it runs under plain Python, since `accelerate launch` turns every failure into code 1. `config` is a
    file of accelerate_configs and further flags of the launcher.
    """
    command = [sys.executable]
    if processes:
        command += ["-m", "accelerate.commands.launch", "--num_processes", str(processes)]
        if config:
            name, *more = config.split()
            command += ["--config_file", str(ROOT / "accelerate_configs" / name), *more]
        elif processes > 1:
            command += ["--multi_gpu", "--main_process_port", "0"]
    path = ROOT / str(script) if (ROOT / str(script)).exists() else Path(str(script))
    done = subprocess.run(
        [*command, str(path), *map(str, flags)],
        cwd=cwd,
        env=os.environ | {"ACCELERATE_USE_CPU": "true"} | (env or {}),
        capture_output=True,
        text=True,
        timeout=timeout,
        **({"stdin": subprocess.DEVNULL} if stdin is None else {"input": stdin}),
    )
    assert done.returncode == code, f"exit code {done.returncode}, not {code}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture
def run(tmp_path: Path) -> Command:
    """`run("train.py", "--lr", "1e-3", processes=2)`: `launch` in the folder of the test."""
    return functools.partial(launch, cwd=tmp_path)


def call_script(script: str, *flags: object, cwd: Path, code: int = 0) -> subprocess.CompletedProcess:
    """main() of a script in this process: its exit code and what it printed, as a command would give them.

    A new process takes seconds to import the libraries; use `run` where the process itself is tested.
    """
    from accelerate.state import AcceleratorState

    from lib.config.cli import parse_cli
    from lib.errors import UserError

    main = importlib.import_module(script.removesuffix(".py")).main
    out, err, returned = io.StringIO(), io.StringIO(), 0
    with (
        contextlib.chdir(cwd),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch.dict(os.environ, {"ACCELERATE_USE_CPU": "true"}),
    ):
        AcceleratorState._reset_state(reset_partial_state=True)  # else the precision of the first call stays
        try:
            main(parse_cli(get_type_hints(main)["config"], list(map(str, flags))))
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            returned = 2
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
    done = subprocess.CompletedProcess([script, *flags], returned, out.getvalue(), err.getvalue())
    assert returned == code, f"code {returned}, not {code}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture
def call(tmp_path: Path) -> Command:
    """`call_script` in the folder of the test."""
    return functools.partial(call_script, cwd=tmp_path)


def results_of(done: subprocess.CompletedProcess) -> dict:
    """The JSON object that a script prints as its last line."""
    return json.loads(done.stdout.strip().splitlines()[-1])


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
