"""Text written by a model: summaries and translations by sequence-to-sequence models, and how long and how they search."""

import contextlib
from collections.abc import Iterator
from typing import Any

from transformers import GenerationConfig

from lib.config.predict import GenerateConfig
from lib.config.sections import literal
from lib.errors import UserError
from lib.inference.inputs import Row
from lib.inference.stream import Answer, Predict

KEYS = {"summarization": "summary_text", "translation": "translation_text", "text-generation": "generated_text"}
DEFAULT_NEW_TOKENS = 256


def build_writer(task: str, model: Any, tokenizer: Any, config: GenerateConfig, top_k: int) -> Predict:
    """Answers with `summary_text` or `translation_text`, and with `top_k` above 1 also `answers`, the best first.

    Raises UserError for a language the model does not name.
    """
    settings = generate_settings(model, config, top_k)
    if task == "translation":
        settings |= language_settings(tokenizer, config)
    prefix = task_prefix(task, model, config)

    def predict(rows: list[Row]) -> list[Answer]:
        texts = [prefix + row.texts[0] for row in rows]
        batch = tokenizer(texts, padding=True, truncation=True, return_tensors="pt").to(model.device)
        with generating(config):
            outputs = model.generate(**batch, **settings)
        written = tokenizer.batch_decode(outputs, skip_special_tokens=True)
        written = [text.strip() for text in written]
        return [answer(task, written[i * top_k : (i + 1) * top_k]) for i in range(len(rows))]

    return predict


def answer(task: str, texts: list[str]) -> Answer:
    """The first text under the key of its task, and all of them where there are several."""
    return {KEYS[task]: texts[0]} | ({"answers": texts} if len(texts) > 1 else {})


def generate_settings(model: Any, config: GenerateConfig, top_k: int) -> dict[str, Any]:
    """What `generate` is told: the user's settings, and a length where neither the user nor the model has one.

    The most likely text is searched, not sampled, so that a text gets the same answer each time. Raises UserError for a
    name that `generate` does not know and for a length that the model has no room for.
    """
    settings: dict[str, Any] = {"do_sample": False, "num_return_sequences": top_k}
    settings["num_beams"] = config.num_beams or max(top_k, getattr(model.generation_config, "num_beams", None) or 1)
    settings |= length_settings(model, config.max_new_tokens)
    for name, value in (item.split("=", 1) for item in config.generate_kwargs):
        if name not in vars(GenerationConfig()):
            raise UserError(f"--generate_kwargs {name}: `generate` has no such setting")
        settings[name] = literal(value)
    if settings["do_sample"]:
        settings["num_beams"] = config.num_beams or 1
    return settings


@contextlib.contextmanager
def generating(config: GenerateConfig) -> Iterator[None]:
    """Where `generate` refuses the value of a setting, its reason becomes a message to the user."""
    try:
        yield
    except (ValueError, TypeError) as error:
        if not config.generate_kwargs:
            raise
        raise UserError(f"--generate_kwargs {' '.join(config.generate_kwargs)}: {error}") from error


def length_settings(model: Any, asked: int | None) -> dict[str, int]:
    """`max_new_tokens`, but where a sequence-to-sequence model has a length of its own.

    A decoder's prompt takes places as well: unless asked for, at most half of them go to new tokens.
    """
    own, writes_apart = model.generation_config, model.config.is_encoder_decoder
    places = getattr(model.config, "max_position_embeddings", None) or 2**30
    if asked is not None and asked >= places:
        raise UserError(f"--max_new_tokens {asked}: the model has room for {places - 1}")
    if asked is None and writes_apart and (own.max_length or own.max_new_tokens):
        return {}
    room = places - 1 if writes_apart else places // 2
    return {"max_new_tokens": asked or min(own.max_new_tokens or DEFAULT_NEW_TOKENS, room)}


def task_prefix(task: str, model: Any, config: GenerateConfig) -> str:
    """The words that tell a T5 model its task, as its settings have them; none for other models."""
    if config.prefix is not None:
        return config.prefix
    tasks = getattr(model.config, "task_specific_params", None) or {}
    name = f"translation_{config.source_lang}_to_{config.target_lang}" if task == "translation" else task
    known = [key for key in tasks if key.startswith("translation_")]
    if task == "translation" and known and name not in tasks:
        languages = ", ".join(key.removeprefix("translation_").replace("_to_", " to ") for key in known)
        raise UserError(f"--source_lang and --target_lang: this model translates {languages}; name one of them")
    return tasks.get(name, {}).get("prefix", "")


def language_settings(tokenizer: Any, config: GenerateConfig) -> dict[str, Any]:
    """Tell a tokenizer of many languages the source, and `generate` the token that begins the target.

    Models of one pair of languages, and those told by a prefix, need neither.
    """
    if not hasattr(tokenizer, "src_lang"):
        return {}
    if config.source_lang is None or config.target_lang is None:
        raise UserError(
            "this model translates between many languages; name both with --source_lang and --target_lang, "
            f"as the model does, such as {tokenizer.src_lang}"
        )
    codes = getattr(tokenizer, "lang_code_to_token", {})
    tokens = {name: codes.get(name, name) for name in (config.source_lang, config.target_lang)}
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in tokens.items()}
    for name, number in ids.items():
        if number is None or number == tokenizer.unk_token_id:
            raise UserError(
                f"the model has no language {name}; write it as the model does, such as {tokenizer.src_lang}"
            )
    tokenizer.src_lang = config.source_lang
    return {"forced_bos_token_id": ids[config.target_lang]}
