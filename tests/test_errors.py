"""Secrets are found wherever they stand in a text, and ordinary text is left as it is."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from lib.config.cli import parse_cli
from lib.config.predict import PredictConfig
from lib.config.train import TrainConfig
from lib.errors import one_message, printable, redact
from tests.conftest import ROOT

KEY = "Zx9Qw8Er7Ty6Ui5Op4As3Df2"
HEX = "0123456789abcdef0123456789abcdef01234567"

SECRETS = [
    *(f"https://{KEY}@host", f"https://user:{KEY}@host/x", f"https://:{KEY}@h", f"socks5://u:{KEY}@h:1080"),
    *(
        f"https://u:pa/{KEY}@host",
        f"https://u:p@{KEY}@host/x",
        f"https://u:p#a?{KEY}@h.org",
        f"https://u:my {KEY}@h.org",
    ),
    *(f"http://u:123/{KEY}@mirror.org", f"https://h.org/?token={KEY}", f"https://h/x?a=1&access_token={KEY}&b=2"),
    *(f"https://h/?sig={KEY}", f"https://h/?api-key={KEY}", f"https://h/?X-Amz-Signature={HEX}", f"model?token={KEY}"),
    *(f"user:{KEY}@10.0.0.1", f"u:{KEY}@0.5.example", f"u:{KEY}@10:8080", f"u:{KEY}@k.org", f"u:{KEY}@host@0.5"),
    *(f"user:{KEY}@host", f"user:{KEY}@host:8080", f"u:p@{KEY}@host", f"u:p/{KEY}@host.org/x"),
    *(f"hf_{KEY}", f"my_hf_{KEY}", f"api_org_{KEY}", f"ghp_{KEY}", f"gho_{KEY}", f"github_pat_{KEY}_x", f"glpat-{KEY}"),
    *(f"wandb_v1_{KEY}", "AKIAABCDEFGHIJKLMNOP", f"sk-{KEY}", f"sk-proj-{KEY}-x", f"xoxb-{KEY}"),
    *(
        f"api_key={HEX}",
        f"key {HEX}",
        f"WANDB_API_KEY={HEX}",
        f"token={HEX[:32]}",
        f'"token": "{KEY}"',
        f"password: {KEY}",
    ),
    *(f"//u:{KEY}@host.org/x", f"me@corp.org:{KEY}@host.org", f"https://h/?jwt={KEY}", f"authorization: token {KEY}"),
    *(f"gsk_{KEY}", f"dckr_pat_{KEY}", f"ya29.{KEY}", f"SG.{KEY}.{KEY}"),
    *(f"Bearer {KEY}", f"Authorization: Basic {KEY}=="),
]
ORDINARY = [
    *(
        "write to a@b.com",
        HEX,
        HEX[:32],
        "data@v2/x.csv",
        "./a@b/c.csv",
        "C:/dir/a@b.csv",
        "C:\\a@b.csv",
        "mailto:a@b.com",
    ),
    *("https://example.com/@user", "https://example.com:8080/@user", "http://localhost:8080", "https://hf-mirror.com"),
    *(
        "task-glue-sst2-long-name-with-many-words-2024",
        "glue-mrpc-bert-base-uncased-seed-1",
        "sk-learn-baseline-for-glue",
    ),
    *(
        "see https://example.com:443 failed, ask admin@x.org",
        "https://h.org/a?b=c@d",
        "git@github.com:user/repo",
        "git@github.com:user/repo.git@v1",
    ),
    *("roberta-base", "user/name", "sk-roberta-base-finetuned-sst2", "token classification", "bearer of bad news"),
    *(
        "lr=1e-3 is-new",
        "pad_token=<pad>",
        "negative=2",
        "note: write a@b.com",
        "the tokenizer: could not",
        "key 12 of 40",
    ),
    *(
        "max_new_tokens=256",
        "num_hidden_layers=4",
        "monkey=12345678901234567",
        "2024-01-01 10:30 a@b.com",
        "hockey: 2-1 @home",
        "label:pos@0.5",
        "label:pos@0.5, then neg:x@10.",
        "docs:precision@10 and docs:recall@k",
        "http://localhost:8080 with f1@0.5",
        "a:b@95%",
    ),
]


@pytest.mark.parametrize("text", SECRETS)
def test_secret_is_redacted_and_refused_with_the_flag(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    secrets = (KEY, HEX[:32], "AKIAABCDEFGHIJKLMNOP")
    shown = redact(f"the server at {text} did not answer")
    assert not any(secret in shown for secret in secrets)
    (tmp_path / "recipe.yaml").write_text(f"seed: 7\nnotes: '{text}'\n")
    for arguments in (["--notes", text], [f"--hub-endpoint={text}"], ["--config", str(tmp_path / "recipe.yaml")]):
        with pytest.raises(SystemExit) as ended:
            parse_cli(TrainConfig, arguments)
        message = capsys.readouterr().err
        assert ended.value.code == 2
        assert "secret" in message
        assert "--notes" in message or "--hub_endpoint" in message
        assert not any(secret in message for secret in secrets)


@pytest.mark.parametrize("text", ORDINARY)
def test_ordinary_text_is_neither_redacted_nor_refused(text: str) -> None:
    assert redact(text) == text
    assert parse_cli(TrainConfig, ["--notes", text]).tracking.notes == text


@pytest.mark.parametrize("flag", ["--wandb_api_key", "--token", "--hub-token", "--password", "--hf_token"])
def test_value_of_a_flag_that_is_named_like_a_secret_is_never_shown(
    flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for value in ("hunter2", HEX):
        with pytest.raises(SystemExit):
            parse_cli(TrainConfig, [flag, value])
        message = capsys.readouterr().err
        assert value not in message
        assert flag.replace("-", "_").replace("__", "--", 1) in message


def test_texts_to_classify_are_data_whatever_they_look_like() -> None:
    for text in SECRETS:
        assert parse_cli(PredictConfig, [text]).inputs.texts == (text,)


def test_commits_are_not_taken_for_keys() -> None:
    parsed = parse_cli(TrainConfig, ["--model_revision", HEX, "--revision", HEX, "--dataset", "user/name"])
    assert (parsed.model.model_revision, parsed.data.revision) == (HEX, HEX)


def test_long_text_is_searched_in_bounded_time() -> None:
    started = time.perf_counter()
    for part in ("_", "a:", "a.", "key_", "a@", "https://", "a b:c@", "a=", "token: "):
        redact(part * 10_000)
    assert time.perf_counter() - started < 20


def test_line_of_a_message_looks_like_no_other_message() -> None:
    assert one_message("a\n  b\n\nerror: \x1b[2J") == "a\n    b\n\n  error: \\x1b[2J"


TRACE = f"""
import logging, threading, warnings
from lib.errors import hide_secrets
hide_secrets()
logging.getLogger("httpx").warning("GET %s", "https://user:{KEY}@host/api")
logging.getLogger("lib").warning("unread: %s", "a\\x1b]0;x\\x07\\r\\n- forged")
warnings.warn("\\x1b[2J no answer from https://user:{KEY}@host/api\\n- forged")
def fail():
    raise ConnectionError("\\x1b[2J no answer from https://user:{KEY}@host/api")
thread = threading.Thread(target=fail)
thread.start()
thread.join()
raise ConnectionError("no answer from https://user:{KEY}@host/api")
"""


def test_logs_and_traces_of_libraries_hold_no_secrets() -> None:
    done = subprocess.run([sys.executable, "-c", TRACE], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 1
    shown = [line for line in done.stderr.split("\n") if f"user:{KEY}" in line]
    assert all("warnings.warn(" in line or "raise " in line for line in shown)  # the lines of the program itself
    assert done.stderr.count("https://***@host/api") == 4
    assert "GET https://***@host/api" in done.stderr
    assert "ConnectionError: no answer from https://***@host/api" in done.stderr
    assert all(printable(line) == line and not line.startswith("- forged") for line in done.stderr.split("\n"))
    assert "unread: a\\x1b]0;x\\x07\\r\n  - forged" in done.stderr
