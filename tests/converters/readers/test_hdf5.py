"""The HDF5 reader against h5py: the same tree, attributes and bytes."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import ml_dtypes
import numpy as np
import pytest

from weightport.converters.checkpoint import SourceFile
from weightport.converters.readers import hdf5_messages, hdf5_structures
from weightport.converters.readers.hdf5 import Dataset, Group, read_hdf5
from weightport.converters.readers.signatures import is_hdf5
from weightport.errors import ConversionError
from weightport.io.arrays import DTYPES

from ...support.hdf5_files import (
    MODEL_CONFIG,
    VERSIONS,
    attributes,
    few,
    fixed,
    kernel,
    legacy,
    modern,
    whole_model,
    write,
)


def plain(value: Any) -> Any:
    """An attribute as h5py reads it, in the reader's terms."""
    if isinstance(value, h5py.Empty):
        return None
    if isinstance(value, np.ndarray):
        return [plain(item) for item in value.ravel().tolist()]
    value = value.item() if isinstance(value, np.generic) else value
    return value.decode() if isinstance(value, bytes) else value


def assert_same(ours: Group | Dataset, theirs: h5py.Group | h5py.Dataset, file: SourceFile) -> int:
    """Compare two trees; the number of datasets."""
    assert ours.attrs == {name: plain(value) for name, value in theirs.attrs.items()}
    if isinstance(ours, Group):
        assert list(ours.children) == sorted(theirs)
        return sum(assert_same(child, theirs[name], file) for name, child in ours.children.items())
    assert ours.shape == theirs.shape
    assert theirs.dtype in (DTYPES[ours.dtype], np.dtype("V2") if ours.dtype == "BF16" else None)
    assert file.read(ours.offset, ours.nbytes) == np.asarray(theirs[()]).tobytes()
    return 1


def check(path: Path) -> int:
    file = SourceFile(path)
    with h5py.File(path) as theirs:
        return assert_same(read_hdf5(file), theirs, file)


def parse(path: Path, start: int = 0) -> Group:
    return read_hdf5(SourceFile(path), start)


@pytest.mark.parametrize(
    ("fill", "datasets"),
    [
        (legacy, 50),
        (lambda file: legacy(file, 3, fixed), 6),
        (lambda file: legacy(file, 400), 800),  # several B-tree levels
        (whole_model, 52),
        (modern, 63),
        (attributes, 1),
    ],
    ids=["legacy", "fixed-length names", "many layers", "whole model", "weights.h5", "attributes"],
)
def test_reads_what_keras_writes(
    tmp_path: Path, fill: Callable[[h5py.File], Any], datasets: int
) -> None:
    path = write(tmp_path, fill)
    assert check(path) == datasets


@pytest.mark.parametrize("options", VERSIONS.values(), ids=VERSIONS)
@pytest.mark.parametrize("fill", [few, attributes])
def test_reads_every_version_of_the_format(
    tmp_path: Path, fill: Callable[[h5py.File], Any], options: dict[str, Any]
) -> None:
    check(write(tmp_path, fill, **options))


def test_the_versions_are_what_they_say(tmp_path: Path) -> None:
    assert [write(tmp_path, few, **options).read_bytes()[8] for options in VERSIONS.values()] == [
        0,
        2,
        3,
        0,
    ]


def test_superblock_1(tmp_path: Path) -> None:
    """h5py cannot ask for version 1: it is 4 bytes longer, so the root's header moves to the end of
    the file."""
    old = write(tmp_path, few).read_bytes()
    root = struct.unpack_from("<Q", old, 64)[0]
    (size,) = struct.unpack_from("<I", old, root + 8)
    new = bytearray(old + old[root : root + 16 + size])
    new[8], new[24:100] = 1, bytes(4) + old[24:96]
    struct.pack_into("<Q", new, 44, len(new))  # end of file
    struct.pack_into("<Q", new, 68, len(old))
    path = write(tmp_path, few)
    path.write_bytes(new)
    assert check(path) == 15


def test_a_header_that_continues_elsewhere(tmp_path: Path) -> None:
    def fill(file: h5py.File) -> None:
        group = file.create_group("g")
        for i in range(7):
            group.attrs[f"name{i}"] = "x" * 50 * i
            file[f"between{i}"] = kernel(8)

    for options in ({}, {"libver": ("v108", "v108")}):
        path = write(tmp_path, fill, **options)
        assert (b"OCHK" in path.read_bytes()) == bool(options)
        check(path)


def test_a_header_with_all_its_options(tmp_path: Path) -> None:
    def fill(file: h5py.File) -> None:
        options = h5py.h5p.create(h5py.h5p.GROUP_CREATE)
        options.set_attr_phase_change(6, 4)
        options.set_attr_creation_order(h5py.h5p.CRT_ORDER_TRACKED)
        h5py.h5g.create(file.id, b"g", gcpl=options)
        file["g"].attrs["a"] = 1

    check(write(tmp_path, fill, libver="latest"))


def test_a_text_that_was_never_set(tmp_path: Path) -> None:
    def fill(file: h5py.File) -> None:
        kind = h5py.h5t.py_create(h5py.string_dtype(), logical=True)
        h5py.h5a.create(file.id, b"nil", kind, h5py.h5s.create(h5py.h5s.SCALAR))

    assert parse(write(tmp_path, fill)).attrs == {"nil": ""}


def test_bfloat16_as_a_float(tmp_path: Path) -> None:
    """As a library with such a type may write it; Keras stores two opaque bytes."""

    def fill(file: h5py.File) -> None:
        kind = h5py.h5t.IEEE_F32LE.copy()
        kind.set_fields(15, 7, 8, 0, 7)
        kind.set_size(2)
        h5py.h5d.create(file.id, b"x", kind, h5py.h5s.create_simple((3,))).write(
            h5py.h5s.ALL, h5py.h5s.ALL, np.array([1, -2, 0.5], np.float32)
        )

    path = write(tmp_path, fill)
    (dataset,) = leaves(parse(path))
    data = SourceFile(path).read(dataset.offset, dataset.nbytes)
    assert dataset.dtype == "BF16"
    assert np.frombuffer(data, DTYPES["BF16"]).tolist() == [1, -2, 0.5]


def test_the_values(tmp_path: Path) -> None:
    """What the callers rely on, spelled out."""
    root = parse(write(tmp_path, whole_model))
    assert root.attrs["model_config"] == MODEL_CONFIG
    weights = root.children["model_weights"]
    assert isinstance(weights, Group)
    assert (
        weights.children["input_1"].attrs["weight_names"] == []
    )  # h5py stores an empty list as floats
    assert weights.children["dense_3"].attrs["weight_names"] == [
        "dense_3/kernel:0",
        "dense_3/bias:0",
    ]
    assert list(weights.children)[:4] == ["dense", "dense_1", "dense_10", "dense_11"]
    optimizer = root.children["optimizer_weights"]
    assert isinstance(optimizer, Group)
    adam: Any = optimizer.children["adam"]
    assert (adam.children["iter:0"].dtype, adam.children["iter:0"].shape) == ("I64", ())


def test_what_is_no_tensor_is_named_and_spares_the_file(tmp_path: Path) -> None:
    def fill(file: h5py.File) -> None:
        file["compound"] = np.zeros(2, [("a", "f4"), ("b", "i4")])
        file["fixed"] = np.array([b"abc"])
        file["texts"] = ["a", "b"]
        file.create_dataset("sequence", 1, h5py.vlen_dtype("i4"))[0] = np.arange(3)
        file["big_endian"] = np.zeros(2, ">f4")
        file["big_integer"] = np.zeros(2, ">i4")
        file["u32"] = np.zeros(2, "u4")
        file["c64"] = np.zeros(2, "c8")
        file["enum"] = np.zeros(2, dtype=h5py.enum_dtype({"A": 0, "B": 1}, basetype="i1"))
        file["reference"] = np.array([file.ref], dtype=h5py.ref_dtype)
        file["float8"] = np.zeros(2, ml_dtypes.float8_e4m3fn).view("V1")
        file["null"] = h5py.Empty("f4")
        file["weight"] = kernel(2)
        file.attrs["odd"] = np.zeros(2, [("a", "f4")])

    root = parse(write(tmp_path, fill))
    names = {
        name: child.dtype for name, child in root.children.items() if isinstance(child, Dataset)
    }
    assert names.pop("weight") == "F32"
    assert names == {
        "compound": "8-byte compound",
        "fixed": "fixed-length string",
        "texts": "variable-length string",
        "sequence": "16-byte variable-length",
        "big_endian": "big-endian 4-byte float",
        "big_integer": "big-endian 4-byte integer",
        "u32": "4-byte integer",
        "c64": "8-byte compound",
        "enum": "1-byte enumeration",
        "reference": "8-byte reference",
        "float8": "1-byte opaque",
        "null": "null",
    }
    assert root.attrs["odd"] is None


def test_a_file_inside_a_file(tmp_path: Path) -> None:
    """A stored member of a `.keras` archive: offsets are those of the archive."""
    inner = write(tmp_path, modern)
    outer = tmp_path / "outer"
    outer.write_bytes(b"x" * 1001 + inner.read_bytes() + b"y" * 500)
    file = SourceFile(outer)
    assert is_hdf5(file, 1001)
    assert not is_hdf5(file)
    assert not is_hdf5(file, file.size - 3)
    with h5py.File(inner) as theirs:
        assert assert_same(read_hdf5(file, 1001, inner.stat().st_size), theirs, file) == 63
        assert assert_same(read_hdf5(file, 1001), theirs, file) == 63
    with pytest.raises(ConversionError, match=r"truncated: needs \d+ bytes, has 2000"):
        read_hdf5(file, 1001, 2000)


def test_no_tensor_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ranges: list[tuple[int, int]] = []
    read = SourceFile.read

    def counted(self: SourceFile, offset: int, nbytes: int) -> bytes:
        ranges.append((offset, offset + nbytes))
        return read(self, offset, nbytes)

    def large(file: h5py.File) -> None:
        for i in range(63):
            file[f"layers/x{i}/vars/0"] = np.zeros(10_000, "f4")

    monkeypatch.setattr(SourceFile, "read", counted)
    root = parse(write(tmp_path, large))
    beside = hdf5_structures.PAGE  # bytes of a tensor that structures may be read with
    inside = [
        (child.offset + beside, child.offset + child.nbytes - beside) for child in leaves(root)
    ]
    assert len(inside) == 63
    assert not [1 for begin, end in inside for low, high in ranges if low < end and begin < high]
    assert sum(high - low for low, high in ranges) < 4 * beside * 63


def leaves(group: Group) -> Iterator[Dataset]:
    for child in group.children.values():
        yield from leaves(child) if isinstance(child, Group) else (child,)


def test_lookup3_known_answers() -> None:
    """From the self-test of Bob Jenkins' lookup3.c."""
    assert hdf5_messages.checksum(b"") == 0xDEADBEEF
    assert hdf5_messages.checksum(b"Four score and seven years ago") == 0x17770551
