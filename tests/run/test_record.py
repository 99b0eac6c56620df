"""The record of a run, and which settings make another experiment."""

import json

import torch
from accelerate import Accelerator

from lib.config.sections import flatten
from lib.config.train import TrainConfig
from lib.run.record import compare_settings, experiment_hash, run_record, version

SETTINGS = {"learning_rate": 1e-3, "logging_steps": 5, "num_train_epochs": 2.0, "text_columns": ("a", "b")}
SETTINGS |= {"run/data_fingerprint": "abc", "run/num_processes": 1, "run/version_torch": "2"}


def test_only_settings_that_change_the_result_make_another_experiment():
    same = SETTINGS | {"logging_steps": 9, "run/num_processes": 2, "text_columns": ["a", "b"]}
    assert compare_settings(SETTINGS, same) == []
    assert experiment_hash(SETTINGS) == experiment_hash(same)
    other = SETTINGS | {"learning_rate": 2e-3, "run/data_fingerprint": "xyz"}
    rate, data = compare_settings(SETTINGS, other)
    assert all(word in rate for word in ("learning_rate", "0.001", "0.002"))
    assert all(word in data for word in ("data_fingerprint", "abc", "xyz"))
    assert experiment_hash(SETTINGS) != experiment_hash(other)
    assert "learning rate of every step" in compare_settings(SETTINGS, SETTINGS | {"num_train_epochs": 3})[-1]


def test_option_newer_than_the_run_counts_as_its_default():
    now = json.loads(json.dumps(flatten(TrainConfig())))
    before = {name: value for name, value in now.items() if name != "compile"}
    assert compare_settings(before, now) == []
    (changed,) = compare_settings(before, now | {"compile": True})
    assert "compile" in changed


def test_other_order_of_batches_is_another_experiment():
    now = SETTINGS | {"run/batches_sorted_together": 100}
    assert compare_settings(now, now) == []
    (changed,) = compare_settings(SETTINGS, now)
    assert "batches_sorted_together" in changed


def test_record_names_devices_precision_and_versions():
    record = run_record(Accelerator(cpu=True))
    assert record["version_torch"] == torch.__version__
    assert (record["num_processes"], record["mixed_precision"]) == (1, "no")
    assert record["devices"][0].startswith("CPU, ")
    assert version("no-such-package") is None
