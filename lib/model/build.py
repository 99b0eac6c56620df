"""The model that is trained: loaded, then frozen in part or given an adapter, then compiled if asked."""

from typing import Any

import torch

from lib.config.train import TrainConfig
from lib.data.load import Data
from lib.model.adapters.adapt import adapt
from lib.model.compilation import compile_layers
from lib.model.load import build_model
from lib.model.source import LoadingInfo


def build_classifier(config: TrainConfig, data: Data, tokenizer: Any, device: torch.device) -> tuple[Any, LoadingInfo]:
    """A classifier for the labels of `data`, and which of its weights are not those of the checkpoint.

    Raises UserError if it cannot be loaded, changed, frozen, adapted or compiled as asked.
    """
    model, weights = build_model(config.model, data.label_names, tokenizer, data.problem_type)
    model = adapt(model, config.adapter, config.model, weights.new)
    return compile_layers(model, config.training.compile, device), weights
