"""Files appear whole or not at all: written beside their place, synced to the disk, then renamed.

`folder` and `file` are for a new output, `merged` for files that join a folder, `text` for a small
file that is replaced. A run of the first two works in `.<name>.<pid>.partial/` next to its
target and holds a lock on a file in it. The operating system drops that lock when the process ends,
however it ends, so the next run for the same target knows which remains to remove. Rename flags:
renameat2(2).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from ..errors import ConversionError
from .locks import lock

_AT_FDCWD = -100
_NOREPLACE = 1
_EXCHANGE = 2
_WRITING = {
    errno.ENOSPC: "the disk is full; nothing was left behind",
    errno.EDQUOT: "the disk quota is used up; nothing was left behind",
    errno.EFBIG: "files this large are not allowed here; nothing was left behind",
    errno.EIO: "input/output error; nothing was left behind",
    errno.EROFS: "the file system is read-only",
}
_PLACING = _WRITING | {
    errno.EEXIST: "something else appeared there meanwhile",
    errno.ENOTEMPTY: "something else appeared there meanwhile",
    errno.ENAMETOOLONG: "the name is too long",
    errno.ENOENT: "the folder it should go into does not exist",
    errno.ENOTDIR: "the place it should go into is not a folder",
    errno.EACCES: "no permission to write in its folder",
    errno.EPERM: "no permission to write in its folder",
}


@contextlib.contextmanager
def folder(target: Path, overwrite: bool = False, sync: bool = True) -> Iterator[Path]:
    """An empty folder to write into, which becomes `target` when the block ends.

    If the block raises, it disappears.

    With `overwrite`, an earlier output folder (it holds `model_index.json` or `conversion.json`, or
    nothing) is swapped out at the end; until then it stays as it is. Without `sync` the system
    decides when it is on the disk.

    Raises:
        ConversionError: the target exists or cannot be replaced, its parent is missing or not
            writable, or the disk is full or fails while the block writes.
    """
    with _staged(target, overwrite, sync, as_folder=True) as path:
        path.mkdir()
        yield path


@contextlib.contextmanager
def file(target: Path, overwrite: bool = False, sync: bool = True) -> Iterator[Path]:
    """Like `folder`, for one file: yields the path to create it at.

    `overwrite` replaces a regular file.
    """
    with _staged(target, overwrite, sync, as_folder=False) as path:
        yield path


@contextlib.contextmanager
def merged(
    folder: str | os.PathLike[str], stale: Iterable[str] = (), last: str = "model_index.json"
) -> Iterator[Path]:
    """An empty folder to write into; when the block ends its files move to `folder`.

    They replace those of their names. If the block raises, `folder` stays as it was. The file that
    says that the others are there moves last. Files of `folder` named in `stale`, by paths in it,
    are removed in the end unless they were written anew.

    Raises:
        OSError: `folder` is a file, or cannot be written.
    """
    place = Path(folder).expanduser().absolute()
    if place.exists() and not place.is_dir():
        raise OSError(f"{place}: not a folder")
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        prefix=f".{place.name}.", suffix=".partial", dir=place.parent
    ) as name:
        staging = Path(name) / place.name
        staging.mkdir()
        yield staging
        paths = [path for path in staging.rglob("*") if path.is_file()]
        for path in paths:
            _sync_one(path)
        if not place.exists():
            staging.rename(place)
            return
        written = {path.relative_to(staging).as_posix() for path in paths}
        for name in sorted(written, key=lambda name: name == last):
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (staging / name).replace(place / name)
        for name in set(stale) - written:
            (place / name).unlink()


def text(path: Path, content: str) -> None:
    """Write a small text file, in place of an earlier one.

    Raises:
        OSError: it cannot be written; an earlier one is as it was.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        beside.write_text(content, encoding="utf-8")
        _sync_one(beside)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def check_space(place: Path, nbytes: int) -> None:
    """Raise ConversionError unless the file system of an existing folder has `nbytes` free."""
    status = os.statvfs(place)
    free = status.f_bavail * status.f_frsize
    if free < nbytes:
        raise ConversionError(
            f"{place}: needs {nbytes / 1e9:.2f} GB of disk space, but only {free / 1e9:.2f} GB are"
            " free"
        )


def check_apart(target: Path, inputs: Iterable[Path]) -> None:
    """Raise ConversionError if the output is, contains, or lies inside one of the inputs.

    Links are followed.
    """
    output = Path(os.path.realpath(target))  # unlike `resolve`, no error for a loop of links
    for path in inputs:
        source = Path(os.path.realpath(path))
        relation = _relation(output, source)
        if relation:
            raise ConversionError(
                f"{target}: the output {relation} the input {path}; choose another place"
            )


def _relation(output: Path, source: Path) -> str | None:
    if output == source:
        return "is"
    if output.exists() and source.exists() and output.samefile(source):
        return "is"
    if output in source.parents:
        return "contains"
    if source in output.parents:
        return "lies inside"
    return None


@contextlib.contextmanager
def _staged(target: Path, overwrite: bool, sync: bool, as_folder: bool) -> Iterator[Path]:
    place = target.resolve() if target.name in ("", "..") else target.parent.resolve() / target.name
    with _explained(target, _PLACING):
        _check_replaceable(place, target, overwrite, as_folder)
        _sweep(place, target)
        partial, held = _create(place, target)
    try:
        with _explained(target, _WRITING):
            yield partial / place.name
            if sync:
                _sync(partial / place.name)
        with _explained(target, _PLACING):
            if _check_replaceable(place, target, overwrite, as_folder):
                _exchange(partial / place.name, place)
            else:
                _rename(partial / place.name, place)
            if sync:
                # It is in place, and some file systems cannot sync a folder.
                with contextlib.suppress(OSError):
                    _sync_one(place.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        os.close(held)


@contextlib.contextmanager
def _explained(target: Path, reasons: dict[int, str]) -> Iterator[None]:
    """Turn the operating system errors that a user can do something about into one line."""
    try:
        yield
    except OSError as error:
        if error.errno not in reasons:
            raise
        raise ConversionError(f"{target}: cannot be written, {reasons[error.errno]}") from None


def _check_replaceable(place: Path, target: Path, overwrite: bool, as_folder: bool) -> bool:
    """Whether something is there that may be replaced; raises if it may not."""
    try:
        mode = place.lstat().st_mode
    except FileNotFoundError:
        return False
    if not overwrite:
        raise ConversionError(f"{target}: already exists; choose another name or use --overwrite")
    if as_folder and stat.S_ISDIR(mode):
        ours = {"model_index.json", "conversion.json"}
        names = {path.name for path in place.iterdir()}
        if names and not names & ours:
            raise ConversionError(
                f"{target}: not an earlier output (no model_index.json), so it is not overwritten"
            )
    elif as_folder or not stat.S_ISREG(mode):
        raise ConversionError(
            f"{target}: exists and is {_kind(mode, as_folder)}, so it is not overwritten; remove it"
            " first"
        )
    return True


def _kind(mode: int, as_folder: bool) -> str:
    if stat.S_ISLNK(mode):
        return "a link"
    if stat.S_ISDIR(mode):
        return "a folder"
    return "not a folder" if as_folder else "not a regular file"


# --- the temp folder and its lock -----------------------------------------------------------------


def _create(place: Path, target: Path) -> tuple[Path, int]:
    """A new temp folder for this run, and the descriptor that keeps it locked."""
    partial = place.parent / f".{place.name}.{os.getpid()}.partial"
    held = None
    with contextlib.suppress(FileExistsError):
        partial.mkdir(mode=0o700)
        try:
            held = _lock(partial)
        except OSError:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    if held is None:
        raise ConversionError(f"{target}: another run is writing it")
    return partial, held


def _lock(partial: Path) -> int | None:
    """Lock a temp folder; None if another process holds it or is removing it."""
    return lock(partial / partial.name)  # too long to be the output, which lies beside it


def _sweep(place: Path, target: Path) -> None:
    """Remove what killed runs for the same target left; raise if a run for it is alive."""
    pattern = re.compile(re.escape(f".{place.name}.") + r"(\d+)\.partial")
    for path in place.parent.iterdir():
        match = pattern.fullmatch(path.name)
        if match is None or path.is_symlink() or not path.is_dir():
            continue
        held = _lock(path)
        if held is None:
            raise ConversionError(f"{target}: another run (process {match[1]}) is writing it")
        shutil.rmtree(path, ignore_errors=True)
        os.close(held)


def sweep(folder: Path, beginning: str) -> None:
    """Remove what killed runs left in a folder of outputs whose names begin so; what is being
    written stays."""
    pattern = re.compile(rf"\.{re.escape(beginning)}.*\.\d+\.partial", re.DOTALL)
    for path in folder.iterdir() if folder.is_dir() else ():
        if not pattern.fullmatch(path.name) or path.is_symlink() or not path.is_dir():
            continue
        held = _lock(path)
        if held is not None:
            shutil.rmtree(path, ignore_errors=True)
            os.close(held)


# --- moving into place ----------------------------------------------------------------------------


def _sync(path: Path) -> None:
    """Flush a file, or a folder and everything in it, to the disk."""
    if path.is_dir():
        for child in sorted(path.iterdir()):
            _sync(child)
    _sync_one(path)


def _sync_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _rename(new: Path, place: Path) -> None:
    """Rename without replacing anything."""
    if not _renameat2(new, place, _NOREPLACE):
        # Claim the name with something empty, which a plain rename may then replace.
        if new.is_dir():
            place.mkdir()
        else:
            os.close(os.open(place, os.O_CREAT | os.O_EXCL))
        new.rename(place)


def _exchange(new: Path, place: Path) -> None:
    """Put `new` at `place`; what was there ends up in the temp folder, or is gone."""
    if _renameat2(new, place, _EXCHANGE):
        return
    if new.is_file():
        new.replace(place)
        return
    aside = place.parent / f".{place.name}.{os.getpid()}.old"
    place.rename(aside)
    try:
        new.rename(place)
    except OSError:
        aside.rename(place)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _renameat2(old: Path, new: Path, flag: int) -> bool:
    """Linux's rename with flags.

    False where the C library, the kernel or the file system has none.
    """
    library = ctypes.CDLL(None, use_errno=True)
    function: Callable[..., int] | None = getattr(library, "renameat2", None)
    if function is None:
        return False
    from_path = os.fsencode(old)
    to_path = os.fsencode(new)
    if function(_AT_FDCWD, from_path, _AT_FDCWD, to_path, ctypes.c_uint(flag)) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(new))
