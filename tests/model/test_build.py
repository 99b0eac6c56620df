"""Models that cannot be trained as they are launched are refused before data is read."""

import dataclasses
import json
import shutil
from pathlib import Path

from lib.config.sections import AdapterConfig, ModelConfig
from lib.config.train import TrainConfig
from lib.model.build import check_trainable
from tests.conftest import Command


def config_of(folder: Path, *overrides: str, adapter: str | None = None) -> TrainConfig:
    model = ModelConfig(model=str(folder), config_overrides=overrides)
    return dataclasses.replace(TrainConfig(), model=model, adapter=AdapterConfig(adapter=adapter))  # type: ignore[arg-type]


def quantized(roberta: Path, folder: Path) -> Path:
    shutil.copytree(roberta, folder)
    content = json.loads((folder / "config.json").read_text())
    content["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def test_quantized_weights_are_trained_with_an_adapter_only(call: Command, roberta: Path, tmp_path: Path) -> None:
    folder = quantized(roberta, tmp_path / "quantized")
    check_trainable(config_of(folder, adapter="lora"))
    (tmp_path / "broken.csv").write_bytes(b"\xff\xfe broken")
    done = call("train.py", "--model", folder, "--train_file", "broken.csv", code=2)
    assert "quantization_config in config.json: bitsandbytes" in done.stderr
    assert "--adapter lora" in done.stderr
