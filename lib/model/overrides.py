"""Changes to a model's configuration before it is built: names and values are checked by the configuration itself."""

import difflib
import re
from collections.abc import Sequence
from typing import Any

from huggingface_hub.errors import StrictDataclassError

from lib.config.sections import literal
from lib.errors import UserError

REASONS = {
    "the classes are those of the data": ("num_labels", "id2label", "label2id", "problem_type"),
    "it belongs to the tokenizer, which is kept": ("vocab_size", "type_vocab_size"),
    "it says which model this is; choose another one by --model": (
        *("model_type", "architectures", "transformers_version", "is_encoder_decoder", "auto_map", "_name_or_path"),
    ),
    "weights are float32 in any case; the precision of the work is --mixed_precision": ("dtype", "torch_dtype"),
    "training reads the outputs as they are": (
        *("return_dict", "output_attentions", "output_hidden_states", "use_cache", "chunk_size_feed_forward"),
    ),
}
"""Keys that are not the user's to change, by the reason."""

BY_LAYER = re.compile(r"layer|attention_window")
"""Names of lists that may have one entry for each layer."""

OURS = {name: reason for reason, names in REASONS.items() for name in names}


def override(settings: Any, changes: Sequence[str]) -> None:
    """Change a configuration of transformers in place, by `name=value`.

    A list with one entry for each layer is cut to the layers that are left. Raises UserError for a key that the
    configuration does not have, with near ones, for one that is not the user's to change, and for a value of a wrong type.
    """
    before = depth(settings)
    for change in changes:
        name, text = change.split("=", 1)
        check_name(settings, name)
        set_value(settings, name, literal(text))
    changed = {change.split("=", 1)[0] for change in changes}
    for name, value in vars(settings).items():
        by_layer = BY_LAYER.search(name) and isinstance(value, list) and len(value) == before != depth(settings)
        if by_layer and name not in changed:
            if depth(settings) > before:
                raise UserError(
                    f"--config_overrides num_hidden_layers={depth(settings)}: {name} describes {before} layers; change it too"
                )
            setattr(settings, name, value[: depth(settings)])


def depth(settings: Any) -> Any:
    return getattr(settings, "num_hidden_layers", None)


def check_name(settings: Any, name: str) -> None:
    """Raise UserError unless `name` is a key of the configuration that may be changed."""
    reason = OURS.get(name, OURS["vocab_size"] if name.endswith("_token_id") else None)
    if reason:
        raise UserError(f"--config_overrides {name}: {reason}")
    names = {
        key for key in (*settings.to_dict(), *settings.attribute_map) if key not in OURS and "_token_id" not in key
    }
    if name not in names:
        near = difflib.get_close_matches(name, sorted(names), cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"it has: {', '.join(sorted(names))}"
        raise UserError(
            f"--config_overrides {name}: the configuration of {settings.model_type} has no such key; {hint}"
        )


def set_value(settings: Any, name: str, value: Any) -> None:
    """Raises UserError for a value of another type than the key has."""
    before = getattr(settings, name)
    wrong = UserError(f"--config_overrides {name}={value}: {name} takes a value like {before!r}, not {value!r}")
    if None not in (before, value) and kind_of(before) != kind_of(value):
        raise wrong
    if type(before) is int and type(value) is int and value < 1 <= before:
        raise wrong  # a size or number of parts
    try:
        setattr(settings, name, value)
    except (StrictDataclassError, TypeError, ValueError) as error:  # the configuration knows better what the key takes
        raise wrong from error


def kind_of(value: Any) -> type:
    """The type, whole and real numbers being one."""
    return float if type(value) is int else type(value)
