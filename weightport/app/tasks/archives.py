"""Archives that hold a repository or several files: what a conversion gives to download, and what
people upload in place of a folder."""

from __future__ import annotations

import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path, PurePosixPath

from ...errors import ConversionError, printable

_MEMBERS = 10_000
_DAMAGED = (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, zlib.error)


def opened(source: str) -> str:
    """A source as it is; of an archive what it holds, unpacked: its one folder or file, or a folder
    of them all. What is no whole archive is left to the readers, which say so.

    Raises:
        ConversionError: the archive names places outside it, or holds too much.
    """
    path = Path(source)
    if path.suffix.lower() != ".zip" or not path.is_file():
        return source
    unpacked = _unpacked(path)
    return source if unpacked is None else str(unpacked)


def all_opened(sources: Sequence[str]) -> list[str]:
    """The same of several."""
    return [opened(source) for source in sources]


@cache
def _unpacked(path: Path) -> Path | None:
    folder = Path(tempfile.mkdtemp(prefix="unpacked-"))
    try:
        with zipfile.ZipFile(path) as archive:
            members = [one for one in archive.infolist() if not one.is_dir()]
            _check(path, members)
            for member in members:
                place = folder / member.filename
                place.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(member) as packed, place.open("wb") as plain:
                    shutil.copyfileobj(packed, plain, 1 << 20)
    except _DAMAGED:
        return None
    top = sorted(folder.iterdir())
    if not top:
        return None
    return top[0] if len(top) == 1 else folder


def _check(path: Path, members: Sequence[zipfile.ZipInfo]) -> None:
    """Refuse what no archive of ours holds, before anything is unpacked."""
    if len(members) > _MEMBERS:
        raise ConversionError(f"{path}: holds more than {_MEMBERS} files")
    for member in members:
        name = PurePosixPath(member.filename)
        if name.is_absolute() or ".." in name.parts or not member.filename.isprintable():
            raise ConversionError(f"{path}: names a file outside it: {printable(member.filename)}")
    size = sum(member.file_size for member in members)
    if size > 2 * path.stat().st_size + (1 << 20):  # weights hardly become smaller
        raise ConversionError(f"{path}: holds {size} bytes, too many for its own size")
