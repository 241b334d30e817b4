"""Opens what is a file and nothing else: a pipe would wait for ever, a device has no end."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from ..errors import ConversionError


def open_regular(path: Path) -> int:
    """A descriptor of a regular file, to read from.

    Raises:
        ConversionError: it cannot be opened, or is no regular file.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise ConversionError(f"{path}: cannot be opened ({error.strerror})") from None
    except ValueError:  # a NUL in the name
        raise ConversionError(f"{path}: cannot be the name of a file") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ConversionError(f"{path}: not a regular file")
    return descriptor


def read_regular(path: Path, limit: int) -> bytes:
    """The content of a regular file of at most `limit` bytes.

    Raises:
        ConversionError: it cannot be read, is no regular file, or is larger.
    """
    with os.fdopen(open_regular(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise ConversionError(
                f"{path}: has {size} bytes; at most {limit} are read of a file of this kind"
            )
        try:
            return file.read(limit + 1)[:limit]
        except OSError as error:
            raise ConversionError(f"{path}: cannot be read ({error.strerror})") from None


def fetch(descriptor: int, offset: int, nbytes: int) -> None:
    """Ask the system for a range of a file that will be read soon, and go on."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, offset, nbytes, os.POSIX_FADV_WILLNEED)


def read_far_ahead(descriptor: int) -> None:
    """Tell the system that a file is read mostly in order, so that it reads more at once."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
