"""Data sets as they are stored: from the catalog, the Hub, a folder or the user's files. Nothing else reads them."""

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    Features,
    Value,
    load_dataset,
    load_dataset_builder,
    load_from_disk,
)
from datasets.data_files import EmptyDatasetError
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from huggingface_hub import cached_assets_path

from lib.config.sections import DataConfig
from lib.data.catalog import DEFAULT, ROLES, data_needs, own_files
from lib.errors import UserError, first_line
from lib.hub import packaged
from lib.hub.advice import advice
from lib.hub.cache.layout import Repo, find_snapshot, snapshot_files
from lib.hub.cache.publish import merge_folder
from lib.hub.endpoint import configure_endpoint, datasets_cache
from lib.hub.needs import Need, chosen_config, missing_from_cache, read_card
from lib.runtime.atomic import sha256
from lib.runtime.startup import hidden

FILE_FORMATS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
"""The builder of `datasets` that reads each kind of file."""


@hidden("scipy")  # `datasets` imports it for Matlab files only
def load_raw(config: DataConfig) -> dict[str, Dataset]:
    """All splits as they are stored, under their own names.

    Raises UserError for a file, folder or data set that cannot be read, and for options that do not apply to it.
    """
    files = own_files(config)
    if files:
        return {role: load_file(path, role) for role, path in files.items()}
    name = config.dataset or DEFAULT
    is_folder = Path(name).is_dir()
    if config.revision and (name == DEFAULT or is_folder):
        kind = DEFAULT if name == DEFAULT else "a folder"
        raise UserError(f"--revision {config.revision}: {kind} has no revisions; leave it out")
    if name == DEFAULT:
        return load_movie_reviews(config.dataset_config or "five")
    if is_folder:
        if config.dataset_config:
            raise UserError(f"--dataset_config {config.dataset_config}: the folder {name} has none; leave it out")
        return load_folder(name, "--dataset")
    if Path(name).exists():
        raise UserError(f"--dataset {name} is a file; give files as --train_file, --validation_file and --test_file")
    (need,) = data_needs(config)
    return load_hub(need.repo.repo_id, need.dataset_config, config.revision)


def data_identity(config: DataConfig) -> str | None:
    """Hash over everything that `load_raw(config)` reads: the contents of its files, wherever they are, and how to read them.

    None where it cannot be known without loading: data that `datasets` finds by itself, or that cannot be read at all.
    """
    name, files = config.dataset or DEFAULT, own_files(config)
    parts: dict[str, Any] = {"dataset_config": config.dataset_config}
    try:
        if files:
            parts |= {role: path_identity(path) for role, path in files.items()}
        elif name == DEFAULT:
            parts["movie_reviews"] = [packaged.VADER_SHA256, packaged.FIVE_CUTS]
        elif Path(name).exists():
            parts["folder"] = path_identity(name)
        else:
            (need,) = data_needs(config)
            snapshot = find_snapshot(need.repo, need.revision)
            if snapshot is None or missing_from_cache(need):
                return None
            parts |= {"commit": snapshot.name, "config": need.dataset_config}
            parts["folder"] = path_identity(str(isolate_config(snapshot, need)), need.dataset_config)
    except Exception:  # of many kinds, and all of them are reported with their reason when the data are read
        return None
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode(errors="surrogatepass")).hexdigest()


def path_identity(path: str, hub_config: str | None = None) -> list[list[Any]]:
    """The name, size and sha256 of a file, or of each file in a folder that is read; of a file, the ending is its name."""
    file = Path(path)
    if not file.is_dir():
        return [["".join(file.suffixes).lower(), file.stat().st_size, sha256(file)]]
    if is_saved(file):
        read = [item for item in sorted(file.rglob("*")) if item.is_file()]
    else:
        found = load_dataset_builder(path, hub_config).config.data_files or {}
        read = [Path(item) for split in sorted(found) for item in found[split]]
        read += [
            item for name in ("README.md", ".huggingface.yaml", "dataset_infos.json") if (item := file / name).is_file()
        ]
    return [[os.path.relpath(item, file), item.stat().st_size, sha256(item)] for item in read]


def is_saved(folder: Path) -> bool:
    """Whether a folder was saved by `datasets`."""
    return (folder / "dataset_dict.json").exists() or (folder / "state.json").exists()


def load_movie_reviews(kind: str) -> dict[str, Dataset]:
    """The movie-review ratings as `five` classes, as `binary` ones (without ratings of exactly 0), or as `rating`, a float."""
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
    """A Hub data set from its snapshot in the cache, or else from wherever `datasets` finds it.

    Raises UserError with the commands that download or import it.
    """
    need = Need("--dataset", Repo(path, "dataset"), revision or "main", dataset_config=hub_config)
    snapshot = find_snapshot(need.repo, need.revision)
    try:
        if snapshot and not missing_from_cache(need):
            return dict(load_dataset(str(isolate_config(snapshot, need)), hub_config))
        return dict(load_dataset(path, hub_config, revision=revision))
    except (DatasetNotFoundError, ConnectionError, FileNotFoundError, ValueError, RuntimeError, OSError) as error:
        reason = first_line(error)
        lines = "\n".join(f"  {line}" for line in advice(need, configure_endpoint(None)))
        raise UserError(
            f"--dataset {path}{f' --dataset_config {hub_config}' if hub_config else ''} could not be loaded: {reason}\n"
            f"Check the name (user/name), the network or a mirror (HF_ENDPOINT), or one of:\n{lines}"
        ) from error


def isolate_config(snapshot: Path, need: Need) -> Path:
    """The snapshot, or if its README lists several configurations, a folder of symlinks whose README lists only one.

    `datasets` wants the files of every configuration in the README, but a run downloads those of one. The folder's path
    depends on data set, commit and configuration alone, so that the tables `datasets` caches for it are found again.
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
        infos = card.get("dataset_info") or []
        infos = infos if isinstance(infos, list) else [infos]
        head = {"configs": [chosen], "dataset_info": [i for i in infos if i.get("config_name", "default") == name]}
        (draft / "README.md").unlink()
        (draft / "README.md").write_text(f"---\n{json.dumps(head, default=str)}\n---\n", encoding="utf-8")
        merge_folder(draft, place)
    return place


def load_folder(path: str, flag: str) -> dict[str, Dataset]:
    """A folder saved by `datasets`, or one of data files. Raises UserError with `flag` and path if it cannot be read."""
    try:
        if is_saved(Path(path)):
            saved = load_from_disk(path)
            return dict(saved) if isinstance(saved, DatasetDict) else {"train": saved}
        return dict(load_dataset(path))
    except EmptyDatasetError as error:
        raise UserError(f"{flag} {path}: the folder holds no data files") from error
    except IndexError as error:
        raise UserError(f"{flag} {path}: a split saved there is empty") from error
    except (DatasetGenerationError, FileNotFoundError, ValueError, OSError) as error:
        raise UserError(f"{flag} {path} could not be loaded: {root_cause(error)}") from error


def load_file(path: str, role: str) -> Dataset:
    """One file, or the split `role` of a saved folder. Raises UserError with flag, file and, where known, the line."""
    flag, file = f"--{role}_file", Path(path)
    if file.is_dir():
        splits = load_folder(path, flag)
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
        # By default the words "null", "NA" and "None" are read as missing values.
        options = {"keep_default_na": False, "na_values": [""], "encoding": "utf-8-sig"}
        options["sep"] = "\t" if file.suffix.lower() == ".tsv" else ","
    try:
        dataset = load_dataset(FILE_FORMATS[file.suffix.lower()], data_files={"train": path}, **options)["train"]
    except Exception as error:  # the readers behind `datasets` raise errors of many kinds, all about this file
        raise UserError(f"{flag} {path} could not be read: {bad_line(file) or root_cause(error)}") from error
    header = dataset.column_names[0]
    if "sep" in options and len(dataset.column_names) == 1 and any(mark in header for mark in ",;\t|"):
        wanted = "tabs" if options["sep"] == "\t" else "commas"
        raise UserError(f"{flag} {path} has one column, {header!r}; separate its columns by {wanted}")
    return dataset


def root_cause(error: BaseException) -> str:
    """The first line of the error that started it all."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    lines = str(error).strip().splitlines() or [type(error).__name__]
    no_rows = any(text in lines[0] for text in ("corresponds to no data", "No columns to parse"))
    return "there are no rows in it" if no_rows else lines[0]


def bad_line(file: Path) -> str | None:
    """The first line that is not UTF-8 or, of .jsonl, not a JSON object; None if there is none. Readers name no line."""
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
