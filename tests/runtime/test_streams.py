"""Printing ends no run, whatever becomes of terminal, pipe, disk and encoding."""

import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import ROOT

START = "import sys\nfrom lib.runtime.streams import keep_writing\n"
GOES_ON = "keep_writing()\nfor _ in range(3): print('out', flush=True); print('err', file=sys.stderr)\nsys.exit(7)\n"


def full_disk() -> int:
    return os.open("/dev/full", os.O_WRONLY)


def closed_pipe() -> int:
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def dead_terminal() -> int:
    master, slave = pty.openpty()
    os.close(master)
    return slave


def start(code: str, **options: object) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT), **options.pop("env", {})}  # type: ignore[dict-item]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return subprocess.run([sys.executable, "-c", START + code], env=environment, timeout=60, **streams)  # type: ignore[call-overload]


@pytest.mark.parametrize("broken", [full_disk, closed_pipe, dead_terminal])
@pytest.mark.parametrize("names", [("stdout",), ("stderr",), ("stdout", "stderr")])
def test_stream_that_cannot_be_written_is_said_once_on_the_other_and_the_script_goes_on(
    names: tuple[str, ...], broken: Callable[[], int]
) -> None:
    file = broken()
    done = start(GOES_ON, **dict.fromkeys(names, file))
    os.close(file)
    assert done.returncode == 7
    said = (done.stdout or b"") + (done.stderr or b"")
    assert said.count(b"cannot be written") == 2 - len(names)
    assert said.count(b"out\n" if names == ("stderr",) else b"err\n") == 3 * (2 - len(names))


def test_closed_streams_are_not_lent_to_files(tmp_path: Path) -> None:
    """The system gives the next file that is opened the lowest free number, and 2 is where errors are printed."""
    code = "keep_writing()\nimport os\nfile = open('file', 'w')\nprint('a'); print('b', file=sys.stderr); os.write(2, b'c')\n"
    command = [sys.executable, "-c", START + code + "file.close()"]
    closed = ["bash", "-c", 'exec "$@" <&- >&- 2>&-', "bash", *command]
    done = subprocess.run(closed, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=60, check=False)
    assert done.returncode == 0
    assert (tmp_path / "file").read_text() == ""


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "gbk", "utf-8"])
def test_character_that_an_encoding_lacks_is_escaped_and_json_stays_json(encoding: str) -> None:
    text = "größer 正面 ดี \N{GRINNING FACE} \udc80"
    code = f"import json\nkeep_writing()\nprint(json.dumps({text!a}, ensure_ascii=False))\n"
    done = start(code, env={"PYTHONIOENCODING": encoding})
    assert (done.returncode, done.stderr) == (0, b"")
    assert json.loads(done.stdout.decode(encoding)) == text


def test_script_that_only_prints_ends_like_a_unix_tool() -> None:
    code = "keep_writing(only_prints=True)\nprint('out', flush=True)\nsys.exit(7)\n"
    done = start(code, stdout=closed_pipe())
    assert (done.returncode, done.stderr) == (141, b"")
    done = start(code, stdout=full_disk())
    assert done.returncode == 1
    assert b"standard output cannot be written" in done.stderr


def test_terminal_that_does_not_block_gets_everything() -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    code = "keep_writing()\nprint('x' * 500_000, flush=True)\n"
    with subprocess.Popen(
        [sys.executable, "-c", START + code],
        stdout=writer,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    ) as process:
        os.close(writer)
        with open(reader, "rb") as file:
            assert len(file.read()) == 500_001
        assert process.wait(20) == 0
