"""What the HDF5 reader refuses: files that h5py would follow, expand or misread; damage; and
mutations of both."""

from __future__ import annotations

import random
import re
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from weightport.converters.checkpoint import SourceFile
from weightport.converters.readers import hdf5_messages
from weightport.converters.readers import hdf5_structures as hdf5_blocks
from weightport.converters.readers.hdf5 import Group, read_hdf5
from weightport.converters.readers.signatures import HDF5
from weightport.errors import ConversionError

from ..support.hdf5_files import VERSIONS, attributes, few, kernel, legacy, write


def parse(path: Path, start: int = 0) -> Group:
    return read_hdf5(SourceFile(path), start)


# ---- attacks: what h5py would follow, expand or misread


def created(file: h5py.File, layout: int | None = None) -> None:
    """A dataset whose data are never written."""
    options = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    if layout is not None:
        options.set_layout(layout)
    parent = file.create_group("layers")
    h5py.h5d.create(parent.id, b"evil", h5py.h5t.IEEE_F32LE, h5py.h5s.create_simple((4,)), options)


def virtual(file: h5py.File) -> None:
    layout = h5py.VirtualLayout((4,), "f4")
    layout[:] = h5py.VirtualSource("/etc/hostname", "data", (4,))
    file.create_virtual_dataset("layers/evil", layout)


def committed(file: h5py.File) -> None:
    file["type"] = np.dtype("f4")
    file.create_dataset("layers/evil", data=kernel(3), dtype=file["type"])


def alias(file: h5py.File) -> None:
    file["layers/first"] = kernel(3)
    file["layers/second"] = file["layers/first"]


def cycle(file: h5py.File) -> None:
    file["layers/evil"] = file.create_group("layers")


def set_link(link: Any) -> Callable[[h5py.File], Any]:
    def fill(file: h5py.File) -> None:
        file.create_group("layers")["evil"] = link

    return fill


def dataset(**options: Any) -> Callable[[h5py.File], Any]:
    return lambda file: file.create_dataset("layers/evil", (64,), "f4", **options)


def many_children(file: h5py.File) -> None:
    for i in range(9):
        file.create_group(f"layers/{i}")


def many_attributes(file: h5py.File) -> None:
    file.create_group("layers").attrs.update({str(i): i for i in range(9)})


LATEST = {"libver": "latest"}
ATTACKS: dict[str, tuple[Callable[[h5py.File], Any], dict[str, Any], str]] = {
    "external link": (
        set_link(h5py.ExternalLink("/etc/hostname", "/")),
        {},
        "/layers/evil: is an external link",
    ),
    "soft link": (set_link(h5py.SoftLink("/layers")), {}, "/layers/evil: is a soft link"),
    "soft link, new style": (
        set_link(h5py.SoftLink("/layers")),
        LATEST,
        "/layers/evil: is a soft link",
    ),
    "second hard link": (alias, {}, "/layers/second: is a second link to one object"),
    "second hard link, new style": (
        alias,
        LATEST,
        "/layers/second: is a second link to one object",
    ),
    "cycle": (cycle, {}, "/layers/evil: is a second link to one object, or part of a cycle"),
    "external storage": (
        dataset(external=[("/etc/hostname", 0, 256)]),
        {},
        "/layers/evil: has its data in other files",
    ),
    "virtual dataset": (virtual, {}, "/layers/evil: its data layout is virtual"),
    "chunks": (dataset(chunks=(8,)), {}, "/layers/evil: its data layout is chunked"),
    "chunks, new style": (dataset(chunks=(8,)), LATEST, "/layers/evil: its data layout is chunked"),
    "compression": (dataset(compression="gzip"), {}, "/layers/evil: its data layout is chunked"),
    "shape bomb": (
        lambda file: file.create_dataset("layers/evil", (2**40,), "f4", chunks=(1024,)),
        {},
        "/layers/evil: its data layout is chunked",
    ),
    "compact": (
        lambda file: created(file, h5py.h5d.COMPACT),
        {},
        "/layers/evil: its data layout is compact",
    ),
    "never written": (created, {}, "/layers/evil: was never written"),
    "committed type": (committed, {}, "/layers/evil: has a committed data type"),
    "committed type of an attribute": (
        lambda file: (file.update(t=np.dtype("f4")), file.attrs.create("a", 1, dtype=file["t"])),
        {},
        "/: has an attribute with a committed data type",
    ),
    "lone committed type": (
        lambda file: file.update(t=np.dtype("f4")),
        {},
        "/t: is neither a group nor a dataset",
    ),
    "deep nesting": (
        lambda file: file.create_group("g/" * 65),
        {},
        "/g" * 65 + ": is nested deeper than 64 groups",
    ),
    "dense children": (many_children, LATEST, "/layers: keeps its children in a fractal heap"),
    "dense attributes": (
        many_attributes,
        LATEST,
        "/layers: keeps its attributes in a fractal heap",
    ),
    "control characters": (
        lambda file: file.create_group("a\x1b[31m"),
        {},
        r"/: has a child that is named 'a\x1b[31m', which is no usable name",
    ),
    "user block": (lambda file: None, {"userblock_size": 512}, "not an HDF5 file"),
}


@pytest.mark.parametrize(("fill", "options", "message"), ATTACKS.values(), ids=ATTACKS)
def test_attack_is_refused_by_name(
    tmp_path: Path, fill: Callable[[h5py.File], Any], options: dict[str, Any], message: str
) -> None:
    path = write(tmp_path, fill, **options)
    with pytest.raises(ConversionError, match="^" + re.escape(f"{path}: {message}")) as error:
        parse(path)
    assert "\n" not in str(error.value)


def test_64_groups_deep_is_read(tmp_path: Path) -> None:
    assert list(parse(write(tmp_path, lambda file: file.create_group("g/" * 64))).children) == ["g"]


def test_user_block_is_refused_where_it_ends(tmp_path: Path) -> None:
    path = write(tmp_path, lambda file: None, userblock_size=512)
    with pytest.raises(ConversionError, match="user block"):
        parse(path, 512)


def test_short_addresses_are_refused(tmp_path: Path) -> None:
    options = h5py.h5p.create(h5py.h5p.FILE_CREATE)
    options.set_sizes(4, 4)
    h5py.h5f.create(bytes(tmp_path / "x.h5"), h5py.h5f.ACC_TRUNC, options).close()
    with pytest.raises(ConversionError, match="not 8 bytes wide"):
        parse(tmp_path / "x.h5")


# ---- damage: one field changed


def one(file: h5py.File) -> None:
    """A dataset of 12345 floats, and an attribute that lies in a global heap."""
    file["layers/dense"] = np.zeros(12345, "f4")
    file["layers"].attrs["name"] = "some text"


def quads(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}Q", *values)


def replace(path: Path, old: bytes, new: bytes) -> None:
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new))


def test_truncated(tmp_path: Path) -> None:
    path = write(tmp_path, one)
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(size - 1)
    with pytest.raises(ConversionError) as error:
        parse(path)
    expected = (
        f"{path}: truncated: needs {size} bytes, has {size - 1} (the superblock's end-of-file"
        " address)"
    )
    assert str(error.value) == expected


@pytest.mark.parametrize(
    ("size", "message"), [(0, ": not an HDF5"), (7, ": not an HDF5"), (60, ": truncated")]
)
def test_truncated_within_the_superblock(tmp_path: Path, size: int, message: str) -> None:
    path = write(tmp_path, one)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ConversionError, match=message):
        parse(path)


def test_sizes_that_disagree(tmp_path: Path) -> None:
    path = write(tmp_path, one)
    replace(path, quads(12345), quads(12346))
    with pytest.raises(
        ConversionError,
        match="/layers/dense: stores 49380 bytes, but its shape and type need 49384",
    ):
        parse(path)


def test_shape_that_overflows(tmp_path: Path) -> None:
    path = write(tmp_path, one)
    replace(path, quads(12345), quads(2**63))
    with pytest.raises(ConversionError, match=f"need {2**65}"):
        parse(path)


@pytest.mark.parametrize("padding", [0, 2 * 10**6])
def test_data_outside_the_file(tmp_path: Path, padding: int) -> None:
    """What lies after the end-of-file address is outside, too."""
    path = write(tmp_path, one)
    with h5py.File(path) as file:
        address = file["layers/dense"].id.get_offset()
    replace(path, quads(address, 49380), quads(address + 10**6, 49380))
    path.write_bytes(path.read_bytes() + bytes(padding))
    with pytest.raises(
        ConversionError, match=r"/layers/dense: has its data at bytes \d+\.\.\d+ of \d+"
    ):
        parse(path)


@pytest.mark.parametrize("options", [VERSIONS["v2"], VERSIONS["v3"]], ids=["v2", "v3"])
def test_wrong_checksum(tmp_path: Path, options: dict[str, Any]) -> None:
    path = write(tmp_path, one, **options)
    data = path.read_bytes()
    for field in (quads(len(data)), quads(12345)):  # in the superblock, in an object header
        path.write_bytes(data.replace(field, quads(5)))
        with pytest.raises(ConversionError, match="wrong checksum"):
            parse(path)


def test_b_tree_that_contains_itself(tmp_path: Path) -> None:
    path = write(tmp_path, one)
    data = bytearray(path.read_bytes())
    node = data.index(b"TREE")
    data[node + 5] = 1  # its level
    struct.pack_into("<Q", data, node + 32, node)
    path.write_bytes(data)
    with pytest.raises(ConversionError, match=f"shares the structure at {node}"):
        parse(path)


def test_two_groups_that_share_a_heap(tmp_path: Path) -> None:
    path = write(tmp_path, lambda file: [file.create_group(name) for name in ("a", "b")])
    data = bytearray(path.read_bytes())
    first, second = (
        match.start() for match in re.finditer(b"HEAP", bytes(data)) if match.start() > 1000
    )
    path.write_bytes(data.replace(quads(second), quads(first)))
    with pytest.raises(ConversionError, match=f"/b: shares the structure at {first}"):
        parse(path)


def test_text_that_is_not_in_the_heap(tmp_path: Path) -> None:
    path = write(tmp_path, one)
    data = bytearray(path.read_bytes())
    struct.pack_into("<H", data, data.index(b"GCOL") + 16, 2)  # the index of the first text
    path.write_bytes(data)
    with pytest.raises(ConversionError, match="/layers: has an attribute whose text is missing"):
        parse(path)


def twins(file: h5py.File) -> None:
    for name in ("aaaa", "bbbb"):
        file.create_group(name)
        file["aaaa"].attrs[f"of {name}"] = 1


DAMAGE: dict[str, tuple[bytes, bytes, str]] = {
    "slash in a name": (b"bbbb\0", b"a/bb\0", "/: has a child that is named 'a/bb'"),
    "two children of one name": (b"bbbb\0", b"aaaa\0", "/: has two children of one name"),
    "two attributes of one name": (b"of bbbb", b"of aaaa", "/aaaa: has two attributes of one name"),
    "no B-tree": (b"TREE", b"TREX", "/: has no TREE structure"),
    "another B-tree": (b"TREE\0", b"TREE\1", "/: has a wrong B-tree node"),
    "no heap of names": (b"HEAP", b"HEAX", "/: has no HEAP structure"),
    "no leaf": (b"SNOD", b"SNOX", "/: has no SNOD structure"),
}


@pytest.mark.parametrize(("old", "new", "message"), DAMAGE.values(), ids=DAMAGE)
def test_damage_is_refused_by_name(tmp_path: Path, old: bytes, new: bytes, message: str) -> None:
    path = write(tmp_path, twins)
    replace(path, old, new)
    with pytest.raises(ConversionError, match=re.escape(f"{path}: {message}")):
        parse(path)


def test_missing_heap_of_texts(tmp_path: Path) -> None:
    path = write(tmp_path, one)
    replace(path, b"GCOL", b"GCOX")
    with pytest.raises(ConversionError, match="/layers: has no GCOL structure"):
        parse(path)


def test_b_tree_with_a_level_missing(tmp_path: Path) -> None:
    path = write(tmp_path, lambda file: [file.create_group(str(i)) for i in range(500)])
    replace(path, b"TREE\0\1", b"TREE\0\2")
    with pytest.raises(ConversionError, match="/: has a wrong B-tree node"):
        parse(path)


def test_name_that_is_too_long(tmp_path: Path) -> None:
    path = write(tmp_path, lambda file: file.create_group("x" * 1024))
    with pytest.raises(ConversionError, match="/: has a child whose name does not end"):
        parse(path)


def test_root_that_is_no_group(tmp_path: Path) -> None:
    path = write(tmp_path, one)
    with h5py.File(path) as file:
        address = h5py.h5o.get_info(file["layers/dense"].id).addr
    data = bytearray(path.read_bytes())
    for root, message in (
        (address, "its root is a dataset"),
        (data.index(b"HEAP"), "/: has no object header"),
    ):
        struct.pack_into("<Q", data, 64, root)
        path.write_bytes(data)
        with pytest.raises(ConversionError, match=message):
            parse(path)


def test_messages_that_do_not_fit(tmp_path: Path) -> None:
    """A filter on contiguous data, a second data type, a future superblock."""
    for old, new, message in (
        (
            struct.pack("<HHB", 5, 8, 1),
            struct.pack("<HHB", 0x0B, 8, 1),
            "/layers/dense: is compressed or filtered",
        ),
        (
            struct.pack("<HHB", 5, 8, 1),
            struct.pack("<HHB", 3, 8, 1),
            "/layers/dense: has 2 header messages of type 3",
        ),
        (HDF5 + b"\0", HDF5 + b"\4", "a superblock of version 4"),
    ):
        path = write(tmp_path, one)
        replace(path, old, new)
        with pytest.raises(ConversionError, match=message):
            parse(path)


def test_header_of_a_future_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hdf5_blocks, "_checked", lambda data: data[:-4])
    path = write(tmp_path, one, libver="latest")
    replace(path, b"OHDR\2", b"OHDR\3")
    with pytest.raises(ConversionError, match="/: an object header of version 3 is not supported"):
        parse(path)


@pytest.mark.parametrize(
    ("decode", "data"),
    [
        (hdf5_messages.dataspace, bytes([2, 33, 0, 1]) + bytes(8 * 33)),
        (hdf5_messages.dataspace, bytes([3, 0, 0, 1])),
        (hdf5_messages.datatype, bytes([0x13, 0, 0, 0]) + bytes(4)),  # strings of no bytes
        (hdf5_messages.datatype, bytes([0x1F, 0, 0, 0, 4, 0, 0, 0])),
        (hdf5_messages.layout, bytes([2, 1]) + bytes(16)),
        (hdf5_messages.link, bytes([2, 0])),
        (hdf5_messages.attribute, bytes([4]) + bytes(7)),
    ],
)
def test_message_that_is_out_of_range(
    decode: Callable[[hdf5_messages.Fields], Any], data: bytes
) -> None:
    with pytest.raises(hdf5_messages.Hdf5Error, match=r"malformed|not supported"):
        decode(hdf5_messages.Fields(data))


def test_structures_that_overlap_run_out_of_budget(tmp_path: Path) -> None:
    """A text in the heap that 4000 elements name: 4000 times its size, from one copy in the
    file."""
    path = write(
        tmp_path,
        lambda file: file.attrs.update(names=["x" * 50_000, *[f"{i}" for i in range(3_000)]]),
    )
    data = path.read_bytes()
    first = data.index(struct.pack("<I", 50_000))
    end = first + 16 * 3_001
    path.write_bytes(data[:first] + data[first : first + 16] * 3_001 + data[end:])
    with pytest.raises(ConversionError, match="/: has structures that overlap"):
        parse(path)


# ---- mutations: only ConversionError escapes, soon


SEEDS: dict[str, tuple[Callable[[h5py.File], Any], dict[str, Any]]] = {
    "legacy": (lambda file: legacy(file, 4), {}),
    "attributes": (attributes, {}),
    "few, v2": (few, VERSIONS["v2"]),
    "attributes, v3": (attributes, VERSIONS["v3"]),
}
INTERESTING = [0, 1, 8, 2**16 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1]


def mutate(data: bytes, choose: random.Random) -> bytes:
    changed = bytearray(data)
    addresses = [*INTERESTING, *(choose.randrange(len(data)) & -8 for _ in range(8))]
    for _ in range(choose.choice((1, 1, 2, 4, 16))):
        at = choose.randrange(len(data))
        if choose.random() < 0.7:
            changed[at] = choose.randrange(256)
        else:
            changed[at & -8 : (at & -8) + 8] = quads(choose.choice(addresses))
    return bytes(
        changed[: choose.randrange(len(data))] if choose.random() < 0.02 else changed[: len(data)]
    )


class InMemory(SourceFile):
    """Bytes as a file; the reader must never ask for others."""

    def __init__(self, data: bytes) -> None:
        self.path, self.data, self.size = Path("mutated.h5"), data, len(data)

    def read(self, offset: int, nbytes: int) -> bytes:
        assert 0 <= offset <= offset + nbytes <= self.size
        return self.data[offset : offset + nbytes]


def outcome(data: bytes) -> str:
    """Parse; the refusal, if there was one."""
    try:
        read_hdf5(InMemory(data))
    except ConversionError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("count", [3_000, pytest.param(20_000, marks=pytest.mark.full)])
def test_mutated_files_are_read_or_refused(
    tmp_path: Path, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        hdf5_blocks, "_checked", lambda data: data[:-4]
    )  # so that mutations get past checksums
    seeds = [write(tmp_path, fill, **options).read_bytes() for fill, options in SEEDS.values()]
    choose, refusals = random.Random(5), set()
    for i in range(count):
        data = mutate(seeds[i % len(seeds)], choose)
        begin = time.process_time()
        refusal = outcome(data)
        assert time.process_time() - begin < 1
        assert not refusal or (refusal.isprintable() and refusal.startswith("mutated.h5: "))
        refusals.add(re.sub(r".*: |\d+", "", refusal))
    assert len(refusals) > 30  # many different checks were reached
