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
        self.at = start

    @property
    def left(self) -> int:
        """How many bytes there are still."""
        return self._end - self.at

    def take(self, nbytes: int) -> bytes:
        """The next bytes."""
        if nbytes > self.left:
            raise PickleError("the pickle in it ends too early; is the file truncated?")
        if self.at + nbytes > self._limit:
            raise PickleError(
                f"the pickle in it has more than {_MAX_BYTES >> 20} MiB; no checkpoint needs that"
            )
        begin = self.at - self._ahead_at
        if begin + nbytes > len(self._ahead):
            begin = self._fill(nbytes)
        self.at += nbytes
        return self._ahead[begin : begin + nbytes]

    def _fill(self, nbytes: int) -> int:
        """Read ahead; returns where in the buffer the next byte is."""
        self._ahead = self._file.read(self.at, min(max(nbytes, _AHEAD), self.left))
        self._ahead_at = self.at
        return 0

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
        begin = self.at - self._ahead_at
        end = self._ahead.find(b"\n", begin)
        if end < 0:
            begin = self._fill(_AHEAD)
            end = self._ahead.find(b"\n")
        if end < 0:
            raise PickleError("the pickle in it is damaged: a line does not end")
        return self.take(end + 1 - begin)[:-1].decode("latin-1")
