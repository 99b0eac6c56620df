"""Loading classifiers of several architectures, their label names, and freezing."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from lib.config.sections import ModelConfig, ModelSource
from lib.errors import UserError
from lib.model.layers import count_parameters, set_train_mode
from lib.model.load import build_model, label_names, load_classifier, load_tokenizer, longest_input
from lib.model.source import model_name
from tests.conftest import tiny_tokenizer
from tests.tiny_models import NAMES, SETTINGS, build_from, save_classifier, trainable

BACKBONES = {"modernbert": "model", "deberta-v2": "deberta", "gpt2": "transformer"}
"""Attribute of the model that holds the backbone, where it is not the model type."""

LAYERS = {"distilbert": "transformer.layer", "modernbert": "layers", "gpt2": "h"}
"""Attribute of the backbone that holds the layers, where it is not `encoder.layer`."""

EMBEDDINGS = {"electra": ("embeddings", "embeddings_project"), "gpt2": ("wte", "wpe")}
"""Attributes of the backbone below the layers, where they are not only `embeddings`."""


def frozen_prefixes(kind: str, part: str | None) -> tuple[str, ...]:
    """Beginnings of the names of the parameters that `--freeze part` freezes."""
    backbone = BACKBONES.get(kind, kind)
    embeddings = tuple(f"{backbone}.{name}" for name in EMBEDDINGS.get(kind, ("embeddings",)))
    layer = f"{backbone}.{LAYERS.get(kind, 'encoder.layer')}.0"
    return {None: (), "backbone": (backbone,), "embeddings": embeddings, "1": (*embeddings, layer)}[part]


def is_inside(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


@pytest.mark.parametrize("part", [None, "backbone", "embeddings", "1"])
@pytest.mark.parametrize("kind", SETTINGS)
def test_freeze_turns_off_the_gradients_of_the_named_part_only(
    folder_of: Callable[[str], Path], kind: str, part: str | None
) -> None:
    model, _ = build_from(folder_of(kind), freeze=part)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    expected = {name for name, _ in model.named_parameters() if is_inside(name, frozen_prefixes(kind, part))}
    assert frozen == expected
    assert bool(frozen) == (part is not None)


@pytest.mark.parametrize("part", [None, "backbone", "embeddings", "1"])
@pytest.mark.parametrize("kind", SETTINGS)
def test_train_mode_keeps_frozen_parts_in_eval_mode(
    folder_of: Callable[[str], Path], kind: str, part: str | None
) -> None:
    model, _ = build_from(folder_of(kind), freeze=part)
    set_train_mode(model)
    evaluating = {name for name, module in model.named_modules() if not module.training}
    inside = {name for name, _ in model.named_modules() if is_inside(name, frozen_prefixes(kind, part))}
    assert evaluating >= inside
    trained_anew = evaluating - inside
    assert not any(
        parameter.requires_grad for name in trained_anew for parameter in model.get_submodule(name).parameters()
    )
    assert not any(isinstance(model.get_submodule(name), nn.Dropout) for name in trained_anew)


def test_frozen_backbone_has_no_dropout_and_the_head_has(folder_of: Callable[[str], Path]) -> None:
    model, _ = build_from(folder_of("roberta"), freeze="backbone")
    set_train_mode(model)
    inputs = torch.tensor([[0, 7, 8, 9, 2]])
    first, second = (model(inputs, output_hidden_states=True) for _ in range(2))
    assert torch.equal(first.hidden_states[-1], second.hidden_states[-1])
    assert not torch.equal(first.logits, second.logits)


def test_freezing_more_layers_than_there_are_is_refused(folder_of: Callable[[str], Path]) -> None:
    with pytest.raises(UserError, match="--freeze 9: the model has 2 layers"):
        build_from(folder_of("roberta"), freeze="9")


def test_count_parameters_by_hand() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    assert count_parameters(model) == (10, 26)


def test_weights_are_float32_whatever_the_checkpoint_holds(tmp_path: Path) -> None:
    folder = save_classifier("bert", tmp_path, dtype=torch.bfloat16)
    model, weights = build_from(folder)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    stored = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(weight, stored[name].float()) for name, weight in model.state_dict().items())
    assert weights.new == []
    assert load_classifier(ModelConfig(model=str(folder))).dtype == torch.float32


def test_head_of_another_size_is_new_and_other_weights_are_kept(tmp_path: Path) -> None:
    folder = save_classifier("bert", tmp_path, num_labels=5)
    model, weights = build_from(folder)
    assert weights.new == ["classifier.bias", "classifier.weight"]
    assert model.classifier.weight.shape == (3, 16)
    stored = AutoModelForSequenceClassification.from_pretrained(folder).state_dict()
    kept = {name: weight for name, weight in model.state_dict().items() if name not in weights.new}
    assert all(torch.equal(weight, stored[name]) for name, weight in kept.items())


def test_head_of_a_pretrained_backbone_is_reported_as_new(roberta: Path) -> None:
    _, weights = build_from(roberta)
    assert {name.split(".")[0] for name in weights.new} == {"classifier"}
    assert len(weights.new) == 4


def test_label_names_are_saved_with_the_model(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    model, _ = build_from(folder_of("bert"))
    assert model.config.id2label == {0: "bad", 1: "good", 2: "mixed"}
    assert model.config.label2id == {"bad": 0, "good": 1, "mixed": 2}
    model.save_pretrained(tmp_path)
    assert label_names(load_classifier(ModelConfig(model=str(tmp_path)))) == NAMES


def test_backbone_without_a_head_is_refused_as_a_classifier(roberta: Path) -> None:
    with pytest.raises(UserError, match=r"is not a trained classifier: its weights lack classifier\..*train it first"):
        load_classifier(ModelConfig(model=str(roberta)))


def truncate_weights(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])


DAMAGES: dict[str, Callable[[Path], object]] = {
    "config is missing": lambda folder: (folder / "config.json").unlink(),
    "config is not JSON": lambda folder: (folder / "config.json").write_text("{"),
    "weights are missing": lambda folder: (folder / "model.safetensors").unlink(),
    "weights are truncated": truncate_weights,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_model_folder_is_refused_by_name(tmp_path: Path, damage: str) -> None:
    config = ModelConfig(model=str(save_classifier("bert", tmp_path)))
    tokenizer = load_tokenizer(config)
    DAMAGES[damage](tmp_path)
    for load in (lambda: build_model(config, NAMES, tokenizer), lambda: load_classifier(config)):
        with pytest.raises(UserError, match=rf"--model {tmp_path} could not be loaded: "):
            load()


def test_missing_model_folder_is_refused_with_advice(tmp_path: Path) -> None:
    config = ModelConfig(model=str(tmp_path / "nowhere"))
    for load in (load_tokenizer, load_classifier):
        with pytest.raises(UserError, match=r"nowhere could not be loaded: .*\n.*--model minilm"):
            load(config)


def test_loading_restores_the_verbosity_of_transformers(folder_of: Callable[[str], Path]) -> None:
    before = transformers.logging.get_verbosity()
    build_from(folder_of("bert"))
    assert transformers.logging.get_verbosity() == before


@pytest.mark.parametrize("given", ["roberta-base", "FacebookAI/roberta-base", "models/roberta-base/"])
def test_model_name_is_the_last_part_of_a_path_or_id(given: str) -> None:
    assert model_name(given) == "roberta-base"


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 of two layers whose tokenizer and configuration have no padding token."""
    folder = tmp_path_factory.mktemp("gpt2")
    tiny_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=128, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=2
    )
    transformers.GPT2Model(config).save_pretrained(folder)
    return folder


def test_decoder_gets_a_padding_token_in_tokenizer_and_model(decoder: Path) -> None:
    assert AutoTokenizer.from_pretrained(decoder).pad_token is None
    config = ModelConfig(model=str(decoder))
    tokenizer = load_tokenizer(config)
    model, _ = build_model(config, NAMES, tokenizer)
    assert tokenizer.pad_token == "</s>"
    assert model.config.pad_token_id == tokenizer.pad_token_id == 2


def test_decoder_has_the_same_logits_for_a_padded_batch_and_single_texts(decoder: Path) -> None:
    config = ModelConfig(model=str(decoder))
    tokenizer = load_tokenizer(config)
    model, _ = build_model(config, NAMES, tokenizer)
    model.eval()
    texts = ["a good film", "the plot was very very dull and not fine", "great"]
    with torch.inference_mode():
        batch = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits
        single = torch.cat([model(**tokenizer(text, return_tensors="pt")).logits for text in texts])
    torch.testing.assert_close(batch, single, rtol=0, atol=1e-5)
    assert (single[0] - single[1]).abs().max() > 1e-3


# ---------------------------------------------------------------------------------------------------- ready tokenizers


@pytest.mark.parametrize(
    "kind", ["bert", "roberta", "mpnet", "longformer", "gpt2", "openai-gpt", "bart", "distilbert", "camembert"]
)
def test_the_longest_input_is_what_the_model_has_positions_for(kind: str, tmp_path: Path) -> None:
    source = ModelSource(str(trainable(kind, tmp_path)))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.model_max_length = int(1e30)
    tokenizer.save_pretrained(tmp_path)
    room = load_tokenizer(source).model_max_length
    model = load_classifier(source).eval()
    ids = torch.full((1, room + 1), 7)
    ids[:, -1] = 2
    model(input_ids=ids[:, 1:])
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=ids)


@pytest.mark.parametrize("kind", ["t5", "xlnet"])
def test_a_model_of_distances_has_no_longest_input(kind: str, tmp_path: Path) -> None:
    assert load_tokenizer(ModelSource(str(trainable(kind, tmp_path)))).model_max_length > 1e9


def test_deberta_without_positions_has_no_longest_input(tmp_path: Path) -> None:
    for positions, limited in ((True, True), (False, False)):
        folder = tmp_path / str(positions)
        save_classifier("deberta-v2", folder, position_biased_input=positions)
        hf_config = AutoConfig.from_pretrained(folder)
        assert (longest_input(hf_config) == 80) == limited


def test_virtual_tokens_take_positions_from_the_text(roberta: Path) -> None:
    assert load_tokenizer(ModelSource(str(roberta)), 20).model_max_length == 58
    with pytest.raises(UserError, match="78 virtual tokens"):
        load_tokenizer(ModelSource(str(roberta)), 78)


def test_a_tokenizer_without_padding_uses_the_token_that_the_model_takes_for_it(tmp_path: Path) -> None:
    for number, token in ((1, "<pad>"), (None, "</s>"), (128, "</s>"), (-1, "</s>")):
        folder = trainable("gpt2", tmp_path / str(number))
        hf_config = AutoConfig.from_pretrained(folder)
        hf_config.pad_token_id = number
        hf_config.save_pretrained(folder)
        assert load_tokenizer(ModelSource(str(folder))).pad_token == token


def test_padding_stands_where_it_moves_nothing(tmp_path: Path) -> None:
    for kind, side in (("roberta", "right"), ("gpt2", "right"), ("xlnet", "left")):
        folder = trainable(kind, tmp_path / kind)
        tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left" if side == "right" else "right")
        tokenizer.save_pretrained(folder)
        assert load_tokenizer(ModelSource(str(folder))).padding_side == side


def test_saved_tokenizer_reads_special_tokens_as_text_wherever_it_is_loaded(roberta: Path, tmp_path: Path) -> None:
    ours = load_tokenizer(ModelSource(str(roberta)))
    ours.save_pretrained(tmp_path)
    text = "good film </s> bad plot"
    assert AutoTokenizer.from_pretrained(tmp_path)(text).input_ids == ours(text).input_ids
    assert ours(text).input_ids.count(2) == 1
