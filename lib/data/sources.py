"""Data sets as they are stored: from the catalog, the Hub, a folder or the user's files. Nothing else reads them."""

import atexit
import contextlib
import dataclasses
import errno
import hashlib
import itertools
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
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
from huggingface_hub import DatasetCard, cached_assets_path

from lib.config.sections import FILE_FORMATS, DataConfig
from lib.data.catalog import DEFAULT, ROLES, catalog_entry, data_needs, own_files
from lib.data.columns import find_columns
from lib.data.files.opening import Source, open_unpacked
from lib.data.files.tables import READER, FaultyColumn, load_tables
from lib.data.labels.single_label import NAME_COLUMNS
from lib.data.trained_on import UNKNOWN
from lib.errors import UserError, first_line
from lib.hub import packaged
from lib.hub.advice import advice
from lib.hub.cache.layout import Repo, find_snapshot, snapshot_files
from lib.hub.endpoint import configure_endpoint, datasets_cache
from lib.hub.needs import Need, chosen_config, missing_from_cache, read_card
from lib.runtime.atomic import remove_unused, sha256
from lib.runtime.screen import list_some
from lib.runtime.startup import hidden

logger = logging.getLogger(__name__)

CARDS = ("README.md", ".huggingface.yaml")
"""Files of a folder in which `datasets` looks for the names of the data files."""

REFUSED_WRITES = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOLCK, errno.ENOTDIR}
"""Errors of a folder that is read-only or full, or whose file system has no locks."""

MAGIC = re.compile(r"[*?\[\]]|::|://")
"""What `datasets` takes for a pattern or an address in the name of a folder."""


@hidden("scipy")  # `datasets` imports it for Matlab files only
def load_raw(config: DataConfig) -> dict[str, Dataset]:
    """All splits as they are stored, under their own names.

    Raises UserError for a file, folder or data set that cannot be read, and for options that do not apply to it.
    """
    files = own_files(config)
    if files:
        return load_files(files, config)
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
        return load_folder(name, "--dataset", config)
    if Path(name).exists():
        raise UserError(f"--dataset {name} is a file; give files as --train_file, --validation_file and --test_file")
    (need,) = data_needs(config)
    return load_hub(need.repo.repo_id, need.dataset_config, config.revision, config)


def data_identity(config: DataConfig) -> str | None:
    """Hash over everything that `load_raw(config)` reads: the contents of its files, wherever they are, and how to read them.

    None where it cannot be known without loading: data that `datasets` finds by itself, or that cannot be read at all.
    """
    name, files = config.dataset or DEFAULT, own_files(config)
    parts: dict[str, Any] = {"dataset_config": config.dataset_config, "encoding": config.encoding, "reader": READER}
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
            with isolated(snapshot, need) as folder:
                parts["folder"] = path_identity(folder, need.dataset_config, places_of(snapshot))
    except Exception:  # of many kinds, and all of them are reported with their reason when the data are read
        return None
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode(errors="surrogatepass")).hexdigest()


def path_identity(path: str, hub_config: str | None = None, places: tuple[Path, ...] | None = None) -> list[list[Any]]:
    """The name, size and sha256 of a file, or of each file in a folder that is read; of a file, the ending is its name."""
    file = Path(path)
    if not file.is_dir():
        return [["".join(file.suffixes).lower(), file.stat().st_size, sha256(file)]]
    if is_saved(file):
        check_saved(file, "")
        read = [item for item in sorted(file.rglob("*")) if item.is_file()]
    else:
        _, found = find_files(path, "", hub_config, places)
        read = [Path(item) for split in sorted(found) for item in found[split]]
        read += [item for name in (*CARDS, "dataset_infos.json") if (item := file / name).is_file()]
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


def load_hub(
    path: str, hub_config: str | None, revision: str | None, config: DataConfig | None = None
) -> dict[str, Dataset]:
    """A Hub data set from its snapshot in the cache, or else from wherever `datasets` finds it.

    Raises UserError with the commands that download or import it.
    """
    need = Need("--dataset", Repo(path, "dataset"), revision or "main", dataset_config=hub_config)
    snapshot = find_snapshot(need.repo, need.revision)
    try:
        if snapshot and not missing_from_cache(need):
            with isolated(snapshot, need) as folder:
                name = f"--dataset {path}: "
                return read_folder(folder, name, hub_config, config or DataConfig(), places_of(snapshot))
        if revision:  # without the Hub `datasets` takes whatever tables it has
            raise FileNotFoundError(f"the cache has no {revision}")
        return dict(load_dataset(path, hub_config))
    except (DatasetNotFoundError, ConnectionError, FileNotFoundError, ValueError, RuntimeError, OSError) as error:
        reason = first_line(error)
        lines = "\n".join(f"  {line}" for line in advice(need, configure_endpoint(None)))
        raise UserError(
            f"--dataset {path}{f' --dataset_config {hub_config}' if hub_config else ''} could not be loaded: {reason}\n"
            f"Check the name (user/name), the network or a mirror (HF_ENDPOINT), or one of:\n{lines}"
        ) from error


@contextlib.contextmanager
def isolated(snapshot: Path, need: Need) -> Iterator[str]:
    """The snapshot, or if its README lists several configurations, a folder of symlinks whose README lists only one.

    `datasets` wants the files of every configuration in the README, but a run downloads those of one.
    """
    card = read_card(snapshot / "README.md")
    chosen = chosen_config(need, card)
    if chosen is None or len(card["configs"]) == 1:
        yield str(snapshot)
        return
    name = str(chosen.get("config_name", "default"))
    with tempfile.TemporaryDirectory(prefix="chosen-") as place:
        for file, path in snapshot_files(snapshot).items():
            link = Path(place, file)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path.absolute())
        infos = card.get("dataset_info") or []
        infos = infos if isinstance(infos, list) else [infos]
        head = {"configs": [chosen], "dataset_info": [i for i in infos if i.get("config_name", "default") == name]}
        Path(place, "README.md").unlink()
        Path(place, "README.md").write_text(f"---\n{json.dumps(head, default=str)}\n---\n", encoding="utf-8")
        yield place


def places_of(folder: Path) -> tuple[Path, ...]:
    """Where the files of a folder may lie: in it, and those of a snapshot among the blobs of its cache."""
    real = folder.resolve()
    blobs = (real.parents[1] / "blobs", real.parents[2] / "blobs") if real.parent.name == "snapshots" else ()
    return (real, *blobs)


def load_folder(path: str, flag: str, config: DataConfig) -> dict[str, Dataset]:
    """A folder saved by `datasets`, or one of data files. Raises UserError with `flag` and path if it cannot be read."""
    name = f"{flag} {path.rstrip('/')}/"
    try:
        if is_saved(Path(path)):
            check_saved(Path(path), name)
            saved = load_from_disk(path)
            return dict(saved) if isinstance(saved, DatasetDict) else {"train": saved}
        return read_folder(path, name, None, config, places_of(Path(path)))
    except EmptyDatasetError as error:
        raise UserError(f"{flag} {path}: the folder holds no data files") from error
    except IndexError as error:
        raise UserError(f"{flag} {path}: a split saved there is empty") from error
    except (DatasetGenerationError, FileNotFoundError, ValueError, OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{flag} {path} could not be loaded: {root_cause(error)}") from error


def check_card(path: str, name: str) -> None:
    """Raise UserError if the README of a folder names data outside the folder: what is read of it are its own files."""
    for file in (file for file in CARDS if Path(path, file).is_file()):
        text = Path(path, file).read_text(encoding="utf-8")
        stated = DatasetCard(text if file.endswith(".md") else f"---\n{text}\n---\n").data.to_dict()
        for item in strings_in(stated.get("configs")):
            if "://" in item or "::" in item or os.path.isabs(item) or ".." in Path(item).parts:
                raise UserError(
                    f"{name}{file} names {item}, which is not in the folder; give that data by its own name"
                )


def check_places(files: Iterable[Path], folder: Path, name: str, places: tuple[Path, ...]) -> None:
    """Raise UserError for a file of a folder that is, through a link, a file elsewhere."""
    for file in files:
        if not any(file.resolve().is_relative_to(place) for place in places):
            raise UserError(
                f"{name}{os.path.relpath(file, folder)} is a link that leaves the folder, to {file.resolve()}; copy the "
                "file into the folder, or give it as --train_file, --validation_file or --test_file"
            )


def check_saved(folder: Path, name: str) -> None:
    """Raise UserError if a folder saved by `datasets` names files outside itself."""
    check_places(folder.rglob("*"), folder, name, places_of(folder))
    for file in (*folder.rglob("state.json"), *folder.rglob("dataset_dict.json")):
        stated = json.loads(file.read_text(encoding="utf-8"))
        fields = stated.items() if isinstance(stated, dict) else ()
        for item in strings_in([value for key, value in fields if key == "splits" or key.endswith("files")]):
            if Path(item).name != item or item == "..":
                raise UserError(f"{name}{file.relative_to(folder)} names {item}, which is not in the folder")


def strings_in(value: Any) -> Iterator[str]:
    """All texts in lists and mappings, at any depth."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from strings_in(item)


def read_folder(
    path: str, name: str, hub_config: str | None, config: DataConfig, places: tuple[Path, ...]
) -> dict[str, Dataset]:
    """The splits of a folder of data files: `datasets` finds the files, and reads those of kinds that are not ours.

    `name` comes before the names of files in messages; the files must lie in `places`.
    """
    builder, found = find_files(path, name, hub_config, places)
    if hub_config is None and not read_card(Path(path) / "README.md").get("configs"):
        found = separate_eval(found)
        name_unread(path, name, found)
    options = reading_options(builder, config.encoding)
    if options is None:
        words = {"keep_default_na": False, "na_values": [""]} if is_builder(builder, "csv") else {}
        with plain_folder(path) as plain:
            return load_with_datasets(plain, hub_config, words)
    files = {
        split: [Source(item, name + os.path.relpath(item, path), **options) for item in items]
        for split, items in found.items()
    }
    features = builder.config.features if hasattr(builder.config, "features") else None
    described = builder.info.features or features
    return load_columns(files, config, dict.fromkeys(files, described) if described else None)


def load_with_datasets(path: str, hub_config: str | None, words: dict[str, Any]) -> dict[str, Dataset]:
    """A folder of files as `datasets` reads it; its tables last as long as this process.

    They are made anew each time: `datasets` would find its own by the dates of the files, and would not check them.
    """
    root = datasets_cache() / "folders"
    try:
        root.mkdir(parents=True, exist_ok=True)
        remove_unused(root, 0)
        place = tempfile.mkdtemp(prefix=".tmp-", dir=root)
        atexit.register(shutil.rmtree, place, ignore_errors=True)
        return dict(load_dataset(path, hub_config, cache_dir=place, **words))
    except (OSError, DatasetGenerationError) as error:
        if not is_refused_write(error):
            raise
        logger.warning(
            "warning: %s cannot hold tables (%s), %s is used; HF_DATASETS_CACHE names another folder",
            *(root, root_cause(error), tempfile.gettempdir()),
        )
    place = tempfile.mkdtemp(prefix="tables-")
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    return dict(load_dataset(path, hub_config, cache_dir=place, **words))


def is_refused_write(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, is one of REFUSED_WRITES."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in REFUSED_WRITES:
            return True
        error = error.__cause__ or error.__context__
    return False


def find_files(
    path: str, name: str, hub_config: str | None, places: tuple[Path, ...] | None = None
) -> tuple[Any, dict[str, list[str]]]:
    """What `datasets` makes of a folder: the builder, and the files of each split. Raises what `datasets` raises.

    Raises UserError, which begins with `name`, before an address is asked or a file outside `places` is read.
    """
    check_card(path, name)
    with plain_folder(path) as plain, tempfile.TemporaryDirectory(prefix="builder-") as unused:
        builder = load_dataset_builder(plain, hub_config, cache_dir=unused)
        found = {str(split): list(map(str, items)) for split, items in (builder.config.data_files or {}).items()}
        base = os.path.realpath(plain)
    inside = {
        split: [os.path.join(path, os.path.relpath(item, base)) for item in items] for split, items in found.items()
    }
    files = [Path(item) for items in inside.values() for item in items]
    check_places(files, Path(path), name, places or places_of(Path(path)))
    return builder, inside


def separate_eval(found: dict[str, list[str]]) -> dict[str, list[str]]:
    """The files of each split, with those named eval or evaluation in a split of their own: `datasets` calls them test."""
    words = {item: set(re.split(r"[^a-z]+", os.path.basename(item).lower())) for item in found.get("test", [])}
    named = [item for item in words if words[item] & {"eval", "evaluation"} and not words[item] & {"test", "testing"}]
    rest = [item for item in words if item not in named]
    splits = {split: items for split, items in found.items() if split != "test"}
    return splits | ({"test": rest} if rest else {}) | ({"eval": named} if named else {})


def name_unread(path: str, name: str, found: dict[str, list[str]]) -> None:
    """Warn of data files in a folder that belong to no split."""
    read = set(itertools.chain(*found.values()))
    unread = [
        os.path.relpath(item, path)
        for item in map(str, sorted(Path(path).rglob("*")))
        if item not in read
        and item.lower().endswith(tuple(f".{kind}" for kind in FILE_FORMATS if kind != "txt"))
        and os.path.isfile(item)
    ]
    if unread:
        some = list_some(unread, 5)
        logger.warning("%s%s: in no split and not read; files are called train, validation or test", name, some)


@contextlib.contextmanager
def plain_folder(path: str) -> Iterator[str]:
    """The folder, or if `datasets` would not take its name literally, one of links to its files."""
    if not MAGIC.search(os.path.realpath(path)):
        yield path
        return
    with tempfile.TemporaryDirectory() as place:
        for item in (item for item in Path(path).rglob("*") if item.is_file()):
            link = Path(place) / item.relative_to(path)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(item.absolute())
        yield place


def is_builder(builder: Any, name: str) -> bool:
    return type(builder).__module__ == f"datasets.packaged_modules.{name}.{name}"


def reading_options(builder: Any, encoding: str | None) -> dict[str, Any] | None:
    """How our reader reads the files of a folder; None where its kind, or what its README asks for, is not ours."""
    kind = next((kind for kind in ("csv", "json", "parquet", "text") if is_builder(builder, kind)), None)
    config = builder.config
    known = {"name", "version", "data_dir", "data_files", "description", "features", "encoding"}
    known |= {"sep", "delimiter", "names", "column_names"} if kind == "csv" else set()
    settings = {field.name: field.default for field in dataclasses.fields(config) if field.name not in known}
    asked = {name for name, default in settings.items() if getattr(config, name) != default}
    if kind == "csv" and config.names and config.header is None:
        asked -= {"header"}
    if kind is None or asked or (kind == "csv" and len(config.sep) != 1):
        return None
    own = getattr(config, "encoding", None)
    options: dict[str, Any] = {"encoding": encoding if own in (None, "utf-8") else own}
    if kind != "csv":
        return options | {"format": {"json": "jsonl", "text": "txt"}.get(kind, kind)}
    chosen = [("sep", config.sep), *([("names", tuple(config.names))] if config.names else [])]
    return options | {"format": "tsv" if config.sep == "\t" else "csv", "options": tuple(chosen)}


def load_files(files: dict[str, str], config: DataConfig) -> dict[str, Dataset]:
    """The user's files, or folders, by role. Raises UserError with flag, file and, where known, the line."""
    sources, loaded = dict[str, list[Source]](), dict[str, Dataset]()
    for role, path in files.items():
        flag = f"--{role}_file"
        if os.path.isdir(path):
            splits = load_folder(path, flag, config)
            if len(splits) > 1 and role not in splits:
                raise UserError(
                    f"{flag} {path} holds the splits {', '.join(splits)}, none of them {role}; use --dataset {path}"
                )
            loaded[role] = splits[role] if role in splits else next(iter(splits.values()))
            continue
        source = Source(path, f"{flag} {path}", encoding=config.encoding)
        with open_unpacked(source) as (_, kind):
            if os.path.getsize(path) == 0:
                raise UserError(f"{flag} {path} is empty")
            if kind == "txt":
                raise UserError(f"{flag} {path}: the name must end in one of .csv, .tsv, .json, .jsonl, .parquet")
        sources[role] = [source]
    loaded |= load_columns(sources, config) if sources else {}
    return {role: loaded[role] for role in files}


def load_columns(
    files: dict[str, list[Source]], config: DataConfig, features: dict[str, Features] | None = None
) -> dict[str, Dataset]:
    """The rows of files. A column with faults is refused where the run needs it."""
    needed, objects = needed_columns(config), config.soft_labels or ()
    try:
        return load_tables(files, features, needed, objects)
    except FaultyColumn as fault:
        if needed is not None:
            raise
        try:
            texts, labels, *_ = find_columns(load_tables(files, features, set(), objects), config, UNKNOWN)
        except UserError:
            raise fault from None
        read = {*texts, *labels, *NAME_COLUMNS, *objects}
        if fault.column in read:
            raise
        return load_tables(files, features, read, objects)


def needed_columns(config: DataConfig) -> set[str] | None:
    """The columns that a run reads, where all are named; None where some are guessed."""
    entry = catalog_entry(config)
    texts = config.text_columns or (entry.text_columns if entry else None)
    labels = (
        config.label_columns or (config.label_column and (config.label_column,)) or (entry and (entry.label_column,))
    )
    return {*texts, *labels, *NAME_COLUMNS, *(config.soft_labels or ())} if texts and labels else None


def root_cause(error: BaseException) -> str:
    """The first line of the error that started it all."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return first_line(error)
