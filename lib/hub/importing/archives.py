"""Opening archives without trusting them: no member leaves the folder, no bomb fills the disk."""

import contextlib
import lzma
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from lib.errors import UserError
from lib.hub.cache.layout import Repo
from lib.hub.cache.publish import staging_folder

MAX_FILES = 100_000
MAX_RATIO = 200
"""An archive whose contents are more than this many times its size is a bomb: weights hardly compress at all."""
BROKEN = (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError, OSError)
"""Errors of the libraries for archives that are cut off, altered, or compressed by an unknown method."""


@contextlib.contextmanager
def opened(source: Path) -> Iterator[Path]:
    """`source` itself if it is a folder; an archive is extracted to a folder beside the cache, removed afterwards.

    Raises UserError for an archive that is broken, or has members that leave it.
    """
    if source.is_dir():
        yield source
        return
    if not source.is_file():
        raise UserError(f"{source}: no such folder or archive")
    with staging_folder(Repo("incoming")) as target:
        try:
            if zipfile.is_zipfile(source):
                unzip(source, target)
            elif tarfile.is_tarfile(source):
                untar(source, target)
            else:
                raise UserError(
                    f"{source} is neither a folder nor a .zip or .tar archive; a download that was cut off looks like "
                    "this too. Extract other archives and give the folder; for single files give their folder as well."
                )
        except BROKEN as error:
            raise UserError(f"{source} cannot be extracted: {error}") from error
        yield target


def unzip(source: Path, target: Path) -> None:
    """Extract a .zip of ordinary files."""
    with zipfile.ZipFile(source) as archive:
        members = archive.infolist()
        if len(members) > MAX_FILES:
            raise UserError(f"{source} holds {len(members):,} files; this is no model or data set")
        for member in members:
            mode = member.external_attr >> 16
            check_member(source, member.filename, member.is_dir() or stat.S_IFMT(mode) in (0, stat.S_IFREG))
            if member.flag_bits & 1:
                raise UserError(f"{source} needs a password; extract it with that, and give the folder")
            member.filename = member.filename.replace("\\", "/")  # as some programs of Windows write them
        check_size(source, sum(member.file_size for member in members), target)
        archive.extractall(target, members)


def untar(source: Path, target: Path) -> None:
    """Extract a .tar, compressed or not, of ordinary files, and of links that stay inside it.

    Links are extracted last, so that no file is written through one.
    """
    size, links = 0, []
    with tarfile.open(source) as archive:
        for number, member in enumerate(archive):
            if number > MAX_FILES:
                raise UserError(f"{source} holds more than {MAX_FILES:,} files; this is no model or data set")
            check_member(source, member.name, member.isfile() or member.isdir() or member.issym() or member.islnk())
            if member.issym() or member.islnk():
                links.append(member)
                continue
            size += member.size
            check_size(source, size, target)
            archive.extract(member, target, filter="data")
        if archive.fileobj:
            archive.fileobj.read(2**20)  # on to the checksum of a .gz, which lies behind the last member
        for member in sorted(links, key=lambda link: link.issym()):
            try:
                archive.extract(member, target, filter="data")
            except tarfile.FilterError as error:
                raise UserError(f"{source}: {error}; this archive is not to be trusted") from error


def check_member(source: Path, name: str, ordinary: bool) -> None:
    """Raise UserError for a member that leaves the folder, or is a link or device where only files are `ordinary`."""
    parts = PurePosixPath(name.replace("\\", "/"))
    if parts.is_absolute() or ".." in parts.parts or ":" in (parts.parts or ("",))[0]:
        raise UserError(f"{source}: {name!r} would leave the folder; this archive is not to be trusted")
    if not ordinary:
        raise UserError(f"{source}: {name!r} is a link or device; archive ordinary files, or links in a .tar")


def check_size(source: Path, size: int, target: Path) -> None:
    """Raise UserError for contents of `size` bytes when the archive is a bomb, or the disk has no space for them."""
    if size > max(MAX_RATIO * source.stat().st_size, 2**20):
        raise UserError(f"{source} grows more than {MAX_RATIO}-fold when extracted; this archive is not to be trusted")
    if size > (free := shutil.disk_usage(target).free):
        raise UserError(
            f"{source} contains {size / 1e9:.1f} GB and more, {free / 1e9:.1f} GB are free beside the cache; "
            "set HF_HUB_CACHE to a larger disk"
        )
