"""git is asked about folders that may be anybody's."""

import subprocess
from pathlib import Path

from lib.runtime.git import git


def test_configuration_of_a_repository_runs_no_program(tmp_path: Path) -> None:
    subprocess.run(["git", "init", "-q", tmp_path / "clone"], check=True, timeout=60)
    (tmp_path / "clone" / "file").write_text("")
    hook = tmp_path / "hook"
    hook.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    hook.chmod(0o755)
    status = ["status", "--porcelain"]
    assert git(tmp_path / "clone", "config", "core.fsmonitor", str(hook)) == ""
    assert git(tmp_path / "clone", *status) == "?? file"
    assert not (tmp_path / "ran").exists()
    subprocess.run(["git", "-C", tmp_path / "clone", *status], check=True, timeout=60, capture_output=True)
    assert (tmp_path / "ran").exists()


def test_folder_without_repository_and_failing_command_give_none(tmp_path: Path) -> None:
    assert git(tmp_path, "rev-parse", "HEAD") is None
    assert git(tmp_path / "missing", "status") is None
