"""Hashing of sources while others read them, close to where these are: what one has read from the
disk, the other finds in the page cache, even where that is smaller than a file."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial

from .checkpoint import SourceFile
from .writers.background import Later

_WINDOW = 128 << 20  # bytes that hashing may be ahead
_PATIENCE = 5.0  # seconds without anybody reading


def hash_beside_readers(files: Sequence[SourceFile]) -> None:
    """Begin to hash files, in a thread that waits for whoever reads them."""
    Later(_Beside(files).run)


class _Beside:
    """Hashes files one after another, until it need not wait any more at most `_WINDOW` bytes
    ahead of what was read of all of them."""

    def __init__(self, files: Sequence[SourceFile]) -> None:
        self._files = files
        self._before = 0  # bytes of the files that are hashed
        self._alone = False

    def run(self) -> None:
        for file in self._files:
            file.sha256(partial(self._wait, file))
            self._before += file.size

    def _wait(self, file: SourceFile, offset: int) -> None:
        """Return when readers are near, the digest is wanted, or nobody reads."""
        seen = self._taken()
        since = time.monotonic()
        while not self._alone and self._before + offset > seen + _WINDOW:
            self._alone = file.wanted.wait(0.01)
            taken = self._taken()
            if taken != seen:
                seen = taken
                since = time.monotonic()
            elif time.monotonic() > since + _PATIENCE:
                self._alone = True

    def _taken(self) -> int:
        return sum(file.taken for file in self._files)
