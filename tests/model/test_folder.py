"""A damaged model folder ends in a message that names the file; label names are read where their meaning is clear."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lib.config.sections import ModelConfig
from lib.errors import UserError
from lib.model import folder as folders
from lib.model.folder import check_vocabulary
from lib.model.load import build_model, label_names, load_classifier, load_tokenizer
from lib.model.source import loading_errors
from tests import tiny_models
from tests.tiny_models import NAMES

Damage = Callable[[Path], object]
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 3\n"
PAGE = "<!DOCTYPE html><html>log in</html>"


def text(name: str, content: str) -> Damage:
    return lambda folder: (folder / name).write_text(content)


def settings(name: str = "config.json", **changes: Any) -> Damage:
    """Changes to a JSON file; None removes a key."""

    def change(folder: Path) -> None:
        content = json.loads((folder / name).read_text()) | changes
        kept = {key: value for key, value in content.items() if not (key in changes and value is None)}
        (folder / name).write_text(json.dumps(kept))

    return change


def tensors(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Damage:
    def rewrite(folder: Path) -> None:
        file = folder / "model.safetensors"
        save_file(
            {name: tensor.contiguous() for name, tensor in change(load_file(file)).items()}, file, {"format": "pt"}
        )

    return rewrite


def shards(index: Callable[[dict[str, str]], Any], lost: int | None = None) -> Damage:
    """Weights in two files and an index, made from {tensor: file}."""

    def split(folder: Path) -> None:
        weights, places = load_file(folder / "model.safetensors"), {}
        (folder / "model.safetensors").unlink()
        for number in (1, 2):
            file = f"model-0000{number}-of-00002.safetensors"
            names = sorted(weights)[number - 1 :: 2]
            if number != lost:
                save_file({name: weights[name] for name in names}, folder / file, {"format": "pt"})
            places |= dict.fromkeys(names, file)
        (folder / "model.safetensors.index.json").write_text(json.dumps(index(places)))

    return split


@pytest.fixture
def copy(folder_of: Callable[[str], Path], tmp_path: Path) -> Path:
    """A trained classifier that a test may damage."""
    return Path(shutil.copytree(folder_of("bert"), tmp_path / "copy"))


def refusals(folder: Path, tokenizer: Any) -> list[str]:
    """What train.py says about a model, and what eval.py and predict.py say."""
    config = ModelConfig(str(folder))
    said = []
    for load in (lambda: build_model(config, NAMES, tokenizer), lambda: load_classifier(config)):
        with pytest.raises(UserError) as refused:
            load()
        said.append(str(refused.value))
    return said


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (text("config.json", "[]"), "config.json holds a list"),
        (text("config.json", "null"), "config.json holds null"),
        (text("config.json", '"bert"'), "config.json holds a text"),
        (text("config.json", ""), "config.json is empty"),
        (text("config.json", PAGE), "config.json is a web page"),
        (text("config.json", POINTER), "config.json is a git-LFS pointer"),
        (text("config.json", "[" * 100_000), "config.json is nested"),
        (settings(model_type=None), "config.json names no model_type"),
        (settings(model_type=3), "config.json has 3 as model_type"),
        (settings(model_type="nosuch"), "nosuch"),
        (settings(model_type="mamba"), "no model for text classification of this architecture (mamba)"),
        (settings(hidden_size="abc"), "hidden_size"),
        (settings(hidden_size=7.5), "hidden_size"),
        (settings(hidden_size=-1), "hidden_size is -1"),
        (settings(num_attention_heads=0), "num_attention_heads is 0"),
        (settings(num_attention_heads=3), "attention heads (3)"),
        (settings(num_hidden_layers=10**9), "num_hidden_layers is 1,000,000,000"),
        (settings(vocab_size=10**12), "GiB"),
        (settings(intermediate_size=10**8), "GiB"),
        (settings(num_hidden_layers=3), "layer.2"),
        (settings(hidden_size=32), "shape"),
        (settings(layer_types=[["x"]]), "config.json"),
        (settings(attn_implementation="flash_attention_2"), "flash-attn"),
        (settings(attn_implementation="nonsense"), "nonsense"),
        (settings(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}), "pip install"),
        (settings(quantization_config={"quant_method": "gptq", "bits": 4}), "optimum"),
        (text("model.safetensors", ""), "model.safetensors is empty"),
        (text("model.safetensors", PAGE), "model.safetensors is a web page"),
        (text("model.safetensors", POINTER), "model.safetensors is a git-LFS pointer"),
        (tensors(lambda t: {}), "weights: they lack|its weights lack"),
        (
            tensors(lambda t: {f"module.{name}": tensor for name, tensor in t.items()}),
            "weights: they lack|its weights lack",
        ),
        (tensors(lambda t: {name: tensor[..., :8] for name, tensor in t.items()}), "shape"),
        (tensors(lambda t: {name: tensor.to(torch.int8) for name, tensor in t.items()}), "as integers (I8)"),
        (shards(lambda places: {"weight_map": places}, lost=2), "model-00002-of-00002.safetensors"),
        (shards(lambda places: {"weight_map": dict.fromkeys(places, "other.safetensors")}), "other.safetensors"),
        (shards(lambda places: {"weight_map": None}), "index.json names no weights"),
        (shards(lambda places: []), "index.json holds a list"),
        (text("adapter_config.json", "[]"), "adapter_config.json"),
        (settings("config.json", attn_implementation="flex_attention"), "flex_attention"),
    ],
)
def test_damaged_files_and_settings_are_refused_by_name(
    copy: Path, damage: Damage, word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.quantizers.quantizer_bnb_4bit.is_bitsandbytes_available", lambda: False)
    tokenizer = load_tokenizer(ModelConfig(str(copy)))
    damage(copy)
    for message in refusals(copy, tokenizer):
        assert str(copy) in message
        assert any(part in message for part in word.split("|")), message


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (text("tokenizer.json", "[]"), "tokenizer.json holds a list"),
        (text("tokenizer.json", "{"), "tokenizer.json is not JSON"),
        (text("tokenizer.json", POINTER), "tokenizer.json is a git-LFS pointer"),
        (settings("tokenizer.json", post_processor={"type": "TemplateProcessing"}), "PostProcessor"),
        (text("tokenizer_config.json", "null"), "tokenizer_config.json holds null"),
        (settings("tokenizer_config.json", tokenizer_class=3), "could not be loaded"),
        (settings("tokenizer_config.json", model_max_length="many"), "model_max_length"),
        (settings("tokenizer_config.json", model_max_length=2.5), "model_max_length"),
        (settings("tokenizer_config.json", pad_token=3), "pad_token"),
        (lambda folder: [(folder / f"tokenizer{name}.json").unlink() for name in ("", "_config")], "no vocabulary"),
    ],
)
def test_damaged_tokenizer_is_refused_by_name(copy: Path, damage: Damage, word: str) -> None:
    damage(copy)
    with pytest.raises(UserError) as refused:
        load_tokenizer(ModelConfig(str(copy)))
    assert str(copy) in str(refused.value)
    assert word in str(refused.value)


def test_only_what_libraries_raise_is_turned_into_a_message(copy: Path) -> None:
    with pytest.raises(UserError, match="division"), loading_errors(ModelConfig(str(copy))):
        print(1 / 0)
    with pytest.raises(KeyboardInterrupt), loading_errors(ModelConfig(str(copy))):
        raise KeyboardInterrupt


def test_model_that_does_not_fit_into_memory_is_refused_before_it_is_built(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load_tokenizer(ModelConfig(str(copy)))
    monkeypatch.setattr(folders, "available_memory", lambda: 20_000)
    for options in ({}, {"from_scratch": True}, {"config_overrides": ("intermediate_size=64",)}):
        with pytest.raises(UserError, match="memory are free"):
            build_model(ModelConfig(str(copy), **options), NAMES, tokenizer)


def test_overrides_beyond_all_models_are_refused(copy: Path) -> None:
    tokenizer = load_tokenizer(ModelConfig(str(copy)))
    with pytest.raises(UserError, match="num_hidden_layers is 1,000,000,000"):
        build_model(ModelConfig(str(copy), config_overrides=("num_hidden_layers=1000000000",)), NAMES, tokenizer)


def test_weights_that_are_not_finite_are_named(copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    def damage(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        weights["bert.pooler.dense.bias"][3] = float("nan")
        return weights

    tensors(damage)(copy)
    with caplog.at_level(logging.WARNING):
        load_classifier(ModelConfig(str(copy)))
    assert "bert.pooler.dense.bias" in caplog.text


def test_token_ids_beyond_the_embeddings_are_refused_unless_no_text_has_them(copy: Path) -> None:
    config, model = ModelConfig(str(copy)), load_classifier(ModelConfig(str(copy)))
    tokenizer = load_tokenizer(config)
    rows = model.get_input_embeddings().num_embeddings
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<{n}>" for n in range(rows)]})
    check_vocabulary(config, model, tokenizer)
    tokenizer.add_tokens(["beyond"])
    for refused in (
        lambda: check_vocabulary(config, model, tokenizer),
        lambda: build_model(config, NAMES, tokenizer),
    ):
        with pytest.raises(UserError, match=rf"'beyond'.*{rows} "):
            refused()


def test_label_names_do_not_matter_to_tokenizer_and_training(copy: Path) -> None:
    settings(id2label={"a": [1]}, label2id=3, num_labels="many")(copy)
    model, info = build_model(ModelConfig(str(copy)), NAMES, load_tokenizer(ModelConfig(str(copy))))
    assert label_names(model) == NAMES
    assert info.new == []


@pytest.mark.parametrize(
    ("stored", "names"),
    [
        ({"id2label": {"0": 0, "1": 1, "2": 2}}, ["0", "1", "2"]),
        ({"id2label": {"0": True, "1": 2.5, "2": "x"}}, ["True", "2.5", "x"]),
        ({"id2label": ["a", "b", "c"]}, ["a", "b", "c"]),
        ({"id2label": {"2": "c", "0": "a", "1": "b"}}, ["a", "b", "c"]),
        ({"id2label": None, "label2id": {"b": 1, "a": 0, "c": 2}}, ["a", "b", "c"]),
        ({"id2label": None, "label2id": None, "num_labels": 3}, ["LABEL_0", "LABEL_1", "LABEL_2"]),
    ],
)
def test_label_names_of_any_type_are_read(copy: Path, stored: dict[str, Any], names: list[str]) -> None:
    settings(**stored)(copy)
    assert label_names(load_classifier(ModelConfig(str(copy)))) == names


@pytest.mark.parametrize(
    ("stored", "word"),
    [
        ({"id2label": {"1": "a", "2": "b", "3": "c"}}, "numbers the outputs 1, 2, 3"),
        ({"id2label": {"0": "a", "1": "b", "5": "c"}}, "numbers the outputs 0, 1, 5"),
        ({"id2label": {"0": "a", "1": "b", "2": "a"}}, "two outputs 'a'"),
        ({"id2label": {"0": [], "1": "b", "2": "a"}}, "[] as the name of output 0"),
        ({"id2label": {"0": "a", "1": "b", "2": " "}}, "as the name of output 2"),
        ({"id2label": {"a": 0, "b": 1, "c": 2}}, "'a' where the number of an output belongs"),
        ({"id2label": {"0": "a", "1": "b"}}, "shape"),
        ({"id2label": {}}, "is {}"),
        ({"id2label": 3}, "is 3"),
        ({"num_labels": 4}, "num_labels is 4"),
        ({"num_labels": 10**9}, "is 1000000000"),
    ],
)
def test_label_names_without_a_clear_meaning_are_refused_by_file(copy: Path, stored: dict, word: str) -> None:
    settings(**stored)(copy)
    with pytest.raises(UserError) as refused:
        load_classifier(ModelConfig(str(copy)))
    assert word in str(refused.value)
    assert "config.json" in str(refused.value)
    assert "id2label" in str(refused.value)


@pytest.mark.parametrize(
    "stored",
    [
        {"problem_type": "nope"},
        {"problem_type": 3},
        {"thresholds": "x"},
        {"thresholds": [0.5]},
        {"thresholds": [None] * 3},
        {"calibration_temperature": "x"},
        {"calibration_temperature": 0},
        {"calibration_temperature": -1.5},
        {"calibration_temperature": True},
        {"calibration_temperature": float("nan")},
        {"calibration_temperature": float("inf")},
        {"calibration_temperature": 1e-300},
    ],
)
def test_outputs_without_a_clear_meaning_are_refused_by_file(copy: Path, stored: dict[str, Any]) -> None:
    settings(**stored)(copy)
    with pytest.raises(UserError, match=f"{next(iter(stored))} in .*config.json"):
        load_classifier(ModelConfig(str(copy)))


def test_thresholds_of_two_classes_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    folder = tiny_models.classifier(tmp_path / "two", num_labels=2, **tiny_models.labels(["bad", "good"]))
    settings(thresholds=[0.7, 0.3])(folder)
    assert load_classifier(ModelConfig(str(folder))).config.thresholds == [0.7, 0.3]
    settings(thresholds=[0.7, 0.7])(folder)
    with pytest.raises(UserError, match=r"thresholds in .*config.json"):
        load_classifier(ModelConfig(str(folder)))


def test_roberta_without_a_padding_token_counts_positions_from_that_of_its_tokenizer(
    folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(folder_of("roberta"), tmp_path / "copy"))

    def logits() -> torch.Tensor:
        source = ModelConfig(str(folder))
        tokenizer = load_tokenizer(source)
        model = load_classifier(source, tokenizer).eval()
        return model(**tokenizer("a b c", return_tensors="pt")).logits

    whole = logits()
    settings(pad_token_id=None)(folder)
    torch.testing.assert_close(logits(), whole)
