"""Training that is killed at random moments and started again equals an undisturbed run; the whole number: make kills."""

import pytest

from tests.conftest import WORKER_ENV


def kill(run, *flags, code=0, timeout=150):
    return run("tests/kills.py", "--jobs", 1, *flags, env=WORKER_ENV, code=code, timeout=timeout).stdout


@pytest.mark.parametrize("kills", [4, pytest.param(100, marks=pytest.mark.slow)])
def test_run_killed_again_and_again_ends_as_if_nothing_had_happened(run, kills):
    shown = kill(run, "--kills", kills, timeout=900)
    assert f"{kills} kills" in shown
    assert "lost 0, unequal 0, hanging 0, failed 0" in shown


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["shards", "shards in parts"])
def test_run_in_shards_killed_again_and_again_ends_as_if_nothing_had_happened(run, setting):
    shown = kill(run, "--kills", 40, "--setting", setting, timeout=1200)
    assert "40 kills" in shown
    assert "lost 0, unequal 0, hanging 0, failed 0" in shown


@pytest.mark.slow
def test_kills_would_notice_a_save_that_removes_the_old_checkpoint_first(run):
    assert "lost: " in kill(run, "--kills", 20, "--broken", code=1, timeout=900)


@pytest.mark.slow
def test_sweep_killed_again_and_again_ends_like_one_that_was_not(run):
    shown = run("tests/kill_sweeps.py", "--tiny", "--kills", 5, "--seeds", 2, env=WORKER_ENV, timeout=900).stdout
    assert "5 kills" in shown
    assert ": 0 differences" in shown
