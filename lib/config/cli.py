"""Options from the command line and from YAML files, and back to YAML.

A YAML file is a list of flags: the same code reads both, and flags on the command line win. Nothing heavy is imported
here, so `--help` and a misspelt flag answer at once. tyro writes the help; the values are read here, so that every mistake
is one line that names the flag, or the file and its line.
"""

import contextlib
import dataclasses
import difflib
import itertools
import re
import sys
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro
import yaml

from lib.config.limits import INPUT_NAME, FileName, expand_home, shorten, strip_annotations
from lib.config.other_names import OTHER_NAMES
from lib.config.sections import flatten
from lib.errors import SECRET, SECRET_FLAG, UserError, first_line, hide_secrets, printable, redact, require
from lib.runtime.screen import speaks
from lib.runtime.signals import is_first_to_fail
from lib.runtime.streams import Stream

Config = TypeVar("Config")

TYRO: dict[str, Any] = {
    "config": (tyro.conf.OmitArgPrefixes, tyro.conf.FlagConversionOff),
    "use_underscores": True,
    "registry": tyro.constructors.ConstructorRegistry(),
}
"""Flat flags, `--learning_rate` and not `--optim.learning-rate`; booleans take True or False."""

YAML_SPELLING = {"null": "None", "~": "None", "": "None", "true": "True", "false": "False"}
"""Unquoted YAML scalars that flags spell in another way."""

TAGS = {f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "seq")}
"""YAML's own types; what a value means is decided by its option."""
MOST_BYTES = 2**24
"""Of a YAML file."""

TRUSTED = ("hub_endpoint", "send_token_to_mirror", "trust_remote_code", "allow_pickle")
"""Options that let others read the user's token, or run code: that a file turns them on is said."""

TEXTS = ("texts", "question", "context", "explain_tokens", "candidate_labels")
"""Options of predict.py that hold data, whatever it looks like."""


@dataclasses.dataclass(frozen=True)
class Option:
    """An option of a script: the name of its field, its type, whether it may be None, and whether it is a path."""

    name: str
    kind: Any
    nullable: bool = False
    positional: bool = False
    is_path: bool = False

    @property
    def takes_many(self) -> bool:
        return typing.get_origin(self.kind) is tuple


@dataclasses.dataclass(frozen=True)
class Given:
    """An option as it was given: the flag as written, its values as text, and `FILE, line N` if it stands in a file."""

    flag: str
    values: list[str]
    place: str = ""


# ---------------------------------------------------------------------------------------------------- reading


def parse_cli(kind: type[Config], argv: Sequence[str] | None = None) -> Config:
    """Read the options of the dataclass `kind` from `argv` (default: the command line).

    Flags win over the YAML file of `--config`, which wins over what `kind.implied(values)` returns, if `kind` has such a
    method. Ends the process with code 2 and a message if an option is unknown or has a wrong value.
    """
    with ending_on_user_error():
        return parse(kind, sys.argv[1:] if argv is None else argv, lambda: tyro.cli(kind, args=["--help"], **TYRO))


def parse_command(kinds: dict[str, Any], argv: Sequence[str] | None = None) -> Any:
    """Read one of several commands and its options, such as `hub.py import FOLDER --repo_id NAME`.

    Ends the process with code 2 and a message if the command or an option is unknown or has a wrong value.
    """
    command, *arguments = [*(sys.argv[1:] if argv is None else argv)] or [""]

    def show_help() -> None:
        asked = [command, "--help"] if command in kinds else ["--help"]
        description = "Models and data sets on machines that cannot reach the Hub."
        tyro.extras.subcommand_cli_from_dict(kinds, args=asked, description=description, **TYRO)

    with ending_on_user_error():
        if command in ("-h", "--help"):
            print_help(show_help)
        close = difflib.get_close_matches(command, kinds, 1)
        hint = f"perhaps you meant {close[0]}" if close else f"the commands are {', '.join(kinds)}"
        require(command in kinds, f"{shorten(command) or 'no command'}: {hint}; see --help")
        return parse(kinds[command], arguments, show_help)


def parse(kind: type[Config], argv: Sequence[str], show_help: Any = None) -> Config:
    """Read `argv`; `show_help` prints the help and ends the process. Raises UserError for an option that is wrong."""
    hide_secrets()
    options = options_of(kind)
    on_command_line = group(argv, options)
    if any(given.flag in ("-h", "--help") for given in on_command_line):
        print_help(show_help)
    config = configure(kind, list(expand_config(on_command_line)))
    if files := [given.values[0] for given in on_command_line if given.flag == "--config"]:
        tell_trusted(config, files[0], on_command_line)
    return config


def configure(kind: type[Config], found: Sequence[Given]) -> Config:
    """The dataclass `kind` with the options that were found; later ones win. A value is never read as a flag.

    Raises UserError for an option that is unknown or has a wrong value.
    """
    options = options_of(kind)
    values: dict[str, Any] = {}
    places: dict[str, str] = {}

    def take(given: Given) -> None:
        check_text(given, options)
        option = find_option(given, options)
        before = places.get(option.name)
        require(
            not (before and given.place),
            f"--{option.name} stands in {before}, and in {given.place}; remove one of them",
        )
        values[option.name] = read_values(given, option)
        places[option.name] = given.place

    try:
        for given in found:
            take(given)
        chosen = dict(values)
        for given in getattr(kind, "implied", lambda _: ())(chosen):
            if options[given.flag].name not in chosen:
                take(given)
        return build(kind, values)
    except UserError as error:
        named = [places[name] for name in re.findall(r"--(\w+)", str(error)) if places.get(name)]
        new = [place for place in dict.fromkeys(named) if place not in str(error)]
        raise UserError(printable(f"{error} ({'; '.join(new)})" if new else str(error))) from None


def tell_trusted(config: Any, file: str, on_command_line: Sequence[Given]) -> None:
    """Say on stderr which of the TRUSTED options a YAML file has turned on, once for all processes."""
    flags = {given.flag for given in on_command_line}
    chosen = [name for name in TRUSTED if flatten(config).get(name) and f"--{name}" not in flags]
    if chosen and speaks():
        print(f"--config {printable(file)} sets {', '.join(chosen)}", file=sys.stderr)


@contextlib.contextmanager
def ending_on_user_error() -> Iterator[None]:
    """End the process with code 2, as argparse does, and with the message of a UserError."""
    try:
        yield
    except UserError as error:
        if is_first_to_fail():
            print(f"error: {printable(redact(str(error)))}", file=sys.stderr)
        raise SystemExit(2) from None


def options_of(kind: Any) -> dict[str, Option]:
    """The options of a dataclass and its sections, by each of their flags; positional ones by their names in capitals."""
    options: dict[str, Option] = {}
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(field.default_factory):
            options |= options_of(field.default_factory)
            continue
        beside = getattr(field.type, "__metadata__", ())
        is_path = any(isinstance(item, FileName) and item.is_path for item in beside)
        option = Option(field.name, *strip_annotations(field.type), tyro.conf.Positional in beside, is_path)
        names = [f"--{field.name}", *itertools.chain(*(getattr(item, "aliases", None) or () for item in beside))]
        options |= dict.fromkeys([field.name.upper()] if option.positional else names, option)
    return options


def group(arguments: Sequence[str], options: dict[str, Option]) -> list[Given]:
    """The arguments as flags with their values, in order; what belongs to no flag is given to the positional option.

    `--some-flag=value` is `--some_flag` with that value, a switch without a value is True, and `--` ends the flags.
    """
    found: list[Given] = []
    positional = next((flag for flag, option in options.items() if option.positional), None)
    strays = Given(positional or "", [])
    waiting = list(arguments)[::-1]
    while waiting:
        argument = waiting.pop()
        if argument == "--":
            if waiting and not positional:
                raise UserError(f"{shorten(waiting[-1])!r} after --: expected a flag, such as --seed 7")
            strays.values.extend(waiting[::-1])
            break
        if argument in ("-h", "--help"):
            return [Given(argument, [])]
        if not is_flag(argument):
            name = re.sub(
                r"^[-\u2010-\u2015\u2212\uff0d]+|=.*", "", argument
            )  # after -, or the dash that an editor made of --
            misspelt = f"--{name.replace('-', '_')}"
            if not positional or (misspelt in options and not argument.startswith(name)):
                hint = f"; perhaps you meant {misspelt}" if misspelt in options else ""
                place = f" after {found[-1].flag}" if found else ""
                raise UserError(f"{shorten(argument)!r}{place}: expected a flag, such as --seed 7{hint}")
            strays.values.append(argument)
            continue
        name, attached, value = argument[2:].partition("=")
        flag = f"--{name.replace('-', '_')}"
        option = options.get(flag)
        values = [value] if attached else []
        if option is None:  # such as --config, or a flag that is refused later
            values += [waiting.pop()] if waiting and not attached and not is_flag(waiting[-1]) else []
        elif option.takes_many:
            while waiting and waiting[-1] != "--" and not is_flag(waiting[-1]):
                values.append(waiting.pop())
        elif option.kind is bool:
            spelled = waiting[-1].lower() in ("true", "false") if waiting else False
            takes = not attached and waiting and (spelled or (not positional and not is_flag(waiting[-1])))
            values = [waiting.pop()] if takes else values or ["True"]
            values = [item.capitalize() if item.lower() in ("true", "false") else item for item in values]
        elif not attached and waiting and not is_flag(waiting[-1]):
            values.append(waiting.pop())
        found.append(Given(flag, values))
    return [*found, strays] if strays.values else found


def is_flag(argument: str) -> bool:
    """Whether an argument is a flag, not a value such as -1 or a text that begins with a hyphen."""
    return argument.startswith("--") and (len(argument) > 2) and not argument[2].isspace()


def check_text(given: Given, options: dict[str, Option]) -> None:
    """Raise UserError for a secret among the values, since trackers and process lists show them, and for broken text."""
    option = options.get(given.flag)
    for value in given.values:
        try:
            value.encode()
        except UnicodeEncodeError:
            raise UserError(f"{given.flag} {shorten(value)!a} is not UTF-8{in_place(given)}") from None
        require("\0" not in value, f"{given.flag} {shorten(value)!r} holds a character of number 0{in_place(given)}")
        if option is not None and option.name in TEXTS:
            continue
        if SECRET.search(value) or (option is None and SECRET_FLAG.fullmatch(given.flag)):
            shown = redact(value) if SECRET.search(value) else "***"
            raise UserError(
                f"{given.flag} {shorten(shown)}{in_place(given)}: a secret does not belong on the command line or in a YAML "
                "file, where logs and trackers keep it. Use `hf auth login` or HF_TOKEN for a token, WANDB_API_KEY or "
                "`wandb login` for W&B, HF_ENDPOINT for an address with a password; and revoke this one."
            )


def find_option(given: Given, options: dict[str, Option]) -> Option:
    """The option of a flag. Raises UserError with what was probably meant if there is none."""
    if given.flag in options:
        return options[given.flag]
    name, where = given.flag[2:], in_place(given)
    if given.flag == "--config":
        raise UserError(f"--config {shorten(' '.join(given.values))}{where}: a YAML file names no other one")
    other = OTHER_NAMES.get(name.lower())
    if other and other.startswith("nothing: "):
        raise UserError(f"{given.flag}{where} is no option here, and is not needed: {other.removeprefix('nothing: ')}")
    if other:
        raise UserError(f"{given.flag}{where} is no option here; use {other}")
    negated = options.get(f"--{name.removeprefix('no_')}")
    if negated and negated.kind is bool:
        raise UserError(f"{given.flag}{where} is no option here; use --{negated.name} False")
    close = difflib.get_close_matches(given.flag.lower(), [flag for flag in options if flag.startswith("--")], 3, 0.6)
    hint = f"Perhaps you meant: {', '.join(close)}" if close else "--help lists the options"
    raise UserError(f"{shorten(given.flag)}{where} is no option here. {hint}")


def read_values(given: Given, option: Option) -> Any:
    """The value of an option from its text. Raises UserError for text that is not of the option's type."""
    flag = option.name.upper() if option.positional else f"--{option.name}"
    values, kind = given.values, option.kind
    if option.is_path:
        values = [expand_home(flag, value) for value in values]
    if option.nullable and values == ["None"]:
        return None
    if option.takes_many:
        return tuple(values)
    choices = {"True": True, "False": False} if kind is bool else {name: name for name in typing.get_args(kind)}
    kinds = {int: "a whole number, such as 7", float: "a number, such as 0.1", str: "one value"}
    wanted = kinds.get(kind) or f"one of {', '.join(choices)}"
    got = " ".join(map(repr, map(shorten, values))) or "nothing"
    wrong = UserError(f"{flag} takes {wanted}; got {got}{in_place(given)}")
    if len(values) != 1 or (choices and values[0] not in choices) or (values == ["None"] and given.place):
        raise wrong
    try:
        return choices[values[0]] if choices else kind(values[0])
    except ValueError:
        raise wrong from None


def build(kind: type[Config], values: dict[str, Any]) -> Config:
    """The dataclass and its sections with these values by name. Raises UserError for a value that is missing."""
    arguments = {}
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        if dataclasses.is_dataclass(field.default_factory):
            arguments[field.name] = build(field.default_factory, values)
        elif field.name in values:
            arguments[field.name] = values[field.name]
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            positional = tyro.conf.Positional in getattr(field.type, "__metadata__", ())
            raise UserError(f"{field.name.upper() if positional else f'--{field.name}'} is missing; see --help")
    return kind(**arguments)


def in_place(given: Given) -> str:
    return f" ({given.place})" if given.place else ""


# ---------------------------------------------------------------------------------------------------- help


@TYRO["registry"].primitive_rule
def describe_type(info: Any) -> Any:
    """Types in the help as people write them: without None, and `STR ...` for several."""
    registry: Any = tyro.constructors.ConstructorRegistry
    kind = info.type
    inner, nullable = strip_annotations(kind)
    if not nullable and typing.get_origin(kind) is not tuple:
        return None
    if nullable:
        spec = registry.get_primitive_spec(tyro.constructors.PrimitiveTypeInfo.make(inner, info.markers))
    else:
        spec = registry.get_primitive_spec(tyro.constructors.PrimitiveTypeInfo.make(list[str], info.markers))
        spec = dataclasses.replace(spec, metavar="STR ...")
    return dataclasses.replace(
        spec,
        is_instance=lambda _: True,
        str_from_instance=lambda value: list(map(str, value if isinstance(value, tuple) else [value])) or ["none"],
    )


def print_help(show_help: Any) -> typing.NoReturn:
    """Print the help and end the process."""
    Stream.only_prints = True
    with contextlib.suppress(SystemExit):
        show_help()
    sys.stdout.flush()
    raise SystemExit(0)


# ---------------------------------------------------------------------------------------------------- YAML


def expand_config(found: list[Given]) -> Iterator[Given]:
    """Replace `--config FILE` by the options of the file, before all other flags, so that flags win."""
    files = [given.values for given in found if given.flag == "--config"]
    require(len(files) <= 1, "--config is given twice; it takes one YAML file")
    if files:
        require(len(files[0]) == 1, "--config takes the path of a YAML file")
        yield from read_yaml(files[0][0])
    yield from (given for given in found if given.flag != "--config")


class FlatLoader(yaml.BaseLoader):
    """Reads every scalar as text, and stops where options are nested: no depth of nesting costs time, or Python's stack."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.depth += 1
        if self.depth > 4:
            problem = "it is nested too deeply; write lines of `option: value`"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=self.peek_event().start_mark)
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1


def read_yaml(file: str, flag: str = "--config") -> list[Given]:
    """The options of a YAML file, which `flag` names: values as text, so that files and flags have the same types.

    Raises UserError, with the line, if the file is missing, is not YAML, is not a flat mapping, or has an option twice.
    """
    INPUT_NAME.check(flag, file)
    file = expand_home(flag, file)
    path, name = Path(file), f"{flag} {printable(file)}"
    require(path.is_file(), f"{name}: no such file")
    try:
        require(
            path.stat().st_size <= MOST_BYTES, f"{name} has more than {MOST_BYTES:,} bytes, and is no file of options"
        )
        node = yaml.compose(path.read_text(encoding="utf-8"), FlatLoader)
    except yaml.MarkedYAMLError as error:  # its text shows the line, which may hold a secret
        mark = error.problem_mark or error.context_mark
        place = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{name}{place} is not YAML: {error.problem or error.context}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{name} is not YAML: {first_line(error)}") from None
    except OSError as error:
        raise UserError(f"{name} cannot be read: {error.strerror}") from None
    require(isinstance(node, yaml.MappingNode | None), f"{name}: expected lines of `option: value`")
    options: list[Given] = []
    lines: dict[str, int] = {}
    for key, value in node.value if node else ():
        line = key.start_mark.line + 1
        require(isinstance(key, yaml.ScalarNode), f"{name}, line {line}: expected `option: value`")
        shown = printable(shorten(key.value))
        items = value.value if isinstance(value, yaml.SequenceNode) else [value]
        flat = all(isinstance(part, yaml.ScalarNode) for part in items)
        require(flat, f"{name}, line {line}: {shown} holds nested options; write them flat, unindented")
        tag = next((part.tag for part in (key, value, *items) if part.tag not in TAGS), None)
        require(
            tag is None,
            f"{name}, line {line}: {shown} has the tag {tag}; options are plain text, numbers, lists",
        )
        key_flag = f"--{key.value.removeprefix('--').replace('-', '_')}"
        require(
            key_flag not in lines,
            f"{name}: {shown} stands in lines {lines.get(key_flag)} and {line}; remove one of them",
        )
        lines[key_flag] = line
        values = [item.value if item.style else YAML_SPELLING.get(item.value.lower(), item.value) for item in items]
        options.append(Given(key_flag, values, f"{printable(file)}, line {line}"))
    return options


def dump_config(config: Any) -> str:
    """All options as flat YAML that `load_config` reads back to an equal configuration."""
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in flatten(config).items()}
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)


def plain_options(text: str) -> dict[str, Any]:
    """The options in a text that `dump_config` wrote, as plain values; none in another text."""
    try:
        found = yaml.safe_load(text)
    except (ValueError, yaml.YAMLError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def is_saved_config(path: Path) -> bool:
    """Whether a file holds all options of a run, as `dump_config` writes them; a few written by hand do not count."""
    try:
        found = {given.flag for given in read_yaml(str(path))}
    except UserError:
        return False
    return {"--model", "--train_batch_size", "--save_total_limit", "--resume_from_checkpoint"} <= found


def load_config(kind: type[Config], path: Path) -> Config:
    """Read what `dump_config` wrote. Raises UserError for an option that this version does not have or take."""
    return configure(kind, read_yaml(str(path)))
