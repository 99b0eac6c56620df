"""The table of --explain_tokens: how a tokenizer turns texts into a batch, step by step."""

from collections.abc import Sequence
from typing import Any

from lib.errors import printable
from lib.evaluation.tables import format_table

ROLES = ("bos", "eos", "unk", "pad", "mask", "sep", "cls")
"""Roles of special tokens; a token with two roles is called by the later one."""


def explain_tokens(tokenizer: Any, texts: Sequence[str]) -> str:
    """For each text its tokens, ids, special tokens, padding, attention mask and decoded text, and a row per position."""
    batch = tokenizer(list(texts), padding=True, truncation=True)
    role_of = {getattr(tokenizer, f"{role}_token_id", None): role for role in ROLES}
    blocks = [
        f"{type(tokenizer).__name__}: {len(tokenizer):,} tokens, at most {tokenizer.model_max_length:,} per text, "
        f"padding on the {tokenizer.padding_side}"
    ]
    for text, ids, mask in zip(texts, batch["input_ids"], batch["attention_mask"], strict=True):
        tokens = tokenizer.tokenize(text)
        without_padding = [id_ for id_, attended in zip(ids, mask, strict=True) if attended]
        steps = {
            "text": repr(text),
            "1  tokenize": " ".join(tokens),
            "2  convert_tokens_to_ids": " ".join(map(str, tokenizer.convert_tokens_to_ids(tokens))),
            "3  with special tokens": " ".join(map(str, without_padding)),
            "4  input_ids, padded": " ".join(map(str, ids)),
            "   attention_mask": " ".join(map(str, mask)),
            "5  decode": repr(tokenizer.decode(without_padding)),
        }
        width = max(map(len, steps))
        blocks.append("\n".join(f"{name:<{width}}  {printable(value)}" for name, value in steps.items()))
        rows = [
            [token, str(id_), str(attended), role_of.get(id_, "") if attended else "padding"]
            for token, id_, attended in zip(tokenizer.convert_ids_to_tokens(ids), ids, mask, strict=True)
        ]
        blocks.append(format_table([["token", "id", "mask", "what it is"], *rows]))
    return "\n\n".join(blocks)
