"""LevelDB's table format (a sorted string table), in which TensorFlow keeps the index of a
checkpoint.

Format: https://github.com/google/leveldb/blob/main/doc/table_format.md. A table ends in a footer
that points at the index block, whose values point at the data blocks. Every block is followed by
its compression type and its checksum.
"""

from __future__ import annotations

from collections.abc import Iterator

from .protobuf import varint
from .signatures import LEVELDB

FOOTER = 48  # two block handles, padding, magic
TRAILER = 5  # compression type, checksum
RESTART_INTERVAL = (
    16  # a key may repeat parts of the 15 before it: what bounds how far a block expands
)


def _crc_table() -> list[int]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return table


_CRC_LEVELDB = _crc_table()


def crc32c(data: bytes) -> int:
    """CRC-32C (Castagnoli), as in RFC 3720; about 10 MB/s."""
    crc = 0xFFFFFFFF
    table = _CRC_LEVELDB
    for byte in data:
        crc = crc >> 8 ^ table[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


def masked_crc32c(data: bytes) -> int:
    """The checksum as LevelDB and TensorFlow store it: rotated and offset, so that it may cover
    other checksums."""
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def read_table(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The (key, value) pairs of a table, in order; keys ascend strictly.

    Raises:
        ValueError: the table is damaged, compressed, or has a key twice.
    """
    if data[-8:] != LEVELDB or len(data) < FOOTER:
        raise ValueError("not a LevelDB table")
    footer = data[-FOOTER:]
    _, at = _handle(footer, 0)  # the metaindex block: no filters to look up
    index, _ = _handle(footer, at)
    end = 0
    last = None
    for _, value in _entries(_block(data, index)):
        handle, _ = _handle(value, 0)
        if handle.start < end:
            raise ValueError("blocks overlap")
        end = handle.stop
        for key, entry in _entries(_block(data, handle)):
            if last is not None and key <= last:
                raise ValueError(f"key {key[:80]!r} comes twice or out of order")
            last = key
            yield key, entry


def _handle(data: bytes, at: int) -> tuple[range, int]:
    offset, at = varint(data, at)
    size, at = varint(data, at)
    return range(offset, offset + size), at


def _block(data: bytes, handle: range) -> bytes:
    """The contents of a block, once its checksum agrees."""
    start = handle.start
    stop = handle.stop
    if stop + TRAILER > len(data) - FOOTER:
        raise ValueError(f"block {start}..{stop} lies outside the table")
    if masked_crc32c(data[start : stop + 1]) != int.from_bytes(
        data[stop + 1 : stop + TRAILER], "little"
    ):
        raise ValueError(f"block {start}..{stop} does not match its checksum")
    if data[stop] != 0:
        raise ValueError(
            f"block {start}..{stop} is compressed ({'snappy' if data[stop] == 1 else data[stop]})"
        )
    return data[start:stop]


def _entries(block: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The pairs of one block: each key repeats `shared` bytes of the one before."""
    restarts = int.from_bytes(block[-4:], "little")
    end = len(block) - 4 * (restarts + 1)
    if end < 0:
        raise ValueError("a block is shorter than its restart array")
    at = 0
    key = b""
    budget = RESTART_INTERVAL * len(block)
    while at < end:
        shared, at = varint(block, at)
        fresh, at = varint(block, at)
        size, at = varint(block, at)
        if shared > len(key) or at + fresh + size > end:
            raise ValueError("an entry is longer than its block")
        budget -= shared + fresh
        if budget < 0:
            raise ValueError("keys share more than a table may")
        key = key[:shared] + block[at : at + fresh]
        at += fresh + size
        yield key, block[at - size : at]
