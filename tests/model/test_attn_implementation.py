"""--attn_implementation: the same logits, stored with the run, refused where it cannot be had."""

import logging
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from lib.config.sections import ModelConfig, ModelSource
from lib.errors import UserError
from lib.model.attention import check_dropout, set_attention
from lib.model.load import build_model, load_tokenizer
from lib.run.finished import find_model
from lib.runtime.cpu import attention as cpu_attention
from lib.runtime.cpu.kernels import use_cpu_kernels
from tests.conftest import read_lines, sentences, write_csv


def logits_of(source: ModelConfig, train: bool = False) -> torch.Tensor:
    """Logits of padded texts; the head is seeded."""
    tokenizer = load_tokenizer(source)
    torch.manual_seed(0)
    model, _ = build_model(source, ["a", "b", "c"], tokenizer)
    assert source.attn_implementation in ("auto", model.config._attn_implementation)
    batch = tokenizer([text for text, _ in sentences(7)], padding=True, return_tensors="pt")
    return model.train(train)(**batch).logits.detach()


def test_implementations_give_equal_logits(roberta_without_dropout: Path) -> None:
    named = {
        name: ModelConfig(str(roberta_without_dropout), attn_implementation=name) for name in ("sdpa", "eager", "auto")
    }
    logits = {name: logits_of(source) for name, source in named.items()}
    torch.testing.assert_close(logits["eager"], logits["sdpa"], atol=1e-5, rtol=1e-5)
    assert torch.equal(logits["auto"], logits["sdpa"])
    assert logits["sdpa"].std(dim=0).min() > 1e-3, "all texts look alike"


def test_eager_means_eager_also_where_our_kernels_are_on(roberta: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    ours = cpu_attention.attention_forward
    monkeypatch.setattr(cpu_attention, "attention_forward", lambda *a, **k: called.append(1) or ours(*a, **k))
    use_cpu_kernels()
    try:
        logits_of(ModelConfig(str(roberta), attn_implementation="eager"), train=True)
        assert not called
        logits_of(ModelConfig(str(roberta), attn_implementation="sdpa"), train=True)
        assert called
    finally:
        use_cpu_kernels(False)


def test_architecture_without_an_implementation_is_named_with_what_it_has() -> None:
    settings = AutoConfig.for_model("deberta-v2")
    with pytest.raises(UserError, match=r"--attn_implementation sdpa.*deberta-v2.*it has eager"):
        set_attention(ModelSource("deberta", attn_implementation="sdpa"), AutoModelForSequenceClassification, settings)
    set_attention(ModelSource("deberta", attn_implementation="eager"), AutoModelForSequenceClassification, settings)
    assert settings._attn_implementation == "eager"


def test_flash_attention_3_does_not_drop_the_dropout_of_a_model_in_silence() -> None:
    source = ModelSource("any", attn_implementation="flash_attention_3")
    with pytest.raises(UserError, match=r"--config_overrides attention_probs_dropout_prob=0\.0"):
        check_dropout(source, AutoConfig.for_model("roberta"))
    check_dropout(source, AutoConfig.for_model("roberta", attention_probs_dropout_prob=0.0))
    check_dropout(ModelSource("any"), AutoConfig.for_model("roberta"))


def test_what_cannot_be_had_is_refused_before_data_are_read(roberta: Path, call, tmp_path: Path) -> None:
    for script, more in (
        ("train.py", ["--train_file", "no such file.csv"]),
        ("eval.py", ["--test_file", "no such file.csv"]),
        ("predict.py", ["--input", "no such file.csv"]),
    ):
        done = call(script, "--model", roberta, "--attn_implementation", "flash_attention_2", *more, code=2)
        assert "--attn_implementation flash_attention_2: it needs a GPU" in done.stderr
        assert not list(tmp_path.iterdir())


def test_run_keeps_its_implementation_and_eval_and_predict_use_it(
    roberta: Path, call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write_csv(tmp_path / "train.csv", sentences(40))
    flags = (
        "--model",
        roberta,
        "--train_file",
        "train.csv",
        "--max_steps",
        1,
        "--report_to",
        "none",
        "--output_dir",
        "run",
    )
    done = call("train.py", *flags, "--attn_implementation", "eager", "--mixed_precision", "no")
    assert "eager" in next(line for line in done.stdout.splitlines() if line.startswith("attention"))
    run = tmp_path / "run"
    for place, asked, used in (("run", "auto", "eager"), ("run/model", "auto", "eager"), ("run", "sdpa", "sdpa")):
        source = ModelSource(str(tmp_path / place), attn_implementation=asked)
        assert find_model(source, "no").source.attn_implementation == used

    settings = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(
        settings.replace("attn_implementation: eager", "attn_implementation: flash_attention_2")
    )
    monkeypatch.setattr(logging.getLogger("lib"), "propagate", True)
    assert find_model(ModelSource(str(run)), "auto").source.attn_implementation == "auto"
    assert "flash_attention_2" in caplog.text
    call("eval.py", "--run", "run", "--split", "validation", "--mixed_precision", "no")
    call("predict.py", "a fine film", "--model", "run", "--output", "one.jsonl", "--mixed_precision", "no")
    assert len(read_lines(tmp_path / "one.jsonl")) == 1
