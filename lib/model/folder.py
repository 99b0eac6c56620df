"""The folder of a model as its files are, before the libraries read them: damage, label names, size."""

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import PreTrainedConfig

from lib.config.sections import CLASSIFICATION, MULTI_LABEL, REGRESSION, ModelSource
from lib.errors import UserError
from lib.hub.cache.contents import OBJECTS, file_damage
from lib.hub.cache.files import SHARD, TOKENIZER_FILES, missing_shards, weight_files
from lib.runtime.memory import available_memory

MOST_LAYERS = 10_000
MOST_LABELS = 1_000_000
"""Above these a number in config.json is damage: the model would not end to be built."""

SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
"""Settings of config.json that are at least 1 in every model that has them."""

PROBLEMS = (CLASSIFICATION, REGRESSION, MULTI_LABEL)

LABEL_SETTINGS = ("id2label", "label2id", "num_labels")


def unusable(source: ModelSource, reason: str) -> UserError:
    """The error for a model that cannot be loaded for `reason`."""
    return UserError(f"--model {source.model} could not be loaded: {reason}")


def object_damage(file: Path) -> str | None:
    """What is wrong with a file that should hold a JSON object; None when nothing is."""
    try:
        if damage := file_damage(file, file.name):
            return damage
        json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    except RecursionError:
        return "is nested too deeply to be read; download it again"
    except ValueError as error:
        return f"is not JSON ({error}); download it again"
    return None


def find_damage(folder: Path, allow_pickle: bool = False) -> str | None:
    """The first damaged file of a model and what is wrong with it, seen without reading the weights; None if none is."""
    files = {path.name: path for path in sorted(folder.iterdir())}
    if dangling := next((path for path in files.values() if not path.exists()), None):
        return f"{dangling} is a link to a file that is gone; download it again"
    for name in OBJECTS:
        if name in files and (damage := object_damage(files[name])):
            return f"{files[name]} {damage}"
    weights = weight_files(files, allow_pickle)
    if lost := missing_shards({name: files[name] for name in weights}):
        return f"{folder} lacks {', '.join(lost[:3])}, which the names or the index of its weights promise"
    if any(SHARD.fullmatch(name) for name in weights) and not any(name.endswith(".index.json") for name in weights):
        return (
            f"{folder} lacks the index of its weights ({weights[0].split('-')[0]}{Path(weights[0]).suffix}.index.json)"
        )
    for name in weights:
        if not files[name].is_file():
            return f"{files[name]} is not a file"
        if damage := file_damage(files[name], name):
            return f"{files[name]} {damage}"
    return None


def read_config(source: ModelSource, folder: Path) -> dict[str, Any]:
    """The content of an undamaged config.json. Raises UserError if it does not name the architecture."""
    content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kind = content.get("model_type")
    if not isinstance(kind, str) or not kind:
        found = "names no model_type" if kind is None else f"has {kind!r} as model_type"
        raise unusable(
            source, f'{folder}/config.json {found}; add the name of its architecture, such as "model_type": "bert"'
        )
    return content


def has_plain_labels(content: dict[str, Any]) -> bool:
    """Whether transformers itself reads the labels of a configuration; training needs none of them."""
    names, numbers, count = (content.get(name) for name in LABEL_SETTINGS)
    if names is not None and not isinstance(names, dict):
        return False
    pairs = (names or {}).items()
    return (
        all(key.isdecimal() and isinstance(value, str) for key, value in pairs)
        and isinstance(numbers, dict | None)
        and ("num_labels" not in content or (type(count) is int and 0 < count < MOST_LABELS))
        and count in (None, len(names or range(count or 0)))
        and names != {}
    )


def stored_labels(source: ModelSource, content: dict[str, Any], file: Path) -> list[str] | None:
    """The label names in config.json, in the order of the outputs; None where it has none.

    Numbers and booleans become text. Raises UserError, which names the file, where it is not clear which output has
    which name.
    """

    def refuse(found: str, setting: str = "id2label") -> UserError:
        example = '{"0": "bad", "1": "good"}'
        return unusable(
            source, f"{setting} in {file} {found}; correct it: id2label names each output, from 0 on: {example}"
        )

    stored, numbers, count = (content.get(name) for name in LABEL_SETTINGS)
    if count is not None and (type(count) is not int or not 0 < count < MOST_LABELS):
        raise refuse(f"is {count!r}", "num_labels")
    setting = "id2label"
    if stored is None:
        if not isinstance(numbers, dict) or not numbers:
            return None
        stored, setting = {str(number): name for name, number in numbers.items()}, "label2id"
    if isinstance(stored, list):
        stored = {str(number): name for number, name in enumerate(stored)}
    if not isinstance(stored, dict) or not stored:
        raise refuse(f"is {stored!r}", setting)
    names: dict[int, str] = {}
    for key, value in stored.items():
        if not re.fullmatch(r"\d{1,9}", str(key)):
            raise refuse(f"has {key!r} where the number of an output belongs", setting)
        if not isinstance(value, str | int | float) or value != value or not str(value).strip():
            raise refuse(f"has {value!r} as the name of output {key}", setting)
        names[int(key)] = str(value)
    if sorted(names) != list(range(len(stored))):
        found = ", ".join(map(str, list(stored)[:6])) + (", ..." if len(stored) > 6 else "")
        raise refuse(f"numbers the outputs {found}, not 0 to {len(stored) - 1}", setting)
    ordered = [names[number] for number in range(len(names))]
    if len(set(ordered)) < len(ordered):
        twice = next(name for name in ordered if ordered.count(name) > 1)
        raise refuse(f"names two outputs {twice!r}", setting)
    if count not in (None, len(ordered)):
        raise refuse(f"has {len(ordered)} names, but num_labels is {count}", setting)
    return ordered


def check_outputs(source: ModelSource, hf_config: Any, file: Path) -> None:
    """Raise UserError for what gives the outputs of a trained model no meaning in its config.json.

    These are the problem type, the temperature and the thresholds.
    """
    problem, thresholds = getattr(hf_config, "problem_type", None), getattr(hf_config, "thresholds", None)
    if problem is not None and problem not in PROBLEMS:
        raise unusable(source, f"problem_type in {file} is {problem!r}; correct it: one of {', '.join(PROBLEMS)}")
    temperature = getattr(hf_config, "calibration_temperature", None)
    if temperature is not None and not (type(temperature) in (int, float) and 1e-6 <= temperature <= 1e6):
        raise unusable(
            source,
            f"calibration_temperature in {file} is {str(temperature)[:80]}; it is a number above 0, a million at most: "
            "correct it, or remove it for 1",
        )
    if thresholds is None:
        return
    count = hf_config.num_labels
    known = isinstance(thresholds, list) and all(
        type(value) in (int, float) and 0 <= value <= 1 for value in thresholds
    )
    if not known or len(thresholds) != count:
        raise unusable(
            source,
            f"thresholds in {file} is {str(thresholds)[:80]}; it holds {count} numbers from 0 to 1, one for each label: "
            "correct it, or remove it for 0.5",
        )
    if problem in (None, CLASSIFICATION) and count == 2 and abs(sum(thresholds) - 1) > 1e-6:
        raise unusable(
            source,
            f"thresholds in {file} is {str(thresholds)[:80]}; those of two classes have the sum 1: correct it, or remove it "
            "for 0.5",
        )


def check_settings(source: ModelSource, hf_config: Any) -> None:
    """Raise UserError for settings that no model has, or that need a GPU, before anything is built from them."""
    where = f"config.json of --model {source.model}"
    if getattr(hf_config, "_attn_implementation", None) == "flex_attention" and not torch.cuda.is_available():
        raise UserError(f"{where}: attn_implementation is flex_attention, which needs a GPU; remove the setting")
    for name in SIZES:
        value = getattr(hf_config, name, None)
        if type(value) is int and value < 1:
            raise UserError(f"{where}: {name} is {value}; it is at least 1")
    for name, value in vars(hf_config).items():
        if isinstance(value, PreTrainedConfig):
            check_settings(source, value)
        elif type(value) is int and value > MOST_LAYERS and re.search(r"layers?$|experts$", name):
            raise UserError(f"{where}: {name} is {value:,}; no model has more than {MOST_LAYERS:,}")


def check_stored_types(source: ModelSource, folder: Path, hf_config: Any) -> None:
    """Raise UserError for weights that are stored as integers without the settings to turn them into numbers again."""
    if getattr(hf_config, "quantization_config", None) is not None or not folder.is_dir():
        return
    for name in weight_files([path.name for path in folder.iterdir()], False):
        if name.endswith(".json") or not (folder / name).is_file() or file_damage(folder / name, name):
            continue  # loading names the damage
        with safe_open(folder / name, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - not a dict
                if key.endswith("weight") and (kind := file.get_slice(key).get_dtype()).startswith(("I", "U")):
                    raise unusable(
                        source,
                        f"{folder / name} holds {key} as integers ({kind}): the weights are quantized, and config.json does not "
                        "say how; use the model's original",
                    )


@contextlib.contextmanager
def limited_memory(source: ModelSource, folder: Path, changed: bool, frozen_bytes: float = 4.0) -> Iterator[None]:
    """Within, raise UserError as soon as a model that is built on the meta device outgrows the free memory.

    It must not outgrow its weights on disk either, unless the user `changed` its configuration: then config.json is damaged.
    A weight takes four bytes, and `frozen_bytes` in a linear layer.
    """
    memory, stored = available_memory(), 0
    if folder.is_dir():
        files = [folder / name for name in weight_files([path.name for path in folder.iterdir()], True)]
        stored = sum(file.stat().st_size for file in files if file.is_file())
    # Four bits a weight on disk are eight times as much in float32; the rest is room for a new head.
    limits = [(memory, f"but {memory / 2**30:.1f} GiB of memory are free")]
    if stored and not changed:
        limits.append((2**30 + 16 * stored, f"but its weights take {stored / 2**30:.2f} GiB on disk; is it damaged?"))
    limit, problem = min(limits)
    seen, total = set[int](), 0

    def count(layer: Any, _: str, parameter: torch.nn.Parameter | None) -> None:
        nonlocal total
        if parameter is None or not parameter.is_meta or id(parameter) in seen:
            return
        seen.add(id(parameter))
        total += int(parameter.numel() * (frozen_bytes if isinstance(layer, torch.nn.Linear) else 4))
        if total > limit:
            held = "float32" if frozen_bytes == 4 else "the precision in which it is held"
            raise UserError(
                f"config.json of --model {source.model} describes a model of more than {total / 2**30:,.1f} GiB in {held}, "
                f"{problem}"
            )

    handle = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()


def check_tokenizer(source: ModelSource, tokenizer: Any, folder: Path) -> None:
    """Raise UserError for a tokenizer that transformers made up, since the folder has no vocabulary, and for a wrong length."""
    length = tokenizer.model_max_length
    if isinstance(length, bool) or not isinstance(length, int | float) or not length >= 1 or length % 1:
        raise unusable(
            source, f"model_max_length in {folder}/tokenizer_config.json is {length!r}, not a number of tokens"
        )
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    vocabulary = TOKENIZER_FILES - {"tokenizer_config.json"} | {"added_tokens.json", "merges.txt"}
    if names and not names & vocabulary and len(tokenizer) < 100:
        raise unusable(
            source,
            f"{folder} has no vocabulary (tokenizer.json, vocab.txt or the like); copy it from the original model",
        )


def check_vocabulary(source: ModelSource, model: Any, tokenizer: Any) -> None:
    """Raise UserError if the tokenizer makes token ids that the model has no embedding for.

    Special tokens that no text gets may lie beyond: they never reach the model.
    """
    try:
        table, vocabulary = model.get_input_embeddings(), tokenizer.get_vocab()
    except (NotImplementedError, AttributeError):  # of characters or bytes
        return
    rows = table.num_embeddings if isinstance(table, torch.nn.Embedding) else None
    if rows is None or max(vocabulary.values(), default=0) < rows:
        return
    used = {*tokenizer("", "")["input_ids"], tokenizer.pad_token_id, tokenizer.unk_token_id}
    unused = {*tokenizer.all_special_ids} - used
    beyond = {token: number for token, number in vocabulary.items() if number >= rows and number not in unused}
    if beyond:
        token, number = min(beyond.items(), key=lambda item: item[1])
        raise UserError(
            f"--model {source.model}: its tokenizer has {len(beyond):,} tokens, such as {token!r} with the id {number}, beyond "
            f"the {rows:,} that its weights have embeddings for; the tokenizer is another model's, or vocab_size is wrong"
        )
