"""Whatever is typed, a script gets a configuration, or ends with code 2 and one message: never a trace."""

import random
import string
from pathlib import Path
from typing import Any

import pytest

from lib.config.cli import options_of, parse_cli, parse_command
from lib.config.compare import CompareConfig
from lib.config.eval import EvalConfig
from lib.config.hub import COMMANDS
from lib.config.other_names import OTHER_NAMES
from lib.config.predict import PredictConfig
from lib.config.sweep import SweepConfig
from lib.config.train import TrainConfig

VALUES = [
    *(
        "",
        " ",
        "0",
        "1",
        "-1",
        "7",
        "1e3",
        "0.5",
        "1.5",
        "nan",
        "-nan",
        "inf",
        "-inf",
        "1e400",
        "-1e400",
        "1e-400",
        "1e-300",
    ),
    *(
        "1" + "0" * 30,
        "-1" + "0" * 30,
        "9" * 5000,
        "1_000",
        "0x10",
        "１２",
        "²",
        "1,5",
        "1e",
        ".",
        "None",
        "null",
        "True",
        "false",
    ),
    *(
        "yes",
        "a b",
        "a=1",
        "a=nan",
        "=",
        "a=",
        "min_lr=1e400",
        "hidden_dropout_prob=7",
        "balanced",
        "x" * 300,
        "x/" * 3000,
    ),
    *(
        ".",
        "..",
        "/",
        "~",
        "a\0b",
        "\udcff",
        "a\nb",
        "文本",
        "👍",
        "--",
        "-x",
        "---",
        "--seed",
        "--seed=7",
        "[1, 2]",
        "{}",
        "!!int 3",
    ),
    *(
        "https://token@host",
        "user:pw@host",
        "hf_" + "a1" * 20,
        "t.csv",
        "t.jsonl",
        "o.npy",
        "{}",
        "&a",
        "*a",
        "'",
        '"',
        "#",
    ),
    *("sst2", "user/name", "roberta-base", "focal", "lora", "fp16", "wandb", "ner", "auto", "hub"),
]
KINDS = {"train": TrainConfig, "eval": EvalConfig, "predict": PredictConfig, "compare": CompareConfig} | COMMANDS
KINDS |= {"sweep": SweepConfig}


def random_flag(rng: random.Random, flags: list[str]) -> str:
    flag = rng.choice(flags)
    if rng.random() < 0.1:
        flag = rng.choice([f"--{name}" for name in OTHER_NAMES])
    if rng.random() < 0.1:
        at = rng.randrange(len(flag))
        flag = flag[:at] + rng.choice(string.printable) + flag[at + rng.randrange(2) :]
    return flag.replace("_", "-") if rng.random() < 0.1 else flag


def random_arguments(rng: random.Random, flags: list[str], file: Path) -> list[str]:
    arguments: list[str] = []
    for _ in range(rng.randint(1, 4)):
        flag, values = random_flag(rng, flags), rng.choices(VALUES, k=rng.choice([0, 1, 1, 1, 1, 1, 2, 3]))
        arguments += [f"{flag}={values[0]}", *values[1:]] if values and rng.random() < 0.3 else [flag, *values]
    if rng.random() < 0.3:
        lines = [f"{random_flag(rng, flags)[2:]}: {rng.choice(VALUES)}" for _ in range(rng.randint(0, 4))]
        file.write_bytes("\n".join(lines).encode(errors="surrogateescape"))
        arguments += ["--config", str(file)]
    if rng.random() < 0.1:
        rng.shuffle(arguments)
    return arguments


@pytest.mark.parametrize("name", KINDS)
def test_random_arguments_give_a_configuration_or_one_message(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng, kind = random.Random(name), KINDS[name]
    flags = [flag for flag in options_of(kind) if flag.startswith("--")] or ["--"]
    accepted = 0
    for _ in range(1500):
        arguments = random_arguments(rng, flags, tmp_path / "options.yaml")
        if "-h" in arguments or "--help" in arguments:
            continue
        given: Any = None
        code: Any = 0
        try:
            given = parse_command(COMMANDS, [name, *arguments]) if name in COMMANDS else parse_cli(kind, arguments)
        except SystemExit as ended:
            code = ended.code
        except Exception as error:
            raise AssertionError(f"{arguments} raised {error!r}") from error
        printed = capsys.readouterr()
        assert printed.out == "", arguments
        if code:
            assert code == 2, arguments
            assert printed.err.startswith("error: "), arguments
            assert printed.err.count("error: ") == 1, arguments
        else:
            assert type(given) is kind, arguments
            accepted += 1
    assert accepted or name in ("import", "compare")  # which need options that are seldom given
