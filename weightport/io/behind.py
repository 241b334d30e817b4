"""Large files pass through the page cache and leave it: what is written when it is on the disk,
what is read when everybody has read it.

Their pages are used again for what comes next. A new page is dear where a hypervisor has to give it
first, and what others keep in the cache stays there. A file that was in the cache before stays in
it, too. See posix_fadvise(2), mincore(2).
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from mmap import MAP_PRIVATE, PAGESIZE, mmap

_SENT = 8 << 20  # bytes that begin their way to the disk at once
_ON_THE_WAY = 64 << 20  # bytes that have not reached it yet, as a rule
_GRACE = 0.5  # seconds that sending may take whoever does not wait for the disk,
_FAST = 4 << 30  # and one more for so many bytes
_PIECE = 2 << 20  # bytes that leave at once when they are read: as much as one page may have
_APART = 32 << 20  # bytes that one reader may be ahead of the other
_PATIENCE = 5.0  # seconds without a move of the other


class WriteBehind:
    """Follows whoever writes a file from its beginning to its end.

    Args:
        waits: whether the writer will wait for the disk; if not, one that cannot keep up is left
            to the system.
    """

    def __init__(self, descriptor: int, waits: bool = True) -> None:
        self._descriptor = descriptor
        self._waits = waits
        self._sent = 0
        self._took = 0.0

    def follow(self, end: int) -> None:
        """Send what was written up to `end`; what was sent a while ago leaves the cache."""
        while self._sent + _SENT <= end and self._keeps_up:
            began = time.perf_counter()
            _send_or_leave(self._descriptor, self._sent, _SENT)
            if self._sent >= _ON_THE_WAY:
                _send_or_leave(self._descriptor, self._sent - _ON_THE_WAY, _SENT)
            self._took += time.perf_counter() - began
            self._sent += _SENT

    @property
    def _keeps_up(self) -> bool:
        """Whether the disk takes what is sent without making the writer wait, if that matters."""
        return self._waits or self._took <= _GRACE + self._sent / _FAST

    def finish(self) -> None:
        """Return when everything is on the disk.

        Raises:
            OSError: the disk failed; a later sync through another descriptor might not say so.
        """
        os.fdatasync(self._descriptor)
        _send_or_leave(self._descriptor, 0, 0)


class ReadBehind:
    """Follows those who read a file, each of them all of it, in an order of its own.

    Safe to share between threads.
    """

    def __init__(self, descriptor: int, size: int, readers: int) -> None:
        self._descriptor = descriptor
        self._little = size // 16
        self._lock = threading.Lock()
        # Where a piece begins -> bytes that are still to be read of it, by all together.
        self._left = {
            start: readers * min(_PIECE, size - start)
            for start in _not_cached(descriptor, size, _PIECE)
        }

    @property
    def expects(self) -> bool:
        """Whether much of it has to come from the disk: more than a few pieces that the system
        took from a file that is in memory as a whole, as it does now and then."""
        return len(self._left) * _PIECE > self._little

    def passed(self, offset: int, nbytes: int) -> None:
        """One has read a range, and will not read it again."""
        end = offset + nbytes
        with self._lock:
            for start in range(offset - offset % _PIECE, end, _PIECE):
                if start in self._left:
                    self._left[start] -= min(end, start + _PIECE) - max(offset, start)
                    if self._left[start] <= 0:
                        del self._left[start]
                        _send_or_leave(self._descriptor, start, _PIECE)


class Together:
    """Two who read the same files, each in an order of its own, and wait for each other, so that
    what one has brought from the disk is still in the cache for the other."""

    def __init__(self) -> None:
        self._moved = threading.Condition()
        self._read = [0, 0]  # bytes, by each
        self._parted = False

    def advance(self, who: int, nbytes: int) -> None:
        """Reader 0 or 1 has read so much more; returns when the other is near, or reads no more."""
        with self._moved:
            self._read[who] += nbytes
            self._moved.notify_all()
            while not self._parted and self._read[who] > self._read[1 - who] + _APART:
                if not self._moved.wait(_PATIENCE):
                    self._parted = True

    def part(self) -> None:
        """From now on nobody waits."""
        with self._moved:
            self._parted = True
            self._moved.notify_all()


def _send_or_leave(descriptor: int, offset: int, nbytes: int) -> None:
    """Begin to write a range to the disk; what of it is there already leaves the page cache."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, offset, nbytes, os.POSIX_FADV_DONTNEED)


def _not_cached(descriptor: int, size: int, piece: int) -> list[int]:
    """Where those pieces of a file begin that are not in memory; none if nobody tells.

    The page in the middle of a piece speaks for it: there are a million in 4 GB.
    """
    mincore = getattr(ctypes.CDLL(None), "mincore", None)
    if mincore is None or size == 0:
        return []
    starts = range(0, size, piece)
    state = ctypes.c_ubyte()
    missing = []
    try:
        with mmap(descriptor, size, flags=MAP_PRIVATE) as mapped:
            first = ctypes.c_char.from_buffer(mapped)
            address = ctypes.addressof(first)
            del first
            for start in starts:
                middle = (start + min(piece, size - start) // 2) // PAGESIZE * PAGESIZE
                place = ctypes.c_void_p(address + middle)
                if mincore(place, ctypes.c_size_t(1), ctypes.byref(state)):
                    return []
                if not state.value & 1:
                    missing.append(start)
    except OSError:
        return []
    return missing
