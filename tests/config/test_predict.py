"""Options of predict.py: combinations that cannot work refused before anything heavy is imported."""

import ast
import inspect
import os

import pytest

from lib.config import predict as predict_config
from lib.config.cli import parse_cli
from lib.config.predict import PredictConfig


def refusal(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    with pytest.raises(SystemExit) as ended:
        parse_cli(PredictConfig, list(flags))
    assert ended.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["a", "--input", "t.csv"], "texts as arguments and --input exclude each other"),
        (["--question", "who"], "--question and --context belong together"),
        (["--question", "who", "--context", "a"], "--question needs --task question-answering"),
        (["a", "--task", "question-answering"], "takes --question and --context, or --input"),
        (["--input", "t.pdf"], "--input t.pdf: the name must end in one of .csv"),
        (["--input", "-", "--input_format", "parquet"], "parquet is read from a file only"),
        (["a", "--task", "zero-shot-classification"], "needs --candidate_labels"),
        (["a", "--task", "ner", "--top_k", "2"], "--task ner has no --top_k"),
        (["a", "--task", "fill-mask", "--function_to_apply", "none"], "--function_to_apply is for"),
        (["a", "--output", "o.npy"], ".npy holds embeddings only"),
        (["a", "--output", "o.txt"], "--output o.txt: the name must end in one of .jsonl"),
        (["a", "--task", "translation", "--top_k", "3", "--num_beams", "2"], "--top_k 3 needs --num_beams 3"),
        (["--task", "text-generation", "--export_onnx", "o"], "not for --task text-generation"),
        (["a", "--task", "ner", "--threshold", "0.3"], "--threshold is for"),
        (["a", "--threshold", "1.5"], "--threshold takes a number from 0 to 1"),
        (["a", "--threshold", "good=nan"], "'good=nan'"),
        (["a", "--threshold", "=0.3"], "'=0.3'"),
        (["a", "--threshold", "0.3", "0.4"], "--threshold takes one number"),
        (["a", "--abstain_below", "1.5"], "--abstain_below must lie in [0, 1]"),
        (["a", "--task", "fill-mask", "--abstain_below", "0.5"], "--abstain_below is for"),
        (["a", "--abstain_below", "0.5", "--function_to_apply", "none"], "choose one"),
        (["--export_onnx", "o", "--abstain_below", "0.5"], "--abstain_below is for"),
        (["--merge_adapter", "o", "--abstain_below", "0.5"], "--abstain_below is for"),
        (["--merge_adapter", "o", "--threshold", "0.3"], "--threshold is for"),
        (["a", "--top_k", "0"], "--top_k must be above 0, got 0"),
        (["a", "--generate_kwargs", "do_sample"], "--generate_kwargs takes name=value"),
    ],
)
def test_options_that_do_not_fit_are_refused(capsys, flags, message):
    assert message in refusal(capsys, *flags)


def test_misspelt_flag_is_refused_with_the_right_one(capsys):
    assert "--per_device_eval_batch_size" in refusal(capsys, "a", "--per_device_batch_size", "2")


def test_texts_may_come_before_or_after_flags():
    before, after = (parse_cli(PredictConfig, flags) for flags in (["a", "b", "--top_k=2"], ["--top_k", "2", "a", "b"]))
    assert before == after
    assert before.inputs.texts == ("a", "b")


def test_flags_override_the_yaml_file(tmp_path):
    path = tmp_path / "predict.yaml"
    path.write_text("task: ner\ninput: t.txt\naggregation_strategy: max\n")
    config = parse_cli(PredictConfig, ["--config", str(path), "--aggregation_strategy", "none"])
    assert (config.task, config.inputs.input, config.span.aggregation_strategy) == ("ner", "t.txt", "none")


def test_every_option_has_a_help_line():
    for node in ast.walk(ast.parse(inspect.getsource(predict_config))):
        if isinstance(node, ast.ClassDef):
            for field, help_line in zip(node.body, [*node.body[1:], None], strict=True):
                if isinstance(field, ast.AnnAssign) and not ast.unparse(field.annotation).endswith(("Config", "Model")):
                    assert isinstance(help_line, ast.Expr), ast.unparse(field)


def test_output_over_the_input_is_refused_by_whatever_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("texts.jsonl", "texts.ids.jsonl"):
        (tmp_path / name).write_text('{"text": "a"}\n')
    (tmp_path / "link.jsonl").symlink_to("texts.jsonl")
    (tmp_path / "hard.jsonl").hardlink_to("texts.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    for output in ("texts.jsonl", "./texts.jsonl", str(tmp_path / "texts.jsonl"), "link.jsonl", "hard.jsonl"):
        for given in ("texts.jsonl", "link.jsonl"):
            message = refusal(capsys, "--input", given, "--output", output)
            assert f"--output {output}" in message
            assert "another file" in message
    vectors = ["--task", "feature-extraction", "--output", "texts.npy"]
    assert "texts.ids.jsonl" in refusal(capsys, "--input", "texts.ids.jsonl", *vectors)
    assert "is a folder" in refusal(capsys, "--input", "texts.jsonl", "--output", "folder.jsonl")
    assert parse_cli(PredictConfig, ["--input", "texts.jsonl", "--output", "new.jsonl"]).output == "new.jsonl"
    assert parse_cli(PredictConfig, ["--input", "texts.jsonl", "--output", "texts.csv"]).output == "texts.csv"
    with open("texts.jsonl", "rb") as file:
        before = os.dup(0)
        os.dup2(file.fileno(), 0)
        try:
            assert "the standard input" in refusal(capsys, "--output", "hard.jsonl", "--input_format", "jsonl")
        finally:
            os.dup2(before, 0)
            os.close(before)
    assert (tmp_path / "texts.jsonl").read_text() == '{"text": "a"}\n'
