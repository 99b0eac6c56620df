"""Files of others: a value is never read as a flag, and the folder of a run decides what is read, not who is trusted."""

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from lib.config.cli import load_config, options_of, parse_cli, parse_command
from lib.config.compare import CompareConfig
from lib.config.eval import EvalConfig
from lib.config.hub import COMMANDS
from lib.config.predict import PredictConfig
from lib.config.sections import DataConfig, flatten
from lib.config.train import TrainConfig
from lib.errors import UserError

KINDS: dict[str, Any] = {"train": TrainConfig, "eval": EvalConfig, "predict": PredictConfig, "compare": CompareConfig}
NEEDED = {"eval": ["--model=m"], "compare": ["run"], "import": ["folder", "--repo_id=name"]}
"""Arguments without which there is no configuration."""
SMUGGLED = [
    "--send_token_to_mirror",
    "True",
    "--hub_endpoint",
    "http://evil",
    "--seed",
    "77",
    "--per_device_eval_batch_size=3",
]
HOSTILE = [
    SMUGGLED,
    ["x", *SMUGGLED],
    ["--help"],
    ["--", *SMUGGLED],
    ["--config", "/etc/passwd"],
    *SMUGGLED,
    "--help",
    "--",
]
TRUST: dict[str, Any] = {
    **{"hub_endpoint": "http://evil", "send_token_to_mirror": True, "hub_timeout": 1.0, "verify_hashes": False},
    **{"trust_remote_code": True, "model_revision": "0" * 40, "allow_pickle": True, "source": "modelscope"},
    **{
        "output_dir": "elsewhere",
        "run_name": "other",
        "report_to": "wandb",
        "project": "theirs",
        "tags": ["t"],
        "notes": "n",
    },
    **{"mixed_precision": "fp16", "per_device_eval_batch_size": 1, "resume_from_checkpoint": "theirs"},
}
"""Settings of a run that whoever scores or uses it decides anew."""


def parse(name: str, arguments: list[str]) -> dict[str, Any]:
    config = parse_command(COMMANDS, [name, *arguments]) if name in COMMANDS else parse_cli(KINDS[name], arguments)
    return flatten(config)


def read_or_refused(name: str, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any] | None:
    capsys.readouterr()
    with contextlib.suppress(SystemExit):
        return parse(name, arguments)
    assert capsys.readouterr().err.startswith("error: "), arguments
    return None


@pytest.mark.parametrize("name", [*KINDS, *COMMANDS])
def test_value_of_a_yaml_file_that_looks_like_a_flag_stays_a_value_or_is_refused(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    needed, kept, taken = NEEDED.get(name, []), parse(name, NEEDED.get(name, [])), []
    options = {option.name: option for option in options_of(COMMANDS.get(name) or KINDS[name]).values()}
    for option in options.values():
        if option.positional or any(item.startswith(f"--{option.name}=") for item in needed):
            continue
        for value in [*HOSTILE, " ".join(SMUGGLED)]:
            (tmp_path / "options.yaml").write_text(yaml.safe_dump({option.name: value}), encoding="utf-8")
            found = read_or_refused(name, [*needed, "--config", str(tmp_path / "options.yaml")], capsys)
            if found is not None:
                assert {key for key in found if found[key] != kept[key]} <= {option.name}, value
                items = tuple([value] if isinstance(value, str) else value)
                read = found[option.name] if option.takes_many else (str(found[option.name]).removesuffix(".0"),)
                assert read == items
                taken.append(option.name)
    texts = [item.name for item in options.values() if item.kind is str or item.takes_many]
    assert len(taken) >= len(texts) / 2 or name in ("compare", "import", "verify")


@pytest.mark.parametrize("field", list(flatten(TrainConfig())))
def test_no_setting_of_a_run_smuggles_flags_into_its_evaluation(
    field: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = flatten(EvalConfig(run=str(tmp_path)))
    for value in HOSTILE:
        (tmp_path / "config.yaml").write_text(yaml.safe_dump({field: value}), encoding="utf-8")
        for name in ("run", "model"):
            found = read_or_refused("eval", [f"--{name}", str(tmp_path)], capsys)
            if found is not None:
                assert {key for key in found if found[key] != kept[key]} <= {field, "run", "model"}


@pytest.mark.parametrize("data", [[], ["--test_file", "mine.csv"]])
def test_folder_of_a_run_decides_nothing_but_what_is_read_and_scored(data: list[str], tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(TRUST | {"max_length": 9, "seed": 5}), encoding="utf-8")
    for arguments in (["--run", str(tmp_path)], ["--model", str(tmp_path)]):
        found, kept = (parse("eval", [*arguments, *data]), flatten(EvalConfig(run=str(tmp_path))))
        changed = {key for key in found if found[key] != kept[key]}
        assert changed - {"run", "model", "test_file"} == {"max_length", *([] if data else ["seed"])}
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "config.yaml").write_text("{}", encoding="utf-8")
    used, without = (flatten(parse_cli(PredictConfig, ["a", "--model", str(folder)])) for folder in (tmp_path, plain))
    assert used | {"model": ""} == without | {"model": ""}
    asked = parse("eval", ["--run", str(tmp_path), "--hub_endpoint=http://mine", "--send_token_to_mirror"])
    assert (asked["hub_endpoint"], asked["send_token_to_mirror"]) == ("http://mine", True)


def test_settings_that_evaluation_takes_from_a_run_are_about_its_data_and_scores() -> None:
    """Whoever adds an option of the data answers: can it send a secret, run code, or write elsewhere?"""
    files = {"dataset", "dataset_config", "revision", "train_file", "validation_file", "test_file", "encoding"}
    reading = {
        "text_columns",
        "label_column",
        "label_columns",
        "soft_labels",
        "label_order",
        "problem_type",
        "max_length",
    }
    sizes = {
        "window_stride",
        "pad_to_max_length",
        "max_train_samples",
        "max_eval_samples",
        "fold",
        "preprocessing_num_workers",
    }
    assert {field.name for field in dataclasses.fields(DataConfig)} == files | reading | sizes


def test_file_that_turns_on_what_others_can_use_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "theirs.yaml"
    file.write_text(
        "seed: 7\nsend_token_to_mirror: true\nhub_endpoint: http://evil\nallow_pickle: true\n", encoding="utf-8"
    )
    parse_cli(TrainConfig, ["--config", str(file), "--allow_pickle", "False"])
    told = capsys.readouterr().err
    assert "theirs.yaml sets hub_endpoint, send_token_to_mirror" in told
    assert "allow_pickle" not in told
    file.write_text("seed: 7\nhub_timeout: 3\n", encoding="utf-8")
    parse_cli(TrainConfig, ["--config", str(file)])
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("seed: 7\nmetrics: !!python/object/apply:os.system ['touch ran']\n", ["line 2", "python/object"]),
        ("seed: !!python/object/apply:os.system ['touch ran']\n", ["line 1", "python/object"]),
        ("seed: 7\nnotes: !!binary aGk=\n", ["line 2", "binary"]),
        ("a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\n", ["line 2", "nested"]),
        ("seed: 7\ntags: &a [*a]\n", ["line 2", "nested"]),
        ("seed: 7\n<<: {lr: 5}\n", ["line 2", "nested"]),
        ("seed: 7\ntags: " + "[" * 100_000 + "\n", ["line 2", "nested"]),
        ("seed: 7\ntags: " + "{a: " * 100_000 + "\n", ["line 2", "nested"]),
        ("? [seed]\n: 7\n", ["line 1", "option: value"]),
        ("{seed: 1, seed: 2}\n", ["seed stands in lines 1 and 1"]),
        ("lr: 1\nseed: 2\nlearning_rate: 3\n", ["line 1", "line 3", "--learning_rate"]),
        ("seed: 1\n---\nseed: 2\n", ["line 2"]),
        ("seed: 7\n\x1b]0;x\x07: 1\n", ["not YAML"]),
        ('seed: 7\n"\\e]0;x\\r\\n- forged": 1\n', ["line 2", "\\x1b", "\\r\\n_ forged"]),
        ('seed: "\\e[2J\\n- forged"\n', ["line 1", "\\x1b[2J\\n- forged"]),
    ],
)
def test_yaml_that_is_more_than_options_is_refused_with_its_line(
    text: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(SystemExit) as ended:
        parse_cli(TrainConfig, ["--config", "recipe.yaml"])
    message = capsys.readouterr().err
    assert ended.value.code == 2
    assert [word for word in ["recipe.yaml", *words] if word not in message] == []
    assert message.rstrip("\n").isprintable()
    assert not Path("ran").exists()
    with pytest.raises(UserError, match=r"recipe\.yaml"):
        load_config(TrainConfig, Path("recipe.yaml"))


def test_alias_of_a_value_is_the_value(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("run_name: &name mine\nnotes: *name\n", encoding="utf-8")
    assert parse_cli(TrainConfig, ["--config", str(tmp_path / "recipe.yaml")]).tracking.notes == "mine"


def test_values_of_a_sweep_are_no_flags() -> None:
    """W&B starts `train.py --lr=0.1 --tags=...`: what follows the equal sign is the value."""
    for value in (*SMUGGLED, json.dumps(SMUGGLED)):
        config = parse_cli(TrainConfig, [f"--tags={value}"[:60], f"--notes={value}"])
        assert config.tracking.notes == value
        assert dataclasses.replace(config, tracking=TrainConfig().tracking) == TrainConfig()
