"""Writes small dicts of tensors as `torch.save` does, without torch: a zip with a pickle, and a
member for the bytes of each tensor.

Format: torch/serialization.py, and the opcodes of Python's pickletools.
"""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from ...errors import ConversionError
from ..checkpoint import Tensor

_STORAGES = {
    "F64": "DoubleStorage", "F32": "FloatStorage", "F16": "HalfStorage", "BF16": "BFloat16Storage",
}  # fmt: skip
_ROOT = "archive"
_DATE = (1980, 1, 1, 0, 0, 0)  # the same file at any time


def write_torch(path: Path, content: Mapping[str, object]) -> None:
    """Write a dict of tensors, text, numbers and dicts of the same.

    Raises:
        ConversionError: a tensor has a dtype that has no storage.
    """
    tensors: list[Tensor] = []
    pickle = b"\x80\x02" + b"".join(_pickled(content, tensors)) + b"."
    with path.open("wb") as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        _member(archive, "data.pkl", pickle)
        _member(archive, "byteorder", b"little")
        for number, tensor in enumerate(tensors):
            _member(archive, f"data/{number}", tensor.numpy().tobytes())
        _member(archive, "version", b"3\n")


def _member(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
    archive.writestr(zipfile.ZipInfo(f"{_ROOT}/{name}", _DATE), data)


def _pickled(value: object, tensors: list[Tensor]) -> Iterator[bytes]:
    """Opcodes of protocol 2; the tensors that they refer to are listed."""
    if value is None:
        yield b"N"
    elif isinstance(value, bool):
        yield b"\x88" if value else b"\x89"
    elif isinstance(value, int):
        yield _number(value)
    elif isinstance(value, str):
        yield _text(value)
    elif isinstance(value, Tensor):
        yield _tensor(value, len(tensors))
        tensors.append(value)
    elif isinstance(value, Mapping):
        yield b"}("
        for key, one in value.items():
            yield from _pickled(key, tensors)
            yield from _pickled(one, tensors)
        yield b"u"
    else:
        raise TypeError(type(value))


def _number(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def _text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def _tuple(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def _global(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def _tensor(tensor: Tensor, number: int) -> bytes:
    """A call of `_rebuild_tensor_v2`, with a reference to the storage."""
    if tensor.dtype not in _STORAGES:
        raise ConversionError(f"`{tensor.name}`: {tensor.dtype} has no place in a file of torch")
    count = 1
    strides = []
    for size in reversed(tensor.shape):
        strides.append(_number(count))
        count *= size
    storage = _tuple(
        _text("storage"),
        _global("torch", _STORAGES[tensor.dtype]),
        _text(str(number)),
        _text("cpu"),
        _number(count),
    )
    sizes = _tuple(*map(_number, tensor.shape))
    hooks = _global("collections", "OrderedDict") + b")R"
    arguments = _tuple(
        storage + b"Q", _number(0), sizes, _tuple(*reversed(strides)), b"\x89", hooks
    )
    return _global("torch._utils", "_rebuild_tensor_v2") + arguments + b"R"
