"""Options from flags and YAML files, and back: a file is a list of flags, and flags given by hand win.

Nothing heavy is imported here, so that `--help` and a misspelt flag answer at once.
"""

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
_SPELLING = {"null": "None", "~": "None", "": "None", "true": "True", "false": "False"}
_BOOLEANS = {"True": "True", "False": "False", "true": "True", "false": "False"}


class TextLoader(yaml.BaseLoader):
    """Reads every scalar as text, so that the flags' types rule; unquoted null, true and false as flags spell them."""

    def construct_scalar(self, node: yaml.ScalarNode) -> str:
        text = super().construct_scalar(node)
        return text if node.style else _SPELLING.get(text.lower(), text)


def parse_cli(kind: type[Config], argv: Sequence[str] | None = None) -> Config:
    """Read flags, with the YAML file behind `--config` first, and before it what `kind` says that they imply.

    Ends the process with code 2 and a message, as argparse does, when an option is unknown or takes no such value.
    """
    given = [part for item in (sys.argv[1:] if argv is None else argv) for part in split_flag(item)]
    given = switch_on(given, set(switches(kind)))
    try:
        arguments = expand_config(given)
        refuse_secrets(arguments)
        implied = getattr(kind, "implied_flags", None)
        arguments = [*(implied(arguments) if implied else ()), *arguments]
        return tyro.cli(
            kind,
            args=arguments,
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagConversionOff),
            use_underscores=True,
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except SystemExit as ended:
        if ended.code and "--config" in given:
            print(f"(with the options of --config {last_value(given, '--config')})", file=sys.stderr)
        raise


def parse_command(kinds: dict[str, Any], argv: Sequence[str] | None = None) -> Any:
    """Read a command of `kinds` and its flags, as `hub.py import FOLDER --repo_id NAME`; ends with code 2 as above."""
    arguments = [part for item in (sys.argv[1:] if argv is None else argv) for part in split_flag(item)]
    try:
        refuse_secrets(arguments)
        return tyro.extras.subcommand_cli_from_dict(
            kinds,
            args=arguments,
            description="Models and data sets on machines that cannot reach the Hub.",
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagConversionOff),
            use_underscores=True,
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def refuse_secrets(arguments: Sequence[str]) -> None:
    """Raise UserError for a token or password among the flags: trackers and process lists show them to everyone."""
    for flag, value in itertools.pairwise(["", *arguments]):
        if SECRET.search(value):
            raise UserError(
                f"{flag} {redact(value)}: a secret does not belong on the command line or in a YAML file, where "
                "logs and trackers keep it. Use `hf auth login` or HF_TOKEN for a token, HF_ENDPOINT for an address with a "
                "password; and take this one back."
            )


def split_flag(argument: str) -> list[str]:
    """`--some-flag=value` as `--some_flag` and `value`: one spelling for all that follows."""
    if not argument.startswith("--"):
        return [argument]
    flag, *value = argument.split("=", 1)
    return [f"--{flag[2:].replace('-', '_')}", *value]


def switches(kind: Any) -> Iterator[str]:
    """The options of `kind`, sections included, that are on or off."""
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(field.default_factory):
            yield from switches(field.default_factory)
        elif isinstance(field.default, bool):
            yield f"--{field.name}"


def switch_on(arguments: Sequence[str], names: set[str]) -> list[str]:
    """A switch without a value is on: `--flag` as `--flag True`, which is what sweeps write."""
    given = []
    for argument, following in itertools.pairwise([*arguments, ""]):
        given += [argument, "True"] if argument in names and following not in _BOOLEANS else [argument]
    return [
        _BOOLEANS.get(item, item) if before in names else item
        for before, item in zip(["", *given], given, strict=False)
    ]


def last_value(arguments: Sequence[str], flag: str) -> str | None:
    """What the last `flag` among the arguments is set to; None when it is absent, or set to None."""
    values = [value for name, value in itertools.pairwise(arguments) if name == flag]
    return values[-1] if values and values[-1] != "None" else None


def expand_config(arguments: list[str]) -> list[str]:
    """Put the flags of the `--config` file in its place but before all others, so that flags win."""
    if "--config" not in arguments:
        return arguments
    at = arguments.index("--config")
    require(at + 1 < len(arguments), "--config takes the path of a YAML file")
    return [*flags_from_yaml(Path(arguments[at + 1])), *arguments[:at], *arguments[at + 2 :]]


def flags_from_yaml(path: Path, only: frozenset[str] | None = None) -> Iterator[str]:
    """A YAML file as the list of flags it stands for.

    Raises UserError when the file is missing, is not YAML, or is not a flat mapping.
    """
    require(path.is_file(), f"--config {path}: no such file")
    try:
        text = path.read_text(encoding="utf-8")
        settings, node = yaml.load(text, TextLoader), yaml.compose(text, TextLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path} is not YAML: {error}") from None
    require(isinstance(settings or {}, dict), f"--config {path}: expected lines of `option: value`")
    refuse_twice(path, node)
    for key, value in (settings or {}).items():
        items = value if isinstance(value, list) else [value]
        flat = all(isinstance(item, str) for item in items)
        require(flat, f"--config {path}: {key} holds nested options; write them flat, unindented")
        if only is None or key in only:
            yield from (*split_flag(f"--{key}"), *items)


def refuse_twice(path: Path, node: yaml.Node | None) -> None:
    """Raise UserError for an option that a YAML file has twice: YAML itself takes the last without a word."""
    lines: dict[str, int] = {}
    for key, _ in node.value if node else []:
        line = key.start_mark.line + 1
        first = lines.setdefault(key.value.replace("-", "_"), line)
        require(first == line, f"--config {path}: {key.value} stands in lines {first} and {line}; remove one of them")


def save_config(config: Any, path: Path) -> None:
    """Write all options as flat YAML that `--config` reads back to an equal configuration."""
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in flatten(config).items()}
    path.write_text(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True), encoding="utf-8")


def load_config(kind: type[Config], path: Path) -> Config:
    """Read what `save_config` wrote."""
    return parse_cli(kind, ["--config", str(path)])
