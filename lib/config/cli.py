"""Options from the command line and from YAML files, and back to YAML.

A YAML file is a list of flags: the same parser reads both, and flags on the command line win. Nothing heavy is imported
here, so `--help` and a misspelt flag answer at once.
"""

import contextlib
import dataclasses
import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro
import yaml

from lib.config.sections import flatten
from lib.errors import SECRET, UserError, redact, require

Config = TypeVar("Config")

TYRO: dict[str, Any] = {
    "config": (tyro.conf.OmitArgPrefixes, tyro.conf.FlagConversionOff),
    "use_underscores": True,
}
"""Flat flags, `--learning_rate` and not `--optim.learning-rate`; booleans take True or False."""

YAML_SPELLING = {"null": "None", "~": "None", "": "None", "true": "True", "false": "False"}
"""Unquoted YAML scalars that flags spell in another way."""


def parse_cli(kind: type[Config], argv: Sequence[str] | None = None) -> Config:
    """Read the options of the dataclass `kind` from `argv` (default: the command line).

    Flags win over the YAML file of `--config`, which wins over what `kind.implied_flags(arguments)` returns, if `kind`
    has such a method. Ends the process with code 2 and a message if an option is unknown or has a wrong value.
    """
    given = switch_on(split_flags(argv), set(switches(kind)))
    with ending_on_user_error():
        arguments = expand_config(given)
        refuse_secrets(arguments)
        implied: Any = getattr(kind, "implied_flags", lambda _: [])
        arguments = [*implied(arguments), *arguments]
        try:
            return tyro.cli(kind, args=arguments, **TYRO)
        except SystemExit as ended:
            if ended.code and "--config" in given:
                print(f"(with the options of --config {last_value(given, '--config')})", file=sys.stderr)
            raise


def parse_command(kinds: dict[str, Any], argv: Sequence[str] | None = None) -> Any:
    """Read one of several commands and its options, such as `hub.py import FOLDER --repo_id NAME`.

    Ends the process with code 2 and a message if the command or an option is unknown or has a wrong value.
    """
    arguments = split_flags(argv)
    with ending_on_user_error():
        refuse_secrets(arguments)
        description = "Models and data sets on machines that cannot reach the Hub."
        return tyro.extras.subcommand_cli_from_dict(kinds, args=arguments, description=description, **TYRO)


@contextlib.contextmanager
def ending_on_user_error() -> Iterator[None]:
    """End the process with code 2, as argparse does, and with the message of a UserError."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def split_flags(argv: Sequence[str] | None) -> list[str]:
    """The arguments with `--some-flag=value` as `--some_flag` and `value`, so that each flag has one spelling."""
    arguments: list[str] = []
    for argument in sys.argv[1:] if argv is None else argv:
        if argument.startswith("--"):
            flag, *value = argument.split("=", 1)
            arguments += [f"--{flag[2:].replace('-', '_')}", *value]
        else:
            arguments.append(argument)
    return arguments


def switches(kind: Any) -> Iterator[str]:
    """The boolean flags of `kind`, those of its sections included."""
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(field.default_factory):
            yield from switches(field.default_factory)
        elif isinstance(field.default, bool):
            yield f"--{field.name}"


def switch_on(arguments: Sequence[str], switches: set[str]) -> list[str]:
    """`--flag` without a value as `--flag True`, and `--flag true` as W&B sweeps write it, too."""
    given: list[str] = []
    for argument in [*arguments, ""]:
        if given and given[-1] in switches:
            if argument in ("true", "false", "True", "False"):
                argument = argument.capitalize()
            else:
                given.append("True")
        given.append(argument)
    return given[:-1]


def refuse_secrets(arguments: Sequence[str]) -> None:
    """Raise UserError for a token or password among the flags, since trackers and process lists show them."""
    for flag, value in itertools.pairwise(["", *arguments]):
        if SECRET.search(value):
            raise UserError(
                f"{flag} {redact(value)}: a secret does not belong on the command line or in a YAML file, where logs and "
                "trackers keep it. Use `hf auth login` or HF_TOKEN for a token, HF_ENDPOINT for an address with a password; "
                "and revoke this one."
            )


def last_value(arguments: Sequence[str], flag: str) -> str | None:
    """The value of the last `flag` among the arguments; None if it is absent or None."""
    values = [value for name, value in itertools.pairwise(arguments) if name == flag]
    return values[-1] if values and values[-1] != "None" else None


def expand_config(arguments: list[str]) -> list[str]:
    """Replace `--config FILE` by the options of the file, before all other flags, so that flags win."""
    if "--config" not in arguments:
        return arguments
    at = arguments.index("--config")
    require(at + 1 < len(arguments), "--config takes the path of a YAML file")
    return [*as_flags(read_yaml(Path(arguments[at + 1]))), *arguments[:at], *arguments[at + 2 :]]


def as_flags(options: dict[str, list[str]]) -> list[str]:
    return [part for name, values in options.items() for part in (f"--{name}", *values)]


def read_yaml(path: Path) -> dict[str, list[str]]:
    """The options of a YAML file and their values as text, so that both sources of options have the same types.

    Raises UserError if the file is missing, is not YAML, is not a flat mapping, or has an option twice.
    """
    require(path.is_file(), f"--config {path}: no such file")
    try:
        node = yaml.compose(path.read_text(encoding="utf-8"), yaml.BaseLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path} is not YAML: {error}") from None
    require(isinstance(node, yaml.MappingNode | None), f"--config {path}: expected lines of `option: value`")
    options: dict[str, list[str]] = {}
    lines: dict[str, int] = {}
    for key, value in node.value if node else ():
        items = value.value if isinstance(value, yaml.SequenceNode) else [value]
        flat = all(isinstance(part, yaml.ScalarNode) for part in (key, *items))
        require(flat, f"--config {path}: {key.value} holds nested options; write them flat, unindented")
        name, line = key.value.replace("-", "_"), key.start_mark.line + 1
        first = lines.setdefault(name, line)
        require(first == line, f"--config {path}: {key.value} stands in lines {first} and {line}; remove one of them")
        options[name] = [
            item.value if item.style else YAML_SPELLING.get(item.value.lower(), item.value) for item in items
        ]
    return options


def save_config(config: Any, path: Path) -> None:
    """Write all options as flat YAML that `load_config` reads back to an equal configuration."""
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in flatten(config).items()}
    path.write_text(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True), encoding="utf-8")


def load_config(kind: type[Config], path: Path) -> Config:
    """Read what `save_config` wrote."""
    return parse_cli(kind, ["--config", str(path)])
