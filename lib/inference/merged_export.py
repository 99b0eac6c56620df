"""An adapter merged into its base model: an ordinary model of the architecture, which needs no peft."""

import shutil
from pathlib import Path
from typing import Any

import torch

from lib.errors import UserError
from lib.inference.onnx_export import TEXTS
from lib.model.adapters.adapt import adapter_info
from lib.model.adapters.peft_methods import merge_peft
from lib.model.weights import save_model
from lib.run.best_model import KIND
from lib.runtime.atomic import AGAIN, drafting, explaining, publish_folder, write_manifest

TOLERANCE = 1e-3
"""Largest difference of a logit with which a merged model is written."""


def export_merged(model: Any, tokenizer: Any, folder: Path) -> float:
    """Write the model with its adapter's update added to its weights to `folder`; return the largest difference of a logit.

    The weights are float32. The folder appears only when it is whole, with label names, thresholds and tokenizer. Raises
    UserError if the adapter is no update of weights, or the folder is not empty; RuntimeError if logits differ.
    """
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"--merge_adapter {folder}: the folder is not empty; name another")
    info = adapter_info(model)
    if info is None:
        raise UserError("--merge_adapter: the model has no adapter; it can be used as it is")
    if info.bottleneck is not None or model.active_peft_config.is_prompt_learning:
        kind = "bottleneck" if info.bottleneck is not None else model.active_peft_config.peft_type.lower()
        raise UserError(
            f"--merge_adapter: a {kind} adapter adds to what layers compute, not to their weights, and cannot be merged; "
            "lora, dora and ia3 can"
        )
    before = compute_logits(model, tokenizer)
    card = Path(model.config._name_or_path) / "README.md"
    merged = merge_peft(model)
    difference = (compute_logits(merged, tokenizer) - before).abs().max().item() / max(1.0, before.abs().max().item())
    if not difference <= TOLERANCE:
        raise RuntimeError(f"logits of the merged model differ by {difference:.1e}; it is not written")
    with explaining(folder, AGAIN):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with drafting(folder) as fresh:
            save_model(merged, fresh)
            tokenizer.save_pretrained(fresh)
            if card.is_file():
                shutil.copy(card, fresh)
            write_manifest(fresh, KIND)
            publish_folder(fresh, folder)
    return difference


@torch.no_grad()
def compute_logits(model: Any, tokenizer: Any) -> torch.Tensor:
    """float32 (texts, outputs) on the CPU, of a few texts of different length."""
    batch = tokenizer(list(TEXTS), padding=True, truncation=True, return_tensors="pt").to(model.device)
    return model(**batch).logits.float().cpu()
