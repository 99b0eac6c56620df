"""--config_overrides and --from_scratch: which weights are kept, new and unused, and that the saved model loads again."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, set_seed

from lib.config.sections import AdapterConfig, ModelConfig
from lib.errors import UserError
from lib.model.adapters.adapt import adapt
from lib.model.layers import find_layers
from lib.model.load import build_model, load_classifier, load_tokenizer, summarize_weight_names
from lib.model.weights import save_model
from tests.conftest import Command, results_of, sentences, write_csv
from tests.predicting import answers
from tests.tiny_models import NAMES, SETTINGS, build_from

DROPOUT = {"distilbert": "dropout", "modernbert": "mlp_dropout", "gpt2": "resid_pdrop"}
"""The key of dropout where it is not `hidden_dropout_prob`."""


def layers_of(model: Any) -> Any:
    return find_layers(model, "--freeze")


@pytest.mark.parametrize("kind", SETTINGS)
def test_fewer_layers_drop_the_upper_ones_and_keep_the_other_weights(
    folder_of: Callable[[str], Path], kind: str
) -> None:
    whole, _ = build_from(folder_of(kind))
    model, weights = build_from(
        folder_of(kind), "num_hidden_layers=1", f"{DROPOUT.get(kind, 'hidden_dropout_prob')}=0.25"
    )
    assert (len(layers_of(whole)), len(layers_of(model))) == (2, 1)
    assert 0.25 in {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)}
    lost = {name for name in whole.state_dict() if name not in model.state_dict()}
    unnamed = "attn.bias"  # transformers itself leaves these of GPT-2 out of its report
    assert set(weights.unused) == {name for name in lost if unnamed not in name}
    assert weights.new == []
    assert all(torch.equal(weight, whole.state_dict()[name]) for name, weight in model.state_dict().items())


@pytest.mark.parametrize("kind", SETTINGS)
def test_changed_model_loads_as_it_was_saved(folder_of: Callable[[str], Path], kind: str, tmp_path: Path) -> None:
    model, _ = build_from(folder_of(kind), "num_hidden_layers=1")
    model.save_pretrained(tmp_path)
    again = load_classifier(ModelConfig(str(tmp_path)))
    ids = torch.tensor([[0, 7, 8, 9, 2]])
    torch.testing.assert_close(model.eval()(ids).logits, again.eval()(ids).logits, rtol=0, atol=1e-6)
    assert all(torch.equal(weight, again.state_dict()[name]) for name, weight in model.state_dict().items())


@pytest.mark.parametrize("kind", SETTINGS)
def test_from_scratch_builds_the_model_from_the_configuration_alone(
    folder_of: Callable[[str], Path], kind: str
) -> None:
    """Bitwise equal to what transformers builds from the configuration with the same seed."""
    set_seed(5)
    model, weights = build_from(folder_of(kind), from_scratch=True)
    set_seed(5)
    wanted = AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(folder_of(kind), num_labels=3))
    assert all(torch.equal(weight, wanted.state_dict()[name]) for name, weight in model.state_dict().items())
    assert set(weights.new) == set(model.state_dict())
    pretrained, _ = build_from(folder_of(kind))
    matrices = [name for name, weight in model.state_dict().items() if weight.dim() == 2]
    assert not any(torch.equal(model.state_dict()[name], pretrained.state_dict()[name]) for name in matrices)


def test_from_scratch_needs_no_weights(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    for file in folder_of("bert").iterdir():
        if file.suffix == ".json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    model, _ = build_from(tmp_path, "num_hidden_layers=5", from_scratch=True)
    assert len(layers_of(model)) == 5


def test_layers_beyond_the_checkpoint_are_new(folder_of: Callable[[str], Path]) -> None:
    _, weights = build_from(folder_of("bert"), "num_hidden_layers=3")
    assert {name.split(".layer.")[1][0] for name in weights.new} == {"2"}
    assert weights.unused == []


def test_weights_of_another_shape_are_new(folder_of: Callable[[str], Path]) -> None:
    _, weights = build_from(folder_of("roberta"), "intermediate_size=24")
    assert {name.split(".")[-2] for name in weights.new} == {"dense"}
    assert len(weights.new) == 2 * 3


def test_fewer_positions_lower_the_longest_input(folder_of: Callable[[str], Path]) -> None:
    """RoBERTa counts positions from the id of its padding token + 1, so it loses two."""
    for kind, room in (("bert", 20), ("roberta", 18), ("gpt2", 20)):
        config = ModelConfig(str(folder_of(kind)), config_overrides=("max_position_embeddings=20",))
        tokenizer = load_tokenizer(config)
        assert tokenizer.model_max_length == room
        model, _ = build_model(config, NAMES, tokenizer)
        model(torch.full((1, room), 7))
        with pytest.raises((IndexError, RuntimeError)):
            model(torch.full((1, room + 1), 7))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("num_hidden_layer=1", ["has no such key", "did you mean num_hidden_layers"]),
        ("hidden_dropout=0.2", ["did you mean hidden_dropout_prob"]),
        ("zzzzzz=1", ["it has: ", "hidden_act", "num_hidden_layers"]),
        ("num_hidden_layers=four", ["a value like 2, not 'four'"]),
        ("num_hidden_layers=1.5", ["a value like 2, not 1.5"]),
        ("num_hidden_layers=True", ["a value like 2, not True"]),
        ("num_hidden_layers=0", ["a value like 2, not 0"]),
        ("num_hidden_layers=None", ["a value like 2, not None"]),
        ("hidden_dropout_prob=much", ["a value like 0.1, not 'much'"]),
        ("is_decoder=1", ["a value like False, not 1"]),
        ("num_labels=2", ["num_labels: the classes are those of the data"]),
        ("id2label={}", ["id2label: the classes are those of the data"]),
        ("vocab_size=9", ["it belongs to the tokenizer"]),
        ("pad_token_id=9", ["it belongs to the tokenizer"]),
        ("model_type=gpt2", ["choose another one"]),
        ("dtype=float16", ["--mixed_precision"]),
        ("num_attention_heads=5", ["no model can be built", "not a multiple"]),
        ("hidden_act=rulu", ["no model can be built", "rulu"]),
        ("hidden_dropout_prob=1.5", ["hidden_dropout_prob=1.5", "[0, 1]"]),
    ],
)
def test_wrong_changes_are_refused_with_the_reason(
    folder_of: Callable[[str], Path], change: str, words: list[str]
) -> None:
    with pytest.raises(UserError) as error:
        build_from(folder_of("bert"), change)
    message = str(error.value)
    assert [word for word in ["--config_overrides", *words] if word not in message] == []


def test_common_name_of_a_key_works_beside_the_own_name_of_the_model(folder_of: Callable[[str], Path]) -> None:
    """GPT-2 calls its number of layers `n_layer`, and accepts the common name too."""
    for change in ("n_layer=1", "num_hidden_layers=1"):
        assert len(layers_of(build_from(folder_of("gpt2"), change)[0])) == 1


def test_list_with_one_entry_per_layer_is_cut_with_the_layers(folder_of: Callable[[str], Path]) -> None:
    model, _ = build_from(folder_of("modernbert"), "num_hidden_layers=1")
    assert len(model.config.layer_types) == 1
    with pytest.raises(UserError, match="layer_types has entries for 2 layers"):
        build_from(folder_of("modernbert"), "num_hidden_layers=3")


@pytest.mark.parametrize("method", ["bottleneck", "lora"])
def test_adapter_over_a_changed_model_loads_as_it_was_saved(
    folder_of: Callable[[str], Path], method: Any, tmp_path: Path
) -> None:
    model, weights = build_from(folder_of("roberta"), "num_hidden_layers=1")
    model = adapt(model, AdapterConfig(adapter=method), ModelConfig(str(folder_of("roberta"))), weights.new)
    save_model(model, tmp_path / "adapter")
    again = load_classifier(ModelConfig(str(tmp_path / "adapter")))
    ids = torch.tensor([[0, 7, 8, 9, 2]])
    torch.testing.assert_close(model.eval()(ids).logits, again.eval()(ids).logits)


def test_names_of_many_weights_are_summarized() -> None:
    names = [f"encoder.layer.{layer}.{name}.weight" for layer in (4, 5) for name in "abcd"]
    assert summarize_weight_names([*names, "cls.predictions.bias"]) == "encoder.layer.4.*, encoder.layer.5.*, cls.*"
    assert summarize_weight_names([f"w{n}" for n in range(8)]) == "w0, w1, w2, w3, w4, w5, ... (8 tensors)"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ModelConfig(from_scratch=True, freeze="backbone"), "--freeze would keep random weights"),
        (lambda: ModelConfig(config_overrides=("num_hidden_layers",)), "takes name=value, got 'num_hidden_layers'"),
    ],
)
def test_contradictory_settings_are_refused(make: Callable[[], Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        make()


@pytest.mark.slow
def test_minilm_with_four_layers_is_trained_evaluated_and_used(run: Command, tmp_path: Path) -> None:
    train, test = write_csv(tmp_path / "t.csv", sentences(40)), write_csv(tmp_path / "e.csv", sentences(12, 1))
    flags = ["--train_file", train, "--test_file", test, "--max_steps", 2, "--report_to", "none", "--run_name", "small"]
    changes = ["--config_overrides", "num_hidden_layers=4", "hidden_dropout_prob=0.2"]
    done = run("train.py", *flags, *changes, "--mixed_precision", "no")
    assert "num_hidden_layers=4 hidden_dropout_prob=0.2" in done.stdout
    assert "encoder.layer.4.*, encoder.layer.5.*" in done.stdout
    scored = results_of(run("eval.py", "--run", "outputs/small", "--output_dir", "again"))
    assert scored["test/loss"] == pytest.approx(results_of(done)["test/loss"], abs=1e-6)
    model = load_classifier(ModelConfig(str(tmp_path / "outputs/small/model")))
    assert (model.config.num_hidden_layers, model.config.hidden_dropout_prob) == (4, 0.2)
    assert len(answers("a good film", "--model", tmp_path / "outputs/small")) == 1
    refused = run("train.py", *flags, *changes[:1], "num_hidden_layer=4", code=2)
    assert "did you mean num_hidden_layers" in refused.stderr
