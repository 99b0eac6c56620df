"""Every number has limits, and every name of a file; what is outside is refused with code 2 and the flag."""

import dataclasses
import itertools
import os
import pwd
from pathlib import Path
from typing import Any

import pytest

from lib.config.cli import Option, options_of, parse_cli
from lib.config.compare import CompareConfig
from lib.config.eval import EvalConfig
from lib.config.limits import FileName, Within
from lib.config.predict import PredictConfig
from lib.config.sections import flatten
from lib.config.train import TrainConfig

KINDS = (TrainConfig, EvalConfig, PredictConfig, CompareConfig)
WILD = ("nan", "-nan", "inf", "-inf", "1e400", "-1e400", "-1", "-1" + "0" * 30, "1" + "0" * 30, "1" + "0" * 5000)


def numbers(kind: Any) -> list[Option]:
    return list(dict.fromkeys(option for option in options_of(kind).values() if option.kind in (int, float)))


def sections(kind: Any) -> list[Any]:
    parts = [field.default_factory for field in dataclasses.fields(kind)]
    return [kind, *filter(dataclasses.is_dataclass, parts)]


def refusal(capsys: pytest.CaptureFixture[str], kind: Any, *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        parse_cli(kind, arguments)
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    return message


@pytest.mark.parametrize("kind", KINDS)
def test_every_number_has_limits(kind: Any) -> None:
    fields = [field for section in sections(kind) for field in dataclasses.fields(section)]
    limited = {
        field.name for field in fields if any(isinstance(x, Within) for x in getattr(field.type, "__metadata__", ()))
    }
    assert [option.name for option in numbers(kind) if option.name not in limited] == []


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_out_of_range_are_refused_with_the_flag(kind: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for option, value in itertools.product(numbers(kind), WILD):
        assert f"--{option.name} " in refusal(capsys, kind, f"--{option.name}", value), (option.name, value)


@pytest.mark.parametrize(
    ("flag", "value", "word"),
    [
        ("--adam_beta1", "1", "[0, 1)"),
        ("--adam_beta2", "1.5", "[0, 1)"),
        ("--adam_epsilon", "0", "(0, 1]"),
        ("--lr", "1e-300", "float32"),
        ("--lr", "1e30", "1,000"),
        ("--epochs", "1e12", "1,000,000"),
        ("--weight_decay", "1e38", "at most"),
        ("--warmup_steps", "10.5", "whole number"),
        ("--eval_steps", "10.5", "whole number"),
        ("--eval_steps", "0", "above 0"),
        ("--average_checkpoints", "1", "averages nothing"),
        ("--seed", "4294967296", "4,294,967,295"),
        ("--bs", "1e3", "whole number"),
        ("--class_weights", "a=1e300", "--class_weights"),
        ("--config_overrides", "hidden_dropout_prob=1.5", "[0, 1]"),
        ("--config_overrides", "hidden_dropout_prob=nan", "finite"),
        ("--lr_scheduler_kwargs", "num_cycles=1e400", "finite"),
    ],
)
def test_value_that_cannot_work_is_refused(
    flag: str, value: str, word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert word in refusal(capsys, TrainConfig, flag, value)


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        *(
            ("--bs", "1000000"),
            ("--max_steps", "1000000"),
            ("--adam_beta1", "0"),
            ("--weight_decay", "0"),
            ("--seed", "0"),
        ),
        *(("--epochs", "0.01"), ("--warmup_steps", "0"), ("--warmup_steps", "100"), ("--lr", "1e-12"), ("--lr", "2")),
        *(
            ("--eval_steps", "0.05"),
            ("--eval_steps", "100"),
            ("--average_checkpoints", "0"),
            ("--average_checkpoints", "3"),
        ),
        *(("--dataloader_num_workers", "0"), ("--window_stride", "0"), ("--label_smoothing_factor", "0.1")),
    ],
)
def test_unusual_value_that_works_is_taken(flag: str, value: str) -> None:
    assert float(value) in flatten(parse_cli(TrainConfig, [flag, value])).values()


def test_number_of_a_yaml_file_is_refused_with_its_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    for line in ("adam_beta1: .nan", "adam_beta1: 1", "adam_beta1: [1, 2]", "adam_beta1: true"):
        recipe.write_text(f"seed: 7\n{line}\n")
        message = refusal(capsys, TrainConfig, "--config", str(recipe))
        assert "--adam_beta1" in message
        assert "recipe.yaml, line 2" in message


@pytest.mark.parametrize("kind", KINDS)
def test_names_that_no_file_can_have_are_refused(kind: Any, capsys: pytest.CaptureFixture[str]) -> None:
    fields = [field for section in sections(kind) for field in dataclasses.fields(section)]
    named = [f.name for f in fields if any(isinstance(x, FileName) for x in getattr(f.type, "__metadata__", ()))]
    assert {"output_dir", "train_file"} <= set(named) or kind in (PredictConfig, CompareConfig)
    for name, value in itertools.product(named, ("", " ", "x" * 256, "ü" * 128, "a/" * 3000, "a\0b", "\udcff")):
        assert f"--{name}" in refusal(capsys, kind, f"--{name}={value}"), (name, value)


@pytest.mark.parametrize("name", [".", "..", "a/b", "x" * 129, "文" * 67])
def test_run_name_that_names_no_folder_of_its_own_is_refused(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--run_name" in refusal(capsys, TrainConfig, "--run_name", name)


PATHS = {
    TrainConfig: (
        "model",
        "dataset",
        "train_file",
        "validation_file",
        "test_file",
        "output_dir",
        "resume_from_checkpoint",
    ),
    EvalConfig: ("run", "dataset", "train_file", "validation_file", "test_file", "output_dir"),
    PredictConfig: ("model", "input", "output", "export_onnx", "merge_adapter"),
    CompareConfig: ("output_dir",),
}


@pytest.mark.parametrize("kind", PATHS)
def test_tilde_is_the_home_folder_in_every_path(kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("train_file: ~/theirs.csv\nlabel_column: ~/y\n", encoding="utf-8")
    needed = {EvalConfig: ["--run", "~/run"], CompareConfig: ["~/run", "~/other*"]}.get(kind, [])
    for name in PATHS[kind]:
        path = "~/run" if name == "run" else "~/x.jsonl"
        (tmp_path / "options.yaml").write_text(f"{name}: {path}\n", encoding="utf-8")
        for arguments in ([f"--{name}", path], [f"--{name}={path}"], ["--config", "~/options.yaml"]):
            found = flatten(parse_cli(kind, [*needed, *arguments]))
            assert found[name] == path.replace("~", str(tmp_path))
    if kind is EvalConfig:
        found = flatten(parse_cli(kind, needed))
        assert (found["train_file"], found["label_column"]) == (f"{tmp_path}/theirs.csv", "~/y")
    if kind is CompareConfig:
        assert parse_cli(kind, needed).runs == (str(run), f"{tmp_path}/other*")


def test_tilde_of_a_user_is_that_of_the_user_and_else_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    user = pwd.getpwuid(os.getuid())
    found = parse_cli(TrainConfig, ["--output_dir", f"~{user.pw_name}/runs", "--notes", "~/x", "--run_name", "a"])
    assert (found.tracking.output_dir, found.tracking.notes) == (f"{user.pw_dir}/runs", "~/x")
    with pytest.raises(SystemExit):
        parse_cli(TrainConfig, ["--output_dir", "~nobody_here/runs"])
    assert "./~nobody_here/runs" in capsys.readouterr().err
    (tmp_path / "~old.csv").touch()
    assert parse_cli(TrainConfig, ["--train_file", "~old.csv"]).data.train_file == "~old.csv"
    assert parse_cli(TrainConfig, ["--train_file", "./~x.csv"]).data.train_file == "./~x.csv"
