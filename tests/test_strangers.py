"""A data set whose labels, texts, columns and files try to be more than text, through the real scripts."""

import csv
import json
import re
from pathlib import Path

import pytest
import yaml

from lib.errors import printable
from tests.conftest import Command, read_lines, sentences

HOSTILE = "\x1b]0;x\x07<script>alert(1)</script>\r\n- forged |`$\\frac$\u202e"
LABELS = (f"=cmd|' /C calc'!A0{HOSTILE}", f"@good{HOSTILE}", f"--- {HOSTILE}")
TEXT, LABEL = f"te{HOSTILE}xt", f"la{HOSTILE}bel"
FILE = "re\x1b]0;x\x07\r\n- forged <script> |`$x$\u202eviews"


def write_hostile(path: Path, count: int, seed: int = 0) -> Path:
    names = dict(zip(("bad", "good", "mixed"), LABELS, strict=True))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow((TEXT, LABEL, "id"))
        writer.writerows((f"{text} ={HOSTILE}", names[label], f"=1{HOSTILE}") for text, label in sentences(count, seed))
    return path


def check_screen(text: str, progress: bool = False) -> None:
    """Nothing moves the cursor, and no line is another one than the program's."""
    for line in text.split("\n"):
        assert printable(line) == line, ascii(line)
        assert not line.startswith("- forged"), text


def check_picture(path: Path) -> None:
    assert path.read_bytes()[:4] == b"\x89PNG"


def check_card(path: Path) -> None:
    """The front matter is YAML with our keys, the rest has no HTML, no line of others, and whole tables."""
    text = path.read_text(encoding="utf-8")
    check_screen(text)
    head, body = text.removeprefix("---\n").split("\n---\n", 1)
    known = {"library_name", "pipeline_tag", "base_model", "datasets", "metrics", "model-index", "tags"}
    assert set(yaml.safe_load(head)) <= known
    in_code = re.sub(r"(`+)[^`](?:.*?[^`])?\1(?!`)|```.*?```", "", body, flags=re.DOTALL)
    assert "<" not in in_code
    for header, *rows in (block.strip().split("\n") for block in re.findall(r"(?:^\|.*\n)+", body, re.MULTILINE)):
        bars = [len(re.findall(r"(?<!\\)\|", line)) for line in (header, *rows)]
        assert len(set(bars)) == 1, header


@pytest.fixture
def hostile(tmp_path: Path) -> list[str]:
    train, test = (write_hostile(tmp_path / f"{FILE}{n}.csv", count, n) for n, count in ((0, 60), (1, 24)))
    files = ["--train_file", train, "--test_file", test, "--text_columns", TEXT, "--label_column", LABEL]
    return [
        *map(str, files),
        "--max_steps",
        "2",
        "--bs",
        "8",
        "--problem_type",
        "single_label_classification",
        "--save_total_limit",
        "0",
        "--report_to",
        "none",
    ]


def test_hostile_names_are_text_wherever_they_are_printed_or_written(
    call: Command, roberta: Path, hostile: list[str], tmp_path: Path
) -> None:
    runs = [f"run{seed}\x1b[2J\n- forged" for seed in (1, 2)]
    for run, rate in zip(runs, ("1e-3", "1e-2"), strict=True):
        rate, *more = (rate, "--class_weights", f"{LABELS[0]}=2") if run == runs[1] else (rate,)
        notes = [*more, "--notes", HOSTILE, "--tags", "=1\n- forged"]
        done = call("train.py", "--model", roberta, *hostile, "--output_dir", run, "--lr", rate, *notes)
        check_screen(done.stdout + done.stderr)
    run = tmp_path / runs[0]
    check_card(run / "model" / "README.md")
    scored = call("eval.py", "--run", run)
    check_screen(scored.stdout + scored.stderr)
    assert {row["gold"] for row in read_lines(run / "eval-test" / "predictions.jsonl")} == set(LABELS)
    compared = call("compare.py", *runs, "--output_dir", "compared\x1b[2J\n- forged")
    check_screen(compared.stdout + compared.stderr)
    page = (tmp_path / "compared\x1b[2J\n- forged" / "comparison.md").read_text(encoding="utf-8")
    check_screen(page)
    assert page.count("```") == 2
    check_picture(tmp_path / "compared\x1b[2J\n- forged" / "comparison.png")
    data = ["--input", str(tmp_path / f"{FILE}1.csv"), "--id_column", "id"]
    printed = call("predict.py", "--model", run, *data)
    check_screen(printed.stdout + printed.stderr)
    assert set(json.loads(printed.stdout.splitlines()[0])["probabilities"]) == set(LABELS)
    written = call("predict.py", "--model", run, *data, "--output", f"out{FILE}.csv")
    check_screen(written.stdout + written.stderr)
    rows = list(csv.reader((tmp_path / f"out{FILE}.csv").open(encoding="utf-8", newline="")))
    assert [cell for row in rows for cell in row if cell[:1] in ("=", "@", "+") or cell.startswith("--")] == []


def test_hostile_names_in_a_refusal_are_text(run: Command, roberta: Path, hostile: list[str]) -> None:
    missing = ["--train_file", f"{FILE}9.csv", *hostile[2:]]
    done = run("train.py", *missing, "--model", roberta, code=2)
    check_screen(done.stdout + done.stderr)
    assert "\\x1b]0;x\\x07" in done.stderr
