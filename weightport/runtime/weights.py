"""Weights from files into models and back, in as little memory as possible.

Models are built on the meta device, without memory and without initialisation. Files are mapped privately: what needs
no cast is used in place and read when it is first touched, and stays writable without touching the file. A cast goes
tensor by tensor and gives the pages of its source back. Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import mmap
import zipfile
from collections.abc import Callable, Iterator, Mapping
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .files import STEMS
from .saving import write_json

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_HEADER = 100_000_000  # the limit of the reference implementation
_TOLD = 3  # faults that a message names
_COPIED = 1 << 27  # bytes of a mapped `.bin` file that may stay in memory beside their copies
_MAKERS = {torch.empty, torch.zeros, torch.ones, torch.full, torch.arange, torch.tensor}
_INITIALISERS = {value for name, value in vars(nn.init).items() if name.endswith("_") and callable(value)}


class Empty(TorchFunctionMode):
    """Within it, new tensors are on the meta device and initialisation does nothing."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in _INITIALISERS:
            return kwargs.get("tensor", args[0] if args else None)
        if func in _MAKERS:
            kwargs.setdefault("device", "meta")
            if kwargs["device"] is None:
                kwargs["device"] = "meta"
        return func(*args, **kwargs)


def load_weights(
    model: nn.Module,
    files: list[Path],
    rename: Callable[[str], str | None],
    dtype: torch.dtype | None,
    device: torch.device | None = None,
    use_mmap: bool = True,
) -> list[str]:
    """Fill a model that is on the meta device.

    Args:
        model: the model; its state dict tells which keys and shapes are expected.
        files: `.safetensors` or `.bin`, which together hold every tensor.
        rename: the model's name for a key of a file, or None if the model has no use for it.
        dtype: what floating-point tensors are cast to; None leaves them as they are.
        device: where they go; None leaves them in the mapped file.
        use_mmap: False reads files into memory first.

    Returns:
        The keys that the model has no use for.

    Raises:
        ValueError: a key is missing, unexpected or has the wrong shape, or a file is damaged.
    """
    expected = model.state_dict()
    state: dict[str, Tensor] = {}
    unused: list[str] = []
    faults: list[str] = []
    for path in files:
        for key, tensor, release in read_tensors(path, use_mmap):
            name = rename(key)
            if name is None:
                unused.append(key)
            elif name not in expected:
                close = get_close_matches(name, expected, n=1) if len(faults) < _TOLD else []
                faults.append(f"unexpected {key}" + (f" (nearest: {close[0]})" if close else ""))
            elif name in state:
                faults.append(f"{key} is there twice")
            else:
                state[name] = tensor = _squeezed(tensor, expected[name].shape)
                if tensor.shape != expected[name].shape:
                    faults.append(f"{key} has shape {[*tensor.shape]}, not {[*expected[name].shape]}")
                elif not faults:
                    state[name] = tensor.to(device, dtype if tensor.is_floating_point() else None)
                    if state[name] is not tensor:
                        release()
    faults += [f"missing {key}" for key in expected if key not in state]
    if faults:
        more = f" and {len(faults) - _TOLD} more" if len(faults) > _TOLD else ""
        where = files[0] if len(files) == 1 else files[0].parent
        raise ValueError(f"{where}: does not fit {type(model).__name__}: {'; '.join(faults[:_TOLD])}{more}")
    model.load_state_dict(state, assign=True)
    return unused


def _squeezed(tensor: Tensor, shape: torch.Size) -> Tensor:
    """A convolution of size 1x1 as the linear layer it is, where that is expected."""
    return tensor[:, :, 0, 0] if tensor.ndim == 4 and tensor.shape == (*shape, 1, 1) else tensor


# --- reading ----------------------------------------------------------------------------------------------------------


def read_tensors(path: Path, use_mmap: bool = True) -> Iterator[tuple[str, Tensor, Callable[[], None]]]:
    """The tensors of a file, each with its name and a function that gives its pages in the mapped file back."""
    return (_read_safetensors if path.suffix == ".safetensors" else _read_pickle)(path, use_mmap)


def _read_safetensors(path: Path, use_mmap: bool) -> Iterator[tuple[str, Tensor, Callable[[], None]]]:
    entries, start = read_header(path)
    with path.open("rb") as file:
        data: Any = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) if use_mmap else bytearray(file.read())
    for key, (dtype, shape, begin, end) in entries.items():
        raw = torch.empty(0, dtype=torch.uint8)
        if begin < end:
            raw = torch.frombuffer(data, dtype=torch.uint8, count=end - begin, offset=start + begin)
        aligned = raw if (start + begin) % dtype.itemsize == 0 else raw.clone()
        release = partial(_drop_pages, data, start + begin, start + end) if use_mmap else lambda: None
        yield key, aligned.view(dtype).view(shape), release


def _drop_pages(data: mmap.mmap, begin: int, end: int) -> None:
    """Give back the whole pages within a range of a mapped file; they are read again when needed."""
    first = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE
    if end > first:
        data.madvise(mmap.MADV_DONTNEED, first, end - first)


Entry = tuple[torch.dtype, tuple[int, ...], int, int]


def read_header(path: Path) -> tuple[dict[str, Entry], int]:
    """The tensors of a `.safetensors` file in the order of their bytes, and where these begin in the file.

    Returns:
        Name -> dtype, shape, and where its bytes begin and end; the first byte after the header.

    Raises:
        ValueError: the file is truncated or damaged: every byte must belong to exactly one tensor.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > _MAX_HEADER or 8 + length > size:
            raise ValueError(f"{path}: not a safetensors file, or truncated")
        header = file.read(length)
    try:
        content = json.loads(header, object_pairs_hook=_unique)
        content.pop("__metadata__", None)
        entries = {key: _entry(value) for key, value in content.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise ValueError(f"{path}: the header cannot be read; is the file damaged?") from None
    ordered = dict(sorted(entries.items(), key=lambda item: item[1][2:]))
    position = 0
    for key, (dtype, shape, begin, end) in ordered.items():
        if begin != position or end - begin != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{path}: {key!r} does not lie where it must; the file is damaged")
        position = end
    if 8 + length + position != size:
        end = 8 + length + position
        raise ValueError(f"{path}: the tensors end at byte {end}, the file at {size}; is it complete?")
    return ordered, 8 + length


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError
    return dict(pairs)


def _entry(value: dict[str, Any]) -> Entry:
    shape, (begin, end) = value["shape"], value["data_offsets"]
    if not isinstance(shape, list) or any(type(n) is not int or not 0 <= n < 1 << 48 for n in (*shape, begin, end)):
        raise ValueError
    return DTYPES[value["dtype"]], tuple(shape), begin, end


def _read_pickle(path: Path, use_mmap: bool) -> Iterator[tuple[str, Tensor, Callable[[], None]]]:
    """The tensors of a `.bin` file. It is mapped anew, and its pages given back, whenever enough of it was copied."""
    content, copied = load_pickle(path, use_mmap), 0

    def release() -> None:
        nonlocal copied
        copied += tensor.nbytes

    for key in list(content):
        if copied > _COPIED:
            content, copied = load_pickle(path, use_mmap), 0
        tensor = content.pop(key)
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{path}: does not hold a state dict: {key} is not a tensor")
        yield key, tensor, release


def load_pickle(path: Path, use_mmap: bool = True) -> dict[str, Any]:
    """The dict in a file of `torch.save`; torch unpickles nothing but tensors and containers from it.

    Raises:
        ValueError: there is something else in it, or it is damaged.
    """
    use_mmap = use_mmap and zipfile.is_zipfile(path)  # files from before torch 1.6 cannot be mapped
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=use_mmap)
    except Exception as error:  # UnpicklingError, EOFError, RuntimeError and more
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{path}: cannot be read as a state dict ({reason})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: does not hold a state dict")
    return content


# --- writing ----------------------------------------------------------------------------------------------------------


def write_weights(
    folder: Path, state: Mapping[str, Tensor], library: str, variant: str | None, max_size: int, safe: bool
) -> None:
    """Write a state dict as one file, or as shards with an index where it has more than `max_size` bytes.

    Args:
        folder: an existing folder.
        state: the tensors, on any device; each is brought to the CPU when it is its turn.
        library: whose file names to use, see `files.STEMS`.
        variant: a part of the file names.
        max_size: bytes of tensors in a file; a single tensor may be larger.
        safe: False writes `.bin`, where the library allows it.
    """
    suffix = "safetensors" if safe or library != "diffusers" else "bin"
    stem, part = STEMS[library][0], f".{variant}" if variant else ""
    write = _write_safetensors if suffix == "safetensors" else _write_pickle
    shards: list[dict[str, Tensor]] = [{}]
    room = max_size
    for key, tensor in state.items():
        if tensor.nbytes > room and shards[-1]:
            shards.append({})
            room = max_size
        shards[-1][key] = tensor
        room -= tensor.nbytes
    if len(shards) == 1:
        write(folder / f"{stem}{part}.{suffix}", state)
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"{stem}{part}-{number:05}-of-{len(shards):05}.{suffix}"
        write(folder / name, shard)
        weight_map |= dict.fromkeys(shard, name)
    total = sum(tensor.nbytes for tensor in state.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(folder / f"{stem}.{suffix}.index{part}.json", index)


def _write_safetensors(path: Path, state: Mapping[str, Tensor]) -> None:
    """Widest dtype first, so that every tensor is aligned in the file."""
    ordered = sorted(state.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for key, tensor in ordered:
        end = position + tensor.nbytes
        header[key] = {"dtype": _NAMES[tensor.dtype], "shape": [*tensor.shape], "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in ordered:
            file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _write_pickle(path: Path, state: Mapping[str, Tensor]) -> None:
    torch.save({key: tensor.detach().cpu().clone() for key, tensor in state.items()}, path)
