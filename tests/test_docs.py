"""The documentation: every link, path, flag and command exists, and the Chinese pages have the code of the English ones."""

import dataclasses
import itertools
import re
import shlex
import typing
from collections import Counter
from pathlib import Path

import pytest

from benchmarks import bench
from lib.config.cli import dump_config, parse_cli, parse_command
from lib.config.compare import CompareConfig
from lib.config.eval import EvalConfig
from lib.config.hub import COMMANDS as HUB_COMMANDS
from lib.config.predict import PredictConfig
from lib.config.sweep import SweepConfig
from lib.config.train import TrainConfig
from tests.conftest import ROOT

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
TRANSLATIONS = [("README.md", "README.zh.md"), ("docs/note.md", "docs/note.zh.md")]
SCRIPTS = {
    **{"train.py": TrainConfig, "eval.py": EvalConfig, "predict.py": PredictConfig},
    **{"compare.py": CompareConfig, "sweep.py": SweepConfig},
}
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
FOLDERS = "lib|tests|benchmarks|recipes|accelerate_configs|docs"
OF_OTHER_PROGRAMS = {
    "accelerate launch": "--config_file --multi_gpu --num_processes --main_process_port --quiet --cpu --num_machines "
    "--machine_rank --main_process_ip --rdzv_conf",
    "accelerate launch, refused": "--use_fsdp --use_deepspeed --use_megatron_lm --dynamo_backend --mpirun_hostfile --tpu",
    "accelerate launch, shards": "--fsdp_version --max_restarts --parallelism_config_dp_replicate_size "
    "--parallelism_config_dp_shard_size",
    "hf": "--local-dir --repo-type --yes",
    "torchrun": "--max-restarts --nnodes --nproc-per-node --rdzv-backend --rdzv-id --rdzv-endpoint --rdzv-conf --local-addr",
    "sbatch, ruff": "--requeue --check",
    "every script": "--config --help",
    "the note's script": "--epoch --card_id",
    "Trainer and its examples": "--fp16 --gradient_accumulation_steps --dev_file --push_to_hub",
}


def text_of(path: Path | str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def fences(page: str, language: str) -> list[str]:
    return [body for _, name, body in FENCE.findall(page) if name == language]


def spans(page: str) -> list[str]:
    """Code within lines; a span may go on in the next line."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", FENCE.sub("", page))]


def without_comments(code: str) -> list[str]:
    lines = [re.sub(r"(^|\s+)# .*", "", line).rstrip() for line in code.splitlines()]
    return [line for line in lines if line]


def commands(page: str) -> list[str]:
    """What the page says to type: the lines of its shell blocks, and code within lines that runs one of the scripts."""
    typed = [line for block in fences(page, "bash") for line in without_comments(block)]
    return typed + [span for span in spans(page) if re.match(r"(python|accelerate launch|[A-Z_]+=\S+) .*\.py", span)]


def script_and_flags(command: str) -> tuple[str, list[str]]:
    """The script that a command runs and what follows it; an empty name where it runs none."""
    found = re.search(r"(?:^|[ ])((?:train|eval|predict|hub|compare|sweep)\.py)(?: ([^|]*))?(?:$|\|)", command)
    return (found[1], shlex.split(found[2] or "")) if found else ("", [])


COMMANDS_OF_SCRIPTS = sorted(
    {
        command
        for path in PAGES
        for command in commands(text_of(path))
        if script_and_flags(command)[0] and "--help" not in command
    }
)


def anchors(page: str) -> set[str]:
    """The names that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def options_of(kind: type) -> set[str]:
    """The flags of a script or of one of its sections, with their short forms."""
    found = set()
    hints = typing.get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        section = dataclasses.is_dataclass(field.default_factory)
        found |= options_of(field.default_factory) if section else {f"--{field.name}"}  # type: ignore[arg-type]
        for note in getattr(hints[field.name], "__metadata__", ()):
            found |= set(getattr(note, "aliases", None) or ())
    return found


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_relative_link_leads_somewhere(path):
    for link in re.findall(r"\]\(([^)\s]+)\)", text_of(path)):
        if "://" not in link:
            target, _, anchor = link.partition("#")
            found = path.parent / target if target else path
            assert found.exists(), link
            assert not anchor or anchor in anchors(text_of(found)), link


@pytest.mark.parametrize("path", [path for path in PAGES if path.name != "CHANGELOG.md"], ids=lambda path: path.name)
def test_every_path_and_make_target_exists(path):
    page = text_of(path)
    code = "\n".join([*spans(page), *(body for _, _, body in FENCE.findall(page))])
    for name in re.findall(rf"(?<![\w/.-])(?:{FOLDERS})/[\w/.]*", code):
        assert "NAME" in name or (ROOT / name).exists(), name
    for target in re.findall(r"\bmake ([a-z][a-z-]*)", code):
        assert re.search(rf"^{target}:", text_of("Makefile"), re.MULTILINE), target


def test_every_name_said_to_be_in_a_file_is_in_it():
    found = re.findall(r"`(\w+)(?:\(\))?` (?:in|of) `([\w/]+\.py)`", text_of("CONTRIBUTING.md"))
    assert len(found) > 3
    for name, file in found:
        assert name in text_of(file), (name, file)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_flag_is_an_option(path):
    known = {f"--{name}" for name in bench.NUMBERS} | set(" ".join(OF_OTHER_PROGRAMS.values()).split())
    known |= set().union(*(options_of(kind) for kind in (*SCRIPTS.values(), *HUB_COMMANDS.values())))
    known |= set(re.findall(r'"(--\w+)"', "".join(text_of(file) for file in (ROOT / "benchmarks").glob("*.py"))))
    assert set(re.findall(r"(?<![\w-])--[a-zA-Z][\w-]*", text_of(path))) <= known


def test_pages_have_commands_for_every_script():
    for script in (*SCRIPTS, "hub.py"):
        found = sum(script_and_flags(command)[0] == script for command in COMMANDS_OF_SCRIPTS)
        assert found > (1 if script == "compare.py" else 4), script


@pytest.mark.parametrize("command", COMMANDS_OF_SCRIPTS)
def test_every_command_is_understood(command, tmp_path, monkeypatch):
    """That it does what the page says is tested where its options are; here, that none of its options is stale."""
    script, flags = script_and_flags(command)
    for flag, value in itertools.pairwise(flags):
        folder = {"--run": Path(value), "--config": Path(value).parent}.get(flag)
        if folder and folder.parts[0] == "outputs":
            (tmp_path / folder).mkdir(parents=True)
            (tmp_path / folder / "config.yaml").write_text(dump_config(TrainConfig()), encoding="utf-8")
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(tmp_path)
    if script == "hub.py":
        assert parse_command(HUB_COMMANDS, flags)
    else:
        assert parse_cli(SCRIPTS[script], flags)


def test_loop_change_of_the_readme_fits_train_py_and_is_tested():
    (diff,) = fences(text_of("README.md"), "diff")
    lines = diff.splitlines()
    assert all(line[1:] in text_of("train.py") for line in lines if line[0] in " -")
    added = [line[1:] for line in lines if line[0] == "+"]
    assert added
    assert all(line in text_of("tests/test_change_the_loop.py") for line in added)


@pytest.mark.parametrize(("english", "chinese"), TRANSLATIONS)
def test_both_languages_name_the_same_commands(english, chinese):
    pages = text_of(english), text_of(chinese)
    blocks = [[(name, without_comments(body)) for _, name, body in FENCE.findall(page)] for page in pages]
    assert len(blocks[0]) > 4
    for one, other in zip(*blocks, strict=True):
        assert one == other
    sections = [[Counter(spans(part)) for part in re.split(r"^## ", page, flags=re.MULTILINE)] for page in pages]
    for one, other in zip(*sections, strict=True):
        assert one == other
