"""Scripts import only what they need, when they need it, and print a user's mistake once."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from lib.errors import UserError
from lib.runtime import startup
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
        "found = all(importlib.import_module(name).__file__ for name in UNUSED)\n"
        "from transformers.utils import is_peft_available\n"
        "from transformers import Trainer\n"
        "print(early, found, is_peft_available())\n"
    )
    assert last_line(run(script, env={"PYTHONPATH": str(ROOT)}).stdout) == "[] True False"


@pytest.mark.slow
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


@pytest.mark.slow
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


class Ended(BaseException):
    """Stands for the end of the process with a code."""


def leave(message: str, code: int) -> None:
    raise Ended(code)


@pytest.fixture
def end(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Code and error output of a script whose `main` raises an error, as a process with the given environment."""
    monkeypatch.setattr(startup, "leave", leave)
    monkeypatch.setattr(startup, "AT_FAILURE", [])
    monkeypatch.setattr(startup.REQUEST, "ending", False)
    monkeypatch.setattr(startup.REQUEST, "asked", False)

    def call(raised: BaseException, **environment: str) -> tuple[int, str]:
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)

        def main(_: object) -> None:
            raise raised

        with pytest.raises(Ended) as ended:
            run_script(main, None)
        return ended.value.args[0], capsys.readouterr().err

    return call


End = Callable[..., tuple[int, str]]
SECOND = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}


def test_mistakes_and_stops_end_the_process_with_their_code_and_without_a_trace(end: End) -> None:
    assert end(UserError("no x")) == (2, "error: no x\n")
    code, printed = end(Stopped("SIGTERM"))
    assert (code, printed.startswith("SIGTERM: saved")) == (EXIT_RESUME, True)
    code, printed = end(KeyboardInterrupt())
    assert (code, "Traceback" in printed) == (130, False)


def test_stop_which_all_processes_agreed_on_is_printed_by_the_first(end: End) -> None:
    assert end(Stopped("SIGTERM"), **SECOND) == (EXIT_RESUME, "")


def test_mistake_on_one_process_alone_is_printed_with_its_number(end: End) -> None:
    assert end(UserError("no x"), **SECOND) == (2, "error: process 1 of 2: no x\n")


def test_mistake_that_an_earlier_process_has_printed_is_not_printed_again(
    end: End, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The launcher ends the others when one has ended."""
    monkeypatch.setattr("time.sleep", lambda _: setattr(startup.REQUEST, "asked", True))
    assert end(UserError("no x"), **SECOND) == (2, "")


def test_process_that_only_lost_its_connection_leaves_the_word_to_the_one_that_failed(
    end: End, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = RuntimeError("[gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer")
    monkeypatch.setattr("time.sleep", lambda _: setattr(startup.REQUEST, "asked", True))
    assert end(lost, RANK="0", WORLD_SIZE="2") == (1, "")


def test_bug_keeps_its_trace_without_secrets(end: End) -> None:
    code, printed = end(ZeroDivisionError("https://user:pass-word1@host"))
    assert code == 1
    assert "Traceback" in printed
    assert "ZeroDivisionError: https://***@host" in printed
    assert "process 1 of 2" in end(ZeroDivisionError(), **SECOND)[1]


def test_what_is_registered_for_a_failure_cannot_prevent_the_end(end: End) -> None:
    called = []

    def fail(error: BaseException) -> None:
        called.append(error)
        raise OSError

    startup.AT_FAILURE.extend([fail, fail])
    assert end(UserError("no x")) == (2, "error: no x\n")
    assert len(called) == 2


def test_message_with_names_of_users_moves_no_cursor(end: End) -> None:
    _, printed = end(UserError("classes: a\tb, \x1b[31mred, 正面\n  next line"))
    assert printed == "error: classes: a\\tb, \\x1b[31mred, 正面\n    next line\n"


@pytest.mark.parametrize("raised", [UserError("no x"), Stopped("SIGTERM"), KeyboardInterrupt(), ValueError("bug")])
def test_what_was_printed_is_in_the_file_before_the_process_ends(
    raised: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: End
) -> None:
    printed = []
    monkeypatch.setattr(startup, "leave", lambda *_: printed.append((tmp_path / "out").read_text()) or leave("", 0))
    with (tmp_path / "out").open("w") as file:  # buffered, as standard output into a file or a pipe is
        monkeypatch.setattr("sys.stdout", file)
        print("step 1", file=file)
        end(raised)
    assert printed[0] == "step 1\n"
