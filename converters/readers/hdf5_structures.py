"""The structures of an HDF5 file and where they lie: superblock, object headers, B-trees of names,
heaps of text.

Old-style groups and both versions of object headers, as in the HDF5 File Format Specification,
version 3.0 (sections II to IV.A); see `hdf5`, which walks them. No structure is read twice, and
what all of them may cost is bounded: their bytes, and a part for each thing that Python makes of
them. So no loop outlasts the file, whatever it holds.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from ..checkpoint import SourceFile
from . import hdf5_messages as messages
from .hdf5_messages import UNDEFINED, Fields, Hdf5Error, Link, cut_short
from .signatures import HDF5

STRUCTURE_LIMIT = 1 << 26  # bytes; the file of a Stable Diffusion UNet has 0.6 MB of structure
_EACH = 32  # bytes that a structure, a message, a name or a text counts beside its own
_COSTS = {messages.LINK: 2 * _EACH, messages.ATTRIBUTE: 4 * _EACH}  # messages that hold others
NAME_LIMIT = 1024
PAGE = 1 << 12  # bytes that are read at once: structures are small and lie side by side
_BEFORE = 1 << 10  # of them, those before the structure that is asked for

_PREFIX_1 = struct.Struct("<HHB3x")  # of a message: type, size, flags
_PREFIX_2 = struct.Struct("<BHB")
_PREFIX_2_ORDERED = struct.Struct("<BHB2x")
_HEAP = struct.Struct("<8xQ8xQ")  # bytes of names, and where they lie
_NODE = struct.Struct("<4xBBH16x")  # type, level, number of children
_CHILD = struct.Struct("<8xQ")
_LEAF = struct.Struct("<6xH")  # number of entries
_ENTRY = struct.Struct("<QQI20x")  # of a name: its place in the heap, the object, kind of cache

Header = dict[int, list[Fields]]  # messages by type


class Blocks:
    """The structures of the HDF5 file that lies in `size` bytes from `start` on; every address
    counts from `start`."""

    def __init__(self, file: SourceFile, start: int, size: int) -> None:
        self.file = file
        self.start = start
        self.size = min(size, file.size - start)
        self.seen: set[int] = set()  # addresses of structures
        self._budget = min(8 * self.size, STRUCTURE_LIMIT)
        self._page = b""  # what was read last, and where it lies
        self._page_at = 0
        self._heaps: dict[int, dict[int, bytes]] = {}

    def superblock(self) -> int:
        """Check the superblock (section II.A); the address of the root group's object header."""
        head = self._read(0, min(self.size, 100))
        if not head.startswith(HDF5):
            raise Hdf5Error("not an HDF5 file: it does not begin with HDF5's signature")
        if len(head) < 100:
            raise Hdf5Error(f"truncated: has {self.size} bytes, fewer than any HDF5 file")
        fields = Fields(head[8:])
        version = fields.uint(1)
        if version > 3:
            raise Hdf5Error(f"a superblock of version {version} is not supported")
        (widths,) = fields.unpack(("4xH9x", "4xH13x", "Hx", "Hx")[version])
        if widths != 0x0808:
            raise Hdf5Error(
                "has addresses or lengths that are not 8 bytes wide, which is not supported"
            )
        if version < 2:
            base, _, end, driver, _, root = fields.unpack("6Q")
        else:
            base, _, end, root = fields.unpack("4Q")
            driver = UNDEFINED
            _checked(head[:48])
        if base != 0 or driver != UNDEFINED:
            raise Hdf5Error(
                "begins with a user block or spans several files, which is not supported"
            )
        if end > self.size:
            raise Hdf5Error(
                f"truncated: needs {end} bytes, has {self.size} (the superblock's end-of-file"
                " address)"
            )
        self.size = end
        return root

    def header(self, address: int) -> Header:
        """The messages of an object header and its continuations, by type (section IV.A)."""
        head = self._read_once(address, min(16, self.size - address))
        modern = head.startswith(b"OHDR")
        first, prefix = (self._header_2 if modern else self._header_1)(address, head)
        header: Header = {}
        blocks = [first]
        for block in blocks:  # grows while it is walked
            at = prefix.size
            while at <= len(block):
                kind, size, flags = prefix.unpack_from(block, at - prefix.size)
                end = at + size
                if end > len(block):
                    raise cut_short()
                self._spend(_COSTS.get(kind, _EACH))
                if kind == messages.CONTINUATION:
                    blocks.append(self._continuation(Fields(block[at:end]), modern))
                elif kind in messages.USED and flags & 2:
                    raise Hdf5Error(
                        "has a committed data type or another shared message, which Keras never"
                        " writes"
                    )
                elif kind in messages.USED:
                    header.setdefault(kind, []).append(Fields(block[at:end]))
                at = end + prefix.size
        return header

    def _header_1(self, address: int, head: bytes) -> tuple[bytes, struct.Struct]:
        """The first block of messages of a header of version 1, and the prefix of a message."""
        if len(head) < 16 or head[0] != 1:
            raise Hdf5Error(f"has no object header at {address}; the file is damaged")
        size = int.from_bytes(head[8:12], "little")
        return self._read(address + 16, size), _PREFIX_1

    def _header_2(self, address: int, head: bytes) -> tuple[bytes, struct.Struct]:
        """The same of version 2: optional times and attribute limits, a size of 1 to 8 bytes, and a
        checksum."""
        version, flags = Fields(head[4:]).unpack("BB")
        if version != 2:
            raise Hdf5Error(f"an object header of version {version} is not supported")
        size_at = 6 + (16 if flags & 0x20 else 0) + (4 if flags & 0x10 else 0)
        begin = size_at + (1 << (flags & 3))
        size = int.from_bytes(self._read(address + size_at, begin - size_at), "little")
        messages_of_it = _checked(self._read(address, begin + size + 4))[begin:]
        return messages_of_it, _PREFIX_2_ORDERED if flags & 4 else _PREFIX_2

    def _continuation(self, message: Fields, modern: bool) -> bytes:
        address, nbytes = message.unpack("QQ")
        if not modern:
            return self._read_once(address, nbytes)
        return _checked(self._read_once(address, nbytes, b"OCHK"))[4:]

    def symbol_table(self, message: Fields) -> Iterator[Link]:
        """The children of an old-style group: a B-tree of entries, and a heap of their names
        (sections III.A-D)."""
        tree, heap = message.unpack("QQ")
        size, names_at = _HEAP.unpack(self._read_once(heap, 32, b"HEAP"))
        names = self._read_once(names_at, size)
        for leaf in self._leaves(tree):
            (count,) = _LEAF.unpack(self._read_once(leaf, 8, b"SNOD"))
            for at, address, cache in _ENTRY.iter_unpack(self._read(leaf + 8, 40 * count)):
                end = names.find(b"\0", at, at + NAME_LIMIT)
                if end < 0:
                    raise Hdf5Error(
                        f"has a child whose name does not end within {NAME_LIMIT} bytes"
                    )
                self._spend(_EACH + end - at)
                yield Link(
                    messages.text(names[at:end]), address, "a soft link" if cache == 2 else ""
                )

    def _leaves(self, address: int, parent: int | None = None) -> Iterator[int]:
        """Addresses of the symbol table nodes below a node of a version 1 B-tree; `parent` is the
        level above."""
        kind, level, count = _NODE.unpack(self._read_once(address, 24, b"TREE"))
        if kind != 0 or (parent is not None and level != parent - 1):
            raise Hdf5Error(f"has a wrong B-tree node at {address}; the file is damaged")
        for (child,) in _CHILD.iter_unpack(self._read(address + 24, 16 * count)):
            if level:
                yield from self._leaves(child, level)
            else:
                yield child

    def string(self, length: int, address: int, index: int) -> str:
        """A variable-length string: object `index` of the global heap collection at `address`
        (section III.E)."""
        if length == 0:
            return ""
        if address not in self._heaps:
            self._heaps[address] = self._heap(address)
        data = self._heaps[address].get(index, b"")
        if len(data) < length:
            raise Hdf5Error("has an attribute whose text is missing; the file is damaged")
        self._spend(_EACH + length)
        return messages.text(data[:length])

    def _heap(self, address: int) -> dict[int, bytes]:
        (size,) = struct.unpack("<8xQ", self._read_once(address, 16, b"GCOL"))
        fields = Fields(self._read(address + 16, size - 16))
        objects: dict[int, bytes] = {}
        while fields.left >= 16:
            index, nbytes = fields.unpack("H6xQ")
            if index == 0:  # the free space, which comes last
                break
            self._spend(_EACH)
            objects[index] = fields.take(-(-nbytes // 8) * 8)[:nbytes]
        return objects

    def _read_once(self, address: int, nbytes: int, signature: bytes = b"") -> bytes:
        """The beginning of a structure; a second visit is a cycle, or two owners of one
        structure."""
        if address in self.seen:
            raise Hdf5Error(
                f"shares the structure at {address} with another object, or is part of a cycle"
            )
        self.seen.add(address)
        self._budget -= _EACH
        data = self._read(address, nbytes)
        if not data.startswith(signature):
            raise Hdf5Error(
                f"has no {signature.decode()} structure at {address}; the file is damaged"
            )
        return data

    def _read(self, address: int, nbytes: int) -> bytes:
        if nbytes < 0 or address + nbytes > self.size:
            raise Hdf5Error(
                f"points at bytes {address}..{address + nbytes} of {self.size}; the file is damaged"
            )
        self._budget -= nbytes
        if self._budget < 0:
            raise _too_many()
        at = address - self._page_at
        if at < 0 or at + nbytes > len(self._page):
            self._turn_to(address, nbytes)
            at = address - self._page_at
        return self._page[at : at + nbytes]

    def _turn_to(self, address: int, nbytes: int) -> None:
        """Have a structure in the page, and what is written before and after it."""
        begin = max(0, address - _BEFORE)
        end = min(max(begin + PAGE, address + nbytes), self.size)
        self._page = self.file.read(self.start + begin, end - begin)
        self._page_at = begin

    def _spend(self, nbytes: int) -> None:
        """Count bytes of structure, and what each part of it costs, against what a file can
        have."""
        self._budget -= nbytes
        if self._budget < 0:
            raise _too_many()


def _too_many() -> Hdf5Error:
    return Hdf5Error(f"has structures that overlap, or more than {STRUCTURE_LIMIT} bytes of them")


def _checked(data: bytes) -> bytes:
    """A structure without the checksum at its end, which must be right."""
    if messages.checksum(data[:-4]) != int.from_bytes(data[-4:], "little"):
        raise Hdf5Error("has a wrong checksum; the file is damaged")
    return data[:-4]
