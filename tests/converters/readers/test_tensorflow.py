"""The TensorFlow checkpoint reader: what it reads, and every reason for which it refuses a file."""

import base64
import os
import random
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from weightport.converters.readers.bundles import find_bundle
from weightport.converters.readers.leveldb import crc32c
from weightport.converters.readers.tensorflow import Node, read_bundle
from weightport.errors import ConversionError

from ...support.tf_bundle_writer import (
    GRAPH_KEY,
    block,
    graph_entry,
    index_entry,
    length,
    number,
    object_message,
    string_entry,
    table,
    trailer,
    varint,
    write_bundle,
    write_index,
)

DTYPES = {
    "F32": "f4", "F64": "f8", "F16": "f2", "BF16": ml_dtypes.bfloat16,
    "I64": "i8", "I32": "i4", "I16": "i2", "I8": "i1", "U8": "u1", "BOOL": "?",
}  # fmt: skip
GRAPH = [
    Node({"model": 1}, {}),
    Node({"kernel": 2, "parent": 0}, {}),
    Node({}, {"VARIABLE_VALUE": "weights/0"}),
]
W = index_entry(1, (2, 3), 0, 24)
HEAD = (b"", number(1, 1))


def damaged(
    tmp_path: Path, entries: dict[str, bytes], data: bytes = bytes(64), **options: Any
) -> Path:
    """A bundle of raw entries over one data file."""
    prefix = tmp_path / "ckpt"
    write_index(prefix, entries, **options)
    (tmp_path / "ckpt.data-00000-of-00001").write_bytes(data)
    return prefix


def damaged_table(tmp_path: Path, index: bytes, data: bytes = bytes(64)) -> Path:
    """A bundle of a raw index file over one data file."""
    (tmp_path / "ckpt.index").write_bytes(index)
    (tmp_path / "ckpt.data-00000-of-00001").write_bytes(data)
    return tmp_path / "ckpt"


def small_bundle(prefix: Path) -> Path:
    write_bundle(prefix, {"weights/0": np.arange(6, dtype="f4").reshape(2, 3)}, GRAPH)
    return prefix


# written by TensorFlow 2.21: tf.train.Checkpoint(kernel=tf.Variable([[1.0, 2.0, 3.0], [4.0, 5.0,
# 6.0]])).write(...)
FROM_TENSORFLOW = {
    "ckpt.index": (
        "000IE0U81b0RS8gUqeVmLrYLkNlsKjLQF+pPeMvXLsVZ!QbABi2nP}XAQ&iIHMO=7-"
        "vA*KYh`k7Wo$1lK~z*yNkUarMN=<UK~hOULQF+pRzXZvMF;^B2oeGa0ullU11K0Zdh7M8000000RR9101gu{AOHXW00961006-"
        "9p|Ah}0&D<u000000RR9108)tBta%8A0S*8F000000000000000000000000000000000000000009X5fizIbN+W"
    ),
    "ckpt.data-00000-of-00001": (
        "004kL0000$002Nh004kM005vs006*1S0WNI-U<*33J3ub25V(<Ze?sL0tf*LLlQj-"
        "4pu=@NkKwPMPF7yOjSh^2v%WoX<=e)Wf~!CWpZw1Y%eZBR8&$)LRC~nQ!iFQQb|EVOhsQ-K}=OeDgp=r"
    ),
}


def test_a_checkpoint_of_tensorflow_itself(tmp_path: Path) -> None:
    for name, text in FROM_TENSORFLOW.items():
        (tmp_path / name).write_bytes(base64.b85decode(text))
    bundle = read_bundle(tmp_path / "ckpt")
    key = "kernel/.ATTRIBUTES/VARIABLE_VALUE"
    assert bundle.graph == [Node({"kernel": 1}, {}), Node({}, {"VARIABLE_VALUE": key})]
    assert bundle.tensors[key].numpy().tolist() == [[1, 2, 3], [4, 5, 6]]


def test_crc32c_of_the_standards_example() -> None:
    assert crc32c(b"123456789") == 0xE3069283


def test_tensors_graph_and_order_survive(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tensors = {
        f"weights/{i}": rng.normal(size=(i % 4, 2, 3)[i % 3 :]).astype(dtype)
        for i, dtype in enumerate(list(DTYPES.values()) * 30)
    }
    write_bundle(tmp_path / "ckpt", tensors, GRAPH)
    bundle = read_bundle(tmp_path / "ckpt")
    assert bundle.graph == GRAPH
    assert list(bundle.tensors) == sorted(tensors)
    assert bundle.skipped == {}
    for key, array in tensors.items():
        tensor = bundle.tensors[key]
        assert DTYPES[tensor.dtype] == array.dtype
        assert tensor.shape == array.shape
        assert tensor.numpy().tobytes() == array.tobytes()


def test_several_data_files_and_gaps_between_tensors(tmp_path: Path) -> None:
    entries = {
        "a": index_entry(4, (2,), 4, 2, shard=1),
        "b": index_entry(4, (), 0, 1),
        "c": index_entry(4, (1,), 8, 1),
    }
    write_index(tmp_path / "ckpt", entries, header=number(1, 2))
    (tmp_path / "ckpt.data-00000-of-00002").write_bytes(bytes(range(9)))
    (tmp_path / "ckpt.data-00001-of-00002").write_bytes(bytes(range(10, 19)))
    bundle = read_bundle(tmp_path / "ckpt")
    assert {key: tensor.numpy().tolist() for key, tensor in bundle.tensors.items()} == {
        "a": [14, 15],
        "b": 0,
        "c": [8],
    }
    assert len(bundle.files) == 3


def test_what_is_not_weights_is_listed(tmp_path: Path) -> None:
    bundle = read_bundle(
        damaged(tmp_path, {"config": index_entry(7, (), 0, 9), "w": index_entry(22, (2,), 16, 8)})
    )
    assert bundle.tensors == {}
    assert bundle.graph == []
    assert bundle.skipped == {
        "config": "text, not weights",
        "w": "of TensorFlow dtype 22, not weights",
    }


# --- find_bundle


@pytest.mark.parametrize("named", ["ckpt.index", "ckpt.data-00000-of-00001", "ckpt", ""])
def test_a_bundle_is_found_by_any_of_its_names(tmp_path: Path, named: str) -> None:
    small_bundle(tmp_path / "ckpt")
    assert find_bundle(tmp_path / named) == tmp_path / "ckpt"


def test_a_saved_model_is_found(tmp_path: Path) -> None:
    (tmp_path / "variables").mkdir()
    small_bundle(tmp_path / "variables" / "variables")
    small_bundle(tmp_path / "other")
    assert find_bundle(tmp_path) == tmp_path / "variables" / "variables"


def test_only_content_makes_an_index(tmp_path: Path) -> None:
    for name in ("ckpt.index", "empty.index"):
        (tmp_path / name).write_text("an index of something else" * (name == "ckpt.index"))
    os.mkfifo(tmp_path / "pipe.index")
    assert [
        find_bundle(tmp_path / name)
        for name in ("ckpt", "empty.index", "pipe.index", ".index", "", "absent")
    ] == [None] * 6


def test_the_newest_of_several(tmp_path: Path) -> None:
    for name in ("ckpt-1", "ckpt-2", "ckpt-3"):
        small_bundle(tmp_path / name)
    with pytest.raises(
        ConversionError, match="several checkpoints; name one of ckpt-1, ckpt-2, ckpt-3"
    ):
        find_bundle(tmp_path)
    (tmp_path / "checkpoint").write_text(
        'model_checkpoint_path: "ckpt-2"\nall_model_checkpoint_paths: "ckpt-1"\n'
    )
    assert find_bundle(tmp_path) == tmp_path / "ckpt-2"


@pytest.mark.parametrize("present", [0, 2])
@pytest.mark.parametrize(
    "named",
    ["../secret/ckpt", "{folder}/secret/ckpt", "secret\\ckpt", "..", "", "\x1b[31m", "a" * 5000],
)
def test_a_checkpoint_file_leads_nowhere_else(tmp_path: Path, named: str, present: Any) -> None:
    folder, secret = tmp_path / "in", tmp_path / "secret"
    folder.mkdir()
    secret.mkdir()
    small_bundle(secret / "ckpt")
    for i in range(present):
        small_bundle(folder / f"ckpt-{i}")
    (folder / "checkpoint").write_text(
        f'model_checkpoint_path: "{named.format(folder=tmp_path)}"\n'
    )
    with pytest.raises(ConversionError, match="no checkpoint of this folder") as caught:
        find_bundle(folder)
    assert str(caught.value).isprintable()


# --- read_bundle refuses: where the tensors lie


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        (index_entry(1, (2, 3), 0, 20), r"'w' has 20 bytes, but F32 \(2, 3\) needs 24"),
        (
            index_entry(1, (2, 3), 48, 24),
            r"'w' lies at bytes 48\.\.72 of a data file of 64; is it truncated\?",
        ),
        (index_entry(1, (2, 3), -8, 24), r"'w' lies at bytes -8\.\.16"),
        (index_entry(1, (2, 3), 24, -24), r"'w' lies at bytes 24\.\.0"),
        (index_entry(1, (2, 3), (1 << 63) - 1, 24), "'w' lies at bytes 9223372036854775807"),
        (index_entry(1, (2, 3), 0, 24, shard=1), "'w' lies in data file 1 of 1"),
        (index_entry(1, (2, 3), 0, 24, shard=-1), "'w' lies in data file -1 of 1"),
        (index_entry(1, (-2, -3), 0, 24), r"'w' has shape \(-2, -3\)"),
        (
            index_entry(1, (1 << 62, 1 << 62), 0, 24),
            "but F32 .* needs 85070591730234615865843651857942052864",
        ),
        (index_entry(1, (1,) * 33, 0, 4), "'w' has shape"),
        (W + length(2, b""), "'w' has shape"),
        (W + length(7, b""), "'w' is a partitioned variable"),
        (W + number(5, 24), "field 5 is not one number"),
        (W + length(4, b"8"), "field 4 is not one number"),
        (b"\x12\x01", "a field is longer than its message"),
        (b"\x0b", "field 1 has wire type 3"),
        (b"\x08", "a number is cut short"),
        (b"\x08" + b"\xff" * 9 + b"\x02", "longer than 64 bits"),
        (b"\x08" + b"\x80" * 10 + b"\x01", "longer than 64 bits"),
        (number(2, 1), "field 2 is not a message"),
    ],
)
def test_bad_entries_are_refused(tmp_path: Path, entry: bytes, reason: str) -> None:
    with pytest.raises(ConversionError, match=rf"ckpt\.index: .*{reason}"):
        read_bundle(damaged(tmp_path, {"w": entry}))


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        (b"\0w\0\1\1\2\x80", "'w' is a partitioned variable"),
        (b"w\n2", r"key 'w\\n2' is not printable"),
        (b"\x1b[2J", "is not printable"),
        (b"w\x80", "is not printable"),
    ],
)
def test_bad_keys_are_refused(tmp_path: Path, key: bytes, reason: str) -> None:
    with pytest.raises(ConversionError, match=reason) as caught:
        read_bundle(damaged_table(tmp_path, table([HEAD, (key, W)])))
    assert str(caught.value).isprintable()


def test_tensors_do_not_share_bytes(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="'v' and 'w' share bytes"):
        read_bundle(damaged(tmp_path, {"w": index_entry(1, (2, 3), 20, 24), "v": W}))


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (number(1, 1) + number(2, 1), "big-endian"),
        (number(1, 0), "declares 0 data files"),
        (number(1, -1), "declares -1 data files"),
        (number(1, 1 << 60), "declares 1152921504606846976 data files"),
        (number(1, 2), "data-00000-of-00002: missing"),
    ],
)
def test_bad_headers_are_refused(tmp_path: Path, header: bytes, reason: str) -> None:
    with pytest.raises(ConversionError, match=reason):
        read_bundle(damaged(tmp_path, {"w": W}, header=header))


def test_data_files_are_regular_files_of_the_same_folder(tmp_path: Path) -> None:
    prefix, shard = small_bundle(tmp_path / "ckpt"), tmp_path / "ckpt.data-00000-of-00001"
    (tmp_path / "blobs").mkdir()
    moved = shard.rename(tmp_path / "blobs" / "1")
    with pytest.raises(ConversionError, match="data-00000-of-00001: missing"):
        read_bundle(prefix)
    shard.symlink_to(moved)
    with pytest.raises(ConversionError, match="a link out of the checkpoint's folder"):
        read_bundle(prefix)
    index = (tmp_path / "ckpt.index").rename(
        tmp_path / "blobs" / "2"
    )  # as a download cache has it: all files are links
    (tmp_path / "ckpt.index").symlink_to(index)
    assert list(read_bundle(prefix).tensors) == ["weights/0"]
    shard.unlink()
    (tmp_path / "ckpt.index").unlink()
    index.rename(tmp_path / "ckpt.index")
    os.mkfifo(shard)
    with pytest.raises(ConversionError, match="not a regular file"):
        read_bundle(prefix)


# --- read_bundle refuses: the table


def one_block(contents: bytes, compression: int = 0) -> bytes:
    """A table whose only data block has these contents."""
    at = varint(0) + varint(len(contents))
    return join(contents + trailer(contents, compression), block([(b"", at)]))


def join(data: bytes, index: bytes) -> bytes:
    footer = (varint(0) * 2 + varint(len(data)) + varint(len(index))).ljust(40, b"\0")
    return data + index + trailer(index) + footer + table([(b"", b"")])[-8:]


GOOD = block([HEAD, (b"w", W)])
# an empty key, then one of 1000 bytes, then 90 that repeat it and add a byte
EXPANDING = (
    b"\0\0\0\0\xe8\7\0"
    + b"a" * 1000
    + b"".join(b"\xe8\7\1\0%c" % i for i in range(33, 123))
    + bytes(4)
)


@pytest.mark.parametrize(
    ("index", "reason"),
    [
        (b"", "not a LevelDB table"),
        (table([HEAD])[-8:], "not a LevelDB table"),
        (table([HEAD])[1:], "block .* lies outside the table|does not match"),
        (table([(b"w", W)]), "the bundle has no header"),
        (join(b"", block([])), "the bundle has no header"),
        (table([HEAD, (b"w", W), (b"w", W)]), "key b'w' comes twice or out of order"),
        (table([HEAD, (b"w", W), (b"w", W)], block_size=1), "key b'w' comes twice or out of order"),
        (table([HEAD, (b"w", W), (b"v", W)]), "key b'v' comes twice or out of order"),
        (one_block(GOOD, 1), r"is compressed \(snappy\)"),
        (one_block(GOOD, 4), r"is compressed \(4\)"),
        (one_block(GOOD).replace(b"w", b"v", 1), "does not match its checksum"),
        (one_block(b""), "shorter than its restart array"),
        (one_block(b"\xff" * 4), "shorter than its restart array"),
        (one_block(b"\x01\x00\x00" + bytes(4)), "an entry is longer than its block"),
        (one_block(b"\x00\x05\x00" + bytes(4)), "an entry is longer than its block"),
        (one_block(b"\x00\x00" + bytes(4)), "an entry is longer than its block|cut short"),
        (
            join(GOOD + trailer(GOOD), block([(b"", varint(0) + varint(9999))])),
            r"block 0\.\.9999 lies outside",
        ),
        (
            join(GOOD + trailer(GOOD), block([(b"", varint(0) + varint(len(GOOD)))] * 2)),
            "blocks overlap",
        ),
        (one_block(EXPANDING), "keys share more"),
        (bytes(1 << 22) + table([HEAD]), r"an index of 4194\d+ bytes is no checkpoint's"),
    ],
)
def test_bad_tables_are_refused(tmp_path: Path, index: bytes, reason: str) -> None:
    with pytest.raises(ConversionError, match=rf"ckpt\.index: .*({reason})"):
        read_bundle(damaged_table(tmp_path, index))


def test_the_damaged_tables_come_from_a_good_one(tmp_path: Path) -> None:
    assert list(read_bundle(damaged_table(tmp_path, one_block(GOOD))).tensors) == ["w"]


# --- read_bundle refuses: the object graph


def with_graph(tmp_path: Path, entry: bytes, data: bytes) -> Path:
    return damaged(tmp_path, {"weights/0": W, GRAPH_KEY: entry}, bytes(24) + data)


@pytest.mark.parametrize(
    ("node", "reason"),
    [
        (Node({"child": 1}, {}), "the object graph has 1 objects, but 'child' is number 1"),
        (Node({"child": -1}, {}), "the object graph has 1 objects, but 'child' is number -1"),
        (Node({"a\nb": 0}, {}), r"not printable or comes twice: 'a\\nb'"),
        (
            Node({}, {"VARIABLE_VALUE": "weights/1"}),
            "names 'weights/1', which the bundle does not hold",
        ),
    ],
)
def test_bad_graphs_are_refused(tmp_path: Path, node: Any, reason: str) -> None:
    with pytest.raises(ConversionError, match=reason) as caught:
        read_bundle(with_graph(tmp_path, *graph_entry([node], 24)))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("node", "reason"),
    [
        (length(1, length(2, b"child")) * 2, "comes twice: 'child'"),
        (length(1, length(2, b"child") * 2), "field 2 is not one string"),
        (length(1, number(2, 7)), "field 2 is not one string"),
    ],
)
def test_a_name_is_given_once(tmp_path: Path, node: Any, reason: str) -> None:
    with pytest.raises(ConversionError, match=reason):
        read_bundle(with_graph(tmp_path, *string_entry(length(1, node), 24)))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda data: data[:-1] + b"?", "does not match its checksum"),
        (lambda data: data[:1] + b"?" + data[2:], "does not match its checksum"),
        (lambda data: bytes([data[0] + 1]) + data[1:], "bytes, not "),
    ],
)
def test_a_damaged_graph_is_refused(tmp_path: Path, change: Any, reason: str) -> None:
    entry, data = graph_entry(GRAPH, 24)
    assert read_bundle(with_graph(tmp_path, entry, data)).graph == GRAPH
    with pytest.raises(ConversionError, match=f"'{GRAPH_KEY}' .*{reason}"):
        read_bundle(with_graph(tmp_path, entry, change(data)))


@pytest.mark.parametrize(
    "entry", [index_entry(7, (2,), 0, 9), index_entry(7, (), 0, (1 << 22) + 1)]
)
def test_only_one_short_graph_is_read(tmp_path: Path, entry: bytes) -> None:
    prefix = damaged(tmp_path, {GRAPH_KEY: entry})
    os.truncate(tmp_path / "ckpt.data-00000-of-00001", 1 << 23)
    with pytest.raises(ConversionError, match="one short string is expected"):
        read_bundle(prefix)


# --- robustness


def open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_nothing_stays_open_after_a_refusal(tmp_path: Path) -> None:
    prefix = damaged(tmp_path, {"w": index_entry(1, (9,), 0, 24)})
    before = open_files()
    for _ in range(3):
        with pytest.raises(ConversionError):
            read_bundle(prefix)
        find_bundle(prefix)
    assert open_files() == before


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Change, insert, remove or cut off a few bytes."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        at, byte = (
            rng.randrange(len(changed) + 1),
            rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)]),
        )
        changed[at : at + rng.randint(0, 2)] = bytes([byte] * rng.randint(0, 2))
        if rng.random() < 0.02:
            del changed[at:]
    return bytes(changed)


def outcome(prefix: Path) -> str:
    try:
        bundle = read_bundle(prefix)
    except ConversionError as error:
        return "refused" if str(error).isprintable() else f"{error!r} is not printable"
    for tensor in bundle.tensors.values():
        tensor.numpy()
    for file in bundle.files:
        file.close()
    return "read"


def test_mutated_files_raise_nothing_but_conversion_errors(tmp_path: Path) -> None:
    prefix = small_bundle(tmp_path / "ckpt")
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    rng, outcomes = random.Random(0), set()
    for _ in range(300):
        for path, original in files.items():
            path.write_bytes(mutate(original, rng) if rng.random() < 0.7 else original)
        outcomes.add(outcome(prefix))
    assert outcomes == {"read", "refused"}


def test_mutations_under_good_checksums_raise_nothing_but_conversion_errors(tmp_path: Path) -> None:
    text = b"".join(length(1, object_message(node)) for node in GRAPH)
    rng, outcomes = random.Random(0), set()
    for _ in range(600):
        entry, data = string_entry(mutate(text, rng) if rng.random() < 0.5 else text, 24)
        contents = block([HEAD, (GRAPH_KEY.encode(), entry), (b"weights/0", W)])
        index = one_block(mutate(contents, rng) if rng.random() < 0.5 else contents)
        outcomes.add(outcome(damaged_table(tmp_path, index, bytes(24) + data)))
    assert outcomes == {"read", "refused"}
