"""The messages of HDF5 object headers: what describes a group or a dataset, decoded from bytes that
are at hand.

Field by field as in the HDF5 File Format Specification, version 3.0 (section IV, data objects).
Nothing here touches a file; every length is checked against the bytes present.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from ..checkpoint import DTYPES

UNDEFINED = 2**64 - 1  # an address of nothing
FIXED_STRING, VARIABLE_STRING = "fixed-length string", "variable-length string"

# message types (section IV.A.2)
DATASPACE, LINK_INFO, DATATYPE, LINK, EXTERNAL_FILES, LAYOUT = 0x01, 0x02, 0x03, 0x06, 0x07, 0x08
FILTERS, ATTRIBUTE, CONTINUATION, SYMBOL_TABLE, ATTRIBUTE_INFO = 0x0B, 0x0C, 0x10, 0x11, 0x15
USED = {
    DATASPACE,
    LINK_INFO,
    DATATYPE,
    LINK,
    EXTERNAL_FILES,
    LAYOUT,
    FILTERS,
    ATTRIBUTE,
    SYMBOL_TABLE,
    ATTRIBUTE_INFO,
}


class Hdf5Error(Exception):
    """What is wrong with one object; the reader adds the file and the path in it."""


class Fields:
    """A cursor over the bytes of one structure; running past their end is an error, never a short
    value."""

    def __init__(self, data: bytes) -> None:
        self.data, self.position = data, 0

    @property
    def left(self) -> int:
        """The number of bytes not taken yet."""
        return len(self.data) - self.position

    def take(self, nbytes: int) -> bytes:
        """The next `nbytes` bytes."""
        if nbytes > self.left:
            raise Hdf5Error("a structure is cut short; the file is damaged")
        self.position += nbytes
        return self.data[self.position - nbytes : self.position]

    def uint(self, nbytes: int) -> int:
        """The next `nbytes` bytes as an unsigned little-endian integer."""
        return int.from_bytes(self.take(nbytes), "little")

    def unpack(self, layout: str) -> tuple[int, ...]:
        """The next fields, by a `struct` format without its byte order."""
        return struct.unpack("<" + layout, self.take(struct.calcsize("<" + layout)))


class Type(NamedTuple):
    """A data type: a key of `DTYPES` or, for what is no tensor, a name for messages; and the bytes
    of an element."""

    name: str
    size: int


class Link(NamedTuple):
    """A child of a group: its name, and the address of its object header or (`kind`) why it has
    none."""

    name: str
    address: int
    kind: str = ""


class AttributeMessage(NamedTuple):
    """An attribute: its value is `shape` elements of `type` (none for a null space), still encoded
    in `data`."""

    name: str
    type: Type
    shape: tuple[int, ...] | None
    data: Fields


def text(data: bytes) -> str:
    """UTF-8 up to the first NUL; other bytes are spelled out, as in Python source."""
    return data.split(b"\0", 1)[0].decode("utf-8", "backslashreplace")


def dataspace(fields: Fields) -> tuple[int, ...] | None:
    """The shape, or None for a null space, which has no elements (message 0x01)."""
    version, rank, flags, kind = fields.unpack("BBBB")
    if version not in (1, 2) or rank > 32:
        raise Hdf5Error(f"a data space of version {version} and rank {rank} is not supported")
    if version == 1:
        fields.take(4)
    shape = fields.unpack(f"{rank}Q")
    if flags & 1:
        fields.take(8 * rank)  # the sizes it may grow to
    return None if version == 2 and kind == 2 else shape


# little-endian floats: size, bit field (implied leading one, location of the sign), bit offset,
# precision, exponent (location, size), mantissa (location, size), exponent bias
_FLOATS: dict[tuple[int, ...], str] = {
    (2, 0x0F20, 0, 16, 10, 5, 0, 10, 15): "F16",
    (2, 0x0F20, 0, 16, 7, 8, 0, 7, 127): "BF16",
    (4, 0x1F20, 0, 32, 23, 8, 0, 23, 127): "F32",
    (8, 0x3F20, 0, 64, 52, 11, 0, 52, 1023): "F64",
}
# what follows the base type of h5py's Boolean: names (padded to 8 bytes before version 3), then
# values
_BOOLEANS = (b"FALSE\0\0\0TRUE\0\0\0\0\0\1", b"FALSE\0TRUE\0\0\1")
_CLASSES = (
    *("integer", "float", "time", FIXED_STRING, "bit field", "opaque", "compound", "reference"),
    *("enumeration", "variable-length", "array", "complex"),
)


def datatype(fields: Fields) -> Type:
    """The data type of each element (message 0x03); a two-byte opaque is bfloat16, as Keras stores
    it."""
    first, bits, size = fields.unpack("BHxI")
    kind, version = first & 15, first >> 4
    if not 1 <= version <= 5 or kind >= len(_CLASSES) or size == 0:
        raise Hdf5Error("its data type is malformed; the file is damaged")
    name = f"{'big-endian ' if kind < 2 and bits & 1 else ''}{size}-byte {_CLASSES[kind]}"
    if kind == 0:
        name = _integer(fields, bits, size) or name
    elif kind == 1:
        name = _FLOATS.get((size, bits, *fields.unpack("HHBBBBI")), name)
    elif kind == 3:
        name = FIXED_STRING
    elif kind == 5 and size == 2:
        name = "BF16"
    elif kind == 8 and size == 1 and bits == 2 and fields.take(12)[0] & 15 == 0:
        name = "BOOL" if fields.data[fields.position :].startswith(_BOOLEANS) else name
    elif kind == 9 and bits & 15 == 1:
        name = VARIABLE_STRING
    return Type(name, size)


def _integer(fields: Fields, bits: int, size: int) -> str | None:
    """The safetensors name of a little-endian integer that fills its bytes, if it has one."""
    name = f"{'I' if bits & 8 else 'U'}{8 * size}"
    plain = (bits & 1 == 0 or size == 1) and fields.unpack("HH") == (0, 8 * size)
    return name if plain and name in DTYPES else None


def layout(fields: Fields) -> tuple[int, int]:
    """Address and size of contiguous data (message 0x08).

    Raises:
        Hdf5Error: the data are compact, chunked (perhaps compressed) or virtual (in other files).
    """
    version, kind = fields.unpack("BB")
    if not 3 <= version <= 5:  # 1 and 2 were last written in 2005
        raise Hdf5Error(f"a data layout of version {version} is not supported")
    if kind != 1:
        name = {0: "compact", 2: "chunked", 3: "virtual"}.get(kind, f"unknown ({kind})")
        raise Hdf5Error(
            f"its data layout is {name}, but Keras writes contiguous data; save it again with Keras"
        )
    address, size = fields.unpack("QQ")
    return address, size


def link(fields: Fields) -> Link:
    """A child of a new-style group (message 0x06)."""
    version, flags = fields.unpack("BB")
    if version != 1:
        raise Hdf5Error(f"a link message of version {version} is not supported")
    kind = fields.uint(1) if flags & 0x08 else 0
    fields.take(
        (8 if flags & 0x04 else 0) + (1 if flags & 0x10 else 0)
    )  # creation order, character set
    name = text(fields.take(fields.uint(1 << (flags & 3))))
    if kind == 0:
        return Link(name, fields.uint(8))
    return Link(
        name, UNDEFINED, {1: "a soft link", 64: "an external link"}.get(kind, "a user-defined link")
    )


def dense_address(fields: Fields, order_size: int) -> int:
    """Where the links (message 0x02) or attributes (0x15) lie that are not in the header, or
    `UNDEFINED`.

    `order_size` is the width of the field that counts creations, if it is there: 8 for links, 2 for
    attributes.
    """
    _, flags = fields.unpack("BB")
    fields.take(order_size if flags & 1 else 0)
    return fields.uint(8)


def attribute(fields: Fields) -> AttributeMessage:
    """An attribute (message 0x0C)."""
    version, flags, name_size, type_size, space_size = fields.unpack("BBHHH")
    if not 1 <= version <= 3:
        raise Hdf5Error(f"an attribute message of version {version} is not supported")
    if version == 3:
        fields.take(1)  # character set of the name
    if version > 1 and flags & 3:
        raise Hdf5Error("has an attribute with a committed data type, which Keras never writes")
    align = 8 if version == 1 else 1
    name, type_, space = (
        fields.take(-(-size // align) * align) for size in (name_size, type_size, space_size)
    )
    return AttributeMessage(text(name), datatype(Fields(type_)), dataspace(Fields(space)), fields)


def checksum(data: bytes) -> int:
    """Bob Jenkins' lookup3 hash (`hashlittle`, public domain) with initial value 0, HDF5's metadata
    checksum."""
    mask = 0xFFFFFFFF
    a = b = c = (0xDEADBEEF + len(data)) & mask
    last = (len(data) - 1) // 12
    for i, (x, y, z) in enumerate(struct.iter_unpack("<3I", data.ljust(12 * last + 12, b"\0"))):
        a, b, c = (a + x) & mask, (b + y) & mask, (c + z) & mask
        for shift in (
            (4, 6, 8, 16, 19, 4) if i < last else ()
        ):  # each round mixes one word, then they change roles
            a, b, c = b, (c + b) & mask, ((a - c) ^ (c << shift | c >> 32 - shift)) & mask
    for shift in (14, 11, 25, 16, 4, 14, 24) if data else ():
        a, b, c = b, ((c ^ b) - (b << shift | b >> 32 - shift)) & mask, a
    return b if data else c
