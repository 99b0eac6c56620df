"""LoRA, DoRA, IA3, prefix and prompt tuning through peft, which is imported only when one of them is used."""

import contextlib
import importlib.util
import inspect
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel

from lib.config.sections import AdapterConfig, ModelSource
from lib.errors import UserError, first_line
from lib.model.frozen_weights import LINEAR, seeming_float32
from lib.runtime.startup import hidden

QUERIES_AND_VALUES = (
    *(("query", "value"), ("query_proj", "value_proj"), ("q_proj", "v_proj"), ("q_lin", "v_lin"), ("q", "v")),
    *(("Wqkv",), ("qkv_proj",), ("query_key_value",), ("qkv",), ("c_attn",), ("in_proj",)),
)
"""What transformers calls the projections of attention that Hu et al. (2021, arXiv:2106.09685, section 7.1) adapt: those to
queries and values, or one to queries, keys and values."""

ALL_LINEAR = "all-linear"
"""Every linear layer, as Dettmers et al. (2023, arXiv:2305.14314, section 4) found best below quantized weights."""

IA3_TARGETS = {
    "distilbert": ["k_lin", "v_lin", "ffn.lin2"],
    "electra": ["key", "value", "output.dense"],
    "xlm-roberta": ["key", "value", "output.dense"],
}
"""By model type, the modules to adapt where peft has no default: those that match its defaults for BERT."""

FEEDFORWARD = ("ffn.lin2", "output.dense")
"""Of these modules, IA3 scales the inputs instead of the outputs."""


def add_peft(model: PreTrainedModel, config: AdapterConfig, head: list[str], base: ModelSource) -> torch.nn.Module:
    """The model with a new adapter; only the adapter and the modules `head` are trainable.

    Raises UserError if peft is not installed or the method does not fit the architecture.
    """
    check_package(f"--adapter {config.adapter}")
    with using_peft():
        import peft

    kind = model.config.model_type
    if config.adapter == "prefix" and "past_key_values" not in inspect.signature(model.base_model.forward).parameters:
        raise UserError(f"--adapter prefix: {kind} takes no past keys and values; use --adapter prompt or lora")
    try:
        settings = peft_config(model, config, head)
        settings.revision = base.model_revision
        with using_peft(), seeming_float32(model):
            adapted = peft.get_peft_model(model, settings)
        settings.base_model_name_or_path = base.model
    except (ValueError, KeyError) as error:
        hint = "If the modules to adapt are unknown, name them with --adapter_target_modules NAME [NAME ...]."
        raise UserError(f"--adapter {config.adapter} does not work on {kind}: {error}\n{hint}") from error
    return adapted


def peft_config(model: PreTrainedModel, config: AdapterConfig, head: list[str]) -> Any:
    """peft's configuration of the method; the modules `head` are trained and saved whole."""
    import peft

    kind = model.config.model_type
    shared: dict[str, Any] = {"task_type": "SEQ_CLS", "modules_to_save": list(head)}
    targets = list(config.adapter_target_modules) or None
    if config.adapter in ("lora", "dora"):
        targets = lora_targets(model, targets, head)
        lora = {"r": config.lora_rank, "lora_alpha": config.lora_alpha}
        return peft.LoraConfig(**shared, **lora, target_modules=targets, use_dora=config.adapter == "dora")
    if config.adapter == "ia3":
        targets = targets or IA3_TARGETS.get(kind)
        scaled_inputs = [name for name in targets if name in FEEDFORWARD] if targets else None
        return peft.IA3Config(**shared, target_modules=targets, feedforward_modules=scaled_inputs)
    shared |= {
        "num_virtual_tokens": config.num_virtual_tokens,
        # A prompt stands beside the token embeddings, which may be narrower than the layers, as in ELECTRA.
        "token_dim": model.get_input_embeddings().embedding_dim
        if config.adapter == "prompt"
        else model.config.hidden_size,
        "num_layers": model.config.num_hidden_layers,
        "num_attention_heads": model.config.num_attention_heads,
        "num_transformer_submodules": 1,
    }
    return (peft.PrefixTuningConfig if config.adapter == "prefix" else peft.PromptTuningConfig)(**shared)


def lora_targets(model: PreTrainedModel, wanted: list[str] | None, head: list[str]) -> list[str] | None:
    """The modules that LoRA adapts: those `wanted`, else queries and values; None leaves the choice to peft, or its error.

    The modules `head`, which are trained whole, are not among `all-linear`.
    """
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN

    if wanted not in (None, [ALL_LINEAR]) or (wanted is None and model.config.model_type in KNOWN):
        return wanted
    trained = tuple(f"{name}." for name in head)
    linear = [
        path
        for path, layer in model.named_modules()
        if isinstance(layer, LINEAR) and path.startswith(f"{model.base_model_prefix}.")
    ]
    linear = [path for path in linear if not f"{path}.".startswith(trained)]
    if wanted:
        return linear
    names = {path.rpartition(".")[2] for path in linear}
    return next((list(pair) for pair in QUERIES_AND_VALUES if {*pair} <= names), None)


def load_peft(model: PreTrainedModel, folder: Path) -> torch.nn.Module:
    """The model with the trained adapter and head of a folder, not trainable.

    Raises UserError if peft is not installed, or the files are damaged or do not fit the model.
    """
    check_package(f"the adapter in {folder}")
    with using_peft():
        import peft

    try:
        with using_peft(), seeming_float32(model):
            return peft.PeftModel.from_pretrained(model, str(folder), torch_device="cpu")
    except (ValueError, KeyError, RuntimeError, TypeError, OSError, SafetensorError) as error:
        raise UserError(f"the adapter in {folder} could not be loaded: {first_line(error)}") from error


def reload_peft(model: torch.nn.Module, folder: Path) -> None:
    """Load the saved weights of adapter and head into the model that has them, in place."""
    import peft

    with using_peft():
        peft.set_peft_model_state_dict(model, peft.load_peft_weights(str(folder), device="cpu"))


def merge_peft(model: Any) -> Any:
    """The base model with the adapter's update added to its weights, and with the trained head; `model` is used up."""
    with using_peft():
        from peft.utils import ModulesToSaveWrapper

    base = model.get_base_model()
    wrapped = [(name, part) for name, part in base.named_modules() if isinstance(part, ModulesToSaveWrapper)]
    for name, part in wrapped:  # peft itself fails here for IA3
        base.set_submodule(name, part.modules_to_save[part.active_adapter])
    with using_peft():
        return model.merge_and_unload(safe_merge=True)


def check_package(reason: str) -> None:
    """Raise UserError with the command that installs peft, where it is missing."""
    if importlib.util.find_spec("peft") is None:
        raise UserError(f"{reason} needs the package peft, which is not installed; run: pip install 'peft>=0.21,<0.22'")


@contextlib.contextmanager
def using_peft() -> Iterator[None]:
    """Within, FutureWarnings of transformers about names that peft uses are hidden, and bitsandbytes, unless it is in use."""
    with warnings.catch_warnings(), hidden("bitsandbytes"):
        warnings.simplefilter("ignore", FutureWarning)
        yield
