"""The steps from text to batch, as they are shown."""

from transformers import AutoTokenizer

from lib.config.sections import ModelConfig
from lib.inference.explain_tokens import explain_tokens
from lib.inference.inputs import Row
from lib.inference.tasks import CutTexts, is_cut
from lib.model.load import load_tokenizer


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


def test_texts_that_are_cut_are_counted_with_their_share(roberta):
    """As the tokenizer cuts them: of lengths around the limit, single texts and pairs, words of one token and of none."""
    tokenizer = AutoTokenizer.from_pretrained(roberta)
    tokenizer.model_max_length = 8
    texts = [" ".join(["film"] * n) for n in range(12)] + ["é" * 40, ""]
    for rows in ([(text,) for text in texts], [(text, "a plot") for text in texts]):
        whole = [len(tokenizer(*row)["input_ids"]) for row in rows]
        kept = [len(tokenizer(*row, truncation=True)["input_ids"]) for row in rows]
        assert [is_cut(tokenizer, row) for row in rows] == [a > b for a, b in zip(whole, kept, strict=True)]
    count = CutTexts(tokenizer, lambda row: row.texts)
    passed = [(Row(n, n, (text,)), {}) for n, text in enumerate(texts)]
    assert list(count.watch(iter(passed))) == passed
    assert str(count) == "5 of 14 texts (35.7%) are longer than 8 tokens and were cut (--max_length)"


def test_special_tokens_and_padding_are_named(roberta):
    tokenizer = load_tokenizer(ModelConfig(model=str(roberta)))
    shown = explain_tokens(tokenizer, ["a film", "a strange <mask> film"])
    rows = [line.split() for line in shown.splitlines()]
    assert ["<s>", "0", "1", "cls"] in rows
    assert ["</s>", "2", "1", "sep"] in rows
    assert ["<unk>", "3", "1", "unk"] in rows
    assert ["<mask>", "4", "1", "mask"] in rows
    assert rows.count(["<pad>", "1", "0", "padding"]) == 2
