"""LoRA, DoRA, IA3, prefix and prompt tuning through peft, which is imported only when one of them is asked for."""

import contextlib
import importlib.util
import inspect
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedModel

from lib.config.sections import AdapterConfig
from lib.errors import UserError

LORA_TARGETS = {"distilbert": ["q_lin", "v_lin"], "modernbert": ["Wqkv"]}
IA3_TARGETS = {
    "distilbert": ["k_lin", "v_lin", "ffn.lin2"],
    "electra": ["key", "value", "output.dense"],
    "xlm-roberta": ["key", "value", "output.dense"],
}
"""Modules of architectures that peft has no defaults for; chosen as it chooses those of BERT."""

FEEDFORWARD = ("ffn.lin2", "output.dense")
WEIGHTS = "adapter_model.safetensors"


def check_package(reason: str) -> None:
    """Raise UserError, with the command that helps, when peft is not installed."""
    if importlib.util.find_spec("peft") is None:
        raise UserError(f"{reason} needs the package peft, which is not installed; run: pip install 'peft>=0.21,<0.22'")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings that peft draws from transformers about names of tomorrow."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def peft_settings(model: PreTrainedModel, config: AdapterConfig, head: list[str]) -> Any:
    """The configuration object of peft; `head` are the modules that are trained and saved as a whole."""
    import peft

    kind = model.config.model_type
    shared: dict[str, Any] = {"task_type": "SEQ_CLS", "modules_to_save": list(head)}
    targets = list(config.adapter_target_modules) or None
    if config.adapter in ("lora", "dora"):
        targets = targets or LORA_TARGETS.get(kind)
        lora = {"r": config.lora_rank, "lora_alpha": config.lora_alpha}
        return peft.LoraConfig(**shared, **lora, target_modules=targets, use_dora=config.adapter == "dora")
    if config.adapter == "ia3":
        targets = targets or IA3_TARGETS.get(kind)
        scaled_inputs = [name for name in targets if name in FEEDFORWARD] if targets else None
        return peft.IA3Config(**shared, target_modules=targets, feedforward_modules=scaled_inputs)
    shared |= {
        "num_virtual_tokens": config.num_virtual_tokens,
        "token_dim": model.config.hidden_size,
        "num_layers": model.config.num_hidden_layers,
        "num_attention_heads": model.config.num_attention_heads,
        "num_transformer_submodules": 1,
    }
    return (peft.PrefixTuningConfig if config.adapter == "prefix" else peft.PromptTuningConfig)(**shared)


def add_peft(
    model: PreTrainedModel, config: AdapterConfig, head: list[str], base: str, revision: str | None
) -> torch.nn.Module:
    """The model with a new adapter; only adapter and `head` are trainable.

    Raises UserError when peft is not installed or the method does not fit the architecture.
    """
    check_package(f"--adapter {config.adapter}")
    import peft

    kind = model.config.model_type
    if config.adapter == "prefix" and "past_key_values" not in inspect.signature(model.base_model.forward).parameters:
        raise UserError(f"--adapter prefix: {kind} takes no keys and values from outside; use --adapter prompt or lora")
    try:
        settings = peft_settings(model, config, head)
        settings.revision = revision
        with quiet():
            adapted = peft.get_peft_model(model, settings)
        settings.base_model_name_or_path = base
    except (ValueError, KeyError) as error:
        named = "--adapter_target_modules NAME [NAME ...] names its modules, if that is what is missing"
        raise UserError(f"--adapter {config.adapter} does not work on {kind}: {error}\n{named}") from error
    return adapted


def save_peft(model: Any, folder: Path) -> None:
    """adapter_config.json and adapter_model.safetensors, as peft writes them: the adapter and the head."""
    model.save_pretrained(folder, save_embedding_layers=False)


def load_peft(model: PreTrainedModel, folder: Path) -> torch.nn.Module:
    """The model with the adapter and the head of a folder, for use as it is.

    Raises UserError when peft is not installed, or the files are damaged or of another model.
    """
    check_package(f"the adapter in {folder}")
    import peft

    try:
        with quiet():
            return peft.PeftModel.from_pretrained(model, str(folder), torch_device="cpu")
    except (ValueError, KeyError, RuntimeError, TypeError, OSError, SafetensorError) as error:
        raise UserError(f"the adapter in {folder} could not be loaded: {str(error).splitlines()[0]}") from error


def restore_peft(model: torch.nn.Module, folder: Path) -> None:
    """Load what `save_peft` wrote into the very model, in place."""
    import peft

    peft.set_peft_model_state_dict(model, load_file(folder / WEIGHTS))
