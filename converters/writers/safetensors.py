"""The streaming safetensors writer: plans the header, then fills it tensor by tensor from lazy
sources.

One thread reads, transposes and casts blocks, a second one hashes them, and the caller's writes
them. Stored tensors and their axis permutations take constant memory; a tensor that is computed is
held whole. The file is the one that `safetensors` itself writes for the same tensors. Format:
https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from ...errors import ConversionError, printable
from ...io.behind import WriteBehind
from ...io.dtypes import FLOATS
from ...io.weight_files import shard_name, write_index
from ..checkpoint import stored_in
from .background import read_ahead
from .pieces import DEPTH, Block, Blocks, Output

__all__ = ["Output", "Written", "WrittenFile", "write_safetensors"]

_METADATA = {"format": "pt"}  # what transformers asks for
# Wide dtypes first, so that every tensor is aligned; within a dtype, by name.
_ORDER = (
    "I64", "F64", "F32", "I32", "BF16", "F16", "I16", "F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL",
)  # fmt: skip


@dataclass(frozen=True)
class WrittenFile:
    """One file of weights: its name in the folder, its size, and the SHA-256 of its content unless
    nobody asked."""

    name: str
    nbytes: int
    sha256: str | None


@dataclass
class Written:
    """What was written, and what in it deserves a warning.

    Attributes:
        files: the weight files, and the index if they are several.
        nonfinite: key -> how many elements were NaN or Inf in the source.
        overflow: key -> how many finite elements became Inf in the narrower dtype.
    """

    files: list[WrittenFile] = field(default_factory=list)
    nonfinite: dict[str, int] = field(default_factory=dict)
    overflow: dict[str, int] = field(default_factory=dict)


def write_safetensors(
    folder: Path,
    filename: str,
    outputs: Sequence[Output],
    *,
    max_shard_size: int,
    metadata: Mapping[str, str] = _METADATA,
    progress: Callable[[int], None] = lambda nbytes: None,
    hashes: bool = True,
    sync: bool = True,
) -> Written:
    """Write tensors to `folder/filename`, or to numbered shards and an index if they exceed
    `max_shard_size` bytes.

    Shards are filled in the given order, as `save_pretrained` fills them. `metadata` goes into
    every header. `progress` is called with the bytes of every block. With `sync` every weight is on
    the disk in the end; an index is not: `io.atomic` sees to that.

    Raises:
        ConversionError: an output does not fit its sources, or a source file is damaged or changes
            meanwhile.
        OSError: the disk is full or fails.
    """
    _check(outputs)
    written = Written()
    blocks = Blocks()
    shards = list(_shards(outputs, max_shard_size))
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = filename if len(shards) == 1 else shard_name(filename, number, len(shards))
        weight_map |= {output.key: name for output in shard}
        in_order = sorted(shard, key=lambda output: (_ORDER.index(output.dtype), output.key))
        with (folder / name).open("xb", buffering=0) as target:
            behind = WriteBehind(target.fileno(), waits=sync)
            digest = hashlib.sha256() if hashes else None
            header = _header(in_order, metadata)
            with _made(header, blocks.of(in_order), digest) as data:
                nbytes = _write(target, data, behind, written, progress)
            written.files.append(_file(name, nbytes, digest))
            if sync:
                behind.finish()
    sources = [source for output in outputs for source in output.sources]
    for file in {place.file for source in sources for place in stored_in(source)}:
        file.check_unchanged()
    if len(shards) > 1:
        total = sum(output.nbytes for output in outputs)
        index = write_index(folder, filename, weight_map, total)
        content = index.read_bytes()
        digest = hashlib.sha256(content) if hashes else None
        written.files.append(_file(index.name, len(content), digest))
    return written


def _check(outputs: Sequence[Output]) -> None:
    seen = {"__metadata__"}
    for output in outputs:
        key = printable(output.key)
        if output.key in seen:
            raise ConversionError(f"`{key}` cannot be written: the name is used twice or reserved")
        seen.add(output.key)
        dtypes = {source.dtype for source in output.sources}
        if len(dtypes) != 1 or (
            output.dtype not in dtypes and not {output.dtype, *dtypes} <= set(FLOATS)
        ):
            raise ConversionError(
                f"`{key}` cannot be written: {', '.join(sorted(dtypes))} does not become"
                f" {output.dtype}"
            )
        flaw = _misfit(output)
        if flaw:
            raise ConversionError(f"`{key}` cannot be written: {flaw}")


def _misfit(output: Output) -> str | None:
    """Why the sources do not give the shape of an output, if they do not."""
    shapes = [source.shape for source in output.sources]
    if output.op is None:
        elements = sum(map(math.prod, shapes))
        if elements == math.prod(output.shape):
            return None
        return f"{elements} elements do not fill shape {output.shape}"
    try:
        shape = output.op.shapes(shapes, output.parts)[output.part]
    except ValueError as error:
        return str(error)
    return None if shape == output.shape else f"{shape} is not {output.shape}"


# --- files ----------------------------------------------------------------------------------------


def _shards(outputs: Sequence[Output], limit: int) -> Iterator[list[Output]]:
    """Fill shards in order; a tensor over the limit gets one of its own, and the shard before it
    stays open."""
    current: list[Output] = []
    total = 0
    for output in outputs:
        if output.nbytes > limit:
            yield [output]
        elif current and total + output.nbytes > limit:
            yield current
            current = [output]
            total = output.nbytes
        else:
            current.append(output)
            total += output.nbytes
    if current or not outputs:
        yield current


def _file(name: str, nbytes: int, digest: hashlib._Hash | None) -> WrittenFile:
    return WrittenFile(name, nbytes, digest.hexdigest() if digest else None)


@contextlib.contextmanager
def _made(
    header: Block, blocks: Generator[Block, None, None], digest: hashlib._Hash | None
) -> Iterator[Iterator[Block]]:
    """The header and the blocks, made in one thread and hashed in another: `DEPTH` in all."""
    data = _chained(header, read_ahead(blocks, DEPTH // 2 + 1))
    if digest is not None:
        data = read_ahead(_hashed(data, digest), DEPTH // 2 + 1)
    with contextlib.closing(data):
        yield data


def _chained(header: Block, blocks: Generator[Block, None, None]) -> Generator[Block, None, None]:
    with contextlib.closing(blocks):
        yield header
        yield from blocks


def _hashed(
    blocks: Generator[Block, None, None], digest: hashlib._Hash
) -> Generator[Block, None, None]:
    with contextlib.closing(blocks):
        for block in blocks:
            digest.update(block.data)
            yield block


def _write(
    file: BinaryIO,
    blocks: Iterable[Block],
    behind: WriteBehind,
    written: Written,
    progress: Callable[[int], None],
) -> int:
    """Write blocks, and add up their counts; the size of the file."""
    nbytes = 0
    for block in blocks:
        view = block.data
        while view:
            view = view[file.write(view) :]
        nbytes += len(block.data)
        behind.follow(nbytes)
        for counts, count in (
            (written.nonfinite, block.nonfinite),
            (written.overflow, block.overflow),
        ):
            if count:
                counts[block.key] = counts.get(block.key, 0) + count
        progress(len(block.data))
    return nbytes


def _header(outputs: Sequence[Output], metadata: Mapping[str, str]) -> Block:
    """Length and JSON of the header, padded with spaces so that the data starts at a multiple of
    8."""
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for output in outputs:
        begin = end
        end = end + output.nbytes
        entries[output.key] = {
            "dtype": output.dtype,
            "shape": output.shape,
            "data_offsets": (begin, end),
        }
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return Block("", memoryview(len(text).to_bytes(8, "little") + text))
