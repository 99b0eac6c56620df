"""Data sets by short name: where they live on the Hub, which columns matter, how they are usually scored."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Source:
    """One row of the table: a Hub id, its configuration, columns, the split used for each role, the usual metrics.

    `further_validation` are splits that are scored as well, and choose nothing. Metrics are those of classes; numbers and
    several labels have the usual ones of problems.py.
    """

    path: str
    config: str | None = None
    text_columns: tuple[str, ...] = ("text",)
    label_column: str = "label"
    validation: str = "validation"
    metrics: tuple[str, ...] = ("accuracy", "f1_macro")
    further_validation: tuple[str, ...] = ()


def glue(config: str, *text_columns: str, metrics: tuple[str, ...] = ("accuracy",)) -> Source:
    return Source("nyu-mll/glue", config, text_columns, metrics=metrics)


CATALOG = {
    "movie_reviews": Source("embedded"),
    "sst5": Source("SetFit/sst5"),
    "sst2": glue("sst2", "sentence"),
    "cola": glue("cola", "sentence", metrics=("matthews_correlation", "accuracy")),
    "mrpc": glue("mrpc", "sentence1", "sentence2", metrics=("accuracy", "f1")),
    "qqp": glue("qqp", "question1", "question2", metrics=("accuracy", "f1")),
    "rte": glue("rte", "sentence1", "sentence2"),
    "qnli": glue("qnli", "question", "sentence"),
    "mnli": dataclasses.replace(
        glue("mnli", "premise", "hypothesis"),
        validation="validation_matched",
        further_validation=("validation_mismatched",),
    ),
    "stsb": glue("stsb", "sentence1", "sentence2"),
    "rotten_tomatoes": Source("cornell-movie-review-data/rotten_tomatoes"),
    "imdb": Source("stanfordnlp/imdb"),
    "ag_news": Source("fancyzhx/ag_news"),
}
