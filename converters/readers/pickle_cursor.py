"""Reads the operands of pickle instructions from a file, in order, and never more than is there."""

from __future__ import annotations

from ..checkpoint import SourceFile
from .pickle_globals import PickleError

_MAX_BYTES = 64 << 20  # of one pickle; that of a full Stable Diffusion training run has 2 MB
_AHEAD = 1 << 16  # bytes read at once, and the longest line
_FIXED = 16  # bytes; no operand of a fixed size has more


class Cursor:
    """Reads on through a range of a file. Every length is checked before anything is allocated.

    Attributes:
        data: what was read ahead. Where the range ends, zeros follow, which are no instruction.
        next: where in it the next byte is.
        last: up to where in it an instruction and an operand of a fixed size are there as a whole;
            the machine reads ahead before it goes on from there.
    """

    def __init__(self, file: SourceFile, start: int, end: int) -> None:
        self._file = file
        self._end = end
        self._readable = min(end, start + _MAX_BYTES)
        self._data_at = start
        self.data = b""
        self.next = 0
        self.last = -1

    @property
    def at(self) -> int:
        """Where in the file the next byte is."""
        return self._data_at + self.next

    @property
    def left(self) -> int:
        """How many bytes there are still."""
        return self._end - self.at

    def read_ahead(self, nbytes: int = _FIXED) -> None:
        """Have so many of the next bytes in `data`, or all that there are."""
        at = self.at
        wanted = max(nbytes, _AHEAD)
        there = max(0, min(wanted, self._readable - at))
        self.data = self._file.read(at, there) + bytes(_FIXED if there < wanted else 0)
        self._data_at = at
        self.next = 0
        self.last = len(self.data) - _FIXED

    def take(self, nbytes: int) -> bytes:
        """The next bytes."""
        if self.at + nbytes > self._readable:
            raise self.ended(nbytes)
        if self.next + nbytes > len(self.data):
            self.read_ahead(nbytes)
        begin = self.next
        self.next = begin + nbytes
        return self.data[begin : self.next]

    def ended(self, nbytes: int) -> PickleError:
        """What is wrong where so many bytes are needed and are not there."""
        if nbytes > self.left:
            return PickleError("the pickle in it ends too early; is the file truncated?")
        return PickleError(
            f"the pickle in it has more than {_MAX_BYTES >> 20} MiB; no checkpoint needs that"
        )

    def fixed(self, nbytes: int) -> bytes:
        """The first operand of an instruction, of a fixed size."""
        begin = self.next
        self.next = begin + nbytes
        return self.data[begin : self.next]

    def uint(self, nbytes: int) -> int:
        """The same, a little-endian number."""
        return int.from_bytes(self.fixed(nbytes), "little")

    def counted(self, width: int) -> bytes:
        """Bytes that follow their count."""
        return self.take(self.uint(width))

    def text(self, width: int) -> str:
        """UTF-8 text that follows its length; lone surrogates pass, as in Python."""
        return self.counted(width).decode("utf-8", "surrogatepass")

    def line(self) -> str:
        """The text up to the end of the line."""
        end = self.data.find(b"\n", self.next)
        if end < 0:
            self.read_ahead()
            end = self.data.find(b"\n")
        if end < 0:
            raise PickleError("the pickle in it is damaged: a line does not end")
        return self.take(end + 1 - self.next)[:-1].decode("latin-1")
