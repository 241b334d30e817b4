"""PNG pictures, as far as they hold data: text chunks, and the pixels of plain RGB.

Format: https://www.w3.org/TR/png-3/
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...errors import ConversionError
from ...io.arrays import Array
from ...io.regular import read_regular
from .signatures import PNG

_MAX_BYTES = 64 << 20  # of a file
_MAX_TEXT = 32 << 20  # of a text, unpacked
_MAX_PIXELS = 2_000_000  # whose filters are undone one by one
_CHANNELS = {2: 3, 6: 4}  # type of colours -> bytes of a pixel


@dataclass(frozen=True)
class Png:
    """A picture.

    Attributes:
        texts: keyword -> text.
        width: in pixels.
        height: likewise.
        colours: 2 is RGB, 6 has alpha beside.
    """

    path: Path
    texts: dict[str, bytes]
    width: int
    height: int
    depth: int
    colours: int
    interlaced: bool
    data: bytes

    def pixels(self) -> Array | None:
        """The pixels (height, width, 3); None where they are not 8 bits of RGB, or are too many.

        Raises:
            ConversionError: they are damaged.
        """
        channels = _CHANNELS.get(self.colours)
        if channels is None or self.depth != 8 or self.interlaced:
            return None
        if not 0 < self.width * self.height <= _MAX_PIXELS:
            return None
        stride = self.width * channels
        rows = _inflated(self.data, (stride + 1) * self.height, self.path)
        if len(rows) != (stride + 1) * self.height:
            raise ConversionError(f"{self.path}: its pixels end too early; is it truncated?")
        result = np.zeros((self.height, stride), np.uint8)
        above = np.zeros(stride, np.uint8)
        lines = np.frombuffer(rows, np.uint8).reshape(self.height, stride + 1)
        for row, line in zip(result, lines, strict=True):
            _unfilter(int(line[0]), line[1:], above, channels, row, self.path)
            above = row
        return result.reshape(self.height, self.width, channels)[:, :, :3]


def read_png(path: Path) -> Png:
    """Read a picture.

    Raises:
        ConversionError: it is none, is damaged, or is larger than a picture with data in it.
    """
    content = read_regular(path, _MAX_BYTES)
    if not content.startswith(PNG):
        raise ConversionError(f"{path}: not a PNG")
    texts: dict[str, bytes] = {}
    head = None
    data = []
    for kind, body in _chunks(content, path):
        if kind == b"IHDR" and len(body) == 13:
            head = struct.unpack(">IIBBBBB", body)
        elif kind == b"IDAT":
            data.append(body)
        elif kind in (b"tEXt", b"zTXt", b"iTXt"):
            keyword, text = _text(kind, body, path)
            texts.setdefault(keyword, text)
    if head is None:
        raise ConversionError(f"{path}: a PNG without a header; is it damaged?")
    width, height, depth, colours, _, _, interlaced = head
    return Png(path, texts, width, height, depth, colours, bool(interlaced), b"".join(data))


def _chunks(content: bytes, path: Path) -> Iterator[tuple[bytes, bytes]]:
    """Kind and body of each chunk up to the last."""
    at = len(PNG)
    while at + 12 <= len(content):
        (size,) = struct.unpack_from(">I", content, at)
        kind = content[at + 4 : at + 8]
        body = content[at + 8 : at + 8 + size]
        if at + 12 + size > len(content):
            break
        yield kind, body
        if kind == b"IEND":
            return
        at += 12 + size
    raise ConversionError(f"{path}: a PNG that ends too early; is it truncated?")


def _text(kind: bytes, body: bytes, path: Path) -> tuple[str, bytes]:
    """Keyword and text of a chunk."""
    keyword, _, rest = body.partition(b"\0")
    if kind == b"zTXt":
        rest = _inflated(rest[1:], _MAX_TEXT, path)
    elif kind == b"iTXt":
        is_packed = rest[:1] == b"\1"
        rest = rest[2:].split(b"\0", 2)[-1]
        rest = _inflated(rest, _MAX_TEXT, path) if is_packed else rest
    return keyword.decode("latin-1"), rest


def _inflated(data: bytes, limit: int, path: Path) -> bytes:
    """What was packed, at most `limit` bytes."""
    try:
        return zlib.decompressobj().decompress(data, limit)
    except zlib.error:
        raise ConversionError(f"{path}: what is packed in the PNG is damaged") from None


def _unfilter(kind: int, line: Array, above: Array, step: int, row: Array, path: Path) -> None:
    """Undo the filter of a row: section 9.2 of the specification."""
    if kind == 0:
        row[:] = line
    elif kind == 1:
        row[:] = np.cumsum(line.reshape(-1, step), 0, np.uint8).reshape(-1)
    elif kind == 2:
        row[:] = line + above
    elif kind in (3, 4):
        row[:] = np.frombuffer(_by_neighbours(kind, line, above, step), np.uint8)
    else:
        raise ConversionError(f"{path}: a row of its pixels has an unknown filter")


def _by_neighbours(kind: int, line: Array, above: Array, step: int) -> bytearray:
    """A row of which each byte depends on the one before."""
    upper = above.tolist()
    row = bytearray(len(upper))
    for i, value in enumerate(line.tolist()):
        left = row[i - step] if i >= step else 0
        up = upper[i]
        if kind == 3:
            guess = (left + up) >> 1
        else:
            corner = upper[i - step] if i >= step else 0
            guess = _paeth(left, up, corner)
        row[i] = (value + guess) & 0xFF
    return row


def _paeth(a: int, b: int, c: int) -> int:
    """Paeth's predictor."""
    pa = abs(b - c)
    pb = abs(a - c)
    pc = abs(a + b - 2 * c)
    if pa <= pb and pa <= pc:
        return a
    return b if pb <= pc else c
