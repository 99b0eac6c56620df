"""The check for machines with a GPU: a trial run without one."""

import json
import sys

import pytest

from benchmarks import gpu_check


def test_check_without_a_gpu_is_refused_unless_it_is_a_trial(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_check.py"])
    with pytest.raises(SystemExit) as ended:
        gpu_check.main()
    assert ended.value.code == 2
    assert "--tiny" in capsys.readouterr().err


def test_gap_of_lists_that_cannot_be_compared_is_infinite():
    assert gpu_check.gap([], []) == gpu_check.gap([1.0], [1.0, 2.0]) == float("inf")
    assert gpu_check.gap([1.0, 2.2], [1.0, 2.0]) == pytest.approx(0.1)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_trial_run_on_a_cpu_passes_every_check(run, tmp_path):
    done = run("benchmarks/gpu_check.py", "--tiny", "--seconds", 1000, "--output", "found.json", timeout=1100)
    found = json.loads((tmp_path / "found.json").read_text())
    assert found == json.loads(done.stdout.splitlines()[-1])
    assert found["failed"] == []
    shown = {name for name, item in found["checks"].items() if item["ok"]}
    assert {"CUDA graphs equal plain steps", "a resumed run with CUDA graphs is equal bit by bit"} <= shown
    assert found["checks"]["train.py, CUDA graphs"]["graphs"] > 0
    assert {"float32 equals the CPU", "a resumed run is equal bit by bit", "eval.py equals the CPU"} <= shown
    assert found["checks"]["train.py"]["operations_per_step"] > 100
    assert found["checks"]["Trainer, bf16"]["samples_per_second"] > 0
