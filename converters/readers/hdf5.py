"""The structure of an HDF5 file as Keras writes it: groups, attributes, and where each dataset's
bytes lie.

An HDF5 file is untrusted input, so it is read here, in Python, and never handed to the HDF5
library. The subset is what Keras 2 and 3 write through h5py: superblocks 0 to 3, old-style groups
and small new-style ones, contiguous datasets. What lies outside it, or in another file, is refused
by name. Data are not read, but for what lies right beside a structure: a dataset is a range of
bytes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from ...errors import ConversionError, printable
from ...io.arrays import DTYPES
from ..checkpoint import SourceFile
from . import hdf5_messages as messages
from .hdf5_messages import UNDEFINED, AttributeMessage, Fields, Hdf5Error, Link
from .hdf5_structures import Blocks, Header

MAX_DEPTH = 64

Scalar = str | int | float | bool
Attribute = Scalar | list[Scalar] | None


@dataclass(slots=True)
class Dataset:
    """An array in the file, as the range of bytes that holds it (row-major).

    Attributes:
        dtype: a key of `DTYPES`; any other name, such as "8-byte compound", says that this is no
            tensor.
        shape: the dimensions.
        offset: the first byte, from the beginning of the `SourceFile`.
        nbytes: the size, which is that of the shape.
        attrs: name -> value.
    """

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    attrs: dict[str, Attribute]


@dataclass(slots=True)
class Group:
    """A folder of groups and datasets.

    Attributes:
        attrs: name -> value: a number or a string, a flat list of them for an array, None for any
            other type.
        children: name -> child, in the order of the names, as HDF5 iterates.
    """

    attrs: dict[str, Attribute]
    children: dict[str, Group | Dataset]


def read_hdf5(file: SourceFile, start: int = 0, size: int | None = None) -> Group:
    """The root group of the HDF5 file that is `file`, or `size` bytes of it from `start` on.

    Raises:
        ConversionError: the file is truncated or damaged; an object is a link to elsewhere or is
            linked twice; its data are compressed, in pieces, in other files or missing; or it has
            another feature that Keras never uses.
    """
    blocks = Blocks(file, start, file.size - start if size is None else size)
    try:
        root = Link("", blocks.superblock())
    except Hdf5Error as error:
        raise ConversionError(f"{file.path}: {error}") from None
    tree = _object(blocks, root, "", 0)
    if isinstance(tree, Dataset):
        raise ConversionError(
            f"{file.path}: its root is a dataset, not a group; the file is damaged"
        )
    return tree


def _object(blocks: Blocks, link: Link, path: str, depth: int) -> Group | Dataset:
    """The object behind a link, with all that is below it."""
    try:
        if link.kind:
            raise Hdf5Error(
                f"is {link.kind}, which is not followed; only data in the file itself are read"
            )
        if link.address in blocks.seen:
            raise Hdf5Error(
                "is a second link to one object, or part of a cycle; Keras writes each object once"
            )
        if depth > MAX_DEPTH:
            raise Hdf5Error(f"is nested deeper than {MAX_DEPTH} groups")
        header = blocks.header(link.address)
        attrs = _attributes(blocks, header)
        if messages.LAYOUT in header:
            return _dataset(blocks, header, attrs)
        links = _links(blocks, header)
    except Hdf5Error as error:
        raise ConversionError(
            f"{blocks.file.path}: {printable(path or '/', limit=400)}: {error}"
        ) from None
    return Group(
        attrs,
        {child.name: _object(blocks, child, f"{path}/{child.name}", depth + 1) for child in links},
    )


def _dataset(blocks: Blocks, header: Header, attrs: dict[str, Attribute]) -> Dataset:
    """A dataset, whose data must be one range of bytes in the file."""
    if messages.EXTERNAL_FILES in header:
        raise Hdf5Error("has its data in other files, which are not read")
    address, stored = messages.layout(_only(header, messages.LAYOUT))
    if messages.FILTERS in header:
        raise Hdf5Error(
            "is compressed or filtered, which Keras never does; save it again with Keras"
        )
    dtype, shape, nbytes = _described(
        _only(header, messages.DATATYPE).data, _only(header, messages.DATASPACE).data
    )
    if stored != nbytes:
        raise Hdf5Error(f"stores {stored} bytes, but its shape and type need {nbytes}")
    if nbytes == 0:
        return Dataset(dtype, shape, blocks.start, 0, attrs)
    if address == UNDEFINED:
        raise Hdf5Error("was never written: the file has no data for it")
    if address + nbytes > blocks.size:
        raise Hdf5Error(
            f"has its data at bytes {address}..{address + nbytes} of {blocks.size}; the file is"
            " damaged"
        )
    return Dataset(dtype, shape, blocks.start + address, nbytes, attrs)


@lru_cache(1000)  # most datasets of a model are like others
def _described(datatype: bytes, dataspace: bytes) -> tuple[str, tuple[int, ...], int]:
    """The type, the shape and the bytes of a dataset, by the messages that say so."""
    dtype, itemsize = messages.datatype(Fields(datatype))
    shape = messages.dataspace(Fields(dataspace))
    if shape is None:
        return "null", (), 0
    return dtype, shape, math.prod(shape) * itemsize


def _links(blocks: Blocks, header: Header) -> list[Link]:
    """The children of a group, by name."""
    if messages.SYMBOL_TABLE in header:
        links = list(blocks.symbol_table(_only(header, messages.SYMBOL_TABLE)))
    elif messages.LINK_INFO in header:
        if messages.dense_address(_only(header, messages.LINK_INFO), 8) != UNDEFINED:
            raise Hdf5Error(
                "keeps its children in a fractal heap, which Keras never does; save it again with"
                " Keras"
            )
        links = [messages.link(message) for message in header.get(messages.LINK, [])]
    else:
        raise Hdf5Error("is neither a group nor a dataset")
    names = {link.name for link in links}
    if len(names) < len(links):
        raise Hdf5Error("has two children of one name; the file is damaged")
    for name in names:
        if name in ("", ".", "..") or "/" in name or not name.isprintable():
            raise Hdf5Error(
                f"has a child that is named '{printable(name)}', which is no usable name"
            )
    return sorted(links)


def _attributes(blocks: Blocks, header: Header) -> dict[str, Attribute]:
    for message in header.get(messages.ATTRIBUTE_INFO, []):
        if messages.dense_address(message, 2) != UNDEFINED:
            raise Hdf5Error(
                "keeps its attributes in a fractal heap, which Keras never does; save it again with"
                " Keras"
            )
    if messages.ATTRIBUTE not in header:
        return {}
    attributes = [messages.attribute(message) for message in header[messages.ATTRIBUTE]]
    values = {attribute.name: _value(blocks, attribute) for attribute in attributes}
    if len(values) < len(attributes):
        raise Hdf5Error("has two attributes of one name; the file is damaged")
    return values


def _value(blocks: Blocks, attribute: AttributeMessage) -> Attribute:
    """The value of an attribute; an array of any rank as a flat list."""
    (dtype, itemsize), shape, data = attribute.type, attribute.shape, attribute.data
    if shape is None:
        return None
    count = math.prod(shape)
    values: list[Scalar]
    if dtype == messages.FIXED_STRING:
        values = [messages.text(data.take(itemsize)) for _ in range(count)]
    elif dtype == messages.VARIABLE_STRING:
        values = [blocks.string(*data.unpack("IQI")) for _ in range(count)]
    elif dtype in DTYPES:
        values = np.frombuffer(data.take(count * itemsize), DTYPES[dtype]).tolist()
    else:
        return None
    return values if shape else values[0]


def _only(header: Header, kind: int) -> Fields:
    """The one message of a type."""
    found = header.get(kind, [])
    if len(found) != 1:
        raise Hdf5Error(
            f"has {len(found)} header messages of type {kind}, not one; the file is damaged"
        )
    return found[0]
