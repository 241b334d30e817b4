"""The messages of HDF5 object headers: what describes a group or a dataset, decoded from bytes that
are at hand.

Field by field as in the HDF5 File Format Specification, version 3.0 (section IV, data objects).
Nothing here touches a file; every length is checked against the bytes present.
"""

from __future__ import annotations

import struct
from functools import cache
from typing import NamedTuple

from ...io.dtypes import ITEMSIZES

UNDEFINED = 2**64 - 1  # an address of nothing
FIXED_STRING = "fixed-length string"
VARIABLE_STRING = "variable-length string"

# message types (section IV.A.2)
DATASPACE = 0x01
LINK_INFO = 0x02
DATATYPE = 0x03
LINK = 0x06
EXTERNAL_FILES = 0x07
LAYOUT = 0x08
FILTERS = 0x0B
ATTRIBUTE = 0x0C
CONTINUATION = 0x10
SYMBOL_TABLE = 0x11
ATTRIBUTE_INFO = 0x15
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


def cut_short() -> Hdf5Error:
    """What is wrong where more bytes are needed than a structure has."""
    return Hdf5Error("a structure is cut short; the file is damaged")


@cache
def _compiled(layout: str) -> struct.Struct:
    return struct.Struct("<" + layout)


class Fields:
    """A cursor over the bytes of one structure; running past their end is an error, never a short
    value."""

    __slots__ = ("data", "position")

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.position = 0

    @property
    def left(self) -> int:
        """The number of bytes not taken yet."""
        return len(self.data) - self.position

    def take(self, nbytes: int) -> bytes:
        """The next `nbytes` bytes."""
        if nbytes > self.left:
            raise cut_short()
        self.position += nbytes
        return self.data[self.position - nbytes : self.position]

    def uint(self, nbytes: int) -> int:
        """The next `nbytes` bytes as an unsigned little-endian integer."""
        return int.from_bytes(self.take(nbytes), "little")

    def unpack(self, layout: str) -> tuple[int, ...]:
        """The next fields, by a `struct` format without its byte order."""
        fields = _compiled(layout)
        begin = self.position
        if begin + fields.size > len(self.data):
            raise cut_short()
        self.position = begin + fields.size
        return fields.unpack_from(self.data, begin)


class Type(NamedTuple):
    """A data type: a key of `ITEMSIZES` or, for what is no tensor, a name for messages; and the
    bytes of an element."""

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
    """The data type of each element (message 0x03).

    A two-byte opaque is bfloat16, as Keras stores it.
    """
    first, bits, size = fields.unpack("BHxI")
    kind = first & 15
    version = first >> 4
    if not 1 <= version <= 5 or kind >= len(_CLASSES) or size == 0:
        raise Hdf5Error("its data type is malformed; the file is damaged")
    big_endian = kind < 2 and bits & 1
    name = f"{'big-endian ' if big_endian else ''}{size}-byte {_CLASSES[kind]}"
    if kind == 0:
        name = _integer(fields, bits, size) or name
    elif kind == 1:
        name = _FLOATS.get((size, bits, *fields.unpack("HHBBBBI")), name)
    elif kind == 3:
        name = FIXED_STRING
    elif kind == 5 and size == 2:
        name = "BF16"
    elif kind == 8 and size == 1 and bits == 2 and fields.take(12)[0] & 15 == 0:
        names = fields.data[fields.position :]
        if names.startswith(_BOOLEANS):
            name = "BOOL"
    elif kind == 9 and bits & 15 == 1:
        name = VARIABLE_STRING
    return Type(name, size)


def _integer(fields: Fields, bits: int, size: int) -> str | None:
    """The safetensors name of a little-endian integer that fills its bytes, if it has one."""
    sign = "I" if bits & 8 else "U"
    name = f"{sign}{8 * size}"
    little_endian = bits & 1 == 0 or size == 1
    if not little_endian or fields.unpack("HH") != (0, 8 * size):
        return None
    return name if name in ITEMSIZES else None


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


_LINKS = {1: "a soft link", 64: "an external link"}


def link(fields: Fields) -> Link:
    """A child of a new-style group (message 0x06)."""
    version, flags = fields.unpack("BB")
    if version != 1:
        raise Hdf5Error(f"a link message of version {version} is not supported")
    kind = fields.uint(1) if flags & 0x08 else 0
    if flags & 0x04:
        fields.take(8)  # creation order
    if flags & 0x10:
        fields.take(1)  # character set
    length = fields.uint(1 << (flags & 3))
    name = text(fields.take(length))
    if kind == 0:
        return Link(name, fields.uint(8))
    return Link(name, UNDEFINED, _LINKS.get(kind, "a user-defined link"))


def dense_address(fields: Fields, order_size: int) -> int:
    """Where the links (message 0x02) or attributes (0x15) lie that are not in the header.

    `UNDEFINED` if there are none. `order_size` is the width of the field that counts creations, if
    it is there: 8 for links, 2 for attributes.
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

    def aligned(size: int) -> bytes:
        return fields.take(-(-size // align) * align)

    name = text(aligned(name_size))
    type_ = datatype(Fields(aligned(type_size)))
    space = dataspace(Fields(aligned(space_size)))
    return AttributeMessage(name, type_, space, fields)


def checksum(data: bytes) -> int:
    """HDF5's checksum of metadata: Bob Jenkins' lookup3 hash with initial value 0.

    Source: `hashlittle` of lookup3.c, in the public domain.
    """
    mask = 0xFFFFFFFF
    a = b = c = (0xDEADBEEF + len(data)) & mask
    last = (len(data) - 1) // 12
    padded = data.ljust(12 * last + 12, b"\0")
    for i, (x, y, z) in enumerate(struct.iter_unpack("<3I", padded)):
        a = (a + x) & mask
        b = (b + y) & mask
        c = (c + z) & mask
        if i == last:
            break
        for shift in (4, 6, 8, 16, 19, 4):  # each round mixes one word, then they change roles
            mixed = ((a - c) ^ _rotated(c, shift)) & mask
            a, b, c = b, (c + b) & mask, mixed
    if not data:
        return c
    for shift in (14, 11, 25, 16, 4, 14, 24):
        mixed = ((c ^ b) - _rotated(b, shift)) & mask
        a, b, c = b, mixed, a
    return b


def _rotated(word: int, shift: int) -> int:
    """32 bits rotated to the left; what goes beyond them is masked off by the caller."""
    return word << shift | word >> 32 - shift
