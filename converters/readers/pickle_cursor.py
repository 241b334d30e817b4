"""Reads the operands of pickle instructions from a file, in order, and never more than is there."""

from __future__ import annotations

from ..checkpoint import SourceFile
from .pickle_globals import PickleError

_MAX_BYTES = 64 << 20  # of one pickle; that of a full Stable Diffusion training run has 2 MB
_AHEAD = 1 << 16  # bytes read at once, and the longest line


class Cursor:
    """Reads on through a range of a file. Every length is checked before anything is allocated."""

    def __init__(self, file: SourceFile, start: int, end: int) -> None:
        self._file = file
        self._limit = start + _MAX_BYTES
        self._end = end
        self._ahead = b""
        self._ahead_at = start
        self._next = 0  # in what was read ahead

    @property
    def at(self) -> int:
        """Where in the file the next byte is."""
        return self._ahead_at + self._next

    @property
    def left(self) -> int:
        """How many bytes there are still."""
        return self._end - self.at

    def take(self, nbytes: int) -> bytes:
        """The next bytes."""
        begin = self._next
        if begin + nbytes > len(self._ahead):
            self._fill(nbytes)
            begin = 0
        self._next = begin + nbytes
        return self._ahead[begin : begin + nbytes]

    def _fill(self, nbytes: int) -> None:
        """Read ahead, so many bytes at least."""
        at = self.at
        last = min(self._end, self._limit)
        if at + nbytes > self._end:
            raise PickleError("the pickle in it ends too early; is the file truncated?")
        if at + nbytes > last:
            raise PickleError(
                f"the pickle in it has more than {_MAX_BYTES >> 20} MiB; no checkpoint needs that"
            )
        self._ahead = self._file.read(at, min(max(nbytes, _AHEAD), last - at))
        self._ahead_at = at
        self._next = 0

    def uint(self, nbytes: int) -> int:
        """A little-endian number."""
        return int.from_bytes(self.take(nbytes), "little")

    def counted(self, width: int) -> bytes:
        """Bytes that follow their count."""
        return self.take(self.uint(width))

    def text(self, width: int) -> str:
        """UTF-8 text that follows its length; lone surrogates pass, as in Python."""
        return self.counted(width).decode("utf-8", "surrogatepass")

    def line(self) -> str:
        """The text up to the end of the line."""
        end = self._ahead.find(b"\n", self._next)
        if end < 0:
            self._fill(0)
            end = self._ahead.find(b"\n")
        if end < 0:
            raise PickleError("the pickle in it is damaged: a line does not end")
        return self.take(end + 1 - self._next)[:-1].decode("latin-1")
