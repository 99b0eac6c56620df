"""--config_overrides: changes to a model's configuration, checked against the configuration itself."""

import difflib
import re
from collections.abc import Sequence
from typing import Any

from huggingface_hub.errors import StrictDataclassError

from lib.config.sections import literal
from lib.errors import UserError

REASONS = {
    "the classes are those of the data": ("num_labels", "id2label", "label2id", "problem_type"),
    "it belongs to the tokenizer, which does not change": ("vocab_size", "type_vocab_size"),
    "it decides which model this is; choose another one with --model": (
        *("model_type", "architectures", "transformers_version", "is_encoder_decoder", "auto_map", "_name_or_path"),
    ),
    "weights are always float32; the precision of training is --mixed_precision": ("dtype", "torch_dtype"),
    "training needs the outputs in their usual form": (
        *("return_dict", "output_attentions", "output_hidden_states", "use_cache", "chunk_size_feed_forward"),
    ),
}
"""Why a user may not change the keys behind it."""

PROTECTED = {name: reason for reason, names in REASONS.items() for name in names}

PER_LAYER = re.compile(r"layer|attention_window")
"""Names of lists that may have one entry per layer."""


def override(hf_config: Any, changes: Sequence[str]) -> None:
    """Change a configuration of transformers in place; each of `changes` is name=value.

    With fewer layers, lists with one entry per layer are cut. Raises UserError for a key that the configuration does not
    have, with similar ones, for one that a user may not change, and for a value of the wrong type.
    """
    before: Any = getattr(hf_config, "num_hidden_layers", None)
    for change in changes:
        name, text = change.split("=", 1)
        check_name(hf_config, name)
        set_value(hf_config, name, literal(text))
    layers: Any = getattr(hf_config, "num_hidden_layers", None)
    changed = {change.split("=", 1)[0] for change in changes}
    for name, value in vars(hf_config).items():
        per_layer = PER_LAYER.search(name) and isinstance(value, list) and len(value) == before != layers
        if per_layer and name not in changed:
            if layers > before:
                raise UserError(
                    f"--config_overrides num_hidden_layers={layers}: {name} has entries for {before} layers; change it too"
                )
            setattr(hf_config, name, value[:layers])


def check_name(hf_config: Any, name: str) -> None:
    """Raise UserError unless `name` is a key of the configuration that a user may change."""
    reason = PROTECTED.get(name, PROTECTED["vocab_size"] if name.endswith("_token_id") else None)
    if reason:
        raise UserError(f"--config_overrides {name}: {reason}")
    names = {
        key
        for key in (*hf_config.to_dict(), *hf_config.attribute_map)
        if key not in PROTECTED and "_token_id" not in key
    }
    if name not in names:
        similar = difflib.get_close_matches(name, sorted(names), cutoff=0.5)
        hint = f"did you mean {' or '.join(similar)}?" if similar else f"it has: {', '.join(sorted(names))}"
        raise UserError(
            f"--config_overrides {name}: the configuration of {hf_config.model_type} has no such key; {hint}"
        )


def set_value(hf_config: Any, name: str, value: Any) -> None:
    """Set one key. Raises UserError for a value of another type than before; int and float count as one."""
    before = getattr(hf_config, name)
    wrong = UserError(f"--config_overrides {name}={value}: {name} takes a value like {before!r}, not {value!r}")
    kinds = {float if type(item) is int else type(item) for item in (before, value) if item is not None}
    if len(kinds) > 1 or (type(before) is int and type(value) is int and value < 1 <= before):
        raise wrong  # below 1: a size or a count
    try:
        setattr(hf_config, name, value)
    except (StrictDataclassError, TypeError, ValueError) as error:  # transformers checks some types more strictly
        raise wrong from error
