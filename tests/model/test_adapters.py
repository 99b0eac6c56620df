"""Adapters: a new one changes no logit, only adapter and head are trained and saved, and loading is bitwise exact."""

import copy
import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

import eval as evaluation
import predict
from lib.config.cli import parse_cli
from lib.config.eval import EvalConfig
from lib.config.sections import AdapterConfig, ModelConfig, flatten
from lib.config.train import TrainConfig
from lib.errors import UserError
from lib.model.adapters import peft_methods
from lib.model.adapters.adapt import adapt, adapter_folder, frozen_layers
from lib.model.adapters.bottleneck import ARCHITECTURES, Bottleneck, bottleneck_config
from lib.model.layers import count_parameters, set_train_mode
from lib.model.load import load_classifier, load_tokenizer
from lib.model.weights import reload_model, save_model, saved_tensors
from lib.run.best_model import publish_model
from lib.runtime.precision import keep_in_dtype
from tests import tiny_models
from tests.conftest import ROOT, read_lines, results_of, sentences, tiny_roberta, write_csv
from tests.loopback_hub import loopback_hub
from tests.predicting import answers, settings
from tests.resuming import same_tensors
from tests.tiny_models import NAMES, SETTINGS, build_from, save_classifier

KINDS = [*(kind for kind in SETTINGS if kind != "gpt2"), "xlm-roberta"]
PLACEMENTS = ("pfeiffer", "houlsby")
PEFT = ("lora", "dora", "ia3", "prefix", "prompt")
TEXTS = ["a good film", "the plot was very dull and not fine", "great"]


def build(folder: Path, method: str | None, placement: str = "pfeiffer"):
    """(model with a new adapter, tokenizer)."""
    source = ModelConfig(model=str(folder))
    torch.manual_seed(0)
    model, weights = build_from(folder)
    more = {"adapter_placement": placement, "adapter_reduction_factor": 4.0} if method == "bottleneck" else {}
    more = {"num_virtual_tokens": 3} if method in ("prefix", "prompt") else more
    return adapt(model, AdapterConfig(adapter=method, **more), source, weights.new), load_tokenizer(source)


def logits(model, tokenizer) -> torch.Tensor:
    model.eval()
    with torch.inference_mode():
        return model(**tokenizer(TEXTS, padding=True, return_tensors="pt")).logits.clone()


def randomize(model) -> None:
    """Random values for all trainable weights, so that the adapter matters."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in saved_tensors(model).values():
            parameter.normal_(0, 0.5)


def train_a_step(model, tokenizer) -> None:
    set_train_mode(model)
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):  # down-projections have no gradient while up-projections are zero
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(**batch).logits, torch.tensor([0, 1, 2])).backward()
        optimizer.step()


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("kind", KINDS)
def test_new_bottleneck_leaves_logits_bitwise_equal_and_a_trained_one_does_not(folder_of, kind, placement):
    plain, tokenizer = build(folder_of(kind), None)
    adapted, _ = build(folder_of(kind), "bottleneck", placement)
    assert torch.equal(logits(plain, tokenizer), logits(adapted, tokenizer))
    for module in adapted.modules():
        if isinstance(module, Bottleneck):
            with torch.no_grad():
                module.up.bias.normal_()
            assert not torch.allclose(logits(plain, tokenizer), logits(adapted, tokenizer), atol=1e-6)
            torch.nn.init.zeros_(module.up.bias)


@pytest.mark.parametrize("method", ["lora", "dora", "ia3"])
def test_new_adapter_of_peft_leaves_logits_equal(folder_of, method):
    plain, tokenizer = build(folder_of("bert"), None)
    adapted, _ = build(folder_of("bert"), method)
    torch.testing.assert_close(logits(plain, tokenizer), logits(adapted, tokenizer), atol=1e-5, rtol=0)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("kind", KINDS)
def test_training_changes_all_of_adapters_and_head_and_nothing_else(folder_of, kind, placement):
    model, tokenizer = build(folder_of(kind), "bottleneck", placement)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train_a_step(model, tokenizer)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    inside = {name for name in before if ".adapter." in name}
    outside = {name for name in before if not name.startswith(f"{model.base_model_prefix}.")}
    assert changed == inside | outside == set(saved_tensors(model))
    layers = model.config.num_hidden_layers
    assert len(inside) == layers * 4 * (2 if placement == "houlsby" else 1)


@pytest.mark.parametrize("method", PEFT)
def test_training_changes_adapter_and_head_of_peft_only(folder_of, method):
    model, tokenizer = build(folder_of("roberta"), method)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train_a_step(model, tokenizer)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == set(saved_tensors(model))
    assert any("classifier.modules_to_save" in name for name in changed)
    assert count_parameters(model)[0] < 0.2 * count_parameters(model)[1]


@pytest.mark.parametrize(
    ("kind", "method"), [*((kind, "bottleneck") for kind in KINDS), *(("roberta", method) for method in PEFT)]
)
def test_saved_adapter_loads_with_bitwise_equal_logits(folder_of, tmp_path, kind, method):
    model, tokenizer = build(folder_of(kind), method, "houlsby")
    randomize(model)
    wanted, folder = logits(model, tokenizer), tmp_path / "model"
    save_model(model, folder)
    assert "model.safetensors" not in {path.name for path in folder.iterdir()}
    loaded = load_classifier(ModelConfig(model=str(folder)))
    assert torch.equal(logits(loaded, tokenizer), wanted)
    assert list(loaded.config.id2label.values()) == NAMES
    randomize(model)
    train_a_step(model, tokenizer)
    assert not torch.equal(logits(model, tokenizer), wanted)
    reload_model(model, folder)
    assert torch.equal(logits(model, tokenizer), wanted)


@pytest.mark.parametrize("method", ["bottleneck", "lora"])
def test_pooler_missing_from_the_checkpoint_is_trained_and_saved_with_the_head(tmp_path, method):
    """An encoder saved without a pooler gets a random one for its classifier: another one at every load."""
    from transformers import AutoModel

    folder = save_classifier("bert", tmp_path / "bert")
    AutoModel.from_pretrained(folder, add_pooling_layer=False).save_pretrained(folder)
    model, tokenizer = build(folder, method)
    assert any("pooler.dense" in name or "pooler.modules_to_save" in name for name in saved_tensors(model))
    save_model(model, tmp_path / "saved")
    torch.manual_seed(7)
    loaded = load_classifier(ModelConfig(model=str(tmp_path / "saved")))
    assert torch.equal(logits(loaded, tokenizer), logits(model, tokenizer))


def test_frozen_backbone_keeps_its_dropout_with_an_adapter(folder_of):
    model, _ = build(folder_of("bert"), "bottleneck")
    set_train_mode(model)
    assert all(module.training for module in model.modules())
    frozen, _ = build(folder_of("bert"), None)
    frozen.base_model.requires_grad_(False)
    set_train_mode(frozen)
    assert not frozen.base_model.training


def test_copy_of_an_adapted_model_is_independent(folder_of):
    model, tokenizer = build(folder_of("roberta"), "bottleneck")
    before, twin = logits(model, tokenizer), copy.deepcopy(model)
    randomize(twin)
    assert torch.equal(logits(model, tokenizer), before)
    assert not torch.equal(logits(twin, tokenizer), before)


def test_placements_are_those_of_the_papers():
    """Pfeiffer after the norm of the feed-forward part only, Houlsby before both norms."""
    pfeiffer, houlsby = (
        bottleneck_config(AdapterConfig(adapter="bottleneck", adapter_placement=p)) for p in PLACEMENTS
    )
    assert (pfeiffer.attention, pfeiffer.output, pfeiffer.after_norm, pfeiffer.non_linearity) == (
        *(False, True, True),
        "relu",
    )
    assert (houlsby.attention, houlsby.output, houlsby.after_norm, houlsby.non_linearity) == (
        *(True, True, False),
        "swish",
    )


def test_one_layer_of_bert_with_adapters_equals_the_formula(folder_of):
    """Both placements, written out on the modules of a layer."""
    hidden, residual = torch.randn(2, 5, 32), torch.randn(2, 5, 16)
    for placement in PLACEMENTS:
        model, _ = build(folder_of("bert"), "bottleneck", placement)
        randomize(model)
        model.eval()
        output = model.bert.encoder.layer[0].output
        assert hasattr(model.bert.encoder.layer[0].attention.output.dropout, "adapter") == (placement == "houlsby")
        adapter = output.LayerNorm.adapter if placement == "pfeiffer" else output.dropout.adapter
        norm = torch.nn.LayerNorm(16, eps=model.config.layer_norm_eps)
        norm.load_state_dict({name: output.LayerNorm.state_dict()[name] for name in ("weight", "bias")})
        sublayer = output.dense(hidden)
        seen = norm(sublayer + residual) if placement == "pfeiffer" else sublayer
        act = torch.relu if placement == "pfeiffer" else torch.nn.functional.silu
        change = act(seen @ adapter.down.weight.T + adapter.down.bias) @ adapter.up.weight.T + adapter.up.bias
        torch.testing.assert_close(output(hidden, residual), norm(sublayer + change + residual))


def published(folder: Path, base: Path, kind: str = "roberta", legacy: bool = False, **changes: object) -> Path:
    """An adapter with its head in the files of the `adapters` library, with names and settings written by hand."""
    folder.mkdir()
    torch.manual_seed(3)
    inner = {"roberta": "roberta.encoder.layer.{}.output.", "bert": "bert.encoder.layer.{}.output."}
    inner["distilbert"] = "distilbert.transformer.layer.{}.output_adapters."
    module = "layer_text_task_adapters" if legacy else "adapters"
    shapes = {"adapter_down.0.weight": (4, 16), "adapter_down.0.bias": (4,)}
    shapes |= {"adapter_up.weight": (16, 4), "adapter_up.bias": (16,)}
    adapter = {
        f"{inner[kind].format(layer)}{module}.sst-2.{name}": torch.randn(shape)
        for layer in range(2)
        for name, shape in shapes.items()
    }
    head = {"heads.sst-2.1.weight": torch.randn(16, 16), "heads.sst-2.1.bias": torch.randn(16)}
    head |= {"heads.sst-2.4.weight": torch.randn(2, 16), "heads.sst-2.4.bias": torch.randn(2)}
    torch.save(adapter, folder / "pytorch_adapter.bin")
    torch.save(head, folder / "pytorch_model_head.bin")
    about = {"hidden_size": 16, "model_class": "RobertaModelWithHeads", "model_name": str(base)}
    about |= {"model_type": kind, "name": "sst-2"}
    config = {
        **{"adapter_residual_before_ln": False, "cross_adapter": False, "inv_adapter": None, "leave_out": []},
        **{"inv_adapter_reduction_factor": None, "ln_after": False, "ln_before": False, "mh_adapter": False},
        **{"non_linearity": "relu", "original_ln_after": True, "original_ln_before": True, "output_adapter": True},
        **{"reduction_factor": 4, "residual_before_ln": True},
    }
    (folder / "adapter_config.json").write_text(json.dumps(about | {"config": config | changes}))
    activation = "relu" if kind == "distilbert" else "tanh"
    head_config = {"activation_function": activation, "head_type": "classification", "layers": 2, "num_labels": 2}
    head_config |= {"bias": True, "use_pooler": False, "label2id": {"bad": 0, "good": 1}}
    (folder / "head_config.json").write_text(json.dumps(about | {"config": head_config}))
    return folder


@pytest.mark.parametrize(("kind", "legacy"), [("roberta", False), ("roberta", True), ("bert", False)])
def test_published_adapter_has_the_logits_of_its_formula(folder_of, tmp_path, kind, legacy):
    folder = published(tmp_path / "hub", folder_of(kind), kind, legacy)
    model = load_classifier(ModelConfig(model=str(folder)))
    assert model.config.id2label == {0: "bad", 1: "good"}
    stored, head = (torch.load(folder / name) for name in ("pytorch_adapter.bin", "pytorch_model_head.bin"))
    inputs = load_tokenizer(ModelConfig(model=str(folder_of(kind))))(TEXTS, padding=True, return_tensors="pt")

    plain, _ = build(folder_of(kind), None)
    plain.eval()

    def adapt_by_hand(layer: int):
        keys = [key for key in stored if f".layer.{layer}." in key]
        down, down_bias, up, up_bias = (stored[key] for key in keys)

        def hook(module, args, normalised):
            change = torch.relu(normalised @ down.T + down_bias) @ up.T + up_bias
            return torch.nn.functional.layer_norm(args[0] + change, (16,), module.weight, module.bias, module.eps)

        return hook

    for number, layer in enumerate(plain.base_model.encoder.layer):
        layer.output.LayerNorm.register_forward_hook(adapt_by_hand(number))
    with torch.inference_mode():
        first = plain.base_model(**inputs).last_hidden_state[:, 0]
        between = torch.tanh(first @ head["heads.sst-2.1.weight"].T + head["heads.sst-2.1.bias"])
        wanted = between @ head["heads.sst-2.4.weight"].T + head["heads.sst-2.4.bias"]
        found = model(**inputs).logits
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    assert (found[0] - found[1]).abs().max() > 1e-2


@pytest.mark.parametrize("method", ["lora", "published"])
def test_adapter_without_a_configuration_has_no_thresholds_temperature_or_data_of_its_base(tmp_path, method):
    """They belong to the head of the base, and to what it was trained on."""
    base = save_classifier("roberta", tmp_path / "base")
    settings = json.loads((base / "config.json").read_text())
    of_base = {"thresholds": [0.1, 0.2, 0.3], "calibration_temperature": 2.5, "trained_on": {"dataset": "sst2"}}
    if method == "published":
        folder = published(tmp_path / "hub", base)
    else:
        save_model(build(base, method)[0], folder := tmp_path / "adapter")
        (folder / "config.json").unlink()
    (base / "config.json").write_text(json.dumps(settings | of_base))
    model = load_classifier(ModelConfig(model=str(folder)))
    assert not [key for key in of_base if hasattr(model.config, key)]


def test_saved_tensors_have_the_names_of_the_adapters_library(folder_of, tmp_path):
    """Its names for the Houlsby adapter `classifier` of a RobertaForSequenceClassification."""
    model, _ = build(folder_of("roberta"), "bottleneck", "houlsby")
    save_model(model, tmp_path / "model")
    names = set(load_file(tmp_path / "model" / "adapter.safetensors"))
    assert names == {
        f"roberta.encoder.layer.{layer}.{part}output.adapters.classifier.{piece}.{tensor}"
        for layer in range(2)
        for part in ("", "attention.")
        for piece in ("adapter_down.0", "adapter_up")
        for tensor in ("weight", "bias")
    }
    head = set(load_file(tmp_path / "model" / "model_head.safetensors"))
    assert head == {f"classifier.{layer}.{tensor}" for layer in ("dense", "out_proj") for tensor in ("weight", "bias")}
    about = json.loads((tmp_path / "model" / "adapter_config.json").read_text())
    assert about["model_name"] == str(folder_of("roberta"))
    wanted = {"mh_adapter": True, "output_adapter": True, "original_ln_before": False, "original_ln_after": True}
    wanted |= {"residual_before_ln": True, "non_linearity": "swish", "reduction_factor": 4.0, "scaling": 1.0}
    assert about["config"].items() >= wanted.items()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"is_parallel": True}, "is_parallel True"),
        ({"scaling": "learned"}, "scaling 'learned'"),
        ({"non_linearity": "squiggle"}, "non_linearity 'squiggle'"),
        ({"inv_adapter": "nice"}, "inv_adapter 'nice'"),
        ({"reduction_factor": 8}, "does not fit the model"),
        ({"mh_adapter": True, "original_ln_before": False}, "lacks .*attention.output.adapters"),
        ({"leave_out": [0]}, "has .*layer.0."),
    ],
)
def test_unsupported_published_adapter_is_refused_by_the_name_of_its_setting(folder_of, tmp_path, changes, message):
    folder = published(tmp_path / "hub", folder_of("roberta"), **changes)
    with pytest.raises(UserError, match=message):
        load_classifier(ModelConfig(model=str(folder)))


def test_published_head_that_does_not_fit_is_refused(folder_of, tmp_path):
    folder = published(tmp_path / "hub", folder_of("roberta"))
    head = json.loads((folder / "head_config.json").read_text())
    head["config"]["head_type"] = "question_answering"
    (folder / "head_config.json").write_text(json.dumps(head))
    with pytest.raises(UserError, match=r"the head 'sst-2' \(question_answering"):
        load_classifier(ModelConfig(model=str(folder)))
    (folder / "head_config.json").unlink()
    with pytest.raises(UserError, match="an adapter without a head"):
        load_classifier(ModelConfig(model=str(folder)))


def test_pickle_with_code_is_refused_and_runs_nothing(folder_of, tmp_path):
    import os

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "broken_in"),)

    folder = published(tmp_path / "hub", folder_of("roberta"))
    torch.save({"weight": Evil()}, folder / "pytorch_adapter.bin")
    with pytest.raises(UserError, match=r"pytorch_adapter\.bin cannot be read"):
        load_classifier(ModelConfig(model=str(folder)))
    assert not (tmp_path / "broken_in").exists()


def test_unknown_architecture_is_refused_with_the_known_ones(tmp_path):
    folder = tiny_models.deciding_decoder(tmp_path / "gpt2")
    with pytest.raises(UserError, match=r"knows bert, roberta, .*modernbert; the model is gpt2") as refused:
        build(folder, "bottleneck")
    assert all(kind in str(refused.value) for kind in ARCHITECTURES)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--adapter lora --freeze backbone", "leave --freeze out"),
        ("--lora_rank 4", "--lora_rank is for --adapter lora or dora, not for a run without it"),
        ("--adapter lora --adapter_placement houlsby", "--adapter_placement is for --adapter bottleneck, not for lora"),
        ("--adapter prefix --num_virtual_tokens 0", "--num_virtual_tokens must be above 0"),
        ("--adapter ia3 --num_virtual_tokens 3", "--num_virtual_tokens is for --adapter prefix or prompt"),
        ("--load_in 4bit", "--load_in 4bit: quantized weights do not learn; add --adapter lora"),
        ("--load_in 8bit --freeze backbone", "add --adapter lora"),
        ("--load_in 8bit --adapter lora --compile", "--compile"),
        ("--load_in 3bit --adapter lora", "4bit"),
    ],
)
def test_contradictory_options_are_refused_when_parsed(capsys, flags, message):
    with pytest.raises(SystemExit) as ended:
        parse_cli(TrainConfig, flags.split())
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_missing_peft_is_reported_with_the_command_that_installs_it(folder_of, monkeypatch):
    monkeypatch.setattr(peft_methods.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"--adapter lora needs the package peft.*pip install 'peft"):
        build(folder_of("bert"), "lora")


def test_unsupported_methods_of_an_architecture_are_refused_by_name(folder_of):
    with pytest.raises(UserError, match=r"--adapter prefix: modernbert takes no past keys"):
        build(folder_of("modernbert"), "prefix")
    with pytest.raises(UserError, match=r"--adapter ia3 does not work on modernbert: .*\n.*--adapter_target_modules"):
        build(folder_of("modernbert"), "ia3")


def test_adapter_is_refused_as_a_base_model_and_for_other_tasks(folder_of, tmp_path):
    model, tokenizer = build(folder_of("roberta"), "bottleneck")
    publish_model(Accelerator(cpu=True), model, tokenizer, tmp_path / "model")
    with pytest.raises(UserError, match="is itself an adapter"):
        adapt(model, AdapterConfig(adapter="lora"), ModelConfig(model=str(tmp_path / "model")), [])
    with pytest.raises(UserError, match="is an adapter of a text classifier"):
        answers("a film", "--model", tmp_path / "model", "--task", "feature-extraction")


def test_missing_base_model_is_named(folder_of, tmp_path):
    folder = published(tmp_path / "hub", tmp_path / "moved")
    with pytest.raises(UserError, match=r"is an adapter over .*moved, which is not there"):
        load_classifier(ModelConfig(model=str(folder)))
    assert adapter_folder(ModelConfig(model=str(folder_of("roberta")))) is None


@pytest.mark.parametrize("method", ["bottleneck", "lora", "prompt"])
def test_predict_answers_with_an_adapter(folder_of, tmp_path, method):
    model, tokenizer = build(folder_of("roberta"), method)
    randomize(model)
    publish_model(Accelerator(cpu=True), model, tokenizer, tmp_path / "model")
    found = answers(*TEXTS, "--model", tmp_path / "model")
    wanted = logits(model, tokenizer).softmax(dim=1)
    for row, probabilities in zip(found, wanted.tolist(), strict=True):
        assert list(row["probabilities"].values()) == pytest.approx(probabilities, abs=1e-6)


def test_adapter_without_a_tokenizer_uses_that_of_its_base_model(folder_of, tmp_path):
    folder = published(tmp_path / "hub", folder_of("roberta"))
    (found,) = answers("a good film", "--model", folder)
    assert found["label"] in ("bad", "good")


def test_long_text_leaves_room_for_the_virtual_tokens(folder_of, tmp_path):
    model, tokenizer = build(folder_of("roberta"), "prompt")
    tokenizer.model_max_length = 10_000
    publish_model(Accelerator(cpu=True), model, tokenizer, tmp_path / "model")
    (found,) = answers("film " * 300, "--model", tmp_path / "model")
    assert found["label"] in NAMES


def test_published_adapter_and_its_base_model_are_downloaded_from_the_hub(run, tmp_path):
    tiny_roberta(tmp_path / "hub" / "models" / "roberta-base")
    (tmp_path / "hub" / "models" / "AdapterHub").mkdir()
    published(tmp_path / "hub" / "models" / "AdapterHub" / "roberta-base-pf-sst2", Path("roberta-base"))
    with loopback_hub(tmp_path / "hub") as (endpoint, requests):
        env = {"HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0"}
        done = run("predict.py", "a good film", "--model", "AdapterHub/roberta-base-pf-sst2", env=env)
    assert json.loads(done.stdout)["label"] in ("bad", "good")
    assert any("roberta-base-pf-sst2" in path and path.endswith("pytorch_adapter.bin") for path in requests)
    assert any("/roberta-base/" in path and path.endswith("model.safetensors") for path in requests)


def test_recipe_has_the_settings_of_the_note():
    path = ROOT / "recipes" / "rotten_tomatoes_adapter.yaml"
    config = flatten(parse_cli(TrainConfig, ["--config", str(path)]))
    wanted = {"model": "roberta-base", "dataset": "rotten_tomatoes", "adapter": "bottleneck", "learning_rate": 1e-4}
    wanted |= {"num_train_epochs": 6, "train_batch_size": 32, "max_length": 80}
    assert {name: config[name] for name in wanted} == wanted


def test_adapter_is_trained_evaluated_and_used_by_the_scripts(
    run, roberta_without_dropout, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    base, folder = roberta_without_dropout, tmp_path / "outputs" / "adapted"
    files = {role: write_csv(tmp_path / f"{role}.csv", sentences(n, n)) for role, n in (("train", 96), ("test", 31))}
    flags = (
        f"--train_file {files['train']} --test_file {files['test']} --model {base} --run_name adapted --bs 8 --lr 2e-2"
    )
    flags += " --adapter bottleneck --adapter_reduction_factor 2 --epochs 6 --logging_steps 22 --mixed_precision no"
    results = results_of(run("train.py", *flags.split(), "--report_to", "none", processes=1))
    losses = [line["train/loss"] for line in read_lines(folder / "metrics.jsonl")]
    assert losses[-1] < losses[0] - 0.05
    size = sum(path.stat().st_size for path in (folder / "model").glob("*.safetensors"))
    assert size < 0.4 * (base / "model.safetensors").stat().st_size
    assert results["run/trainable_parameters"] < 0.4 * results["run/parameters"]

    evaluation.main(parse_cli(EvalConfig, ["--run", str(folder), "--output_dir", str(tmp_path / "again")]))
    scored = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    for name in ("test/loss", "test/accuracy"):
        assert scored[name] == pytest.approx(results[name], abs=1e-6)
    rows = read_lines(folder / "eval-test" / "predictions.jsonl")
    predict.main(settings("--input", files["test"], "--model", folder, "--output", tmp_path / "labels.jsonl"))
    assert [row["label"] for row in read_lines(tmp_path / "labels.jsonl")] == [row["predicted"] for row in rows]
    card = (folder / "model" / "README.md").read_text()
    assert "predict.py" in card
    assert "pipeline(" not in card


@pytest.mark.parametrize("method", ["bottleneck", "lora", "dora", "ia3", "prefix", "prompt"])
def test_frozen_weights_in_bf16_give_equal_losses_and_gradients(folder_of, method):
    """As autocast rounds them in each forward; DoRA, which also reads their norms, keeps them in float32."""
    found = []
    for precision in ("no", "bf16"):
        torch.manual_seed(0)
        model, tokenizer = build(folder_of("bert"), method)
        randomize(model)
        keep_in_dtype(frozen_layers(model), precision)
        rounded = [name for name, p in model.named_parameters() if p.dtype == torch.bfloat16]
        assert bool(rounded) == (precision == "bf16" and method != "dora")
        assert not set(rounded) & set(saved_tensors(model))
        batch = tokenizer(["a dull film", "good"], padding=True, return_tensors="pt")
        torch.manual_seed(7)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model.train()(**batch).logits.float().square().mean()
        loss.backward()
        found.append({"loss": loss.detach()} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert same_tensors(*found)


def test_prompt_is_as_wide_as_the_token_embeddings_of_electra(folder_of):
    model, tokenizer = build(folder_of("electra"), "prompt")
    batch = tokenizer(["a dull film", "good"], padding=True, return_tensors="pt")
    assert model(**batch).logits.shape == (2, 3)
