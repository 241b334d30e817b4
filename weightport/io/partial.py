"""Files that lie elsewhere, of which only those bytes come here that are read.

Each is a file of its whole size with holes in it; who reads one asks for the bytes first.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

_BLOCK = 1 << 16
"""Bytes that come at once: the header of a file, or many small pieces of one."""

Fetch = Callable[[int, int], bytes]
"""Gives the bytes from an offset on, so many."""


class PartialFile:
    """A file with holes.

    Attributes:
        size: of the whole.
        sha256: of the whole, as whoever has it says.
    """

    def __init__(self, path: Path, size: int, sha256: str, fetch: Fetch) -> None:
        self.size = size
        self.sha256 = sha256
        self._fetch = fetch
        self._here: set[int] = set()
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        os.truncate(self._descriptor, size)
        self._identity = _identity(self._descriptor)
        _known[self._identity] = self

    def bring(self, offset: int, nbytes: int) -> None:
        """Have bytes here, those around them too.

        Raises:
            OSError: in one line, why they do not come.
        """
        blocks = range(offset // _BLOCK, -(-(offset + nbytes) // _BLOCK))
        missing = [block for block in blocks if block not in self._here]
        for first, last in _runs(missing):
            start = first * _BLOCK
            content = self._fetch(start, min((last + 1) * _BLOCK, self.size) - start)
            os.pwrite(self._descriptor, content, start)
            self._here.update(range(first, last + 1))

    def close(self) -> None:
        """Forget it."""
        _known.pop(self._identity, None)
        os.close(self._descriptor)


_known: dict[tuple[int, int], PartialFile] = {}


def partial(descriptor: int) -> PartialFile | None:
    """The partial file that an open one is, if it is any."""
    return _known.get(_identity(descriptor)) if _known else None


def _identity(descriptor: int) -> tuple[int, int]:
    about = os.fstat(descriptor)
    return about.st_dev, about.st_ino


def _runs(blocks: list[int]) -> list[tuple[int, int]]:
    """Numbers in order as first and last of those that follow each other."""
    found: list[tuple[int, int]] = []
    for block in blocks:
        if found and found[-1][1] == block - 1:
            found[-1] = (found[-1][0], block)
        else:
            found.append((block, block))
    return found
