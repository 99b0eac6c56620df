"""The nine tasks: how they predict, and which texts they truncate.

Transformers 5 has no pipeline for question answering, summarization and translation, and its feature-extraction pipeline
gives token vectors only. These tasks are ours; the pipelines of transformers do the others.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from lib.config.predict import GENERATING
from lib.data.tokenization import stored_windows
from lib.inference.embeddings import build_embeddings
from lib.inference.generation import build_seq2seq, build_text_generation, task_prefix
from lib.inference.inputs import Example
from lib.inference.load import Task
from lib.inference.pipelines import build_classification, build_fill_mask, build_ner, build_zero_shot
from lib.inference.question_answering import build_question_answering
from lib.inference.stream import Predict, Prediction

BUILDERS: dict[str, Callable[[Task], Predict]] = {
    "feature-extraction": build_embeddings,
    "fill-mask": build_fill_mask,
    "ner": build_ner,
    "question-answering": build_question_answering,
    "sentiment-analysis": build_classification,
    "summarization": build_seq2seq,
    "text-generation": build_text_generation,
    "translation": build_seq2seq,
    "zero-shot-classification": build_zero_shot,
}


def build_predict(task: Task) -> Predict:
    """The function from a batch of examples to their predictions.

    Raises UserError if the model or the options do not fit the task.
    """
    predict, tokenizer = BUILDERS[task.config.task](task), task.tokenizer
    own_way = ("feature-extraction", "question-answering", "sentiment-analysis")
    if task.config.task in (*GENERATING, *own_way) or tokenizer.num_special_tokens_to_add():
        return predict
    # A decoder's tokenizer adds no special tokens, and models take no empty input: an empty text becomes one token.
    token = tokenizer.bos_token or tokenizer.eos_token or tokenizer.pad_token

    def predict_filled(examples: list[Example]) -> list[Prediction]:
        filled = (tuple(text or token for text in example.texts) for example in examples)
        return predict([dataclasses.replace(e, texts=texts) for e, texts in zip(examples, filled, strict=True)])

    return predict_filled


@dataclasses.dataclass
class TruncationCounter:
    """Counts the examples with more tokens than the model reads, while their predictions pass by."""

    tokenizer: Any
    texts_read: Callable[[Example], Sequence[str]]
    """The one or two texts that the model reads of an example; none for a task that does not truncate."""
    seen: int = 0
    truncated: int = 0

    def watch(self, predictions: Iterator[tuple[Example, Prediction]]) -> Iterator[tuple[Example, Prediction]]:
        for example, prediction in predictions:
            self.seen += 1
            self.truncated += is_truncated(self.tokenizer, self.texts_read(example))
            yield example, prediction

    def __str__(self) -> str:
        limit = self.tokenizer.model_max_length
        share = f"{self.truncated:,} of {self.seen:,} texts ({self.truncated / max(self.seen, 1):.1%})"
        return f"{share} are longer than {limit:,} tokens and were cut (--max_length)"


def count_truncation(task: Task) -> TruncationCounter:
    """A counter for the task.

    It stays at zero for tasks that read long texts in windows, and for text generation, which drops a text's beginning.
    """
    config, tokenizer = task.config, task.tokenizer
    in_windows = config.task == "sentiment-analysis" and stored_windows(tokenizer) is not None
    if in_windows or config.task in ("question-answering", "ner", "text-generation"):
        return TruncationCounter(tokenizer, lambda example: ())
    if config.task == "zero-shot-classification":
        longest = max(config.zero_shot.candidate_labels, key=len)
        hypothesis = config.zero_shot.hypothesis_template.format(longest)
        return TruncationCounter(tokenizer, lambda example: (example.texts[0], hypothesis))
    prefix = task_prefix(config, task.model) if config.task in GENERATING else ""
    return TruncationCounter(tokenizer, lambda example: (prefix + example.texts[0], *example.texts[1:]))


def is_truncated(tokenizer: Any, texts: Sequence[str]) -> bool:
    """Whether the texts together have more tokens than the tokenizer's limit, special tokens included."""
    limit, special = tokenizer.model_max_length, tokenizer.num_special_tokens_to_add(pair=len(texts) == 2)
    # Each token covers at least one byte, except one that may mark a text's beginning: short texts need no tokenizing.
    if sum(len(text.encode()) + 1 for text in texts) + special <= limit:
        return False
    return len(tokenizer(*texts, verbose=False)["input_ids"]) > limit
