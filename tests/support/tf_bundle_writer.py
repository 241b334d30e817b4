"""Writes TensorFlow checkpoints (tensor bundles) that TensorFlow itself reads; the reverse of
`converters.tensorflow`.

`write_bundle` is all that most tests need. Tests of damage put bundles together from `index_entry`,
`graph_entry`, `string_entry` and `write_index`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import ml_dtypes  # noqa: F401  (teaches numpy the name bfloat16)
import numpy as np

from weightport.converters.readers.leveldb import masked_crc32c
from weightport.converters.readers.object_graph import Node

HEADER = b"\x08\x01\x1a\x02\x08\x01"  # one data file; little-endian; version 1
GRAPH_KEY = "_CHECKPOINTABLE_OBJECT_GRAPH"
NUMBERS = {
    "f4": 1,
    "f8": 2,
    "i4": 3,
    "u1": 4,
    "i2": 5,
    "i1": 6,
    "i8": 9,
    "?": 10,
    "bfloat16": 14,
    "u2": 17,
    "f2": 19,
}
ENUM = {np.dtype(dtype): number for dtype, number in NUMBERS.items()}


def write_bundle(
    prefix: Path,
    tensors: Mapping[str, np.ndarray],
    graph: Sequence[Node] | None = None,
    checksums: bool = True,
) -> None:
    """Write `prefix.index` and `prefix.data-00000-of-00001`.

    `checksums=False` leaves out those of the tensors (slow in Python); TensorFlow refuses such
    files, our reader does not look.
    """
    entries: dict[str, bytes] = {}
    with prefix.with_name(prefix.name + ".data-00000-of-00001").open("wb") as file:
        for key, array in sorted(tensors.items()):
            data = array.tobytes()
            crc = masked_crc32c(data) if checksums else 0
            entries[key] = index_entry(ENUM[array.dtype], array.shape, file.tell(), len(data), crc)
            file.write(data)
        if graph is not None:
            entries[GRAPH_KEY], data = graph_entry(graph, file.tell())
            file.write(data)
    write_index(prefix, entries)


def write_index(
    prefix: Path, entries: Mapping[str, bytes], header: bytes = HEADER, block_size: int = 4096
) -> None:
    """Write `prefix.index` from serialised `BundleEntryProto`s."""
    pairs = [(b"", header), *sorted((key.encode(), value) for key, value in entries.items())]
    prefix.with_name(prefix.name + ".index").write_bytes(table(pairs, block_size))


def index_entry(
    dtype: int, shape: Sequence[int], offset: int, size: int, crc: int = 0, shard: int = 0
) -> bytes:
    """A `BundleEntryProto`."""
    dims = b"".join(length(2, number(1, dim)) for dim in shape)
    place = number(3, shard) + number(4, offset) + number(5, size)
    return number(1, dtype) + length(2, dims) + place + b"\x35" + crc.to_bytes(4, "little")


def graph_entry(graph: Sequence[Node], offset: int) -> tuple[bytes, bytes]:
    """The `BundleEntryProto` of the object graph and its bytes."""
    return string_entry(b"".join(length(1, object_message(node)) for node in graph), offset)


def string_entry(text: bytes, offset: int) -> tuple[bytes, bytes]:
    """The `BundleEntryProto` of a string tensor of shape () and its bytes."""
    size = len(text).to_bytes(4, "little")
    content = masked_crc32c(size).to_bytes(4, "little") + text
    data = varint(len(text)) + content
    return index_entry(7, (), offset, len(data), masked_crc32c(size + content)), data


def object_message(node: Node) -> bytes:
    """A `TrackableObject`."""
    children = (
        length(1, number(1, child) + length(2, name.encode()))
        for name, child in node.children.items()
    )
    attributes = (
        length(2, length(1, name.encode()) + length(2, b"") + length(3, key.encode()))
        for name, key in node.variables.items()
    )
    return b"".join((*children, *attributes))


def table(pairs: Sequence[tuple[bytes, bytes]], block_size: int = 4096) -> bytes:
    """A LevelDB table of pairs, in the order given."""
    out, handles, pending = b"", [], []
    for pair in pairs:
        pending.append(pair)
        if sum(len(key) + len(value) for key, value in pending) >= block_size or pair is pairs[-1]:
            contents = block(pending)
            handles.append((pair[0], varint(len(out)) + varint(len(contents))))
            out += contents + trailer(contents)
            pending = []
    footer = b""
    for contents in (block([]), block(handles, restart_interval=1)):
        footer += varint(len(out)) + varint(len(contents))
        out += contents + trailer(contents)
    return out + footer.ljust(40, b"\0") + (0xDB4775248B80FB57).to_bytes(8, "little")


def block(pairs: Sequence[tuple[bytes, bytes]], restart_interval: int = 16) -> bytes:
    """The contents of a block: each key without what it shares with the one before, then the
    restart positions."""
    out, restarts, last = b"", [0], b""
    for i, (key, value) in enumerate(pairs):
        shared = 0
        if i % restart_interval:
            while shared < min(len(key), len(last)) and key[shared] == last[shared]:
                shared += 1
        elif i:
            restarts.append(len(out))
        out += (
            varint(shared) + varint(len(key) - shared) + varint(len(value)) + key[shared:] + value
        )
        last = key
    return out + b"".join(at.to_bytes(4, "little") for at in (*restarts, len(restarts)))


def trailer(contents: bytes, compression: int = 0) -> bytes:
    """The compression type and the checksum that follow a block."""
    return bytes([compression]) + masked_crc32c(contents + bytes([compression])).to_bytes(
        4, "little"
    )


def varint(value: int) -> bytes:
    """A protobuf varint; negative numbers as 64-bit two's complement."""
    value %= 1 << 64
    out = b""
    while value >= 0x80:
        out, value = out + bytes([value & 0x7F | 0x80]), value >> 7
    return out + bytes([value])


def number(field: int, value: int) -> bytes:
    """A protobuf field that is an integer; none where 0, as protobuf has it."""
    return varint(field << 3) + varint(value) if value else b""


def length(field: int, data: bytes) -> bytes:
    """A protobuf field that is a string or a message."""
    return varint(field << 3 | 2) + varint(len(data)) + data
