"""The table of --explain_tokens."""

from lib.config.sections import ModelConfig
from lib.inference.explain_tokens import explain_tokens
from lib.model.load import load_tokenizer


def test_every_step_from_text_to_batch_is_shown(roberta):
    tokenizer = load_tokenizer(ModelConfig(model=str(roberta)))
    tokenizer.split_special_tokens = False  # as for --task fill-mask
    texts = ["a film", "the plot was <mask> strange"]
    lines = [line.split() for line in explain_tokens(tokenizer, texts).splitlines()]
    batch = tokenizer(texts, padding=True)
    for number, tokens in enumerate((["a", "film"], ["the", "plot", "was", "<mask>", "<unk>"])):
        ids = tokenizer.convert_tokens_to_ids(tokens)
        steps = [tokens, ids, [0, *ids, 2], batch["input_ids"][number], batch["attention_mask"][number]]
        for step in steps:
            assert any(line[-len(step) :] == list(map(str, step)) for line in lines), step
    for role in ("<s> 0 1 cls", "</s> 2 1 sep", "<unk> 3 1 unk", "<mask> 4 1 mask", "<pad> 1 0 padding"):
        assert role.split() in lines, role
