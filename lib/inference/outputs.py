"""Answers on disk or on the standard output: jsonl, csv, npy and parquet, written as they come, published when whole."""

import contextlib
import csv
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from tqdm import tqdm

from lib.errors import UserError
from lib.inference.inputs import Row
from lib.inference.stream import Answer
from lib.runtime.atomic import finite

DIGITS = 6


def write_answers(path: str | None, answers: Iterable[tuple[Row, Answer]], total: int | None = None) -> int:
    """Write each row with its answer to `path`, or as jsonl to the standard output; give back their number.

    A file appears under its name only when it is complete. A bar is shown on a terminal, `total` its expected length.
    Raises UserError when the file cannot be written.
    """
    bar = tqdm(answers, total=total, unit="row", dynamic_ncols=True, disable=not sys.stderr.isatty())
    if path is None:
        return write_all(JsonLines(sys.stdout), bar)
    target = Path(path)
    parts = {name: name.with_name(name.name + ".part") for name in files_of(target)}
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        count = write_all(open_writer(target, parts), bar)
        for name, part in parts.items():
            os.replace(part, name)
    except OSError as error:
        raise UserError(f"--output {path} cannot be written: {error}") from error
    finally:
        for part in parts.values():
            with contextlib.suppress(OSError):
                part.unlink()
    return count


def write_all(writer: Any, answers: Iterable[tuple[Row, Answer]]) -> int:
    count = 0
    try:
        for row, answer in answers:
            writer.write(row, answer)
            count += 1
    finally:
        writer.close()
    return count


def files_of(target: Path) -> list[Path]:
    """The files that an output consists of: an array has no room for ids, which lie beside it, one a line."""
    return [target, target.with_suffix(".ids.jsonl")] if target.suffix.lower() == ".npy" else [target]


def open_writer(target: Path, parts: dict[Path, Path]) -> Any:
    kind, part = target.suffix.lower(), parts[target]
    if kind == ".npy":
        return Arrays(part, parts[files_of(target)[1]])
    if kind == ".parquet":
        return Parquet(part)
    if kind == ".csv":
        return Table(part.open("w", newline="", encoding="utf-8"))
    return JsonLines(part.open("w", encoding="utf-8"))


def flat_row(row: Row, answer: Answer) -> dict[str, Any]:
    """What is written of a row: its id, its text, a list of two for pairs, and the answer."""
    text = row.texts[0] if len(row.texts) == 1 else list(row.texts)
    return {"id": row.id, "text": text} | {key: plain(value) for key, value in answer.items()}


def plain(value: Any) -> Any:
    """Lists and numbers that JSON has, floats cut to six digits after the point."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return [finite(item) for item in value.tolist()]
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (float, np.floating)):
        return finite(round(float(value), DIGITS))
    return int(value) if isinstance(value, np.integer) else value


class JsonLines:
    """One JSON object a line."""

    def __init__(self, file: TextIO) -> None:
        self.file = file

    def write(self, row: Row, answer: Answer) -> None:
        self.file.write(json.dumps(flat_row(row, answer), ensure_ascii=False, default=str) + "\n")

    def close(self) -> None:
        if self.file is sys.stdout:
            self.file.flush()
        else:
            self.file.close()


class Table:
    """csv: probabilities as one column a class; lists as JSON."""

    def __init__(self, file: TextIO) -> None:
        self.file, self.writer = file, csv.writer(file)
        self.header: list[str] = []

    def write(self, row: Row, answer: Answer) -> None:
        cells: dict[str, Any] = {}
        for key, value in flat_row(row, answer).items():
            if isinstance(value, dict):
                cells |= {f"{key}/{name}": item for name, item in value.items()}
            else:
                cells[key] = json.dumps(value, ensure_ascii=False) if isinstance(value, list) else value
        if not self.header:
            self.header = list(cells)
            self.writer.writerow(self.header)
        self.writer.writerow([cells.get(name) for name in self.header])

    def close(self) -> None:
        self.file.close()


class Arrays:
    """npy: float32 (rows, size), and the ids beside it; the number of rows is filled in at the end."""

    def __init__(self, path: Path, ids: Path) -> None:
        self.file, self.ids = path.open("wb"), ids.open("w", encoding="utf-8")
        self.rows = self.size = 0

    def write(self, row: Row, answer: Answer) -> None:
        if not self.rows:
            self.size = len(answer["embedding"])
            self.write_header()
        self.file.write(answer["embedding"].astype("<f4").tobytes())
        self.ids.write(json.dumps(row.id, ensure_ascii=False, default=str) + "\n")
        self.rows += 1

    def write_header(self) -> None:
        """NumPy pads the header for a number of rows that grows, so that it can be written over."""
        header = {"descr": "<f4", "fortran_order": False, "shape": (self.rows, self.size)}
        np.lib.format.write_array_header_1_0(self.file, header)

    def close(self) -> None:
        self.file.seek(0)
        self.write_header()
        self.file.close()
        self.ids.close()


class Parquet:
    """parquet: columns `id` and `embedding`, a fixed-size list of float32; a group of rows at a time."""

    GROUP = 4096

    def __init__(self, path: Path) -> None:
        self.file = path.open("wb")
        self.writer: Any = None
        self.ids: list[Any] = []
        self.vectors: list[np.ndarray] = []

    def write(self, row: Row, answer: Answer) -> None:
        self.ids.append(row.id)
        self.vectors.append(answer["embedding"])
        if len(self.ids) == self.GROUP:
            self.flush()

    def flush(self) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        values = pa.array(np.concatenate(self.vectors).astype("<f4"))
        vectors = pa.FixedSizeListArray.from_arrays(values, len(self.vectors[0]))
        if self.writer is None:
            self.numbered = isinstance(self.ids[0], int)
            kind = pa.int64() if self.numbered else pa.string()
            self.writer = pq.ParquetWriter(self.file, pa.schema([("id", kind), ("embedding", vectors.type)]))
        ids = pa.array(self.ids if self.numbered else [str(i) for i in self.ids], self.writer.schema.field("id").type)
        self.writer.write_table(pa.Table.from_arrays([ids, vectors], schema=self.writer.schema))
        self.ids, self.vectors = [], []

    def close(self) -> None:
        if self.ids:
            self.flush()
        if self.writer is not None:
            self.writer.close()
        self.file.close()
