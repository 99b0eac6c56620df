"""Text generation: summaries and translations by sequence-to-sequence models, continuations by decoders."""

import contextlib
from collections.abc import Iterator
from typing import Any

from transformers import GenerationConfig

from lib.config.predict import GenerateConfig, PredictConfig
from lib.config.sections import literal
from lib.errors import UserError
from lib.inference.inputs import Example
from lib.inference.load import Task
from lib.inference.stream import Predict, Prediction

KEYS = {"summarization": "summary_text", "translation": "translation_text", "text-generation": "generated_text"}
"""The field of the most likely text, named as in the pipelines of transformers 4."""

DEFAULT_NEW_TOKENS = 256


def build_seq2seq(task: Task) -> Predict:
    """Predictions of summarization and translation, as of `to_prediction`.

    Raises UserError for a language that the model does not have.
    """
    config, model, tokenizer, top_k = task.config, task.model, task.tokenizer, task.config.top_k or 1
    settings = generate_settings(model, config.generate, top_k)
    if config.task == "translation":
        settings |= language_settings(tokenizer, config.generate)
    prefix = task_prefix(config, model)

    def predict(examples: list[Example]) -> list[Prediction]:
        texts = [prefix + example.texts[0] for example in examples]
        batch = tokenizer(texts, padding=True, truncation=True, return_tensors="pt").to(model.device)
        with user_errors(config.generate):
            outputs = model.generate(**batch, **settings)
        written = [text.strip() for text in tokenizer.batch_decode(outputs, skip_special_tokens=True)]
        return [to_prediction(config.task, written[i * top_k : (i + 1) * top_k]) for i in range(len(examples))]

    return predict


def build_text_generation(task: Task) -> Predict:
    """Predictions as of `to_prediction`: each text is the input and its continuation.

    An input that is too long is truncated at its beginning. Raises UserError if --max_new_tokens leaves no room for it.
    """
    config, tokenizer = task.config, task.tokenizer
    settings = generate_settings(task.model, config.generate, config.top_k or 1)
    tokenizer.truncation_side = "left"
    room = tokenizer.model_max_length - settings["max_new_tokens"]
    if room < 1:
        raise UserError(f"--max_new_tokens {settings['max_new_tokens']} leaves no room for the text before it")
    settings |= {"return_full_text": False, "tokenizer_encode_kwargs": {"truncation": True, "max_length": room}}
    start = tokenizer.bos_token or tokenizer.eos_token
    pipe = task.pipeline()

    def predict(examples: list[Example]) -> list[Prediction]:
        texts = [example.texts[0] for example in examples]
        with user_errors(config.generate):
            outputs = pipe([text or start for text in texts], batch_size=len(examples), **settings)
        return [
            to_prediction(config.task, [text + item["generated_text"] for item in output])
            for text, output in zip(texts, outputs, strict=True)
        ]

    return predict


def to_prediction(task: str, texts: list[str]) -> Prediction:
    """The first text under the key of its task; all of them under `answers`, the most likely first, if several."""
    return {KEYS[task]: texts[0]} | ({"answers": texts} if len(texts) > 1 else {})


@contextlib.contextmanager
def user_errors(config: GenerateConfig) -> Iterator[None]:
    """Raise UserError if `generate` refuses a value of --generate_kwargs."""
    try:
        yield
    except (ValueError, TypeError) as error:
        if not config.generate_kwargs:
            raise
        raise UserError(f"--generate_kwargs {' '.join(config.generate_kwargs)}: {error}") from error


def generate_settings(model: Any, config: GenerateConfig, top_k: int) -> dict[str, Any]:
    """Arguments of `generate`: the user's settings, and a length if neither the user nor the model has one.

    The default is search without sampling, so that a text gets the same output each time. Raises UserError for a name that
    `generate` does not know and for more tokens than the model has positions.
    """
    beams = config.num_beams or max(top_k, getattr(model.generation_config, "num_beams", None) or 1)
    settings: dict[str, Any] = {"do_sample": False, "num_return_sequences": top_k, "num_beams": beams}
    settings |= length_settings(model, config.max_new_tokens)
    for name, value in (item.split("=", 1) for item in config.generate_kwargs):
        if name not in vars(GenerationConfig()):
            raise UserError(f"--generate_kwargs {name}: `generate` has no such setting")
        settings[name] = literal(value)
    if settings["do_sample"]:
        settings["num_beams"] = config.num_beams or 1
    return settings


def length_settings(model: Any, max_new_tokens: int | None) -> dict[str, int]:
    """`max_new_tokens` for `generate`; nothing if a sequence-to-sequence model has its own default length.

    The prompt and the new tokens of a decoder share its positions: by default new tokens get at most half of them.
    Raises UserError if the model has too few positions.
    """
    defaults, is_seq2seq = model.generation_config, model.config.is_encoder_decoder
    positions = getattr(model.config, "max_position_embeddings", None) or 2**30
    if max_new_tokens is not None and max_new_tokens >= positions:
        raise UserError(f"--max_new_tokens {max_new_tokens}: the model has room for {positions - 1}")
    if max_new_tokens is None and is_seq2seq and (defaults.max_length or defaults.max_new_tokens):
        return {}
    room = positions - 1 if is_seq2seq else positions // 2
    return {"max_new_tokens": max_new_tokens or min(defaults.max_new_tokens or DEFAULT_NEW_TOKENS, room)}


def task_prefix(config: PredictConfig, model: Any) -> str:
    """The text before each input: --prefix, else what a T5 model's configuration has for the task, else nothing.

    Raises UserError if the model's configuration has prefixes for translation, but not for these two languages.
    """
    if config.generate.prefix is not None:
        return config.generate.prefix
    name, source, target = config.task, config.generate.source_lang, config.generate.target_lang
    prefixes = getattr(model.config, "task_specific_params", None) or {}
    pairs = [key for key in prefixes if key.startswith("translation_")]
    key = f"translation_{source}_to_{target}" if name == "translation" else name
    if name == "translation" and pairs and key not in pairs:
        languages = ", ".join(pair.removeprefix("translation_").replace("_to_", " to ") for pair in pairs)
        raise UserError(f"--source_lang and --target_lang: this model translates {languages}; name one of them")
    return prefixes.get(key, {}).get("prefix", "")


def language_settings(tokenizer: Any, config: GenerateConfig) -> dict[str, Any]:
    """The argument of `generate` for the target language; the source language is set in the tokenizer.

    Nothing for models of one language pair and models told by a prefix. Raises UserError for an unknown language.
    """
    if not hasattr(tokenizer, "src_lang"):
        return {}
    example = f"as the model does, such as {tokenizer.src_lang}"
    if config.source_lang is None or config.target_lang is None:
        raise UserError(
            "this model translates between many languages; name both with --source_lang and --target_lang, " + example
        )
    codes = getattr(tokenizer, "lang_code_to_token", {})
    ids = {}
    for name in (config.source_lang, config.target_lang):
        ids[name] = tokenizer.convert_tokens_to_ids(codes.get(name, name))
        if ids[name] is None or ids[name] == tokenizer.unk_token_id:
            raise UserError(f"the model has no language {name}; write it {example}")
    tokenizer.src_lang = config.source_lang
    return {"forced_bos_token_id": ids[config.target_lang]}
