"""The steps from text to batch, as they are shown."""

from lib.config import ModelConfig
from lib.modeling import load_tokenizer
from lib.tokens import explain_tokens


def test_each_step_is_shown_and_adds_up(roberta):
    tokenizer = load_tokenizer(ModelConfig(model=str(roberta)))
    shown = explain_tokens(tokenizer, ["a film", "the plot was quite strange"])
    batch = tokenizer(["a film", "the plot was quite strange"], padding=True)
    for number, tokens in enumerate(("a film", "the plot was quite <unk>")):
        ids = tokenizer.convert_tokens_to_ids(tokens.split())
        part = shown.split("text  ")[number + 1]
        lines = {line[:26].strip(): line[26:] for line in part.splitlines() if line[:1] in "12345 "}
        assert lines["1  tokenize"].strip() == tokens
        assert lines["2  convert_tokens_to_ids"].split() == [str(i) for i in ids]
        assert lines["3  with special tokens"].split() == [str(i) for i in (0, *ids, 2)]
        assert lines["4  input_ids, padded"].split() == [str(i) for i in batch["input_ids"][number]]
        assert lines["attention_mask"].split() == [str(i) for i in batch["attention_mask"][number]]


def test_special_tokens_and_padding_are_named(roberta):
    tokenizer = load_tokenizer(ModelConfig(model=str(roberta)))
    shown = explain_tokens(tokenizer, ["a film", "a strange <mask> film"])
    rows = [line.split() for line in shown.splitlines()]
    assert ["<s>", "0", "1", "cls"] in rows
    assert ["</s>", "2", "1", "sep"] in rows
    assert ["<unk>", "3", "1", "unk"] in rows
    assert ["<mask>", "4", "1", "mask"] in rows
    assert rows.count(["<pad>", "1", "0", "padding"]) == 2
