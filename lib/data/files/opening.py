"""A file as text: found by its literal name, unpacked, decoded, and refused with the reason where it is no text."""

import bz2
import codecs
import contextlib
import dataclasses
import gzip
import io
import lzma
import os
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lib.config.sections import FILE_FORMATS, named_format
from lib.errors import UserError, require

BLOCK = 1 << 18
"""Bytes that are read at once."""
UNPACK_ERRORS = (
    *(EOFError, OSError, RuntimeError, NotImplementedError, ValueError, LookupError),
    *(struct.error, zlib.error, lzma.LZMAError, zipfile.BadZipFile),
)
"""What Python's readers of packed files raise for damaged ones."""
BOMS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # begins with the mark of UTF-16
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
FOREIGN = (
    (b"\xd0\xcf\x11\xe0", "an Excel or Word file; save it as csv (UTF-8)"),
    (b"PAR1", "parquet; let its name end in .parquet"),
    (b"ARROW1", "an Arrow file; save it as parquet"),
    (b"SQLite format 3", "an SQLite data base; export the table as csv"),
    (b"%PDF", "a PDF; give its text as csv"),
    (b"\x28\xb5\x2f\xfd", "packed with zstd; unpack it first, or pack it with gzip"),
    (b"7z\xbc\xaf", "a 7z archive; unpack it first"),
    (b"Rar!", "a rar archive; unpack it first"),
    (b"<!DOCTYPE html", "a web page; the address it came from was not that of the file itself"),
    (b"<!doctype html", "a web page; the address it came from was not that of the file itself"),
    (b"version https://git-lfs", "a pointer of Git LFS, not the data; get them with: git lfs pull"),
)
"""The first bytes of files that people name .csv or .json, and what to do with them."""


@dataclasses.dataclass(frozen=True)
class Source:
    """A file to read, and its name in messages, such as `--train_file reviews.csv`.

    `format` is a key of FILE_FORMATS, known from the name if it is None. `options` belong to the format, as a separator.
    """

    path: str
    name: str
    format: str | None = None
    encoding: str | None = None
    options: tuple[tuple[str, Any], ...] = ()


class Text:
    """The text of a binary stream, block by block; `size` counts the characters so far.

    The byte order mark decides the encoding, else `encoding`, else it is UTF-8. Raises UserError with the line for bytes
    that are not of this encoding, NUL characters, a file of another kind, and packed data that are damaged.
    """

    def __init__(self, file: Any, name: str, encoding: str | None = None) -> None:
        self.file, self.name, self.encoding = file, name, encoding
        self.size, self.line = 0, 1

    def read(self) -> bytes:
        """Up to BLOCK bytes, as soon as there are some; none at the end."""
        try:
            return self.file.read1(BLOCK)
        except UNPACK_ERRORS as error:
            raise UserError(f"{self.name} is damaged: it cannot be read past line {self.line}: {error}") from error

    def __iter__(self) -> Iterator[str]:
        head = b""
        while len(head) < 32 and (more := self.read()):
            head += more
        for start, kind in FOREIGN:
            require(not head.startswith(start), f"{self.name} is {kind}")
        encoding = self.encoding or "utf-8"
        for mark, kind in BOMS:
            if head.startswith(mark):
                encoding, head = kind, head[len(mark) :]
                break
        decoder, block = codecs.getincrementaldecoder(encoding)("strict"), head
        while True:
            try:
                text = decoder.decode(block, not block)
            except UnicodeError as error:
                raise UserError(self.undecodable(error, encoding)) from None
            if "\0" in text:
                place = self.line + count_breaks(text[: text.index("\0")])
                raise UserError(
                    f"{self.name}: line {place} holds a NUL character, which text never has; "
                    "of a UTF-16 file without its mark say --encoding utf-16-le, else remove it"
                )
            self.size += len(text)
            if text:
                yield text
            self.line += count_breaks(text)
            if not block:
                return
            block = self.read()

    def undecodable(self, error: UnicodeError, encoding: str) -> str:
        line = self.line
        if isinstance(error, UnicodeDecodeError):
            line += count_breaks(error.object[: error.start].decode(encoding, "ignore"))
        if self.encoding:
            return f"{self.name}: line {line} is not {encoding}; name the file's own encoding with --encoding"
        return (
            f"{self.name}: line {line} is not {encoding.upper()}; name the encoding, such as --encoding gb18030 or "
            "--encoding cp1252, or save the file as UTF-8"
        )


def count_breaks(text: str) -> int:
    return text.count("\n") or text.count("\r")


def split_lines(blocks: Iterable[str], newline: str = "") -> Iterator[str]:
    r"""Lines with their ends, which are \n, \r\n or \r, or only what `newline` names; each once it is known to be complete."""
    parts: list[str] = []
    for block in blocks:
        ends = "\n" in block or (not newline and ("\r" in block or (parts and parts[-1].endswith("\r"))))
        parts.append(block)
        if ends:
            lines = io.StringIO("".join(parts), newline=newline).readlines()
            parts = [] if lines[-1].endswith("\n") else [lines.pop()]
            yield from lines
    if parts:
        yield from io.StringIO("".join(parts), newline=newline).readlines()


def check_file(path: str, name: str) -> None:
    """Raise UserError unless `path`, taken literally, is a file that can be read."""
    try:
        kind = os.stat(path).st_mode
    except (OSError, ValueError) as error:  # ValueError: a NUL character
        missing = isinstance(error, FileNotFoundError | NotADirectoryError | ValueError)
        hint = "; it is an address: download the file first" if "://" in path else ""
        raise UserError(f"{name}: {'no such file' if missing else error}{hint}") from None
    require(not stat.S_ISDIR(kind), f"{name} is a folder; give a file")
    pipe = stat.S_ISFIFO(kind) or stat.S_ISSOCK(kind)
    require(not pipe, f"{name} is a pipe, and files are read more than once; save it as a file")
    require(stat.S_ISREG(kind), f"{name} is a device, not a file")
    require(os.access(path, os.R_OK), f"{name} may not be read by you; change its permissions (chmod +r)")


@contextlib.contextmanager
def open_unpacked(source: Source) -> Iterator[tuple[Any, str]]:
    """The bytes of a file, out of gzip, bzip2, xz or a zip archive of one file, and the format.

    What the bytes say counts, not the name. Raises UserError for what is not a readable file of a known format.
    """
    check_file(source.path, source.name)
    path, chosen = source.path, source.format or named_format(source.path)
    with contextlib.ExitStack() as stack:
        try:
            raw = stack.enter_context(Path(path).open("rb"))
            head = raw.read(8)
            raw.seek(0)
            file: Any = raw
            if head.startswith(b"\x1f\x8b"):
                file = stack.enter_context(gzip.open(raw))
            elif head.startswith(b"BZh"):
                file = stack.enter_context(bz2.open(raw))
            elif head.startswith(b"\xfd7zXZ\0"):
                file = stack.enter_context(lzma.open(raw))
            elif head.startswith((b"PK\3\4", b"PK\5\6")):
                archive = stack.enter_context(zipfile.ZipFile(raw))
                member = only_member(archive, source.name)
                chosen = source.format or named_format(member) or chosen
                file = stack.enter_context(archive.open(member))
        except UNPACK_ERRORS as error:
            raise UserError(f"{source.name} cannot be opened: {error}") from error
        if chosen is None or chosen not in FILE_FORMATS:
            endings = ", ".join(f".{name}" for name in FILE_FORMATS if name != "txt")
            raise UserError(
                f"{source.name}: the name must end in one of {endings}; these may be packed: .gz, .bz2, .xz, .zip"
            )
        yield file, chosen


def only_member(archive: zipfile.ZipFile, name: str) -> str:
    """The file in an archive that holds one. Raises UserError for none, several, and an Excel workbook."""
    names = [name for name in archive.namelist() if not name.endswith("/")]
    require("[Content_Types].xml" not in names, f"{name} is an Excel or Word file; save it as csv (UTF-8)")
    names = [item for item in names if not item.startswith("__MACOSX/") and not item.endswith(".DS_Store")]
    if len(names) != 1:
        found = ", ".join(names[:5]) or "no file"
        raise UserError(f"{name} holds {found}, and an archive must hold one file; unpack it first")
    return names[0]
