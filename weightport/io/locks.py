"""Locks that the operating system drops when their process ends, however it ends.

`flock(2)`; on NFS the server keeps it, and drops it when the client is gone.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path


def lock(path: Path, wait: bool = False) -> int | None:
    """The descriptor of a file that no other process has locked; made if it is not there.

    None if another process holds it, or its folder vanished. Closing the descriptor unlocks it.

    Args:
        wait: until another process is done with it.

    Raises:
        OSError: the file cannot be made, or the file system has no locks.
    """
    how = fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB
    while True:
        descriptor = None
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            descriptor = os.open(path, flags, 0o600)
            fcntl.flock(descriptor, how)
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        except (BlockingIOError, FileNotFoundError):
            wait = False
        except BaseException:
            if descriptor is not None:
                os.close(descriptor)
            raise
        if descriptor is not None:
            os.close(descriptor)
        if not wait:
            return None


@contextlib.contextmanager
def locked(path: Path, wait: bool = False) -> Iterator[int | None]:
    """Like `lock`; when the block ends, the file is gone."""
    descriptor = lock(path, wait)
    try:
        yield descriptor
    finally:
        if descriptor is not None:
            path.unlink(missing_ok=True)
            os.close(descriptor)
