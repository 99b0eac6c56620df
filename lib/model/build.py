"""The model that is trained: loaded, then frozen in part or given an adapter, then recomputed or compiled if asked."""

from typing import Any

import torch
from transformers import AutoModelForSequenceClassification

from lib.config.train import TrainConfig
from lib.data.load import Data
from lib.errors import UserError
from lib.model.adapters.adapt import adapt, adapter_folder
from lib.model.attention import check_dropout, set_attention
from lib.model.compilation import compile_layers
from lib.model.frozen_weights import FLOAT32, check_package, frozen_weights
from lib.model.load import build_model
from lib.model.overrides import override
from lib.model.recomputation import recompute_layers
from lib.model.sharding import SHARDED
from lib.model.source import LoadingInfo, load_hf_config
from lib.runtime.launch_checks import read_sharding


def build_classifier(
    config: TrainConfig, data: Data, tokenizer: Any, device: torch.device, mixed_precision: str = "no"
) -> tuple[Any, LoadingInfo]:
    """A classifier for the labels of `data`, and which of its weights are not those of the checkpoint.

    The linear layers below an adapter are read in the form in which they are held, so that memory never has them in float32.
    Raises UserError if it cannot be loaded, changed, frozen, adapted, recomputed or compiled as asked.
    """
    method, frozen = config.adapter.adapter, FLOAT32
    if method is not None:
        frozen = frozen_weights(config.model.load_in, mixed_precision, device, weight_norms=method == "dora")
    model, weights = build_model(config.model, data.label_names, tokenizer, data.problem_type, frozen)
    model = adapt(model, config.adapter, config.model, weights.new)
    model = recompute_layers(model, config.training.gradient_checkpointing)
    return compile_layers(model, config.training.compile, device), weights


def check_trainable(config: TrainConfig) -> None:
    """Raise UserError for a model that cannot be trained, before data is loaded.

    Quantized weights do not learn, so they need an adapter.
    """
    source = config.model
    if adapter_folder(source) is not None:
        return  # refused when the model is built
    hf_config = load_hf_config(source)
    override(hf_config, source.config_overrides)
    set_attention(source, AutoModelForSequenceClassification, hf_config)
    check_dropout(source, hf_config, config.training.padding_free)
    quantization = getattr(hf_config, "quantization_config", None)
    method = quantization.get("quant_method", "no method") if isinstance(quantization, dict) else quantization
    if source.load_in:
        check_package(f"--load_in {source.load_in}")
        if quantization:
            raise UserError(
                f"--model {source.model}: its weights are quantized already (quantization_config in config.json: {method}); "
                "leave --load_in out"
            )
    if quantization and config.adapter.adapter is None:
        raise UserError(
            f"--model {source.model}: its weights are quantized (quantization_config in config.json: {method}), and quantized "
            "weights do not learn; train an adapter, --adapter lora, or use the model's original"
        )
    if read_sharding():
        check_sharding(config, hf_config, bool(quantization or source.load_in))


def check_sharding(config: TrainConfig, hf_config: Any, quantized: bool) -> None:
    """Raise UserError for what does not go together with a model in shards."""
    plain = "launch with accelerate_configs/multi_gpu.yaml, where every process holds the whole model"
    if quantized:
        raise UserError(
            f"FSDP does not spread quantized weights, and those of --model {config.model.model} are; {plain}, or use the "
            "model's original, without --load_in"
        )
    if hf_config.model_type not in SHARDED:
        raise UserError(
            f"FSDP is not tested for --model {config.model.model}, of type {hf_config.model_type}, but for "
            f"{', '.join(SHARDED)}; {plain}"
        )
    if config.model.head_solver:
        raise UserError(
            f"FSDP and --head_solver do not go together: it solves for the layers of a whole model; {plain}"
        )
    if config.training.compile:
        raise UserError(f"FSDP and --compile do not go together here; leave --compile out, or {plain}")
