"""Predictions as jsonl, csv, npy or parquet, written one by one; a file gets its name when it is complete."""

import contextlib
import csv
import fcntl
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from lib.config.predict import NPY_IDS
from lib.errors import UserError, printable
from lib.inference.inputs import Example
from lib.inference.stream import Prediction
from lib.runtime.atomic import finite, sync, umask
from lib.runtime.screen import json_line

DIGITS = 6
"""Digits after the point of a float in jsonl and csv."""

FORMULA = re.compile("'*[=+@\t\r\n\uff0b\uff1d\uff20\uff0d-]")
"""How a text begins that Excel, LibreOffice or Google Sheets runs."""
NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?")

ROW_GROUP = 4096
"""Rows of a parquet file that are written together."""


def write_predictions(
    path: str | None, predictions: Iterable[tuple[Example, Prediction]], total: int | None = None
) -> int:
    """Write each example's prediction to `path`, or as jsonl to standard output. Returns their number.

    On a terminal there is a progress bar; `total` is its expected length. Raises UserError if the file cannot be written.
    """
    bar = tqdm(predictions, total=total, unit="row", dynamic_ncols=True, disable=not sys.stderr.isatty())
    if path is None:
        return write_all(JsonLines(None), bar)
    kind, target = Path(path).suffix.lower(), Path(os.path.realpath(path))  # a link stays a link, to the new file
    files = [target, target.with_suffix(NPY_IDS)] if kind == ".npy" else [target]
    parts: list[Path] = []
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists() and not target.is_file():  # a named pipe is written as it is read
            return write_all(WRITERS[kind](*files), bar)
        for file in files:
            # A name of its own: two processes with one output would write into each other's file.
            handle, part = tempfile.mkstemp(prefix=f"{file.name}.", suffix=".part", dir=file.parent)
            os.close(handle)
            parts.append(Path(part))
        count = write_all(WRITERS[kind](*parts), bar)
        publish(parts, files)
    except OSError as error:
        raise UserError(f"--output {printable(path)} cannot be written: {error.strerror or error}") from error
    finally:
        for leftover in parts:
            leftover.unlink(missing_ok=True)
    return count


def publish(parts: Sequence[Path], files: Sequence[Path]) -> None:
    """Give complete files their names, those of one process together: of two that end at once the last has all of them."""
    for part in parts:
        sync(part)
        part.chmod(0o666 & ~umask())
    folder = os.open(files[0].parent, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # file systems without locks
            fcntl.flock(folder, fcntl.LOCK_EX)
        for part, file in zip(parts, files, strict=True):
            os.replace(part, file)
    finally:
        os.close(folder)


class Writer(Protocol):
    def write(self, example: Example, prediction: Prediction) -> None: ...

    def close(self) -> None: ...


def write_all(writer: Writer, predictions: Iterable[tuple[Example, Prediction]]) -> int:
    count = 0
    with contextlib.closing(writer):
        for example, prediction in predictions:
            writer.write(example, prediction)
            count += 1
    return count


def to_record(example: Example, prediction: Prediction) -> dict[str, Any]:
    """What is written of an example: its id, its text (a list of two for a pair), and the prediction."""
    text = example.texts[0] if len(example.texts) == 1 else list(example.texts)
    return {"id": example.id, "text": text} | {key: to_json(value) for key, value in prediction.items()}


def to_json(value: Any) -> Any:
    """A value in the types of JSON, floats rounded; NaN and infinities become text, since JSON has none."""
    if isinstance(value, dict):
        return {key: to_json(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return finite(value.tolist())
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    if isinstance(value, (float, np.floating)):
        return finite(round(float(value), DIGITS))
    return int(value) if isinstance(value, np.integer) else value


class JsonLines:
    """jsonl: one JSON object per line, in a file or on standard output."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.file = path.open("w", encoding="utf-8") if path else sys.stdout

    def write(self, example: Example, prediction: Prediction) -> None:
        self.file.write(json_line(to_record(example, prediction)) + "\n")

    def close(self) -> None:
        if self.path:
            self.file.close()
        else:
            self.file.flush()


class Csv:
    """csv: a column for each class's probability; lists as JSON; text that a spreadsheet would run as `as_text` writes it."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("w", newline="", encoding="utf-8")
        self.writer = csv.writer(self.file)
        self.header: list[str] = []

    def write(self, example: Example, prediction: Prediction) -> None:
        cells: dict[str, Any] = {}
        for key, value in to_record(example, prediction).items():
            if isinstance(value, dict):
                cells |= {f"{key}/{name}": item for name, item in value.items()}
            else:
                cells[key] = json.dumps(value, ensure_ascii=False) if isinstance(value, list) else value
        if not self.header:
            self.header = list(cells)
            self.writer.writerow(map(as_text, self.header))
        self.writer.writerow([as_text(cells.get(name)) for name in self.header])

    def close(self) -> None:
        self.file.close()


def as_text(cell: Any) -> Any:
    """`cell` with an apostrophe before a text that a spreadsheet would take for a formula; numbers stay numbers.

    Of what begins with apostrophes and then like a formula, a reader takes one off to have the text again.
    """
    formula = isinstance(cell, str) and FORMULA.match(cell) and not NUMBER.fullmatch(cell)
    return f"'{cell}" if formula else cell


class Npy:
    """npy: embeddings, float32 (rows, size), and a file of their ids as JSON, one per line."""

    def __init__(self, path: Path, ids: Path) -> None:
        self.file, self.ids = path.open("wb"), ids.open("w", encoding="utf-8")
        self.rows = self.size = 0

    def write(self, example: Example, prediction: Prediction) -> None:
        if not self.rows:
            self.size = len(prediction["embedding"])
            self.write_header()
        self.file.write(prediction["embedding"].astype("<f4").tobytes())
        self.ids.write(json_line(example.id) + "\n")
        self.rows += 1

    def write_header(self) -> None:
        """Written again at the end with the number of rows: NumPy pads the header so that the number may grow."""
        header = {"descr": "<f4", "fortran_order": False, "shape": (self.rows, self.size)}
        np.lib.format.write_array_header_1_0(self.file, header)

    def close(self) -> None:
        self.file.seek(0)
        self.write_header()
        self.file.close()
        self.ids.close()


class Parquet:
    """parquet: columns `id` (int64 or text) and `embedding` (fixed-size list of float32)."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("wb")
        self.writer: Any = None
        self.ids: list[Any] = []
        self.vectors: list[np.ndarray] = []

    def write(self, example: Example, prediction: Prediction) -> None:
        self.ids.append(example.id)
        self.vectors.append(prediction["embedding"])
        if len(self.ids) == ROW_GROUP:
            self.flush()

    def flush(self) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        values = pa.array(np.concatenate(self.vectors).astype("<f4"))
        vectors = pa.FixedSizeListArray.from_arrays(values, len(self.vectors[0]))
        if self.writer is None:
            kind = pa.int64() if isinstance(self.ids[0], int) else pa.string()
            self.writer = pq.ParquetWriter(self.file, pa.schema([("id", kind), ("embedding", vectors.type)]))
        kind = self.writer.schema.field("id").type
        ids = pa.array([str(id_) for id_ in self.ids] if pa.types.is_string(kind) else self.ids, kind)
        self.writer.write_table(pa.Table.from_arrays([ids, vectors], schema=self.writer.schema))
        self.ids, self.vectors = [], []

    def close(self) -> None:
        if self.ids:
            self.flush()
        if self.writer is not None:
            self.writer.close()
        self.file.close()


WRITERS: dict[str, Callable[..., Writer]] = {".jsonl": JsonLines, ".csv": Csv, ".npy": Npy, ".parquet": Parquet}
