"""How a tokenizer takes texts apart, step by step, as a table for the eye; and which texts it cuts."""

from collections.abc import Sequence
from typing import Any

from lib.evaluation.tables import format_table


def explain_tokens(tokenizer: Any, texts: Sequence[str]) -> str:
    """Tokens, their ids, the special tokens around them, and the padding and mask that make the texts one batch."""
    batch = tokenizer(list(texts), padding=True, truncation=True)
    blocks = [
        f"{type(tokenizer).__name__}: {len(tokenizer):,} tokens, at most {tokenizer.model_max_length:,} a text, "
        f"padding on the {tokenizer.padding_side}"
    ]
    for number, text in enumerate(texts):
        tokens = tokenizer.tokenize(text)
        ids = tokenizer.convert_tokens_to_ids(tokens)
        input_ids, mask = batch["input_ids"][number], batch["attention_mask"][number]
        kept = [token for token, seen in zip(input_ids, mask, strict=True) if seen]
        steps = [
            ["text", repr(text)],
            ["1  tokenize", " ".join(tokens)],
            ["2  convert_tokens_to_ids", " ".join(map(str, ids))],
            ["3  with special tokens", " ".join(map(str, kept))],
            ["4  input_ids, padded", " ".join(map(str, input_ids))],
            ["   attention_mask", " ".join(map(str, mask))],
            ["5  decode", repr(tokenizer.decode(kept))],
        ]
        width = max(len(name) for name, _ in steps)
        blocks.append("\n".join(f"{name:<{width}}  {value}" for name, value in steps))
        blocks.append(format_table([["token", "id", "mask", "what it is"], *token_rows(tokenizer, input_ids, mask)]))
    return "\n\n".join(blocks)


def token_rows(tokenizer: Any, input_ids: Sequence[int], mask: Sequence[int]) -> list[list[str]]:
    """A row a position: token, id, mask, and the role of a special token."""
    special = {tokenizer.convert_tokens_to_ids(token): name for name, token in roles(tokenizer).items()}
    tokens = tokenizer.convert_ids_to_tokens(input_ids)
    return [
        [token, str(number), str(seen), special.get(number, "") if seen else "padding"]
        for token, number, seen in zip(tokens, input_ids, mask, strict=True)
    ]


def roles(tokenizer: Any) -> dict[str, str]:
    """The special tokens by their names, the more telling name last where a token has two."""
    names = ("bos_token", "eos_token", "unk_token", "pad_token", "mask_token", "sep_token", "cls_token")
    found = {name: getattr(tokenizer, name, None) for name in names}
    return {name.removesuffix("_token"): token for name, token in found.items() if token}
