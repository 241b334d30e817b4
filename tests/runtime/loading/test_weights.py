"""Weights from files into models and back: hostile files, keys that do not fit, casts, the memory
they take."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from weightport.runtime.loading.weights import NoInit, load_weights, read_tensors, write_weights

Write = Callable[..., Path]
DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "BOOL": torch.bool},
    **{
        "I64": torch.int64,
        "I32": torch.int32,
        "I16": torch.int16,
        "I8": torch.int8,
        "U8": torch.uint8,
    },
}


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a safetensors file from a header, as JSON or raw, and its data."""

    def write_file(header: Any, data: bytes = b"", length: int | None = None) -> Path:
        raw = header if isinstance(header, bytes) else json.dumps(header).encode()
        path = tmp_path / "x.safetensors"
        path.write_bytes(
            (len(raw) if length is None else length).to_bytes(8, "little") + raw + data
        )
        return path

    return write_file


def entry(shape: list[Any], begin: Any, end: Any, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "data"),
    [
        ({"a": entry([2], 0, 8)}, 4),  # truncated
        ({"a": entry([2], 0, 8)}, 12),  # bytes that belong to no tensor
        ({"a": entry([2], 4, 12)}, 12),  # a gap
        ({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, 12),  # an overlap
        ({"a": entry([2], 0, 8), "b": entry([2], 0, 8)}, 8),  # an alias
        ({"a": entry([2], 0, 4)}, 4),  # size against shape
        ({"a": entry([-2], 0, 8)}, 8),
        ({"a": entry([True, 2], 0, 8)}, 8),
        ({"a": entry([2.0], 0, 8)}, 8),
        ({"a": entry([1 << 62, 4], 0, 8)}, 8),
        ({"a": entry([2], 0, 8, "F99")}, 8),
        ({"a": entry([2], 0, 8, ["F32"])}, 8),  # type: ignore[arg-type]
        ({"a": {"dtype": "F32"}}, 0),
        ({"a": [1]}, 0),
        ([1], 0),
        (b"[" * 10**5, 0),
        (b"\xff\xfe", 0),
        (b"{" + b'"a":' + b"9" * 6000 + b"}", 0),
        (b"version https://git-lfs.github.com/spec/v1", 0),
    ],
)
def test_damaged_files_are_refused(write: Write, header: Any, data: int) -> None:
    path = write(header, bytes(data))
    with pytest.raises(ValueError, match=r"x\.safetensors: .+") as caught:
        list(read_tensors(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content", [b"", b"1234567", (1 << 63).to_bytes(8, "little"), b"<!doctype html><html>404"]
)
def test_what_is_no_safetensors_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.safetensors: "):
        list(read_tensors(path))


def test_every_dtype_is_read(tmp_path: Path) -> None:
    state = {name: torch.arange(6).reshape(2, 3).to(dtype) for name, dtype in DTYPES.items()}
    state |= {"scalar": torch.tensor(3.0), "empty": torch.empty(0, 4)}
    save_file(state, tmp_path / "x.safetensors")
    for use_mmap in (True, False):
        found = dict(read_tensors(tmp_path / "x.safetensors", use_mmap))
        assert found.keys() == state.keys()
        for key, tensor in state.items():
            assert found[key].dtype == tensor.dtype
            assert torch.equal(found[key].float(), tensor.float())


def test_unaligned_tensors_are_read(write: Write) -> None:
    """The format allows any offset; torch needs aligned memory."""
    data = b"\1" + torch.tensor([1.5, -2.0]).numpy().tobytes()
    header = {"a": entry([1], 0, 1, "U8"), "b": entry([2], 1, 9)}
    (_, a), (_, b) = read_tensors(write(header, data))
    assert a.tolist() == [1]
    assert b.tolist() == [1.5, -2.0]


@pytest.mark.parametrize("dtypes", [["F32", "F16", "U8", "I64"], ["F16"]])
def test_safetensors_reads_what_is_written(tmp_path: Path, dtypes: list[str]) -> None:
    state = {f"é{i}": torch.arange(i + 1).to(DTYPES[name]) for i, name in enumerate(dtypes * 3)}
    write_weights(tmp_path, state, "diffusers", None, 1 << 30, safe=True)
    found = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    assert found.keys() == state.keys()
    assert all(
        torch.equal(found[key], state[key]) and found[key].dtype == state[key].dtype
        for key in state
    )


def test_layouts_of_memory_are_not_written(tmp_path: Path) -> None:
    state = {
        "a": torch.rand(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "b": torch.rand(4, 6).T[1:],
    }
    write_weights(tmp_path, state, "transformers", "v", 1 << 30, safe=True)
    found = load_file(tmp_path / "model.v.safetensors")
    assert all(torch.equal(found[key], state[key]) for key in state)


# --- into models ----------------------------------------------------------------------------------


class Small(nn.Module):
    """A few layers of every kind that the models have."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.conv = nn.Conv2d(3, 2, 1)
        self.norm = nn.GroupNorm(1, 3)
        self.register_buffer("steps", torch.arange(5))


def fill(path: Path, dtype: Any = None, rename: Any = lambda key: key, **options: Any) -> Small:
    with torch.device("meta"), NoInit():
        model = Small()
    load_weights(model, [path], rename, dtype, **options)
    return model


@pytest.fixture
def small(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    state = {key: torch.rand(t.shape).to(t.dtype) for key, t in Small().state_dict().items()}
    save_file(state, tmp_path / "small.safetensors")
    return tmp_path / "small.safetensors", state


def test_models_are_built_without_memory_or_initialisation(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("meta"), NoInit():
        model = Small()
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    assert not torch.empty(1).is_meta
    state = torch.random.get_rng_state()
    with torch.device("meta"), NoInit():
        Small()
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("use_mmap", [True, False])
@pytest.mark.parametrize("dtype", [None, "float32", "float16", "bfloat16"])
def test_values_and_casts(
    small: tuple[Path, dict[str, Any]], dtype: str | None, use_mmap: bool
) -> None:
    path, state = small
    target = dtype and getattr(torch, dtype)
    model = fill(path, target, use_mmap=use_mmap)
    for key, tensor in model.state_dict().items():
        floating = state[key].is_floating_point()
        assert tensor.dtype == (target if target and floating else state[key].dtype)
        assert torch.equal(tensor, state[key].to(tensor.dtype))
    assert all(p.requires_grad for p in model.parameters())


def test_weights_are_writable_and_the_file_stays(small: tuple[Path, dict[str, Any]]) -> None:
    path, state = small
    before = path.read_bytes()
    model = fill(path)
    with torch.no_grad():
        model.linear.weight += 1
    assert torch.equal(model.linear.weight, state["linear.weight"] + 1)
    assert path.read_bytes() == before
    assert torch.equal(fill(path).linear.weight, state["linear.weight"])


def test_a_cast_gives_no_neighbour_away(tmp_path: Path) -> None:
    """Pages of the file are dropped after a cast; tensors that share a page keep what was written
    into them."""
    state = {key: torch.rand(t.shape) for key, t in Small().state_dict().items() if key != "steps"}
    path = tmp_path / "x.safetensors"
    save_file({**state, "steps": torch.arange(5), "z": torch.rand(9000)}, path)
    model = fill(path, torch.float16, rename=lambda key: None if key == "z" else key)
    assert torch.equal(model.get_buffer("steps"), torch.arange(5))
    assert all(torch.equal(model.state_dict()[key], state[key].half()) for key in state)


def test_linear_layers_take_1x1_convolutions(
    tmp_path: Path, small: tuple[Path, dict[str, Any]]
) -> None:
    _, state = small
    save_file(
        state | {"linear.weight": state["linear.weight"][:, :, None, None].contiguous()},
        tmp_path / "x.safetensors",
    )
    assert torch.equal(fill(tmp_path / "x.safetensors").linear.weight, state["linear.weight"])
    wide = state["linear.weight"][:, :, None, None].expand(-1, -1, 2, 1).contiguous()
    save_file(state | {"linear.weight": wide}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"linear\.weight has shape \[3, 4, 2, 1\], not \[3, 4\]"):
        fill(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("drop", "add", "message"),
    [
        (["linear.bias"], {}, r"x\.safetensors: does not fit Small: missing linear\.bias$"),
        ([], {"linear.wieght": (3, 4)}, r"unexpected linear\.wieght \(nearest: linear\.weight\)$"),
        ([], {"conv.bias": (3,)}, r"conv\.bias has shape \[3\], not \[2\]$"),
        (
            ["conv.bias", "norm.bias", "norm.weight", "linear.bias"],
            {},
            r"missing linear\.bias; .*; .* and 1 more$",
        ),
        ([], {"?": (1,)}, r"unexpected \?$"),
    ],
)
def test_keys_that_do_not_fit(
    tmp_path: Path,
    small: tuple[Path, dict[str, Any]],
    drop: list[str],
    add: dict[str, Any],
    message: str,
) -> None:
    _, state = small
    state = {key: tensor for key, tensor in state.items() if key not in drop}
    save_file(
        state | {key: torch.zeros(shape) for key, shape in add.items()}, tmp_path / "x.safetensors"
    )
    with pytest.raises(ValueError, match=message):
        fill(tmp_path / "x.safetensors")


def test_a_key_in_two_shards(small: tuple[Path, dict[str, Any]]) -> None:
    with torch.device("meta"), NoInit():
        model = Small()
    with pytest.raises(ValueError, match="is there twice"):
        load_weights(model, [small[0], small[0]], lambda key: key, None)


# --- .bin files -----------------------------------------------------------------------------------


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("use_mmap", [True, False])
def test_pickled_weights(
    tmp_path: Path, small: tuple[Path, dict[str, Any]], legacy: bool, use_mmap: bool
) -> None:
    _, state = small
    path = tmp_path / "x.bin"
    torch.save(state, path, _use_new_zipfile_serialization=not legacy)
    before = path.read_bytes()
    model = fill(path, use_mmap=use_mmap)
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    with torch.no_grad():
        model.linear.weight += 1
    assert path.read_bytes() == before


@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
def test_a_cast_leaves_little_of_the_file_in_memory(tmp_path: Path, suffix: str) -> None:
    """However large the file: what was copied is dropped from its mapping."""
    path, names = tmp_path / f"x.{suffix}", [f"x{i}" for i in range(16)]
    state = {name: torch.rand(1 << 18) for name in names}
    torch.save(state, path) if suffix == "bin" else save_file(state, path)
    with torch.device("meta"), NoInit():
        model = nn.ParameterDict({name: torch.empty(1 << 18) for name in names})
    resident: list[int] = []

    def rename(key: str) -> str:
        maps = Path("/proc/self/smaps").read_text(encoding="utf-8").split(str(path))[1:]
        resident.append(sum(int(one.split("Rss:")[1].split()[0]) for one in maps))
        return key

    load_weights(model, [path], rename, torch.float16)
    assert all(torch.equal(model[name], state[name].half()) for name in names)
    assert 0 < max(resident) <= 4096  # kilobytes; the file has 16384


class Attack:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("attacked"),))


@pytest.mark.parametrize("content", [{"a": Attack()}, [1], {"a": 1}, Attack()])
def test_hostile_pickles_run_nothing(place: Path, content: Any) -> None:
    path = place / "x.bin"
    torch.save(content, path)
    with pytest.raises(ValueError, match=r"x\.bin: .+") as caught:
        fill(path)
    assert "\n" not in str(caught.value)
    assert not Path("attacked").exists()


@pytest.mark.parametrize("content", [b"", b"PK\3\4", b"\x80\x02}.", b"not a pickle"])
def test_damaged_pickles(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.bin: ") as caught:
        fill(path)
    assert "\n" not in str(caught.value)
