"""The record of a run, and which settings make another experiment."""

import json

import torch
from accelerate import Accelerator

from lib.config.sections import flatten
from lib.config.train import TrainConfig
from lib.run.record import compare_settings, experiment_hash, run_record, version
from lib.run.resume import describe_promise

SETTINGS = {"learning_rate": 1e-3, "logging_steps": 5, "num_train_epochs": 2.0, "text_columns": ("a", "b")}
SETTINGS |= {"run/data_fingerprint": "f", "run/num_processes": 1, "run/version_torch": "2"}


def test_only_settings_that_change_the_result_make_another_experiment():
    same = SETTINGS | {"logging_steps": 9, "run/num_processes": 2, "text_columns": ["a", "b"]}
    assert compare_settings(SETTINGS, same) == []
    assert experiment_hash(SETTINGS) == experiment_hash(same)
    other = SETTINGS | {"learning_rate": 2e-3, "run/data_fingerprint": "g"}
    assert compare_settings(SETTINGS, other) == [
        "  learning_rate: 0.001 there, 0.002 now",
        "  data_fingerprint: f there, g now",
    ]
    assert experiment_hash(SETTINGS) != experiment_hash(other)
    assert (
        "changes the learning rate of every step" in compare_settings(SETTINGS, SETTINGS | {"num_train_epochs": 3})[-1]
    )


def test_option_newer_than_the_run_counts_as_its_default():
    now = json.loads(json.dumps(flatten(TrainConfig())))
    before = {name: value for name, value in now.items() if name != "compile"}
    assert compare_settings(before, now) == []
    assert compare_settings(before, now | {"compile": True}) == ["  compile: False there, True now"]


def test_another_order_of_batches_is_another_experiment():
    now = SETTINGS | {"run/batches_sorted_together": 100}
    assert compare_settings(now, now) == []
    assert compare_settings(SETTINGS, now) == ["  batches_sorted_together: None there, 100 now"]


def test_promise_of_a_resumed_run_names_what_differs():
    assert "bit by bit" in describe_promise(SETTINGS, dict(SETTINGS), [])
    assert "num_processes 1 -> 2" in describe_promise(SETTINGS, SETTINGS | {"run/num_processes": 2}, [])
    assert "version_torch 2 -> 3" in describe_promise(SETTINGS, SETTINGS | {"run/version_torch": "3"}, [])


def test_cpu_kernels_may_change_within_a_run_which_is_then_no_longer_bit_by_bit():
    now = flatten(TrainConfig())
    other = now | {"cpu_kernels": False}
    before_the_option = {name: value for name, value in now.items() if name != "cpu_kernels"}
    assert compare_settings(now, other) == []
    assert "bit by bit" in describe_promise(before_the_option, now, [])
    assert "cpu_kernels True -> False" in describe_promise(now, other, [])


def test_record_names_devices_precision_and_versions():
    record = run_record(Accelerator(cpu=True))
    assert record["version_torch"] == torch.__version__
    assert (record["num_processes"], record["mixed_precision"]) == (1, "no")
    assert record["devices"][0].startswith("CPU, ")
    assert version("no-such-package") is None
