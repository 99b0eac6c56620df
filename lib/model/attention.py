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


def check_dropout(source: ModelSource, hf_config: Any, padding_free: bool = False) -> None:
    """Raise UserError where training would ask attention for dropout that has none.

    That is FlashAttention 3, and the kernel for texts in one row, but for FlashAttention 2.
    """
    settings = hf_config.get_text_config()
    dropped = [name for name, value in vars(settings).items() if "dropout" in name and "att" in name and value]
    changes = " ".join(f"{name}=0.0" for name in dropped)
    if padding_free and source.attn_implementation != "flash_attention_2" and dropped:
        raise UserError(
            f"--padding_free: attention within a row of texts has no dropout, which the model asks for ({', '.join(dropped)})\n"
            f"This works: --config_overrides {changes}, which changes the result, or leave --padding_free out"
        )
    if source.attn_implementation == "flash_attention_3" and dropped:
        raise UserError(
            f"--attn_implementation flash_attention_3 has no dropout, which the model asks for ({', '.join(dropped)})\n"
            f"This works: --config_overrides {changes}, or --attn_implementation flash_attention_2"
        )
