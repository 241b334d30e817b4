import json
import math
import struct
import threading
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weightport.converters.checkpoint import Computed, SourceFile, Stored, Tensor
from weightport.converters.readers.safetensors import read_safetensors
from weightport.converters.writers import pieces
from weightport.converters.writers.cast import Float16Cast
from weightport.converters.writers.safetensors import Output, Written, write_safetensors
from weightport.converters.writers.transpose import (
    READ,
    TILE,
    Turned,
    coalesced,
    copy_view,
    row_blocks,
    strips,
)
from weightport.errors import ConversionError
from weightport.io.arrays import DTYPES
from weightport.io.dtypes import FLOATS, ITEMSIZES
from weightport.mappings.ops import Op

Arrays = dict[str, np.ndarray[Any, Any]]
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def save(
    folder: Path, arrays: Arrays, name: str = "w.safetensors", limit: int = 1 << 40, **kwargs: Any
) -> Written:
    """Write arrays through a raw file, so that every tensor is `Stored`."""
    outputs = [
        Output(key, t.dtype, t.shape, (t,), **kwargs) for key, t in stored(folder, arrays).items()
    ]
    return write_safetensors(folder, name, outputs, max_shard_size=limit)


def stored(folder: Path, arrays: Arrays) -> dict[str, Stored]:
    path = folder / f"source{len(list(folder.iterdir()))}.raw"
    path.write_bytes(b"xyz" + b"".join(array.tobytes() for array in arrays.values()))
    file, tensors, offset = SourceFile(path), {}, 3
    for key, array in arrays.items():
        tensors[key] = Stored(key, NAMES[array.dtype], array.shape, file, offset)
        offset += array.nbytes
    return tensors


def convert(folder: Path, array: np.ndarray[Any, Any], dtype: str, op: Op | None = None) -> Any:
    """One tensor through the writer: (result, Written)."""
    source = stored(folder, {"a": array})["a"]
    shape = op.apply([array])[0].shape if op else array.shape
    output = Output("a", dtype, shape, (source,), op)
    written = write_safetensors(folder, f"{dtype}.safetensors", [output], max_shard_size=1 << 40)
    return read_safetensors(folder / written.files[0].name).tensors["a"].numpy(), written


def random_bits(
    dtype: np.dtype[Any], shape: tuple[int, ...], seed: int = 0
) -> np.ndarray[Any, Any]:
    """Every bit pattern may come: NaN payloads, denormals, -0.0."""
    bits = np.random.default_rng(seed).integers(0, 256, math.prod(shape) * dtype.itemsize, np.uint8)
    return (bits & 1 if dtype == np.dtype("?") else bits).view(dtype).reshape(shape)


def assert_same_bits(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> None:
    assert (a.dtype, a.shape) == (b.dtype, b.shape)
    assert a.tobytes() == b.tobytes()


# --- round trips and equality with the reference implementation -----------------------------------


@pytest.mark.parametrize("name", FLOATS)
def test_numbers_are_those_of_the_array(tmp_path: Path, name: str) -> None:
    array = random_bits(DTYPES[name], (256, 3))
    numbers = stored(tmp_path, {"x": array})["x"].numbers()
    np.testing.assert_array_equal(numbers, array.astype(np.float64).ravel())


def test_sizes_of_elements_are_those_of_arrays() -> None:
    assert {name: dtype.itemsize for name, dtype in DTYPES.items()} == ITEMSIZES


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (7,), (2, 3, 5), (300, 257)])
@pytest.mark.parametrize("name", DTYPES)
def test_round_trip_is_bit_exact(tmp_path: Path, name: str, shape: tuple[int, ...]) -> None:
    array = random_bits(DTYPES[name], shape)
    save(tmp_path, {"x": array})
    assert_same_bits(read_safetensors(tmp_path / "w.safetensors").tensors["x"].numpy(), array)


def test_special_values_survive(tmp_path: Path) -> None:
    bits = np.array([0x7F800001, 0xFFC12345, 0x80000000, 1, 0x7F800000, 0xFF800000], np.uint32)
    written = save(tmp_path, {"x": bits.view(np.float32)})
    assert_same_bits(
        read_safetensors(tmp_path / "w.safetensors").tensors["x"].numpy(), bits.view(np.float32)
    )
    assert written.nonfinite == {"x": 4}


def mixed() -> Arrays:
    shapes = [(), (0, 4), (3,), (5, 7), (2, 3, 4)]
    arrays = {f"{d}.{i}": random_bits(DTYPES[d], s) for d in DTYPES for i, s in enumerate(shapes)}
    return arrays | {'größe \\ "quoted"': random_bits(DTYPES["F32"], (2,))}


def test_equals_the_reference_implementation(tmp_path: Path) -> None:
    arrays = mixed()
    written = save(tmp_path, arrays)
    tensors = {
        key: torch.from_numpy(np.atleast_1d(a).view(f"u{a.itemsize}").copy())
        for key, a in arrays.items()
    }
    kinds = {
        "BF16": torch.bfloat16,
        "F16": torch.float16,
        "F32": torch.float32,
        "F64": torch.float64,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
    }
    kinds |= {
        "I64": torch.int64,
        "I32": torch.int32,
        "I16": torch.int16,
        "I8": torch.int8,
        "BOOL": torch.bool,
    }
    same = {
        k: t.view(kinds.get(NAMES[arrays[k].dtype], t.dtype)).reshape(arrays[k].shape)
        for k, t in tensors.items()
    }
    safetensors.torch.save_file(same, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    ours = (tmp_path / "w.safetensors").read_bytes()
    assert ours == (tmp_path / "theirs.safetensors").read_bytes()
    (file,) = written.files
    assert (file.name, file.nbytes, file.sha256) == (
        "w.safetensors",
        len(ours),
        SourceFile(tmp_path / file.name).sha256(),
    )


def test_output_is_the_same_in_any_order(tmp_path: Path) -> None:
    arrays = mixed()
    save(tmp_path, arrays, "a.safetensors")
    save(tmp_path, dict(reversed(arrays.items())), "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_reads_what_the_reference_implementation_writes(tmp_path: Path) -> None:
    arrays = {key: array for key, array in mixed().items() if array.dtype != ml_dtypes.bfloat16}
    safetensors.numpy.save_file(arrays, tmp_path / "w.safetensors")
    checkpoint = read_safetensors(tmp_path)
    assert set(checkpoint.tensors) == set(arrays)
    for key, array in arrays.items():
        assert_same_bits(checkpoint.tensors[key].numpy(), array)


def test_progress_and_file_mode(tmp_path: Path) -> None:
    seen: list[int] = []
    output = Output(
        "x", "F32", (1 << 20,), (stored(tmp_path, {"x": np.zeros(1 << 20, "f4")})["x"],)
    )
    written = write_safetensors(
        tmp_path, "w.safetensors", [output], max_shard_size=1 << 40, progress=seen.append
    )
    assert sum(seen) == written.files[0].nbytes
    assert len(seen) > 3
    assert (tmp_path / "w.safetensors").stat().st_mode & 0o777 == 0o644


# --- shards ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [100, 400, 1000, 2500])
def test_shards_are_those_of_save_pretrained(tmp_path: Path, limit: int) -> None:
    from huggingface_hub import split_torch_state_dict_into_shards

    sizes = [25, 10, 300, 90, 4, 25, 60, 200, 1]
    arrays = {f"t{i}": random_bits(DTYPES["F32"], (n,)) for i, n in enumerate(sizes)}
    tensors = {key: torch.from_numpy(array) for key, array in arrays.items()}
    pattern = "diffusion_pytorch_model{suffix}.safetensors"
    split = split_torch_state_dict_into_shards(
        tensors, max_shard_size=limit, filename_pattern=pattern
    )
    written = save(tmp_path, arrays, "diffusion_pytorch_model.safetensors", limit)
    names = [file.name for file in written.files]
    assert names[:-1] == sorted(split.filename_to_tensors)
    index = json.loads((tmp_path / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert index["weight_map"] == split.tensor_to_filename
    assert index["metadata"] == {"total_size": 4 * sum(sizes)} == split.metadata
    checkpoint = read_safetensors(tmp_path / names[-1])
    for key, array in arrays.items():
        assert_same_bits(checkpoint.tensors[key].numpy(), array)


def test_shard_names_of_a_variant(tmp_path: Path) -> None:
    arrays = {"b": np.zeros(10, "f2"), "a": np.ones(10, "f2")}
    written = save(tmp_path, arrays, "diffusion_pytorch_model.fp16.safetensors", 20)
    assert [file.name for file in written.files] == [
        "diffusion_pytorch_model.fp16-00001-of-00002.safetensors",
        "diffusion_pytorch_model.fp16-00002-of-00002.safetensors",
        "diffusion_pytorch_model.safetensors.index.fp16.json",
    ]
    for file in written.files:
        assert SourceFile(tmp_path / file.name).sha256() == file.sha256
    assert set(read_safetensors(tmp_path).tensors) == {"a", "b"}


# --- ops and casts --------------------------------------------------------------------------------

OPS = [
    "h w i o -> o i h w",
    "i o -> o i",
    "1 1 i o -> o i",
    "a b c d -> c d a b",
    "a b c -> c b a",
    "a b c -> b a c",
]
SHAPES: dict[int, list[tuple[int, ...]]] = {
    2: [(1, 9), (300, 257), (1000, 1500)],
    3: [(3, 130, 131), (2, 1, 5), (130, 3, 4)],
    4: [(3, 3, 150, 140), (1, 3, 5, 7), (3, 3, 40, 4), (2, 3, 4, 5)],
}


@pytest.mark.parametrize("dtype", ["F32", "F16", "F64", "U8"])
@pytest.mark.parametrize("text", OPS)
def test_permutations_equal_numpy(tmp_path: Path, text: str, dtype: str) -> None:
    op = Op.parse(text)
    for i, shape in enumerate(SHAPES[len(text.partition("->")[0].split())]):
        shape = (1, 1, *shape[2:]) if text.startswith("1 1") else shape
        array = random_bits(DTYPES[dtype], shape, seed=i)
        (tmp_path / str(i)).mkdir()
        result, _ = convert(tmp_path / str(i), array, dtype, op)
        assert_same_bits(result, op.apply([array])[0].copy())


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_copy_view_and_row_blocks_equal_numpy(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.sampled_from([0, 1, 2, 3, 17, 130]), min_size=1, max_size=4))
    shape = tuple(sizes) if math.prod(sizes) < 500_000 else tuple(min(size, 17) for size in sizes)
    permutation = tuple(data.draw(st.permutations(range(len(shape)))))
    array = np.arange(math.prod(shape), dtype=np.uint32).reshape(shape)
    expected = array.transpose(permutation).copy()
    fewer, order = coalesced(shape, permutation)
    view = array.reshape(fewer).transpose(order) if math.prod(shape) else expected
    blocks = [np.empty(view[index].shape, np.uint32) for index in row_blocks(view.shape, 1000)]
    for block, index in zip(blocks, row_blocks(view.shape, 1000), strict=True):
        copy_view(view[index], block)
        assert block.size <= 1000
    assert np.array_equal(
        np.concatenate([block.reshape(-1) for block in blocks]), expected.reshape(-1)
    )


@pytest.mark.parametrize("permutation", [(2, 0, 1), (2, 1, 0)])
@pytest.mark.parametrize("dtype", ["F32", "F16"])
def test_panels_and_strips_of_a_turned_tensor(
    tmp_path: Path, permutation: tuple[int, ...], dtype: str
) -> None:
    array = random_bits(DTYPES[dtype], (9, 140, 3 * TILE + 5))
    turned = Turned.of(stored(tmp_path, {"a": array})["a"], array.shape, permutation)
    assert turned is not None
    bits = array.view(f"<u{array.itemsize}")
    expected = bits.transpose(permutation).reshape(array.shape[-1], -1)
    space = np.empty(array.nbytes // 2, np.uint8)
    panels = list(turned.panels(space.nbytes))
    assert len(panels) > 2
    for columns in panels:
        panel = turned.read(columns, space, np.empty(READ, np.uint8))
        assert np.array_equal(panel.T, expected[columns])
        found = [strip.copy() for strip in strips(panel, array.nbytes // 10)]
        assert len(found) > 1 or panel.shape[1] < 30
        assert all(strip.flags.c_contiguous and not strip[:, -1].any() for strip in found)
        assert np.array_equal(np.hstack([strip[:, :-1] for strip in found]), panel)


@pytest.mark.parametrize("shape", [(200_000, 5), (300_000, 3), (3, 140_000), (70_000, 33)])
@pytest.mark.parametrize("target", ["F32", "F64", "BF16"])
def test_very_many_rows_and_very_long_ones(
    tmp_path: Path, shape: tuple[int, int], target: str
) -> None:
    """Where a strip has one column, and where a tensor is no turn for its shape."""
    array = np.arange(math.prod(shape), dtype="f4").reshape(shape)
    array[-1, -1] = np.inf
    result, written = convert(tmp_path, array, target, Op.parse("i o -> o i"))
    assert np.array_equal(result, array.T.astype(DTYPES[target]))
    assert written.nonfinite == {"a": 1}


def test_what_is_no_turn_is_not_taken_for_one(tmp_path: Path) -> None:
    source = stored(tmp_path, {"a": np.zeros((3, 4, 5), "f4")})["a"]
    assert Turned.of(source, (3, 4, 5), (1, 2, 0)) is None
    assert Turned.of(source, (60,), (0,)) is None


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("op", [None, Op.parse("i o -> o i")])
@pytest.mark.parametrize(
    ("source", "target"),
    [(a, b) for a in ("F32", "F16", "BF16") for b in ("F64", "F32", "F16", "BF16")],
)
def test_casts_equal_torch(tmp_path: Path, source: str, target: str, op: Op | None) -> None:
    array = random_bits(DTYPES[source], (700, 300))
    result, written = convert(tmp_path, array, target, op)
    kinds = {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
    }
    theirs = (
        torch.from_numpy(array.view(f"i{array.itemsize}"))
        .view(kinds[source])
        .to(kinds[target])
        .to(torch.float64)
    )
    expected = theirs.numpy().T if op else theirs.numpy()
    assert np.array_equal(result.astype("f8"), expected, equal_nan=True)
    bad, now_bad = (int(np.count_nonzero(~np.isfinite(a.astype("f8")))) for a in (array, result))
    assert written.nonfinite.get("a", 0) == bad
    assert written.overflow.get("a", 0) == now_bad - bad
    assert now_bad > bad or target != "F16" or source == "F16"


def test_the_cast_to_float16_has_numpys_bits() -> None:
    """Every float16 with its neighbours in float32, the ties between two, and random bits."""
    halves = np.arange(1 << 16, dtype="u2").view("f2")
    exact = halves.astype("f4").view("u4")
    near = np.concatenate(
        [exact + np.uint32(step % 2**32) for step in (-1, 0, 1, 0xFFF, 0x1000, 0x1001)]
    )
    bits = np.concatenate([near, np.random.default_rng(0).integers(0, 2**32, 300_001, "u4")])
    found = np.empty(bits.size, "f2")
    with np.errstate(all="ignore"):
        Float16Cast()(bits.view("f4"), found)
        expected = bits.view("f4").astype("f2")
    assert_same_bits(found, expected)


def test_overflow_and_nonfinite_are_told_apart(tmp_path: Path) -> None:
    array = np.array([1, np.nan, np.inf, -np.inf, 65504, 65520, -1e30, 1e-30], "f4")
    result, written = convert(tmp_path, array, "F16")
    assert result.tolist()[4:] == [65504, math.inf, -math.inf, 0]
    assert (written.nonfinite, written.overflow) == ({"a": 3}, {"a": 2})


@pytest.mark.parametrize("dtype", ["F32", "F16"])
@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("(p o) ... -> p o ...", 3),
        ("(q+k+v+4m) i -> q+k+v+4m i", 4),
        ("(2a+b+4c) i -> 4c+2a+b i", 3),
        ("(a+b) ... -> (b+a) ...", 1),
        ("(a+4b+2c) i -> (2c+a+4b) i", 1),
        ("i (p o) -> p o i", 2),
        ("i (a+3b) -> a+3b i", 2),
        ("i (a+b) -> (b+a) i", 1),
        ("i 12 d -> (12 d) i", 1),
    ],
)
def test_parts_are_what_the_op_makes(
    tmp_path: Path, text: str, parts: int, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And back; runs of whole rows are copied, never held whole."""
    op = Op.parse(text)
    shape = (84, 12, 4) if "12" in text else (84, 120)
    array = np.random.default_rng(0).standard_normal(shape, np.float32)
    source = stored(tmp_path, {"a": array})["a"]
    expected = op.apply([array], parts)
    outputs = [
        Output(str(part), dtype, result.shape, (source,), op, part, parts)
        for part, result in enumerate(expected)
    ]
    if op.keeps_order:
        monkeypatch.setattr(pieces, "_computed", None)
    write_safetensors(tmp_path, "w.safetensors", outputs, max_shard_size=1 << 40)
    read = read_safetensors(tmp_path / "w.safetensors").tensors
    results = [read[str(part)] for part in range(parts)]
    for result, wanted in zip(results, expected, strict=True):
        assert_same_bits(result.numpy(), np.ascontiguousarray(wanted.astype(DTYPES[dtype])))
    back = Output("a", dtype, array.shape, tuple(results), op.inverse)
    write_safetensors(tmp_path, "back.safetensors", [back], max_shard_size=1 << 40)
    restored = read_safetensors(tmp_path / "back.safetensors").tensors["a"]
    assert_same_bits(restored.numpy(), array.astype(DTYPES[dtype]))


def test_merge_and_computed_sources(tmp_path: Path) -> None:
    arrays = {
        key: np.random.default_rng(i).standard_normal((32, 20), np.float32)
        for i, key in enumerate("qkv")
    }
    tensors = stored(tmp_path, arrays)
    double = Computed("2q", "F32", (32, 20), (tensors["q"],), lambda q: 2 * q, "doubled")
    scalar = Computed("one", "F32", (), (), lambda: np.ones((), np.float32), "a constant")
    outputs = [
        Output("qkv", "F32", (96, 20), tuple(tensors.values()), Op.parse("p o i -> (p o) i")),
        Output("2q", "F32", (20, 32), (double,), Op.parse("i o -> o i")),
        Output("one", "BF16", (), (scalar,)),
    ]
    write_safetensors(tmp_path, "w.safetensors", outputs, max_shard_size=1 << 40)
    read = {
        key: tensor.numpy()
        for key, tensor in read_safetensors(tmp_path / "w.safetensors").tensors.items()
    }
    assert_same_bits(read["qkv"], np.concatenate(list(arrays.values())))
    assert_same_bits(read["2q"], (2 * arrays["q"]).T.copy())
    assert_same_bits(read["one"], np.ones((), ml_dtypes.bfloat16))


def test_writer_refuses_what_does_not_fit(tmp_path: Path) -> None:
    tensors = stored(tmp_path, {"f": np.zeros((2, 3), "f4"), "i": np.zeros((2, 3), "i4")})
    f, i = (tensors["f"],), (tensors["i"],)
    for outputs, message in [
        ([Output("x", "F32", (2, 3), f), Output("x", "F32", (2, 3), f)], "twice"),
        ([Output("__metadata__", "F32", (2, 3), f)], "reserved"),
        ([Output("x", "F16", (2, 3), i)], "I32 does not become F16"),
        ([Output("x", "I64", (2, 3), i)], "I32 does not become I64"),
        ([Output("x", "F32", (2, 4), f)], "6 elements do not fill"),
        ([Output("x", "F32", (4, 3), (*f, *i), Op.parse("p o i -> (p o) i"))], "F32, I32"),
        ([Output("x", "F32", (2, 3), f, Op.parse("i o -> o i"))], r"\(3, 2\) is not \(2, 3\)"),
        ([Output("x", "F32", (1, 3), f, Op.parse("(a+2b) i -> a+2b i"), 0, 2)], "size 2 has not 3"),
    ]:
        with pytest.raises(ConversionError, match=message):
            write_safetensors(tmp_path, "w.safetensors", outputs, max_shard_size=1 << 40)
        assert not (tmp_path / "w.safetensors").exists()


def test_blocks_that_wait_for_a_slow_disk_are_not_overwritten(tmp_path: Path) -> None:
    array = random_bits(DTYPES["F32"], (1 << 21,))
    output = Output("x", "F32", array.shape, (stored(tmp_path, {"x": array})["x"],))
    path = tmp_path / "w.safetensors"
    write_safetensors(
        tmp_path,
        path.name,
        [output],
        max_shard_size=1 << 40,
        progress=lambda nbytes: time.sleep(0.002),
    )
    assert_same_bits(read_safetensors(path).tensors["x"].numpy(), array)


def test_errors_of_the_reading_thread_arrive(tmp_path: Path) -> None:
    tensor = stored(tmp_path, {"x": np.zeros(1 << 20, "f4")})["x"]
    tensor.file.path.write_bytes(b"short now")
    with pytest.raises(ConversionError, match="truncated"):
        write_safetensors(
            tmp_path,
            "w.safetensors",
            [Output("x", "F32", (1 << 20,), (tensor,))],
            max_shard_size=1 << 40,
        )


def test_a_source_that_changed_is_reported(tmp_path: Path) -> None:
    tensor = stored(tmp_path, {"x": np.zeros(4, "f4")})["x"]
    tensor.file.path.write_bytes(b"\1" * 100)
    with pytest.raises(ConversionError, match="changed"):
        write_safetensors(
            tmp_path, "w.safetensors", [Output("x", "F32", (4,), (tensor,))], max_shard_size=1 << 40
        )


def test_an_interrupt_stops_the_reading_thread(tmp_path: Path) -> None:
    def interrupt(nbytes: int) -> None:
        raise KeyboardInterrupt

    tensor = stored(tmp_path, {"x": np.zeros(1 << 22, "f4")})["x"]
    output = Output("x", "F32", (1 << 22,), (tensor,))
    before = set(threading.enumerate())
    with pytest.raises(KeyboardInterrupt):
        write_safetensors(
            tmp_path, "w.safetensors", [output], max_shard_size=1 << 40, progress=interrupt
        )
    assert set(threading.enumerate()) <= before


# --- refusals of the reader -----------------------------------------------------------------------


def entry(
    begin: object = 0, end: object = 8, dtype: object = "F32", shape: object = (2,)
) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def blob(header: object, data: bytes = bytes(8)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


REFUSED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not a safetensors file"),
    "short": (b"1234", "not a safetensors file"),
    "lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid", "version https://git-lfs"),
    "header too long": (struct.pack("<Q", 1 << 63) + b"{}", "not a safetensors file"),
    "header past the end": (struct.pack("<Q", 100) + b"{}", "header ends at 108, the file at 10"),
    "leading space": (blob(b' {"x":1}'), "not a safetensors file"),
    "no json": (blob(b"{nope"), "JSON"),
    "not utf-8": (blob(b'{"\xff":1}'), "JSON"),
    "trailing json": (blob(b"{}{}"), "JSON"),
    "deep": (blob(b'{"x":' * 100_000), "JSON"),
    "huge number": (blob(b'{"x":' + b"9" * 6000 + b"}"), "JSON"),
    "nan": (blob(b'{"x":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}'), "a number is NaN"),
    "duplicate": (
        blob(b'{"x":%b,"x":%b}' % ((json.dumps(entry()).encode(),) * 2)),
        "`x` is there twice",
    ),
    "duplicate metadata": (blob(b'{"__metadata__":{"a":"1","a":"2"}}', b""), "`a` is there twice"),
    "duplicate field": (blob(b'{"x":{"dtype":"F32","dtype":"I32"}}'), "`dtype` is there twice"),
    "metadata not text": (blob({"__metadata__": {"a": 1}}, b""), "__metadata__"),
    "metadata no object": (blob({"__metadata__": [1]}, b""), "__metadata__"),
    "entry no object": (blob({"x": [1]}), "not described"),
    "field missing": (blob({"x": {"dtype": "F32", "shape": [2]}}), "not described"),
    "field unknown": (blob({"x": entry() | {"order": "F"}}), "not described"),
    "dtype unknown": (blob({"x": entry(dtype="F8_E8M0")}), "F8_E8M0, which is not supported"),
    "dtype no text": (blob({"x": entry(dtype=["F32"])}), "not supported"),
    "shape bool": (blob({"x": entry(shape=[True, 2])}), "integers"),
    "shape float": (blob({"x": entry(shape=[2.0])}), "integers"),
    "shape negative": (blob({"x": entry(shape=[-2])}), "integers"),
    "shape text": (blob({"x": entry(shape="2")}), "integers"),
    "shape huge": (blob({"x": entry(shape=[1 << 64])}), "integers"),
    "shape overflow": (blob({"x": entry(shape=[1 << 62, 4, 2])}), "needs"),
    "offsets bool": (blob({"x": entry(begin=False)}), "integers"),
    "offsets three": (blob({"x": entry() | {"data_offsets": [0, 4, 8]}}), "integers"),
    "offsets reversed": (blob({"x": entry(8, 0)}), "needs 8 bytes but has -8"),
    "size": (blob({"x": entry(0, 4)}, bytes(4)), "needs 8 bytes but has 4"),
    "overlap": (blob({"x": entry(), "y": entry(4, 12)}, bytes(12)), "`y` overlaps"),
    "alias": (blob({"x": entry(), "y": entry()}), "`y` overlaps"),
    "gap": (blob({"x": entry(), "y": entry(12, 20)}, bytes(20)), "`y` leaves 4 bytes unused"),
    "gap first": (blob({"x": entry(4, 12)}, bytes(12)), "`x` leaves 4 bytes unused"),
    "truncated": (blob({"x": entry()}, bytes(7)), "is the download complete"),
    "trailing": (blob({"x": entry()}, bytes(9)), "1 bytes follow"),
    "control character": (blob({"x\n\x1b[31m": entry()}), r"x\\x0a\\x1b\[31m"),
    "surrogate": (blob(b'{"\\ud800":%b}' % json.dumps(entry()).encode()), "half a surrogate"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(tmp_path: Path, case: str) -> None:
    data, message = REFUSED[case]
    path = tmp_path / "bad.safetensors"
    path.write_bytes(data)
    with pytest.raises(ConversionError, match=message) as error:
        read_safetensors(path)
    text = str(error.value)
    assert text.startswith(f"{path}: ")
    assert text.isprintable()
    assert len(text) < 400 + len(str(path))


def test_the_blob_of_the_refusals_is_itself_fine(tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").write_bytes(
        blob({"__metadata__": {"a": "1"}, "x": entry(), "e": entry(0, 0, "F32", [0])})
    )
    assert set(read_safetensors(tmp_path).tensors) == {"x", "e"}


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_only_conversion_errors_escape(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    good = bytearray(blob({"x": entry(), "y": entry(8, 16)}, bytes(16)))
    for _ in range(data.draw(st.integers(1, 4))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("fuzz") / "x.safetensors"
    path.write_bytes(
        good[: data.draw(st.integers(0, len(good)))] if data.draw(st.booleans()) else good
    )
    try:
        tensors: list[Tensor] = list(read_safetensors(path).tensors.values())
    except ConversionError:
        return
    assert sum(tensor.numpy().nbytes for tensor in tensors) < len(good)


def sharded(folder: Path) -> dict[str, Any]:
    save(folder, {"a": np.zeros(4, "f4"), "b": np.ones(4, "f4")}, "m.safetensors", 16)
    index: dict[str, Any] = json.loads((folder / "m.safetensors.index.json").read_text())
    return index


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"c": "m-00001-of-00002.safetensors"}, "does not hold `c`"),
        ({"a": None}, "`m-00001-of-00002.safetensors`|also holds|weight_map"),
        ({"a": "m-00002-of-00002.safetensors"}, "does not hold `a`"),
        ({"c": "m-00003-of-00002.safetensors"}, "is missing"),
        ({"c": "../m.safetensors"}, "not a plain"),
        ({"c": "/etc/passwd"}, "not a plain"),
        ({"c": "a\\b.safetensors"}, "not a plain"),
        ({"c": "m.bin"}, "not a plain"),
        ({"c": ""}, "not a plain"),
        ({"c": 1}, "weight_map"),
    ],
)
def test_index_and_shards_must_agree(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    index = sharded(tmp_path)
    index["weight_map"] |= change
    path = tmp_path / "m.safetensors.index.json"
    path.write_text(json.dumps(index))
    with pytest.raises(ConversionError, match=message):
        read_safetensors(path)


def test_a_tensor_the_index_leaves_out(tmp_path: Path) -> None:
    save(
        tmp_path,
        {"a": np.zeros(4, "f4"), "b": np.ones(4, "f4"), "c": np.ones(4, "f4")},
        "m.safetensors",
        32,
    )
    path = tmp_path / "m.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["weight_map"]["a"]
    path.write_text(json.dumps(index))
    with pytest.raises(ConversionError, match="also holds `a`"):
        read_safetensors(path)


@pytest.mark.parametrize(
    "text", ["[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": "x", "a": "x"}}', "{", "\xff"]
)
def test_damaged_index(tmp_path: Path, text: str) -> None:
    path = tmp_path / "m.safetensors.index.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConversionError, match=r"m\.safetensors\.index\.json"):
        read_safetensors(path)


def test_legacy_index_name(tmp_path: Path) -> None:
    sharded(tmp_path)
    (tmp_path / "m.safetensors.index.json").rename(tmp_path / "m.safetensors.fp16.index.json")
    assert set(read_safetensors(tmp_path).tensors) == {"a", "b"}


def test_folder_must_be_unambiguous(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=r"no \.safetensors"):
        read_safetensors(tmp_path)
    save(tmp_path, {"a": np.zeros(4, "f4")}, "a.safetensors")
    save(tmp_path, {"a": np.zeros(4, "f4")}, "b.safetensors")
    with pytest.raises(ConversionError, match=r"name one of them: a\.safetensors, b\.safetensors"):
        read_safetensors(tmp_path)
