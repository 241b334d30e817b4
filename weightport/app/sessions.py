"""What each visitor brought and made, in a folder of its own that goes with the visit."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from ..errors import ConversionError, printable
from .limits import Limits

SESSIONS = "sessions"
RESULTS = "results"


class Running(Protocol):
    """What runs or waits for a session."""

    def cancel(self) -> None:
        """Have it end as soon as it can."""


class Session:
    """The visit of one page.

    Attributes:
        folder: all that it keeps; nobody else's files lie below it.
        files: name -> what was uploaded under it.
        job: what runs or waits for it.
        seen: when it last asked for something, by the monotonic clock.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, Path] = {}
        self.job: Running | None = None
        self.seen = time.monotonic()
        self.uploads.mkdir(parents=True)

    @property
    def uploads(self) -> Path:
        """Where its uploads lie, side by side, so that files that name each other find them."""
        return self.folder / "uploads"

    def take(self, upload: Path) -> None:
        """Move a file here; a second one of its name replaces the first."""
        name = upload.name.replace(":", "_")  # that it refers to the Hub, no name can say
        self.files[name] = upload.replace(self.uploads / name)

    def keep(self, result: Path) -> None:
        """List a result among the uploads, so that other tabs can use it; it is there once."""
        place = self.uploads / result.name
        place.unlink(missing_ok=True)
        place.hardlink_to(result)
        self.files[result.name] = place

    def clear(self) -> None:
        """Delete all that it keeps.

        Raises:
            ConversionError: something uses it.
        """
        if self.job is not None:
            raise ConversionError("your page is busy with a job; cancel that first")
        self.files.clear()
        shutil.rmtree(self.folder, ignore_errors=True)
        self.uploads.mkdir(parents=True)

    def file(self, name: str) -> Path:
        """The upload of a name.

        Raises:
            ConversionError: this session has none.
        """
        if name not in self.files:
            raise ConversionError(f"{printable(name)}: you uploaded no such file")
        return self.files[name]

    def fresh(self, kind: str) -> Path:
        """A new empty folder, by a name that nobody can guess."""
        folder = self.folder / kind / secrets.token_urlsafe(24)
        folder.mkdir(parents=True)
        return folder

    def forget(self, kind: str) -> None:
        """Delete all folders of a kind."""
        shutil.rmtree(self.folder / kind, ignore_errors=True)

    def nbytes(self) -> int:
        """The bytes of all that it keeps."""
        return sum(_sizes(self.folder).values())

    def close(self) -> None:
        """Stop its job and delete all that it keeps."""
        if self.job is not None:
            self.job.cancel()
        shutil.rmtree(self.folder, ignore_errors=True)


class Sessions:
    """All visits of one server, below one folder that goes with it."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        _sweep(Path(tempfile.gettempdir()))
        self.root = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-"))
        self.arrivals = self.root / "arrivals"
        self.arrivals.mkdir()
        self._open: dict[str, Session] = {}
        self._arrived: dict[Path, float] = {}

    def arrived(self, upload: Path) -> Path:
        """Move what was just uploaded to a place that only who uploaded it is told."""
        folder = self.arrivals / secrets.token_urlsafe(24)
        folder.mkdir()
        place = upload.replace(folder / upload.name)
        with contextlib.suppress(OSError):
            upload.parent.rmdir()
        self._arrived[place] = time.monotonic()
        return place

    def take(self, session: Session, upload: str) -> None:
        """Give a session what it was told of.

        Raises:
            ConversionError: it is not an upload, or gone.
        """
        path = Path(upload)
        if self._arrived.pop(path, None) is None or not path.is_file():
            raise ConversionError(f"{printable(path.name)}: did not arrive; upload it again")
        session.take(path)
        path.parent.rmdir()

    def result(self, parts: Sequence[str]) -> Path | None:
        """The result that an address means: session, secret and name; None if there is none."""
        if len(parts) != 3 or any(part in ("", ".", "..") or "\0" in part for part in parts):
            return None
        session, secret, name = parts
        path = self.root / SESSIONS / session / RESULTS / secret / name
        return path if path.is_file() and not path.is_symlink() else None

    def of(self, key: str | None) -> Session:
        """The session of a page, a new one when it asks for the first time.

        Raises:
            ConversionError: it has no key.
        """
        if not key:
            raise ConversionError("this page is used in a browser")
        self.expire()
        session = self._open.get(key)
        if session is None:
            session = Session(self.root / SESSIONS / secrets.token_urlsafe(24))
            self._open[key] = session
        session.seen = time.monotonic()
        return session

    def close(self, key: str | None) -> None:
        """End the visit of a page; nothing of it stays."""
        session = self._open.pop(key or "", None)
        if session is not None:
            session.close()

    def expire(self) -> None:
        """End the visits that said nothing for long and run nothing."""
        oldest = time.monotonic() - self.limits.idle_seconds
        for key, session in list(self._open.items()):
            if session.seen < oldest and session.job is None:
                self.close(key)
        for path, since in list(self._arrived.items()):
            if since < oldest:
                del self._arrived[path]
        for left in self.arrivals.iterdir():  # of uploads that were broken off, too
            if time.time() - left.stat().st_mtime > self.limits.idle_seconds:
                shutil.rmtree(left) if left.is_dir() else left.unlink()

    def close_all(self) -> None:
        """End all visits, and delete the folder of them all."""
        for key in list(self._open):
            self.close(key)
        shutil.rmtree(self.root, ignore_errors=True)


_PREFIX = "weightport-app-"


def _sweep(place: Path) -> None:
    """Delete what a server left behind that was killed."""
    for folder in place.glob(f"{_PREFIX}*-*"):
        process = folder.name.removeprefix(_PREFIX).partition("-")[0]
        if process.isdecimal() and not Path("/proc", process).exists():
            shutil.rmtree(folder, ignore_errors=True)


def _sizes(folder: Path) -> dict[int, int]:
    """The sizes of the files below a folder, each once under however many names; some may go
    meanwhile."""
    found = {}
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            about = path.lstat()
            if stat.S_ISREG(about.st_mode):
                found[about.st_ino] = about.st_size
    return found
