"""The HDF5 reader against h5py: the same tree from what Keras writes, a named refusal of everything else."""

from __future__ import annotations

import random
import re
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import ml_dtypes
import numpy as np
import pytest

from weightport.converters import hdf5_blocks, hdf5_messages
from weightport.converters.checkpoint import DTYPES, SourceFile
from weightport.converters.errors import ConversionError
from weightport.converters.hdf5 import Dataset, Group, is_hdf5, read_hdf5

VERSIONS = {  # keyword arguments of h5py.File -> superblock, object headers, groups
    "v0": {},
    "v2": {"libver": ("v108", "v108")},
    "v3": {"libver": "latest"},
    "tracked": {"track_order": True},  # superblock 0, but new-style groups
}
MODEL_CONFIG = '{"class_name": "Functional", "config": "' + "é" * 30_000 + '"}'


# ---- h5py as the oracle


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


# ---- files like those of Keras (names, attributes and order as Keras 2.15 and 3.15 write them)


def kernel(*shape: int, dtype: str = "f4") -> np.ndarray:
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(dtype)


def legacy(file: h5py.Group, layers: int = 25, text: Callable[[list[str]], Any] = list) -> None:
    """`save_weights("x.h5")`: a group per layer, named weights below it."""
    names = ["dense", *(f"dense_{i}" for i in range(1, layers))]
    file.attrs["layer_names"] = text(["input_1", *names])
    file.attrs["backend"], file.attrs["keras_version"] = "tensorflow", "2.15.0"
    file.create_group("input_1").attrs["weight_names"] = []
    file.create_group("top_level_model_weights").attrs["weight_names"] = []
    for i, name in enumerate(names):
        group = file.create_group(name)
        group.attrs["weight_names"] = text([f"{name}/kernel:0", f"{name}/bias:0"])
        group[f"{name}/kernel:0"], group[f"{name}/bias:0"] = kernel(3, i + 1), kernel(i + 1)


def fixed(names: list[str]) -> np.ndarray:
    """Names as Keras 2 wrote them through h5py 2: fixed-length bytes."""
    return np.array([name.encode() for name in names])


def whole_model(file: h5py.File) -> None:
    """`save("x.h5")`: the legacy layout below a group, the configuration and the optimizer beside it."""
    legacy(file.create_group("model_weights"))
    file.attrs["model_config"] = MODEL_CONFIG
    file.attrs["training_config"] = '{"loss": "mse"}'
    file["optimizer_weights/adam/iter:0"] = np.int64(7)
    file["optimizer_weights/adam/m:0"] = kernel(3, 4)


def modern(file: h5py.File, layers: int = 25) -> None:
    """`save_weights("x.weights.h5")`: numbered variables, every kind of data that Keras stores."""
    file.create_group("vars")
    for i in range(layers):
        variables = file.create_group(f"layers/conv2d_{i}/vars" if i else "layers/conv2d/vars")
        variables.attrs["name"] = f"conv2d_{i + 7}"
        variables["0"], variables["1"] = kernel(3, 3, 2, i + 1), kernel(i + 1)
    of_types = file.create_group("layers/types/vars")
    for i, dtype in enumerate(("f2", "f4", "f8", "i1", "u1", "i2", "i4", "i8", "?")):
        of_types[str(i)] = kernel(2, 5).astype(dtype)
    of_types["9"] = kernel(4, 3).astype(ml_dtypes.bfloat16)
    of_types["9"].attrs["dtype"] = "bfloat16"
    file["optimizer/vars/0"] = np.int64(1000)
    file["optimizer/vars/1"] = np.float32(1e-5)
    file["empty"] = np.zeros((0, 4), "f4")


def attributes(file: h5py.File) -> None:
    values = {
        "text": "naïve ✓",
        "empty": "",
        "bytes": np.bytes_("ascii"),
        "int": 7,
        "bool": True,
        "float": 0.1,
    }
    arrays = {
        "texts": ["a", "", "çé"],
        "fixed": fixed(["one", "three"]),
        "matrix": np.array([[1, 2], [3, 4]], "i4"),
        "none": [],
        "null": h5py.Empty("f4"),
        "half": np.float16([0.5]),
    }
    file.create_group("scalars").attrs.update(values)
    file.create_group("arrays").attrs.update(arrays)
    file["on_dataset"] = kernel(3)
    file["on_dataset"].attrs.update(arrays)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write a file with h5py, by a function that fills it."""

    def write(fill: Callable[[h5py.File], None], **options: Any) -> Path:
        path = tmp_path / "x.h5"
        with h5py.File(path, "w", **options) as file:
            fill(file)
        return path

    return write


def few(file: h5py.File) -> None:
    """As `modern` and `legacy`, with groups of at most eight children, which the newer formats keep in the header."""
    legacy(file.create_group("model_weights"), 5)
    file["layers/dense/vars/0"], file["layers/dense/vars/1"] = kernel(4, 5), kernel(5)
    file["layers/dense_1/vars/0"] = kernel(4, 5).astype(ml_dtypes.bfloat16)
    file["layers/dense_1/vars"].attrs["name"] = "dense_8"
    file["flags"] = np.array([True, False])
    file["counter"] = np.int64(3)
    file.create_group("größe")


# ---- the same as h5py


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
def test_reads_what_keras_writes(write: Callable[..., Path], fill: Callable[[h5py.File], None], datasets: int) -> None:
    path = write(fill)
    assert check(path) == datasets


@pytest.mark.parametrize("options", VERSIONS.values(), ids=VERSIONS)
@pytest.mark.parametrize("fill", [few, attributes])
def test_reads_every_version_of_the_format(
    write: Callable[..., Path], fill: Callable[[h5py.File], None], options: dict[str, Any]
) -> None:
    check(write(fill, **options))


def test_the_versions_are_what_they_say(write: Callable[..., Path]) -> None:
    assert [write(few, **options).read_bytes()[8] for options in VERSIONS.values()] == [0, 2, 3, 0]


def test_superblock_1(write: Callable[..., Path]) -> None:
    """h5py cannot ask for version 1: it is 4 bytes longer, so the root's header moves to the end of the file."""
    old = write(few).read_bytes()
    root = struct.unpack_from("<Q", old, 64)[0]
    (size,) = struct.unpack_from("<I", old, root + 8)
    new = bytearray(old + old[root : root + 16 + size])
    new[8], new[24:100] = 1, bytes(4) + old[24:96]
    struct.pack_into("<Q", new, 44, len(new))  # end of file
    struct.pack_into("<Q", new, 68, len(old))
    path = write(few)
    path.write_bytes(new)
    assert check(path) == 15


def test_a_header_that_continues_elsewhere(write: Callable[..., Path]) -> None:
    def fill(file: h5py.File) -> None:
        group = file.create_group("g")
        for i in range(7):
            group.attrs[f"name{i}"] = "x" * 50 * i
            file[f"between{i}"] = kernel(8)

    for options in ({}, {"libver": ("v108", "v108")}):
        path = write(fill, **options)
        assert (b"OCHK" in path.read_bytes()) == bool(options)
        check(path)


def test_a_header_with_all_its_options(write: Callable[..., Path]) -> None:
    def fill(file: h5py.File) -> None:
        options = h5py.h5p.create(h5py.h5p.GROUP_CREATE)
        options.set_attr_phase_change(6, 4)
        options.set_attr_creation_order(h5py.h5p.CRT_ORDER_TRACKED)
        h5py.h5g.create(file.id, b"g", gcpl=options)
        file["g"].attrs["a"] = 1

    check(write(fill, libver="latest"))


def test_a_text_that_was_never_set(write: Callable[..., Path]) -> None:
    def fill(file: h5py.File) -> None:
        kind = h5py.h5t.py_create(h5py.string_dtype(), logical=True)
        h5py.h5a.create(file.id, b"nil", kind, h5py.h5s.create(h5py.h5s.SCALAR))

    assert parse(write(fill)).attrs == {"nil": ""}


def test_bfloat16_as_a_float(write: Callable[..., Path]) -> None:
    """As a library with such a type may write it; Keras stores two opaque bytes."""

    def fill(file: h5py.File) -> None:
        kind = h5py.h5t.IEEE_F32LE.copy()
        kind.set_fields(15, 7, 8, 0, 7)
        kind.set_size(2)
        h5py.h5d.create(file.id, b"x", kind, h5py.h5s.create_simple((3,))).write(
            h5py.h5s.ALL, h5py.h5s.ALL, np.float32([1, -2, 0.5])
        )

    path = write(fill)
    (dataset,) = leaves(parse(path))
    data = SourceFile(path).read(dataset.offset, dataset.nbytes)
    assert dataset.dtype == "BF16"
    assert np.frombuffer(data, DTYPES["BF16"]).tolist() == [1, -2, 0.5]


def test_the_values(write: Callable[..., Path]) -> None:
    """What the callers rely on, spelled out."""
    root = parse(write(whole_model))
    assert root.attrs["model_config"] == MODEL_CONFIG
    weights = root.children["model_weights"]
    assert isinstance(weights, Group)
    assert weights.children["input_1"].attrs["weight_names"] == []  # h5py stores an empty list as floats
    assert weights.children["dense_3"].attrs["weight_names"] == ["dense_3/kernel:0", "dense_3/bias:0"]
    assert list(weights.children)[:4] == ["dense", "dense_1", "dense_10", "dense_11"]
    adam = root.children["optimizer_weights"].children["adam"]
    assert (adam.children["iter:0"].dtype, adam.children["iter:0"].shape) == ("I64", ())


def test_what_is_no_tensor_is_named_and_spares_the_file(write: Callable[..., Path]) -> None:
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

    root = parse(write(fill))
    names = {name: child.dtype for name, child in root.children.items() if isinstance(child, Dataset)}
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


def test_a_file_inside_a_file(write: Callable[..., Path], tmp_path: Path) -> None:
    """A stored member of a `.keras` archive: offsets are those of the archive."""
    inner = write(modern)
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


def test_no_tensor_is_read(write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    ranges: list[tuple[int, int]] = []
    read = SourceFile.read
    monkeypatch.setattr(SourceFile, "read", lambda self, at, n: (ranges.append((at, at + n)), read(self, at, n))[1])
    root = parse(write(modern))
    data = [(child.offset, child.offset + child.nbytes) for child in leaves(root)]
    assert len(data) == 63
    assert not [1 for begin, end in data for low, high in ranges if low < end and begin < high]


def leaves(group: Group) -> Iterator[Dataset]:
    for child in group.children.values():
        yield from leaves(child) if isinstance(child, Group) else (child,)


def test_lookup3_known_answers() -> None:
    """From the self-test of Bob Jenkins' lookup3.c."""
    assert hdf5_messages.checksum(b"") == 0xDEADBEEF
    assert hdf5_messages.checksum(b"Four score and seven years ago") == 0x17770551


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


def set_link(link: Any) -> Callable[[h5py.File], None]:
    def fill(file: h5py.File) -> None:
        file.create_group("layers")["evil"] = link

    return fill


def dataset(**options: Any) -> Callable[[h5py.File], None]:
    return lambda file: file.create_dataset("layers/evil", (64,), "f4", **options) and None


def many_children(file: h5py.File) -> None:
    for i in range(9):
        file.create_group(f"layers/{i}")


def many_attributes(file: h5py.File) -> None:
    file.create_group("layers").attrs.update({str(i): i for i in range(9)})


LATEST = {"libver": "latest"}
ATTACKS: dict[str, tuple[Callable[[h5py.File], Any], dict[str, Any], str]] = {
    "external link": (set_link(h5py.ExternalLink("/etc/hostname", "/")), {}, "/layers/evil: is an external link"),
    "soft link": (set_link(h5py.SoftLink("/layers")), {}, "/layers/evil: is a soft link"),
    "soft link, new style": (set_link(h5py.SoftLink("/layers")), LATEST, "/layers/evil: is a soft link"),
    "second hard link": (alias, {}, "/layers/second: is a second link to one object"),
    "second hard link, new style": (alias, LATEST, "/layers/second: is a second link to one object"),
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
    "compact": (lambda file: created(file, h5py.h5d.COMPACT), {}, "/layers/evil: its data layout is compact"),
    "never written": (created, {}, "/layers/evil: was never written"),
    "committed type": (committed, {}, "/layers/evil: has a committed data type"),
    "committed type of an attribute": (
        lambda file: (file.update(t=np.dtype("f4")), file.attrs.create("a", 1, dtype=file["t"])),
        {},
        "/: has an attribute with a committed data type",
    ),
    "lone committed type": (lambda file: file.update(t=np.dtype("f4")), {}, "/t: is neither a group nor a dataset"),
    "deep nesting": (lambda file: file.create_group("g/" * 65), {}, "/g" * 65 + ": is nested deeper than 64 groups"),
    "dense children": (many_children, LATEST, "/layers: keeps its children in a fractal heap"),
    "dense attributes": (many_attributes, LATEST, "/layers: keeps its attributes in a fractal heap"),
    "control characters": (
        lambda file: file.create_group("a\x1b[31m"),
        {},
        r"/: has a child that is named 'a\x1b[31m', which is no usable name",
    ),
    "user block": (lambda file: None, {"userblock_size": 512}, "not an HDF5 file"),
}


@pytest.mark.parametrize(("fill", "options", "message"), ATTACKS.values(), ids=ATTACKS)
def test_attack_is_refused_by_name(
    write: Callable[..., Path], fill: Callable[[h5py.File], None], options: dict[str, Any], message: str
) -> None:
    path = write(fill, **options)
    with pytest.raises(ConversionError, match="^" + re.escape(f"{path}: {message}")) as error:
        parse(path)
    assert "\n" not in str(error.value)


def test_64_groups_deep_is_read(write: Callable[..., Path]) -> None:
    assert check(write(lambda file: file.create_group("g/" * 64))) == 0


def test_user_block_is_refused_where_it_ends(write: Callable[..., Path]) -> None:
    path = write(lambda file: None, userblock_size=512)
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


def test_truncated(write: Callable[..., Path]) -> None:
    path = write(one)
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(size - 1)
    with pytest.raises(ConversionError) as error:
        parse(path)
    expected = f"{path}: truncated: needs {size} bytes, has {size - 1} (the superblock's end-of-file address)"
    assert str(error.value) == expected


@pytest.mark.parametrize(("size", "message"), [(0, ": not an HDF5"), (7, ": not an HDF5"), (60, ": truncated")])
def test_truncated_within_the_superblock(write: Callable[..., Path], size: int, message: str) -> None:
    path = write(one)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ConversionError, match=message):
        parse(path)


def test_sizes_that_disagree(write: Callable[..., Path]) -> None:
    path = write(one)
    replace(path, quads(12345), quads(12346))
    with pytest.raises(ConversionError, match="/layers/dense: stores 49380 bytes, but its shape and type need 49384"):
        parse(path)


def test_shape_that_overflows(write: Callable[..., Path]) -> None:
    path = write(one)
    replace(path, quads(12345), quads(2**63))
    with pytest.raises(ConversionError, match=f"need {2**65}"):
        parse(path)


@pytest.mark.parametrize("padding", [0, 2 * 10**6])
def test_data_outside_the_file(write: Callable[..., Path], padding: int) -> None:
    """What lies after the end-of-file address is outside, too."""
    path = write(one)
    with h5py.File(path) as file:
        address = file["layers/dense"].id.get_offset()
    replace(path, quads(address, 49380), quads(address + 10**6, 49380))
    path.write_bytes(path.read_bytes() + bytes(padding))
    with pytest.raises(ConversionError, match=r"/layers/dense: has its data at bytes \d+\.\.\d+ of \d+"):
        parse(path)


@pytest.mark.parametrize("options", [VERSIONS["v2"], VERSIONS["v3"]], ids=["v2", "v3"])
def test_wrong_checksum(write: Callable[..., Path], options: dict[str, Any]) -> None:
    path = write(one, **options)
    data = path.read_bytes()
    for field in (quads(len(data)), quads(12345)):  # in the superblock, in an object header
        path.write_bytes(data.replace(field, quads(5)))
        with pytest.raises(ConversionError, match="wrong checksum"):
            parse(path)


def test_b_tree_that_contains_itself(write: Callable[..., Path]) -> None:
    path = write(one)
    data = bytearray(path.read_bytes())
    node = data.index(b"TREE")
    data[node + 5] = 1  # its level
    struct.pack_into("<Q", data, node + 32, node)
    path.write_bytes(data)
    with pytest.raises(ConversionError, match=f"shares the structure at {node}"):
        parse(path)


def test_two_groups_that_share_a_heap(write: Callable[..., Path]) -> None:
    path = write(lambda file: [file.create_group(name) for name in ("a", "b")] and None)
    data = bytearray(path.read_bytes())
    first, second = (match.start() for match in re.finditer(b"HEAP", bytes(data)) if match.start() > 1000)
    path.write_bytes(data.replace(quads(second), quads(first)))
    with pytest.raises(ConversionError, match=f"/b: shares the structure at {first}"):
        parse(path)


def test_text_that_is_not_in_the_heap(write: Callable[..., Path]) -> None:
    path = write(one)
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
def test_damage_is_refused_by_name(write: Callable[..., Path], old: bytes, new: bytes, message: str) -> None:
    path = write(twins)
    replace(path, old, new)
    with pytest.raises(ConversionError, match=re.escape(f"{path}: {message}")):
        parse(path)


def test_missing_heap_of_texts(write: Callable[..., Path]) -> None:
    path = write(one)
    replace(path, b"GCOL", b"GCOX")
    with pytest.raises(ConversionError, match="/layers: has no GCOL structure"):
        parse(path)


def test_b_tree_with_a_level_missing(write: Callable[..., Path]) -> None:
    path = write(lambda file: [file.create_group(str(i)) for i in range(500)] and None)
    replace(path, b"TREE\0\1", b"TREE\0\2")
    with pytest.raises(ConversionError, match="/: has a wrong B-tree node"):
        parse(path)


def test_name_that_is_too_long(write: Callable[..., Path]) -> None:
    path = write(lambda file: file.create_group("x" * 1024) and None)
    with pytest.raises(ConversionError, match="/: has a child whose name does not end"):
        parse(path)


def test_root_that_is_no_group(write: Callable[..., Path]) -> None:
    path = write(one)
    with h5py.File(path) as file:
        address = h5py.h5o.get_info(file["layers/dense"].id).addr
    data = bytearray(path.read_bytes())
    for root, message in ((address, "its root is a dataset"), (data.index(b"HEAP"), "/: has no object header")):
        struct.pack_into("<Q", data, 64, root)
        path.write_bytes(data)
        with pytest.raises(ConversionError, match=message):
            parse(path)


def test_messages_that_do_not_fit(write: Callable[..., Path]) -> None:
    """A filter on contiguous data, a second data type, a future superblock."""
    for old, new, message in (
        (struct.pack("<HHB", 5, 8, 1), struct.pack("<HHB", 0x0B, 8, 1), "/layers/dense: is compressed or filtered"),
        (struct.pack("<HHB", 5, 8, 1), struct.pack("<HHB", 3, 8, 1), "/layers/dense: has 2 header messages of type 3"),
        (hdf5_blocks.SIGNATURE + b"\0", hdf5_blocks.SIGNATURE + b"\4", "a superblock of version 4"),
    ):
        path = write(one)
        replace(path, old, new)
        with pytest.raises(ConversionError, match=message):
            parse(path)


def test_header_of_a_future_version(write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hdf5_blocks, "_checked", lambda data: data[:-4])
    path = write(one, libver="latest")
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
def test_message_that_is_out_of_range(decode: Callable[[hdf5_messages.Fields], Any], data: bytes) -> None:
    with pytest.raises(hdf5_messages.Hdf5Error, match=r"malformed|not supported"):
        decode(hdf5_messages.Fields(data))


def test_structures_that_overlap_run_out_of_budget(write: Callable[..., Path]) -> None:
    """A text in the heap that 4000 elements name: 4000 times its size, from one copy in the file."""
    path = write(lambda file: file.attrs.update(names=["x" * 50_000, *[f"{i}" for i in range(3_000)]]))
    data = path.read_bytes()
    first = data.index(struct.pack("<I", 50_000))
    end = first + 16 * 3_001
    path.write_bytes(data[:first] + data[first : first + 16] * 3_001 + data[end:])
    with pytest.raises(ConversionError, match="/: has structures that overlap"):
        parse(path)


# ---- mutations: only ConversionError escapes, soon


SEEDS: dict[str, tuple[Callable[[h5py.File], None], dict[str, Any]]] = {
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
    return bytes(changed[: choose.randrange(len(data))] if choose.random() < 0.02 else changed[: len(data)])


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
    write: Callable[..., Path], count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hdf5_blocks, "_checked", lambda data: data[:-4])  # so that mutations get past checksums
    seeds = [write(fill, **options).read_bytes() for fill, options in SEEDS.values()]
    choose, refusals = random.Random(5), set()
    for i in range(count):
        data = mutate(seeds[i % len(seeds)], choose)
        begin = time.perf_counter()
        refusal = outcome(data)
        assert time.perf_counter() - begin < 1
        assert not refusal or (refusal.isprintable() and refusal.startswith("mutated.h5: "))
        refusals.add(re.sub(r".*: |\d+", "", refusal))
    assert len(refusals) > 30  # many different checks were reached
