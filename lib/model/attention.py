"""The implementation of attention that `--attn_implementation` asks for, and whether an architecture has it."""

from typing import Any

from lib.config.sections import ModelSource
from lib.errors import UserError


def set_attention(source: ModelSource, kind: Any, hf_config: Any) -> None:
    """Have a model of the Auto class `kind` compute attention as asked; `auto` leaves the choice to transformers.

    Raises UserError if the architecture does not support it.
    """
    wanted = source.attn_implementation
    if wanted == "auto":
        return
    model = kind._model_mapping.get(type(hf_config), None)  # None: trusted code, which transformers loads
    model = model[0] if isinstance(model, tuple) else model
    supported = ["eager"]
    if model is not None:
        supported += ["sdpa"] if model._supports_sdpa else []
        supported += ["flash_attention_2", "flash_attention_3"] if model._supports_flash_attn else []
        if wanted not in supported:
            raise UserError(
                f"--attn_implementation {wanted}: the architecture of --model {source.model} ({hf_config.model_type}) does "
                f"not have it; it has {', '.join(supported)}"
            )
    hf_config._attn_implementation = wanted


def check_dropout(source: ModelSource, hf_config: Any) -> None:
    """Raise UserError where training would ask FlashAttention 3 for dropout, which it does not have."""
    settings = hf_config.get_text_config()
    dropped = [name for name, value in vars(settings).items() if "dropout" in name and "att" in name and value]
    if source.attn_implementation == "flash_attention_3" and dropped:
        changes = " ".join(f"{name}=0.0" for name in dropped)
        raise UserError(
            f"--attn_implementation flash_attention_3 has no dropout, which the model asks for ({', '.join(dropped)})\n"
            f"This works: --config_overrides {changes}, or --attn_implementation flash_attention_2"
        )
