"""All-or-nothing outputs: written beside the target, synced to disk, then renamed into place in one
step.

A run works in `.<name>.<pid>.partial/` next to its target and holds a lock on a file in it. The
operating system drops that lock when the process ends, however it ends, so the next run for the
same target knows which remains to remove. Rename flags: renameat2(2).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from ..errors import ConversionError

_AT_FDCWD, _NOREPLACE, _EXCHANGE = -100, 1, 2
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
def staged(target: Path, overwrite: bool = False, sync: bool = True) -> Iterator[Path]:
    """An empty folder to write into; becomes `target` when the block ends, and disappears when it
    raises.

    With `overwrite`, an earlier output folder (it holds `model_index.json` or `conversion.json`, or
    nothing) is swapped out at the end; until then it stays as it is. Without `sync` the system
    decides when it is on the disk.

    Raises:
        ConversionError: the target exists or cannot be replaced, its parent is missing or not
            writable, or the disk is full or fails while the block writes.
    """
    with _staged(target, overwrite, sync, folder=True) as path:
        path.mkdir()
        yield path


@contextlib.contextmanager
def staged_file(target: Path, overwrite: bool = False, sync: bool = True) -> Iterator[Path]:
    """Like `staged`, for one file: yields the path to create it at. `overwrite` replaces a regular
    file."""
    with _staged(target, overwrite, sync, folder=False) as path:
        yield path


def check_space(folder: Path, nbytes: int) -> None:
    """Raise ConversionError unless the file system of an existing folder has `nbytes` free."""
    status = os.statvfs(folder)
    free = status.f_bavail * status.f_frsize
    if free < nbytes:
        raise ConversionError(
            f"{folder}: needs {nbytes / 1e9:.2f} GB of disk space, but only {free / 1e9:.2f} GB are"
            " free"
        )


def check_apart(target: Path, inputs: Iterable[Path]) -> None:
    """Raise ConversionError if the output is, contains, or lies inside one of the inputs; links are
    followed."""
    output = Path(os.path.realpath(target))  # unlike `resolve`, no error for a loop of links
    for path in inputs:
        source = Path(os.path.realpath(path))
        same = output == source or (output.exists() and source.exists() and output.samefile(source))
        if same or output in source.parents or source in output.parents:
            relation = "is" if same else "contains" if output in source.parents else "lies inside"
            raise ConversionError(
                f"{target}: the output {relation} the input {path}; choose another place"
            )


@contextlib.contextmanager
def _staged(target: Path, overwrite: bool, sync: bool, folder: bool) -> Iterator[Path]:
    place = target.resolve() if target.name in ("", "..") else target.parent.resolve() / target.name
    with _explained(target, _PLACING):
        _check_replaceable(place, target, overwrite, folder)
        _sweep(place, target)
        partial, lock = _create(place, target)
    try:
        with _explained(target, _WRITING):
            yield partial / place.name
            if sync:
                _sync(partial / place.name)
        with _explained(target, _PLACING):
            if _check_replaceable(place, target, overwrite, folder):
                _exchange(partial / place.name, place)
            else:
                _rename(partial / place.name, place)
            if sync:
                with contextlib.suppress(
                    OSError
                ):  # it is in place, and some file systems cannot sync a folder
                    _sync_one(place.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        os.close(lock)


@contextlib.contextmanager
def _explained(target: Path, reasons: dict[int, str]) -> Iterator[None]:
    """Turn the operating system errors that a user can do something about into one line."""
    try:
        yield
    except OSError as error:
        if error.errno not in reasons:
            raise
        raise ConversionError(f"{target}: cannot be written, {reasons[error.errno]}") from None


def _check_replaceable(place: Path, target: Path, overwrite: bool, folder: bool) -> bool:
    """Whether something is there that may be replaced; raises if something is there that may
    not."""
    try:
        mode = place.lstat().st_mode
    except FileNotFoundError:
        return False
    if not overwrite:
        raise ConversionError(f"{target}: already exists; choose another name or use --overwrite")
    if folder and stat.S_ISDIR(mode):
        ours = {"model_index.json", "conversion.json"}
        names = {path.name for path in place.iterdir()}
        if names and not names & ours:
            raise ConversionError(
                f"{target}: not an earlier output (no model_index.json), so it is not overwritten"
            )
    elif folder or not stat.S_ISREG(mode):
        wanted = "not a folder" if folder else "not a regular file"
        kind = "a link" if stat.S_ISLNK(mode) else "a folder" if stat.S_ISDIR(mode) else wanted
        raise ConversionError(
            f"{target}: exists and is {kind}, so it is not overwritten; remove it first"
        )
    return True


# --- the temp folder and its lock -----------------------------------------------------------------


def _create(place: Path, target: Path) -> tuple[Path, int]:
    """A new temp folder for this run, and the descriptor that keeps it locked."""
    partial = place.parent / f".{place.name}.{os.getpid()}.partial"
    lock = None
    with contextlib.suppress(FileExistsError):
        partial.mkdir(mode=0o700)
        try:
            lock = _lock(partial)
        except OSError:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    if lock is None:
        raise ConversionError(f"{target}: another run is writing it")
    return partial, lock


def _lock(partial: Path) -> int | None:
    """Lock a temp folder; None if another process holds it or is removing it."""
    path = partial / partial.name  # too long to be the output, which lies beside it
    lock = None
    with contextlib.suppress(BlockingIOError, FileNotFoundError):
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(lock), path.stat()):
            return lock
    if lock is not None:
        os.close(lock)
    return None


def _sweep(place: Path, target: Path) -> None:
    """Remove what killed runs for the same target left; raise if a run for it is alive."""
    pattern = re.compile(re.escape(f".{place.name}.") + r"(\d+)\.partial")
    for path in place.parent.iterdir():
        match = pattern.fullmatch(path.name)
        if match is None or path.is_symlink() or not path.is_dir():
            continue
        lock = _lock(path)
        if lock is None:
            raise ConversionError(f"{target}: another run (process {match[1]}) is writing it")
        shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


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
    """Linux's rename with flags; False where the C library, the kernel or the file system has
    none."""
    function: Callable[..., int] | None = getattr(
        ctypes.CDLL(None, use_errno=True), "renameat2", None
    )
    if function is None:
        return False
    if function(_AT_FDCWD, os.fsencode(old), _AT_FDCWD, os.fsencode(new), ctypes.c_uint(flag)) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(new))
