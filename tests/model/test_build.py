"""Models that cannot be trained as they are launched are refused before data is read."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from transformers import BartConfig, OPTConfig, PreTrainedConfig

from lib.config.sections import AdapterConfig, ModelConfig
from lib.config.train import TrainConfig
from lib.errors import UserError
from lib.model.build import check_trainable
from tests.conftest import Command


def config_of(folder: Path, *overrides: str, adapter: str | None = None) -> TrainConfig:
    model = ModelConfig(model=str(folder), config_overrides=overrides)
    return dataclasses.replace(TrainConfig(), model=model, adapter=AdapterConfig(adapter=adapter))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("hf_config", "name"),
    [(BartConfig(encoder_layerdrop=0.1), "encoder_layerdrop"), (OPTConfig(layerdrop=0.1), "layerdrop")],
)
def test_layer_drop_on_several_processes_is_refused_and_turned_off_by_the_line(
    hf_config: PreTrainedConfig, name: str, tmp_path: Path
) -> None:
    hf_config.save_pretrained(tmp_path)
    check_trainable(config_of(tmp_path), 1)
    with pytest.raises(UserError, match=rf"{name}(.|\n)*not on 2(.|\n)*--config_overrides {name}=0.0"):
        check_trainable(config_of(tmp_path), 2)
    check_trainable(config_of(tmp_path, f"{name}=0.0"), 2)


def quantized(roberta: Path, folder: Path) -> Path:
    shutil.copytree(roberta, folder)
    content = json.loads((folder / "config.json").read_text())
    content["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def test_quantized_weights_are_trained_with_an_adapter_only(call: Command, roberta: Path, tmp_path: Path) -> None:
    folder = quantized(roberta, tmp_path / "quantized")
    check_trainable(config_of(folder, adapter="lora"), 1)
    (tmp_path / "broken.csv").write_bytes(b"\xff\xfe broken")
    done = call("train.py", "--model", folder, "--train_file", "broken.csv", code=2)
    assert "quantization_config in config.json: bitsandbytes" in done.stderr
    assert "--adapter lora" in done.stderr
