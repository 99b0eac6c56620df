"""Scripts import only what they need, when they need it, and print a user's mistake once."""

import os
import re

import pytest

from lib.config.sections import ModelConfig
from lib.errors import UserError
from lib.runtime.signals import EXIT_RESUME, Stopped
from lib.runtime.startup import run_script
from tests.conftest import ROOT, Command, sentences, write_csv


def imported(stderr: str) -> set[str]:
    """Top-level packages in the import log that Python writes."""
    return {name.split(".")[0] for name in re.findall(r"import time:.*\|\s+(\S+)", stderr)}


def test_first_step_comes_before_packages_that_it_does_not_use(run: Command, roberta, tmp_path):
    train = write_csv(tmp_path / "train.csv", sentences(30))
    flags = ["--model", roberta, "--train_file", train, "--max_steps", 1, "--logging_steps", 1, "--report_to", "none"]
    done = run("train.py", *flags, env={"PYTHONPROFILEIMPORTTIME": "1"})
    start, end = done.stderr.split("step 1/1 ")
    late = {"evaluate", "sklearn", "scipy", "matplotlib"}
    assert {"torch", "transformers", "accelerate", "tyro"} <= imported(start)
    assert not imported(start) & (late | {"wandb", "peft", "onnx", "onnxruntime", "tensorboard", "trackio"})
    assert late <= imported(end)


def test_packages_hidden_from_transformers_can_be_imported_afterwards(run: Command, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from lib.runtime.startup import UNUSED\n"
        "import sys, importlib\n"
        "early = sorted(set(UNUSED) & set(sys.modules))\n"
        "found = [bool(importlib.import_module(name).__file__) for name in UNUSED]\n"
        "from transformers.utils import is_peft_available\n"
        "from transformers import Trainer\n"
        "print(early, found, is_peft_available())\n"
    )
    assert last_line(run(script, env={"PYTHONPATH": str(ROOT)}).stdout) == "[] [True, True] False"


def test_garbage_is_not_collected_during_imports(run: Command, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import gc, sys\n"
        "seen = []\n"
        "gc.callbacks.append(lambda phase, info: seen.append(phase) if 'torch' in sys.modules else None)\n"
        "import lib.runtime.startup\n"
        "during, kept, on = len(seen), gc.get_freeze_count(), gc.isenabled()\n"
        "gc.collect()\n"
        "print(during, kept > 100_000, on, len(seen) > during)\n"
    )
    assert last_line(run(script, env={"PYTHONPATH": str(ROOT)}).stdout) == "0 True True True"


def test_nothing_is_hidden_from_a_program_that_imported_transformers_before(run: Command, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import transformers.utils\n"
        "with_scipy = transformers.utils.is_scipy_available()\n"
        "import lib.runtime.startup\n"
        "from transformers import Trainer, PreTrainedModel\n"
        "print(with_scipy, Trainer.__name__, PreTrainedModel.__name__)\n"
    )
    assert last_line(run(script, env={"PYTHONPATH": str(ROOT)}).stdout) == "True Trainer PreTrainedModel"


def last_line(text: str) -> str:
    """What a script prints last; W&B prints a line of its own before it."""
    return text.splitlines()[-1]


@pytest.mark.parametrize(("rank", "printed"), [(None, 1), ("0", 1), ("1", 0)])
@pytest.mark.parametrize(
    ("raised", "code", "line"),
    [(UserError("no x"), 2, "error: no x\n"), (Stopped("SIGTERM"), EXIT_RESUME, "SIGTERM: saved")],
)
def test_mistakes_and_stops_end_every_process_with_their_code_and_are_printed_once(
    rank: str | None,
    printed: int,
    raised: Exception,
    code: int,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    def main(_: ModelConfig) -> None:
        raise raised

    def leave(code: int) -> None:
        raise SystemExit(code)

    if rank:
        monkeypatch.setenv("RANK", rank)
    else:
        monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(SystemExit) as ended:
        run_script(main, ModelConfig())
    assert ended.value.code == code
    assert capsys.readouterr().err.count(line) == printed


def test_bug_keeps_its_trace() -> None:
    def main(_: ModelConfig) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_script(main, ModelConfig())


def test_message_with_names_of_users_moves_no_cursor(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(_: ModelConfig) -> None:
        raise UserError("classes: a\tb, \x1b[31mred, 正面\n  next line")

    def leave(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(SystemExit):
        run_script(main, ModelConfig())
    assert capsys.readouterr().err == "error: classes: a\\tb, \\x1b[31mred, 正面\n  next line\n"
