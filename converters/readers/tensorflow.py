"""TensorFlow checkpoints ("tensor bundles") and the variables of SavedModels, read without
TensorFlow.

A bundle is `PREFIX.index`, a LevelDB table from tensor keys to `BundleEntryProto`, and
`PREFIX.data-00000-of-00001` (and further shards), the tensors' bytes. The key
`_CHECKPOINTABLE_OBJECT_GRAPH` holds the graph of Python objects that were saved, in which attribute
paths lead to variables. Format: tensorflow/core/protobuf/tensor_bundle.proto. The index and the
graph are verified against their checksums, the tensors are not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

from ...errors import ConversionError, printable
from ...io.dtypes import ITEMSIZES
from ..checkpoint import SourceFile, Stored
from .bundles import index_path
from .leveldb import masked_crc32c, read_table
from .object_graph import Node, parse_graph
from .protobuf import Message, integer, parse, submessages, varint

__all__ = ["Bundle", "Node", "read_bundle"]

GRAPH_KEY = "_CHECKPOINTABLE_OBJECT_GRAPH"
MAX_BYTES = 1 << 22  # of an index or an object graph; those of a Stable Diffusion UNet have 0.1 MB
MAX_RANK = 32  # numpy's limit

_STRING = 7
_DTYPES = {  # the enum in tensorflow/core/framework/types.proto -> safetensors names
    1: "F32", 2: "F64", 3: "I32", 4: "U8", 5: "I16", 6: "I8", 9: "I64", 10: "BOOL", 14: "BF16",
    19: "F16",
}  # fmt: skip


@dataclass
class Bundle:
    """A bundle whose tensors are not read yet.

    Attributes:
        tensors: checkpoint key -> tensor, in the order of the index (by key).
        graph: the saved objects, the root first; empty if the bundle has no object graph.
        skipped: key -> why it is not in `tensors`.
        files: the index and the data files, open.
    """

    tensors: dict[str, Stored]
    graph: list[Node]
    skipped: dict[str, str]
    files: list[SourceFile]


class _Entry(NamedTuple):
    """A `BundleEntryProto`: where the bytes of one key lie."""

    key: str
    dtype: int
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int
    crc: int


def read_bundle(prefix: Path) -> Bundle:
    """Read the index and the object graph of a bundle; check where its tensors lie.

    Raises:
        ConversionError: a file is missing, damaged or hostile, or holds what cannot be converted.
    """
    with ExitStack() as on_error:
        path = index_path(prefix)
        try:
            index = SourceFile(path)
            on_error.callback(index.close)
            header, entries = _read_index(index)
            shards = []
            for shard_path in _shard_paths(prefix, header):
                shards.append(SourceFile(shard_path))
                on_error.callback(shards[-1].close)
            _check_ranges(entries, shards)
            bundle = Bundle({}, [], {}, [index, *shards])
            for entry in entries:
                _add(bundle, entry, shards[entry.shard])
            _check_graph(bundle)
        except ValueError as error:
            raise ConversionError(f"{path}: {printable(error, 300)}") from None
        on_error.pop_all()
        return bundle


def _read_index(file: SourceFile) -> tuple[Message, list[_Entry]]:
    """The `BundleHeaderProto`, whose key is empty and so comes first, and the entries."""
    if file.size > MAX_BYTES:
        raise ValueError(f"an index of {file.size} bytes is no checkpoint's")
    table = read_table(file.read(0, file.size))
    key, value = next(table, (None, b""))
    if key != b"":
        raise ValueError("the bundle has no header")
    header = parse(value)
    if integer(header, 2) != 0:
        raise ValueError("a big-endian bundle; save it again on a little-endian machine")
    return header, [_parse_entry(key, value) for key, value in table]


def _parse_entry(key: bytes, value: bytes) -> _Entry:
    message = parse(value)
    name = key.decode(errors="surrogateescape")
    if 7 in message or name.startswith(
        "\0"
    ):  # a slice has the key: 0, the variable's name, 0 1, its position
        variable = name.strip("\0").partition("\0")[0]
        raise ValueError(
            f"{variable!r} is a partitioned variable; save the model without a partitioner"
        )
    if not name.isprintable():
        raise ValueError(f"key {name!r} is not printable text")
    shapes = tuple(message.get(2, ()))
    shape = _shape(shapes)
    if len(shapes) > 1 or len(shape) > MAX_RANK or min(shape, default=0) < 0:
        raise ValueError(f"{name!r} has shape {shape}")
    return _Entry(
        name,
        integer(message, 1),
        shape,
        shard=integer(message, 3),
        offset=integer(message, 4),
        size=integer(message, 5),
        crc=integer(message, 6),
    )


@lru_cache(1000)  # most tensors of a model are like others
def _shape(shapes: tuple[int | bytes, ...]) -> tuple[int, ...]:
    """The sizes in a field that holds a `TensorShapeProto`, or nothing for a scalar."""
    protos = submessages({2: list(shapes)}, 2)
    return tuple(integer(dim, 1) for proto in protos for dim in submessages(proto, 2))


def _shard_paths(prefix: Path, header: Message) -> Iterator[Path]:
    """The data files, which must lie where the index lies (also where both are links, as in a
    download cache)."""
    count = integer(header, 1)
    if not 1 <= count < 100_000:
        raise ValueError(f"declares {count} data files")
    folder = index_path(prefix).resolve().parent
    for shard in range(count):
        path = prefix.with_name(f"{prefix.name}.data-{shard:05d}-of-{count:05d}")
        if not path.exists():
            raise ConversionError(
                f"{path}: missing; a checkpoint is its .index file and all its .data files"
            )
        if path.resolve().parent != folder:
            raise ConversionError(
                f"{path}: a link out of the checkpoint's folder; copy the file here"
            )
        yield path


def _check_ranges(entries: list[_Entry], shards: list[SourceFile]) -> None:
    """Every entry lies inside its data file, and no two share bytes."""
    for entry in entries:
        if not 0 <= entry.shard < len(shards):
            raise ValueError(f"{entry.key!r} lies in data file {entry.shard} of {len(shards)}")
        end = entry.offset + entry.size
        available = shards[entry.shard].size
        if entry.offset < 0 or entry.size < 0 or end > available:
            raise ValueError(
                f"{entry.key!r} lies at bytes {entry.offset}..{end} of a data file of {available};"
                " is it truncated?"
            )
    placed = sorted((e for e in entries if e.size), key=attrgetter("shard", "offset"))
    for one, two in pairwise(placed):
        if one.shard == two.shard and one.offset + one.size > two.offset:
            raise ValueError(f"{one.key!r} and {two.key!r} share bytes")


def _add(bundle: Bundle, entry: _Entry, file: SourceFile) -> None:
    if entry.key == GRAPH_KEY and entry.dtype == _STRING:
        bundle.graph = parse_graph(_string(entry, file))
    elif entry.dtype not in _DTYPES:
        kind = "text" if entry.dtype == _STRING else f"of TensorFlow dtype {entry.dtype}"
        bundle.skipped[entry.key] = f"{kind}, not weights"
    else:
        dtype = _DTYPES[entry.dtype]
        needed = math.prod(entry.shape) * ITEMSIZES[dtype]
        if entry.size != needed:
            raise ValueError(
                f"{entry.key!r} has {entry.size} bytes, but {dtype} {entry.shape} needs {needed}"
            )
        bundle.tensors[entry.key] = Stored(entry.key, dtype, entry.shape, file, entry.offset)


def _string(entry: _Entry, file: SourceFile) -> bytes:
    """The one element of a string tensor: its length as a varint, a checksum of the length, its
    bytes."""
    if entry.size > MAX_BYTES or entry.shape:
        raise ValueError(
            f"{entry.key!r} has {entry.size} bytes in shape {entry.shape}; one short string is"
            " expected"
        )
    data = file.read(entry.offset, entry.size)
    length, at = varint(data, 0)
    content = data[at + 4 :]
    if length != len(content):
        raise ValueError(f"{entry.key!r} has {len(content)} bytes, not {length}")
    prefix = length.to_bytes(4, "little")  # checksums cover the length at this fixed width
    if masked_crc32c(prefix) != int.from_bytes(data[at : at + 4], "little") or (
        masked_crc32c(prefix + data[at:]) != entry.crc
    ):
        raise ValueError(f"{entry.key!r} does not match its checksum")
    return content


def _check_graph(bundle: Bundle) -> None:
    for node in bundle.graph:
        for key in node.variables.values():
            if key not in bundle.tensors and key not in bundle.skipped:
                raise ValueError(f"the object graph names {key!r}, which the bundle does not hold")
