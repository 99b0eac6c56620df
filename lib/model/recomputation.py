"""--gradient_checkpointing: the trained layers keep only their input for backward, and compute the rest a second time."""

from typing import Any

from lib.errors import UserError, first_line
from lib.model.layers import find_layers

FLAG = "--gradient_checkpointing"


def recompute_layers(model: Any, wanted: bool) -> Any:
    """`model`, whose trained layers are computed again in the backward pass, if `wanted` (Chen et al., 2016).

    Dropout draws the same numbers the second time, so that gradients stay equal to the last bit. Frozen layers keep
    nothing for backward and are left alone: their outputs may be cached.

    Raises UserError if the architecture cannot do it, or if no layer is trained.
    """
    if not wanted:
        return model
    # Below a trained prompt all layers keep what they compute, though none of their weights is trained.
    prompt = getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False)
    layers = {
        id(layer) for layer in find_layers(model, FLAG) if prompt or any(p.requires_grad for p in layer.parameters())
    }
    if not layers:
        raise UserError(f"{FLAG} saves memory in trained layers, and none is trained here; leave it out")
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    try:
        inner.activation_checkpointing_enable({"use_reentrant": False})
    except ValueError as error:
        raise UserError(f"{FLAG} does not work for {model.config.model_type}: {first_line(error)}") from error
    inner.disable_input_require_grads()  # transformers turned them on: frozen embeddings would keep memory for backward
    switches = [module for module in inner.modules() if hasattr(module, "gradient_checkpointing")]
    for module in switches:
        module.gradient_checkpointing = id(module) in layers
    if not layers <= set(map(id, switches)):
        raise UserError(f"{FLAG} does not work for {model.config.model_type}: transformers cannot recompute its layers")
    return model
