"""Reads `.safetensors`, one file or shards with an index, into a `Checkpoint` without reading any
weights.

A file is: 8 bytes header length, a JSON header, the data. Every byte of the data must belong to
exactly one tensor, and an index must name exactly the tensors its shards hold: a file that two
readers could understand differently is refused. Format:
https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import math
from operator import itemgetter
from pathlib import Path

from ...errors import ConversionError, printable
from ...io.documents import parse_json
from ...io.dtypes import ITEMSIZES
from ...io.weight_files import index_suffix
from ..checkpoint import Checkpoint, SourceFile, Stored
from .shards import read_shards

_TOO_LARGE = 1 << 63
_MAX_AXES = 64
_FIELDS = {"dtype", "shape", "data_offsets"}
_Placed = tuple[int, int, Stored]
MAX_HEADER = 100_000_000  # bytes; the limit of the reference implementation


def read_safetensors(path: Path) -> Checkpoint:
    """Read a `.safetensors` file, a shard index, or a folder that holds one of either.

    Raises:
        ConversionError: the file is truncated, damaged or ambiguous, or index and shards disagree.
    """
    if path.is_dir():
        path = _only_weights(path)
    if index_suffix(path.name):
        return read_shards(path, "safetensors", _read_file)
    return _read_file(path)


def _only_weights(folder: Path) -> Path:
    """The index in a folder, or else its one file."""
    names = sorted(path.name for path in folder.iterdir())
    indexes = [name for name in names if index_suffix(name) == "safetensors"]
    found = indexes or [name for name in names if name.endswith(".safetensors")]
    if len(found) != 1:
        listed = ", ".join(map(printable, found[:5]))
        what = f"name one of them: {listed}" if found else "no .safetensors file or index in it"
        raise ConversionError(f"{folder}: a folder with {len(found)} sets of weights; {what}")
    return folder / found[0]


def _read_file(path: Path) -> Checkpoint:
    """One file: its tensors, in the order of their bytes, and its metadata."""
    file = SourceFile(path)
    try:
        tensors, metadata = _read_header(file)
    except BaseException:
        file.close()
        raise
    return Checkpoint(path, "safetensors", tensors, files=[file], metadata=metadata)


def _read_header(file: SourceFile) -> tuple[dict[str, Stored], dict[str, str]]:
    path = file.path
    length = int.from_bytes(file.read(0, min(8, file.size)), "little")
    first = file.read(8, 1) if file.size > 8 else b""
    if first != b"{" or length > MAX_HEADER:
        raise ConversionError(
            f"{path}: not a safetensors file; it begins with {file.read(0, min(24, file.size))!r}"
        )
    if 8 + length > file.size:
        raise ConversionError(
            f"{path}: the header ends at {8 + length}, the file at {file.size}; is the download"
            " complete?"
        )
    header = parse_json(file.read(8, length), path)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ConversionError(f"{path}: `__metadata__` does not map text to text")
    placed = [_placed(file, 8 + length, key, entry) for key, entry in header.items()]
    placed.sort(key=itemgetter(0, 1))
    _check_layout(file, 8 + length, placed)
    return {tensor.name: tensor for _, _, tensor in placed}, metadata


def _placed(file: SourceFile, start: int, key: str, entry: object) -> _Placed:
    """A tensor, and where it begins and ends."""
    if not key.isprintable():
        raise ConversionError(
            f"{file.path}: the tensor name `{printable(key)}` holds control characters"
        )
    if not isinstance(entry, dict) or entry.keys() != _FIELDS:
        raise _fault(file, key, "is not described by dtype, shape and data_offsets")
    dtype = entry["dtype"]
    shape = entry["shape"]
    offsets = entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEMSIZES:
        raise _fault(file, key, f"has dtype {printable(dtype)}, which is not supported")
    if not (
        type(shape) is type(offsets) is list
        and len(offsets) == 2
        and len(shape) <= _MAX_AXES
        and _are_sizes(shape + offsets)
    ):
        raise _fault(file, key, "has a shape or offsets other than integers from 0 to 2^63")
    begin = start + offsets[0]
    end = start + offsets[1]
    nbytes = math.prod(shape) * ITEMSIZES[dtype]
    if end - begin != nbytes:
        raise _fault(file, key, f"needs {nbytes} bytes but has {end - begin}")
    return begin, end, Stored(key, dtype, tuple(shape), file, begin)


def _fault(file: SourceFile, key: str, what: str) -> ConversionError:
    return ConversionError(f"{file.path}: `{printable(key)}` {what}")


def _are_sizes(numbers: list[object]) -> bool:
    for number in numbers:  # noqa: SIM110  # twice as fast; JSON's true is an int to isinstance
        if type(number) is not int or not 0 <= number < _TOO_LARGE:
            return False
    return True


def _check_layout(file: SourceFile, start: int, placed: list[_Placed]) -> None:
    """Every byte after the header belongs to exactly one tensor."""
    end = start
    for begin, next_end, tensor in placed:
        if begin != end:
            problem = (
                "overlaps the tensor before it"
                if begin < end
                else f"leaves {begin - end} bytes unused"
            )
            raise ConversionError(
                f"{file.path}: `{printable(tensor.name)}` {problem}; the file is damaged"
            )
        end = next_end
    if end > file.size:
        raise ConversionError(
            f"{file.path}: the tensors end at byte {end}, the file at {file.size}; is the download"
            " complete?"
        )
    if end < file.size:
        raise ConversionError(
            f"{file.path}: {file.size - end} bytes follow the last tensor; the file is damaged"
        )
