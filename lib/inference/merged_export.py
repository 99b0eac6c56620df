"""An adapter merged into its base model: an ordinary model of the architecture, which needs no peft."""

from pathlib import Path
from typing import Any

from lib.errors import UserError
from lib.inference.exports import check_outputs, compute_outputs, exporting, refuse_quantized
from lib.model.adapters.adapt import adapter_info
from lib.model.adapters.peft_methods import merge_peft
from lib.model.frozen_weights import KEY
from lib.model.weights import save_model

TOLERANCE = 1e-3
"""Largest difference of an output with which a merged model is written."""


def export_merged(model: Any, tokenizer: Any, folder: Path) -> float:
    """Write the model with its adapter's update added to its weights to `folder`; return the largest difference of a logit.

    The weights are float32. The folder appears only when it is whole, with label names, thresholds and tokenizer. Raises
    UserError if the adapter is no update of weights, or the folder is not empty; RuntimeError if logits differ.
    """
    with exporting("--merge_adapter", folder, model, tokenizer) as draft:
        info = adapter_info(model)
        if info is None:
            raise UserError("--merge_adapter: the model has no adapter; it can be used as it is")
        if info.bottleneck is not None or model.active_peft_config.is_prompt_learning:
            kind = "bottleneck" if info.bottleneck is not None else model.active_peft_config.peft_type.lower()
            raise UserError(
                f"--merge_adapter: a {kind} adapter adds to what layers compute, not to their weights, and cannot be merged; "
                "lora, dora and ia3 can"
            )
        refuse_quantized("--merge_adapter", model)
        wanted = compute_outputs(model, tokenizer)
        merged = merge_peft(model)
        vars(merged.config).pop(KEY, None)
        difference = check_outputs(compute_outputs(merged, tokenizer), wanted, TOLERANCE)
        save_model(merged, draft)
    return difference
