"""Options: flags and YAML give equal settings in any spelling; anything else is refused with code 2."""

import ast
import dataclasses
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lib.config import eval as eval_config
from lib.config import sections as config
from lib.config import train as train_config
from lib.config.cli import dump_config, load_config, options_of, parse_cli
from lib.config.eval import EvalConfig, EvalDataConfig, EvalModel
from lib.config.other_names import OTHER_NAMES
from lib.config.predict import PredictConfig
from lib.config.sections import DataConfig, ModelConfig, flatten
from lib.config.train import ObjectiveConfig, OptimConfig, TrackingConfig, TrainConfig, TrainingConfig
from lib.errors import UserError
from tests.conftest import ROOT

Capture = pytest.CaptureFixture[str]


@dataclasses.dataclass(frozen=True)
class Switches:
    """Switches."""

    on: bool = True
    """On."""
    off: bool = False
    """Off."""


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def refusal(capsys: Capture, *arguments: str, kind: type = TrainConfig) -> str:
    """What the user reads when `arguments` are refused with code 2, frames and line breaks removed."""
    with pytest.raises(SystemExit) as ended:
        parse_cli(kind, list(arguments))
    assert ended.value.code == 2
    return " ".join(capsys.readouterr().err.replace("│", " ").split())


def help_text(capsys: Capture, kind: type) -> str:
    with pytest.raises(SystemExit) as ended:
        parse_cli(kind, ["--help"])
    assert ended.value.code == 0
    return capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------- spelling


@pytest.mark.parametrize(
    "arguments",
    [
        ["--learning_rate", "1e-3"],
        ["--learning-rate", "1e-3"],
        ["--learning_rate=1e-3"],
        ["--learning-rate=0.001"],
        ["--lr", "1e-3"],
        ["--lr=1e-3"],
        ["--lr", "5", "--learning_rate=1e-3"],
    ],
)
def test_flag_spellings_give_the_same_value(arguments: list[str]) -> None:
    assert parse_cli(TrainConfig, arguments).optim.learning_rate == 1e-3


def test_short_flags_set_the_long_ones() -> None:
    parsed = parse_cli(TrainConfig, ["--lr=1", "--bs=8", "--epochs=2", "--model_name_or_path=roberta-base"])
    assert parsed.optim.learning_rate == 1
    assert parsed.training.train_batch_size == 8
    assert parsed.training.num_train_epochs == 2
    assert parsed.model.model == "roberta-base"


def test_value_with_equal_signs_and_hyphens_is_kept() -> None:
    parsed = parse_cli(TrainConfig, ["--notes=lr=1e-3 is-new", "--lr_scheduler_kwargs", "min_lr=1e-6", "num-x=2"])
    assert parsed.tracking.notes == "lr=1e-3 is-new"
    assert parsed.optim.lr_scheduler_kwargs == ("min_lr=1e-6", "num-x=2")


def test_no_flags_are_the_defaults() -> None:
    assert parse_cli(TrainConfig, []) == TrainConfig()


# ---------------------------------------------------------------------------------------------------- YAML


def test_flags_win_over_yaml_wherever_they_stand(tmp_path: Path) -> None:
    recipe = write(tmp_path / "recipe.yaml", "learning_rate: 1e-5\nseed: 7\ntags: [a, b]\n")
    for arguments in (
        ["--lr=1e-3", "--config", recipe, "--tags", "c"],
        [f"--config={recipe}", "--tags", "c", "--lr=1e-3"],
    ):
        parsed = parse_cli(TrainConfig, arguments)
        assert parsed.optim.learning_rate == 1e-3
        assert parsed.tracking.tags == ("c",)
        assert parsed.training.seed == 7


def test_yaml_exponent_without_a_point_is_a_number(tmp_path: Path) -> None:
    recipe = write(tmp_path / "recipe.yaml", "learning_rate: 1e-5\nadam_epsilon: 1E-9\n")
    optim = parse_cli(TrainConfig, ["--config", recipe]).optim
    assert (optim.learning_rate, optim.adam_epsilon) == (1e-5, 1e-9)


def test_yaml_key_may_be_an_alias_or_have_hyphens(tmp_path: Path) -> None:
    recipe = write(tmp_path / "recipe.yaml", "lr: 2\nnum-train-epochs: 1\n")
    parsed = parse_cli(TrainConfig, ["--config", recipe])
    assert (parsed.optim.learning_rate, parsed.training.num_train_epochs) == (2, 1)


@pytest.mark.parametrize("nothing", ["null", "~", "Null", "", "None"])
def test_yaml_null_is_none(tmp_path: Path, nothing: str) -> None:
    recipe = write(tmp_path / "recipe.yaml", f"max_grad_norm: {nothing}\n")
    assert parse_cli(TrainConfig, ["--config", recipe]).optim.max_grad_norm is None


def test_empty_yaml_file_changes_nothing(tmp_path: Path) -> None:
    assert parse_cli(TrainConfig, ["--config", write(tmp_path / "recipe.yaml", "# later\n")]) == TrainConfig()


@pytest.mark.parametrize(
    "given",
    [
        TrainConfig(),
        TrainConfig(optim=OptimConfig(learning_rate=1e-5, max_grad_norm=None, lr_scheduler_kwargs=("min_lr=1e-6",))),
        TrainConfig(objective=ObjectiveConfig(loss="focal", focal_gamma=0.5, class_weights=("a=b=2", "0=1e-3"))),
        TrainConfig(objective=ObjectiveConfig(class_weights=("balanced",))),
        TrainConfig(data=DataConfig(train_file="a b.csv", text_columns=("premise", "hypothesis"), label_column="true")),
        TrainConfig(model=ModelConfig(freeze="4"), metrics=("accuracy", "f1"), mixed_precision="no"),
        TrainConfig(tracking=TrackingConfig(report_to="none", tags=("1", "x: y", "null", "ü"), run_name="1e5")),
        TrainConfig(tracking=TrackingConfig(notes="null", project="~", output_dir="./~")),
        TrainConfig(tracking=TrackingConfig(notes="- first\n- second # not a comment\n", tags=("true", "False"))),
        TrainConfig(training=TrainingConfig(num_train_epochs=0.1, max_steps=10, metric_for_best_model="loss")),
        EvalConfig(model=EvalModel("roberta-base"), metrics=("f1",), data=EvalDataConfig(dataset="sst2")),
        Switches(on=False, off=True),
        Switches(on=True, off=False),
    ],
)
def test_saved_configuration_reads_back_equal(tmp_path: Path, given: object) -> None:
    (tmp_path / "config.yaml").write_text(dump_config(given), encoding="utf-8")
    assert load_config(type(given), tmp_path / "config.yaml") == given


def test_saved_option_that_is_no_option_any_more_is_an_error_of_the_user(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("seed: 7\nno_such: 1\n")
    with pytest.raises(UserError, match=r"--no_such .*config\.yaml, line 2"):
        load_config(TrainConfig, tmp_path / "config.yaml")


@pytest.mark.parametrize(
    ("arguments", "on"),
    [
        (["--allow_changes"], True),
        (["--allow-changes", "--seed", "3"], True),
        (["--allow_changes=True"], True),
        (["--allow_changes", "false"], False),
        (["--allow_changes", "False", "--seed", "3"], False),
        ([], False),
    ],
)
def test_boolean_flag_needs_no_value_and_takes_one(arguments: list[str], on: bool) -> None:
    assert parse_cli(TrainConfig, arguments).training.allow_changes is on


def test_boolean_flag_turns_a_default_off() -> None:
    assert parse_cli(Switches, ["--on=False", "--off=True"]) == Switches(on=False, off=True)


# ---------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("flag", ["--lerning_rate=3", "--learning_rat"])
def test_misspelt_flag_is_refused_with_a_suggestion(capsys: Capture, flag: str) -> None:
    message = refusal(capsys, flag)
    assert flag.split("=")[0] in message
    assert "Perhaps you meant" in message
    assert "--learning_rate" in message


def test_misspelt_yaml_key_is_refused_with_a_suggestion_and_the_file(capsys: Capture, tmp_path: Path) -> None:
    recipe = write(tmp_path / "recipe.yaml", "seed: 3\nwieght_decay: 0.1\n")
    message = refusal(capsys, "--config", recipe)
    assert "wieght_decay" in message
    assert "Perhaps you meant: --weight_decay" in message
    assert "recipe.yaml" in message


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--lr", "fast"], ["learning_rate", "'fast'"]),
        (["--bs=2.5"], ["train_batch_size", "'2.5'"]),
        (["--report_to", "mlflow"], ["--report_to", "'mlflow'", "tensorboard"]),
        (["--lr"], ["--learning_rate takes a number", "got nothing"]),
        (["train.csv"], ["train.csv"]),
        (["--lr=0"], ["--learning_rate must be above 0, got 0.0"]),
        (["--layerwise_lr_decay=0"], ["--layerwise_lr_decay must lie in (0, 1], got 0.0"]),
        (["--layerwise_lr_decay=1.1"], ["--layerwise_lr_decay must lie in (0, 1], got 1.1"]),
        (["--head_learning_rate=0"], ["--head_learning_rate must be above 0, got 0.0"]),
        (["--lr=nan"], ["--learning_rate must be above 0, got nan"]),
        (["--max_length=0"], ["--max_length must be above 0, got 0"]),
        (["--warmup_steps=-1"], ["--warmup_steps must not be negative"]),
        (["--label_smoothing_factor=1"], ["--label_smoothing_factor must lie in [0, 1), got 1.0"]),
        (["--loss=focal", "--label_smoothing_factor=0.1"], ["--label_smoothing_factor is for --loss cross_entropy"]),
        (["--focal_gamma=1"], ["--focal_gamma is for --loss focal"]),
        (["--loss=focal", "--focal_gamma=-1"], ["--focal_gamma must lie in [0, 100], got -1.0"]),
        (["--class_weights", "balanced", "good=2"], ["`balanced` or class=weight", "got 'balanced'"]),
        (["--class_weights", "good=0"], ["with weights above 0, got 'good=0'"]),
        (["--class_weights", "good=nan"], ["with weights above 0, got 'good=nan'"]),
        (["--class_weights", "good"], ["got 'good'"]),
        (["--lr_scheduler_kwargs", "min_lr"], ["--lr_scheduler_kwargs takes name=value, got 'min_lr'"]),
        (["--seed=-1"], ["--seed must not be negative, got -1"]),
        (["--run_name=a/b"], ["--run_name takes letters, digits and . _ -, got 'a/b'"]),
        (["--freeze=head"], ["--freeze takes backbone, embeddings or a number of layers, got 'head'"]),
        (["--freeze=²"], ["--freeze takes"]),
        (["--text_columns", "a", "b", "c"], ["--text_columns takes one or two columns, got 3: a b c; for example"]),
        (["--dataset=sst2", "--test_file=a.csv"], ["--dataset and --test_file exclude each other"]),
        (
            ["--dataset_config=binary", "--train_file=a.csv"],
            ["--dataset_config is for --dataset, not for --train_file"],
        ),
        (["--revision=main", "--test_file=a.csv"], ["--revision is for --dataset, not for --test_file"]),
        (["--config"], ["--config takes the path of a YAML file"]),
        (["--config", "nowhere.yaml"], ["--config nowhere.yaml: no such file"]),
    ],
)
def test_refusal_names_the_flag_and_its_value(capsys: Capture, arguments: list[str], words: list[str]) -> None:
    message = refusal(capsys, *arguments)
    assert [word for word in words if word not in message] == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("optim:\n  learning_rate: 1\n", ["optim holds nested options", "write them flat"]),
        ("tags: [[a, b]]\n", ["tags holds nested options"]),
        ("tags:\n- a: 1\n", ["tags holds nested options"]),
        ("- learning_rate\n", ["expected lines of `option: value`"]),
        ("seed\n", ["expected lines of `option: value`"]),
        ("seed: [1\n", ["is not YAML", "line 2"]),
        ("seed: many\n", ["--seed", "'many'"]),
        ("learning_rate: 0\n", ["--learning_rate must be above 0"]),
        ("seed: 1\n# twice\nbs: 8\nseed: 2\n", ["seed stands in lines 1 and 4; remove one of them"]),
        ("max_steps: 1\nmax-steps: 2\n", ["max-steps stands in lines 1 and 2"]),
    ],
)
def test_refusal_names_the_yaml_key_and_its_value(capsys: Capture, tmp_path: Path, text: str, words: list[str]) -> None:
    message = refusal(capsys, "--config", write(tmp_path / "recipe.yaml", text))
    assert [word for word in words if word not in message] == []


def test_yaml_in_another_encoding_is_refused(capsys: Capture, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("seed: 1\n", encoding="utf-16")
    assert "recipe.yaml is not YAML" in refusal(capsys, "--config", str(tmp_path / "recipe.yaml"))


# ---------------------------------------------------------------------------------------------------- help


def documented_options() -> dict[str, str]:
    """The help line below each option of train.py and eval.py; empty where there is none."""
    lines: dict[str, str] = {}
    for section in ast.walk(ast.parse("".join(map(inspect.getsource, (config, train_config, eval_config))))):
        if isinstance(section, ast.ClassDef) and section.name.endswith(("Config", "Model", "Source")):
            for statement, after in zip(section.body, [*section.body[1:], None], strict=True):
                if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                    text = after.value.value if isinstance(after, ast.Expr) else ""
                    lines[f"{section.name}.{statement.target.id}"] = text
    return lines


def sections_of(kind: type) -> list[type]:
    parts = [field.type for field in dataclasses.fields(kind) if dataclasses.is_dataclass(field.type)]
    return [kind, *(part for part in parts if isinstance(part, type))]


@pytest.mark.parametrize("given", [TrainConfig(), EvalConfig(model=EvalModel("x"))])
def test_help_shows_and_explains_every_option(capsys: Capture, given: object) -> None:
    shown = "".join(help_text(capsys, type(given)).replace("│", " ").split())
    lines = documented_options()
    for section in sections_of(type(given)):
        for field in dataclasses.fields(section):
            if not dataclasses.is_dataclass(field.type):
                owner = next(kind for kind in section.__mro__ if f"{kind.__name__}.{field.name}" in lines)
                text = "".join(lines[f"{owner.__name__}.{field.name}"].split())
                assert f"--{field.name}" in shown
                assert text, f"--{field.name} has no help line"
                assert text in shown, f"the help line of --{field.name} is not shown"


def test_option_is_in_one_section_only() -> None:
    names = [name for section in sections_of(TrainConfig)[1:] for name in flatten(section())]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("script", ["train.py", "eval.py", "predict.py", "hub.py"])
def test_help_imports_nothing_heavy(script: str) -> None:
    """tyro and PyYAML take a fifth of a second, PyTorch alone takes several."""
    command = [sys.executable, "-X", "importtime", ROOT / script, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "usage:" in done.stdout
    imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
    assert "tyro" in imported
    assert not imported & {"torch", "numpy", "transformers", "accelerate", "datasets", "wandb", "evaluate", "psutil"}


# ---------------------------------------------------------------------------------------------------- eval.py


@pytest.mark.parametrize("arguments", [[], ["--run=a", "--model=b"]])
def test_eval_needs_a_run_or_a_model(capsys: Capture, tmp_path: Path, arguments: list[str]) -> None:
    (tmp_path / "config.yaml").write_text(dump_config(TrainConfig()), encoding="utf-8")
    arguments = [argument.replace("--run=a", f"--run={tmp_path}") for argument in arguments]
    assert "give either --run FOLDER or --model ID_OR_FOLDER" in refusal(capsys, *arguments, kind=EvalConfig)


def test_eval_of_a_folder_without_a_run_is_refused(capsys: Capture, tmp_path: Path) -> None:
    message = refusal(capsys, "--run", str(tmp_path), kind=EvalConfig)
    assert f"--run {tmp_path}: no config.yaml there" in message


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """A run on two files, with settings that scoring shares and settings that it does not know."""
    data = DataConfig(train_file="t.csv", test_file="e.csv", text_columns=("a", "b"), label_column="y", max_length=77)
    training = TrainingConfig(seed=5, train_batch_size=3)
    (tmp_path / "config.yaml").write_text(
        dump_config(TrainConfig(data=data, training=training, metrics=("f1",))), encoding="utf-8"
    )
    return tmp_path


def test_eval_uses_the_data_of_the_run(finished: Path) -> None:
    parsed = parse_cli(EvalConfig, ["--run", str(finished)])
    assert flatten(parsed.data) == flatten(load_config(TrainConfig, finished / "config.yaml").data)
    assert (parsed.metrics, parsed.seed, parsed.split) == (("f1",), 5, "test")


def test_eval_flag_wins_over_the_run(finished: Path) -> None:
    parsed = parse_cli(EvalConfig, ["--max_length=9", "--run", str(finished), "--metrics", "accuracy"])
    assert (parsed.data.max_length, parsed.metrics, parsed.data.test_file) == (9, ("accuracy",), "e.csv")


@pytest.mark.parametrize("flag", ["--test_file", "--test-file"])
def test_other_data_replaces_all_data_of_the_run(finished: Path, flag: str) -> None:
    parsed = parse_cli(EvalConfig, ["--run", str(finished), f"{flag}=other.csv"])
    assert parsed.data == EvalDataConfig(test_file="other.csv", max_length=77)
    assert parse_cli(EvalConfig, ["--run", str(finished), "--dataset=sst2"]).data.test_file is None


def test_last_run_given_is_scored(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("other")
    (other / "config.yaml").write_text(dump_config(TrainConfig(data=DataConfig(dataset="mrpc"))), encoding="utf-8")
    recipe = write(other / "eval.yaml", f"run: {finished}\nsplit: validation\n")
    parsed = parse_cli(EvalConfig, ["--config", recipe, "--run", str(other)])
    assert (parsed.run, parsed.data.dataset, parsed.split) == (str(other), "mrpc", "validation")


# ---------------------------------------------------------------------------------------------------- names of others


@pytest.mark.parametrize(
    ("flag", "word"),
    [
        ("--fp16", "--mixed_precision fp16"),
        ("--bf16=True", "--mixed_precision bf16"),
        ("--gradient-accumulation-steps=4", "--train_batch_size"),
        ("--push_to_hub", "hf upload"),
        ("--dev_file=d.csv", "--validation_file"),
        ("--do_train", "train.py trains"),
        ("--evaluation_strategy=epoch", "--eval_steps"),
        ("--overwrite_output_dir", "--resume_from_checkpoint never"),
        ("--num_labels=3", "the classes are those of the data"),
        ("--task_name=mrpc", "--dataset"),
        ("--max_seq_length=128", "--max_length"),
        ("--epoch=3", "--num_train_epochs"),
    ],
)
def test_flag_of_another_program_is_answered_with_ours(flag: str, word: str, capsys: Capture, tmp_path: Path) -> None:
    assert word in refusal(capsys, flag)
    name, _, value = flag[2:].partition("=")
    message = refusal(capsys, "--config", write(tmp_path / "recipe.yaml", f"seed: 1\n{name}: {value or 'true'}\n"))
    assert word in message
    assert "recipe.yaml, line 2" in message


def test_our_options_have_no_entry_among_the_names_of_others() -> None:
    """An option that two scripts call differently is found in the script first."""
    assert not {f"--{name}" for name in OTHER_NAMES} & set(options_of(TrainConfig))


def test_answers_name_options_that_exist() -> None:
    known = {flag for kind in (TrainConfig, EvalConfig, PredictConfig) for flag in options_of(kind)}
    named = {flag for answer in OTHER_NAMES.values() for flag in re.findall(r"--\w+", answer)}
    assert named - known == {"--num_processes", "--config", "--config_file"}


def test_help_names_types_as_people_write_them(capsys: Capture) -> None:
    for kind in (TrainConfig, EvalConfig, PredictConfig):
        text = help_text(capsys, kind)
        assert "{None" not in text
        assert "[STR [STR" not in text
        assert "--text_columns STR ..." in text


def test_value_may_begin_with_hyphens_where_it_is_attached_or_in_a_file(tmp_path: Path) -> None:
    assert parse_cli(TrainConfig, ["--notes=--fp16"]).tracking.notes == "--fp16"
    recipe = write(tmp_path / "recipe.yaml", "notes: --fp16\ntags: [--a, -b]\n")
    tracking = parse_cli(TrainConfig, ["--config", recipe]).tracking
    assert (tracking.notes, tracking.tags) == ("--fp16", ("--a", "-b"))


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["–lr", "1e-3"], "--lr"),
        (["—learning-rate", "1e-3"], "--learning_rate"),
        (["−seed=7"], "--seed"),
        (["learning_rate=1e-3"], "--learning_rate"),
        (["--LEARNING_RATE", "1e-3"], "--learning_rate"),
        (["--no-compile"], "--compile False"),
        (["--", "text"], "'text'"),
        (["--config", ""], "empty"),
        (["--hub_endpoint", ""], "empty"),
    ],
)
def test_what_was_meant_is_said(arguments: list[str], word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_cli(TrainConfig, arguments)
    assert ended.value.code == 2
    assert word in capsys.readouterr().err


def test_dashes_of_editors_in_a_text_stay_a_text() -> None:
    for text in ("– a film", "«model»", "-good film", "…seed"):
        assert parse_cli(PredictConfig, [text]).inputs.texts == (text,)


def test_broken_yaml_is_named_by_line_and_not_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "r.yaml").write_text("seed: 7\ntoken: hunter2: x\n", encoding="utf-8")
    with pytest.raises(SystemExit):
        parse_cli(TrainConfig, ["--config", str(tmp_path / "r.yaml")])
    message = capsys.readouterr().err
    assert "line 2" in message
    assert "hunter2" not in message
    assert message.count("\n") == 1
