"""Prepared data on disk: found again by the content they were made of, checked at each use, limited in size.

HF_DATASETS_CACHE/prepared/KEY/    manifest.json  fields.txt  texts-SPLIT.arrow  tokens-SPLIT.arrow

An entry is written aside and published whole, so that several processes and runs may make the same one at once. Files
that a process has mapped into memory stay readable for it when another one deletes the entry.
"""

import ast
import atexit
import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import datasets
import numpy as np
import pyarrow as pa
import tokenizers
import transformers
from datasets import Dataset, Features
from datasets.fingerprint import Hasher
from datasets.table import MemoryMappedTable

from lib.config.sections import DataConfig
from lib.errors import UserError, first_line
from lib.hub import packaged
from lib.hub.endpoint import datasets_cache
from lib.runtime.atomic import MANIFEST, MARK, find_damage, listed_files, make_folder, remove_unused

LIMIT = 20 * 2**30
"""Bytes of prepared data that are kept; beyond it the least recently used go first."""

FIELDS = "fields.txt"

T = TypeVar("T")


def prepared_folder() -> Path:
    """The folder of all prepared data, beside the tables of `datasets`; HF_DATASETS_CACHE moves both."""
    return datasets_cache() / "prepared"


def prepared_key(identity: str, config: DataConfig, tokenizer: Any, *facts: Any) -> str:
    """Hash of everything that prepared data depend on, the same in every process and run.

    `identity` stands for the content of the source, `facts` for what a program asks for.
    """
    options = dataclasses.asdict(config)
    del options["preprocessing_num_workers"]
    versions = [datasets.__version__, tokenizers.__version__, transformers.__version__]
    depends = [identity, options, tokenizer_identity(tokenizer), facts, versions, program_identity()]
    return hashlib.sha256(json.dumps(depends, sort_keys=True, default=str).encode()).hexdigest()[:32]


def tokenizer_identity(tokenizer: Any) -> list[Any]:
    """What token ids depend on in a tokenizer: its class, rules and vocabulary, and settings."""
    kind = type(tokenizer)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        rules = Hasher.hash(tokenizer)
    else:
        backend.no_truncation()  # left by the previous call; every call sets its own
        backend.no_padding()
        rules = hashlib.sha256(backend.to_str().encode()).hexdigest()
    names = ("model_input_names", "model_max_length", "truncation_side", "split_special_tokens", "special_tokens_map")
    settings = [getattr(tokenizer, name, None) for name in names]
    return [kind.__module__, kind.__qualname__, rules, settings]


@functools.cache
def program_identity() -> str:
    """Hash of the code that reads and prepares data: another program may read the same bytes in another way."""
    digest = hashlib.sha256()
    for path in [*sorted(Path(__file__).parent.rglob("*.py")), Path(packaged.__file__)]:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def find_or_prepare(
    key: str | None, prepare: Callable[[Path], None], read: Callable[[Path], T]
) -> tuple[T, tuple[str, ...]]:
    """What `read` finds in the folder of `key`, which `prepare` fills if it is absent or damaged; and notes on the cache.

    Without a key, or where the folder cannot be written, the data are there for this process only. Raises UserError when
    they can be written nowhere, and what `prepare` raises.
    """
    root, notes = prepared_folder(), list[str]()
    if key is not None:
        folder, found = root / key, None
        with contextlib.suppress(OSError):  # another process may delete the folder meanwhile
            if folder.exists():
                damage = find_damage(folder) or unlisted(folder)
                if damage is None:
                    found = read(folder)
                else:
                    notes.append(f"warning: the prepared data in {folder} were damaged and are made again: {damage}")
                    if all(path.name in (MANIFEST, FIELDS) or path.suffix == ".arrow" for path in folder.iterdir()):
                        (folder / MANIFEST).write_text(MARK)  # it may be what is damaged: else the folder were not ours
        if found is not None:
            with contextlib.suppress(OSError):  # a cache that only others may write
                os.utime(folder / MANIFEST)  # used now: others go first
            return found, ()
        try:
            root.mkdir(parents=True, exist_ok=True)
            make_folder(folder, prepare)
            found = read(folder)
            remove_unused(root, LIMIT, keep=folder)
            return found, tuple(notes)
        except OSError as error:
            notes.append(
                f"warning: prepared data are not kept for the next start: {first_line(error)}; "
                f"the folder is {root}, and HF_DATASETS_CACHE names another"
            )
    try:
        place = Path(tempfile.mkdtemp(prefix="prepared-"))
        atexit.register(shutil.rmtree, place, ignore_errors=True)
        prepare(place)
        return read(place), tuple(notes)
    except OSError as error:
        raise UserError(
            f"the data cannot be prepared: {first_line(error)}; if {root} and {tempfile.gettempdir()} are full or cannot "
            "be written, set HF_DATASETS_CACHE to a folder with room"
        ) from error


def unlisted(folder: Path) -> str | None:
    """A table or the fields that no manifest answers for, in words; None if all are listed."""
    listed = listed_files(folder)
    names = [name for name in (FIELDS, *sorted(path.name for path in folder.glob("*.arrow"))) if name not in listed]
    return f"{names[0]} is not in {MANIFEST}" if names else None


def write_table(path: Path, features: Features, tables: Iterable[pa.Table]) -> None:
    """Write the columns of `features` as an Arrow file, one table at a time, so that memory holds no more than one."""
    schema = features.arrow_schema
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        for table in tables:
            writer.write_table(table.select(schema.names).cast(schema))


def open_table(path: Path) -> Dataset:
    """A file of `write_table`, mapped into memory."""
    return Dataset(MemoryMappedTable.from_file(str(path)), fingerprint=f"{path.parent.name}-{path.stem}")


def write_fields(folder: Path, values: dict[str, Any]) -> None:
    """Write plain values (text, numbers, tuples, lists, dicts, None) so that they are read with the same types."""
    text = repr(values)
    if ast.literal_eval(text) != values:
        raise TypeError(f"these are no plain values: {text}")
    (folder / FIELDS).write_text(text + "\n", encoding="utf-8")


def read_fields(folder: Path) -> dict[str, Any]:
    fields: dict[str, Any] = ast.literal_eval((folder / FIELDS).read_text(encoding="utf-8"))
    return fields


def read_column(dataset: Dataset, name: str) -> np.ndarray:
    """A column of numbers as an array (rows,), or of lists of one length as (rows, length), with its stored dtype."""
    values = dataset.select_columns([name]).with_format("arrow")[:][name].combine_chunks()
    while hasattr(values.type, "value_type"):
        values = values.flatten()
    array: np.ndarray = values.to_numpy(zero_copy_only=False)
    return array if len(array) == len(dataset) else array.reshape(len(dataset), -1)
