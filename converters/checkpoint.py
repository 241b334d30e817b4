"""What every reader returns: a `Checkpoint` of lazy tensors, known by key, dtype and shape before
any byte is read.

A tensor is a range of bytes in a file (`Stored`), or is computed from such ranges (`Computed`:
dequantised, merged). Files are opened once and read with `pread` at known ranges; a range is
checked against the file's real size.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import ConversionError
from ..io.dtypes import ITEMSIZES
from ..io.partial import partial
from ..io.regular import fetch, open_regular, read_far_ahead

if TYPE_CHECKING:
    from ..io.arrays import Array
    from ..io.behind import ReadBehind, Together

_HASHED = 1 << 18  # bytes at once
_FETCHED = 1 << 22  # bytes that are asked for before they are read
_MAKING = 0  # the output, from a file
_HASHING = 1
_CODES = {"F64": "d", "F32": "f", "F16": "e", "BF16": "f"}  # of `struct`


def file_state(status: os.stat_result) -> tuple[int, ...]:
    """What changes with a file; its `ctime` also where somebody sets the other time back."""
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


class SourceFile:
    """A regular file, opened once and read only at explicit ranges. Safe to share between threads.

    Attributes:
        together: whom those wait for who read it for the output, or for its digest.

    Raises:
        ConversionError: the path is not a readable regular file, or a range lies outside it.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._fd = open_regular(self.path)
        read_far_ahead(self._fd)
        self._stat = os.fstat(self._fd)
        self.size = self._stat.st_size
        self._partial = partial(self._fd)
        self._behind: ReadBehind | None = None
        self.together: Together | None = None
        self._hashing = threading.Lock()
        self._sha256 = ""

    def read(self, offset: int, nbytes: int) -> bytes:
        """Bytes `offset .. offset + nbytes`; never allocates more than the file holds."""
        if offset < 0 or nbytes < 0 or offset + nbytes > self.size:
            wanted = f"bytes {offset}..{offset + nbytes} are needed"
            raise ConversionError(
                f"{self.path}: {wanted} but the file has {self.size}; is it truncated?"
            )
        self._bring(offset, nbytes)
        data = os.pread(self._fd, nbytes, offset)
        while len(data) < nbytes:
            more = os.pread(self._fd, nbytes - len(data), offset + len(data))
            if not more:
                raise ConversionError(f"{self.path}: the file shrank while it was read")
            data += more
        return data

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill a writable buffer of bytes from `offset` on."""
        self._bring(offset, len(buffer))
        done = 0
        while done < len(buffer):
            count = os.preadv(self._fd, [buffer[done:]], offset + done)
            if count == 0:
                raise ConversionError(
                    f"{self.path}: the file ends inside a tensor; is it truncated?"
                )
            done += count

    def _bring(self, offset: int, nbytes: int) -> None:
        """Have bytes here of a file that is elsewhere."""
        if self._partial is not None:
            try:
                self._partial.bring(offset, nbytes)
            except OSError as error:
                raise ConversionError(str(error)) from error

    def pass_through(self, readers: int) -> None:
        """From now on, what `readers` have read leaves the page cache, unless it is in it now."""
        from ..io.behind import ReadBehind  # a conversion's; who only looks does without

        if self._partial is None:
            self._behind = ReadBehind(self._fd, self.size, readers)

    @property
    def comes_from_disk(self) -> bool:
        """Whether it passes through, and much of it was not in the page cache."""
        return self._behind is not None and self._behind.expects

    def take(self, offset: int, nbytes: int) -> None:
        """Say that a range went into the output and is not read for it again."""
        self._passed(_MAKING, offset, nbytes, self.together)

    def _passed(self, who: int, offset: int, nbytes: int, together: Together | None) -> None:
        if self._behind is not None:
            self._behind.passed(offset, nbytes)
        if together is not None:
            together.advance(who, nbytes)

    def fetch(self, offset: int, nbytes: int) -> None:
        """Say that a range will be read soon; the beginning of it comes from the disk meanwhile."""
        fetch(self._fd, offset, min(nbytes, _FETCHED))

    def check_unchanged(self) -> None:
        """Raise if the file was modified since it was opened."""
        if self._partial is not None:  # of one commit; what changes is how much is here
            return
        now = os.fstat(self._fd)
        before = self._stat
        if file_state(now) != file_state(before):
            raise ConversionError(f"{self.path}: the file changed while it was read; run again")

    @property
    def state(self) -> tuple[int, ...]:
        """What it was when it was opened, see `file_state`."""
        return file_state(self._stat)

    def sha256(self, beside: Together | None = None) -> str:
        """Hex digest of the whole file, computed once, through a small buffer.

        Args:
            beside: others who read it meanwhile, whom to wait for until somebody asks for the
                digest without it.
        """
        if self._partial is not None:
            return self._partial.sha256
        if beside is None and self.together is not None:
            self.together.part()
        with self._hashing:
            self._sha256 = self._sha256 or self._computed_sha256(beside)
        return self._sha256

    def _computed_sha256(self, beside: Together | None) -> str:
        digest = hashlib.sha256()
        buffer = memoryview(bytearray(_HASHED))
        for offset in range(0, self.size, len(buffer)):
            if offset % _FETCHED == 0:  # the disk works while a processor hashes
                fetch(self._fd, offset + _FETCHED, _FETCHED)
            chunk = buffer[: min(len(buffer), self.size - offset)]
            self.read_into(offset, chunk)
            digest.update(chunk)
            self._passed(_HASHING, offset, len(chunk), beside)
        return digest.hexdigest()

    def close(self) -> None:
        """Close the file; tensors that lie in it can no longer be read."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __del__(self) -> None:
        if hasattr(self, "_fd"):  # it was opened
            self.close()


class SourceReader(io.RawIOBase):
    """A source file for who asks for an open one; it has a place of its own in it."""

    def __init__(self, file: SourceFile) -> None:
        self._file = file
        self._at = 0

    def readable(self) -> bool:
        """It can be read."""
        return True

    def seekable(self) -> bool:
        """It can be read from anywhere."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to an offset."""
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._file.size}[whence]
        if start + offset < 0:
            raise OSError("an offset before the file")
        self._at = start + offset
        return self._at

    def tell(self) -> int:
        """Where it is."""
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Read on, to the end of the buffer or of the file."""
        target = memoryview(buffer).cast("B")
        nbytes = max(0, min(len(target), self._file.size - self._at))
        target[:nbytes] = self._file.read(self._at, nbytes)
        self._at += nbytes
        return nbytes


@dataclass(slots=True, unsafe_hash=True)
class Tensor:
    """A named tensor whose bytes are not read yet.

    Attributes:
        name: the name in the file, as the file spells it (for reports).
        dtype: a safetensors dtype name, a key of `ITEMSIZES`.
        shape: the dimensions.

    Nobody changes one; it is not frozen because that takes five times as long to make.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        return math.prod(self.shape) * ITEMSIZES[self.dtype]

    def numpy(self) -> Array:
        """The whole tensor, in memory."""
        raise NotImplementedError

    def numbers(self) -> list[float]:
        """All of them, of a small tensor of floats."""
        return [float(number) for number in self.numpy().ravel()]

    def reshaped(self, shape: tuple[int, ...]) -> Tensor:
        """The same numbers in another shape of as many."""

        def compute(array: Array) -> Array:
            return array.reshape(shape)

        return Computed(self.name, self.dtype, shape, (self,), compute, "reshaped")


@dataclass(slots=True, unsafe_hash=True)
class Stored(Tensor):
    """A tensor that lies in a file as one range of row-major little-endian bytes."""

    file: SourceFile
    offset: int

    def reshaped(self, shape: tuple[int, ...]) -> Stored:
        """The same bytes in another shape of as many numbers."""
        return replace(self, shape=shape)

    def numbers(self) -> list[float]:
        """All of them, of a small tensor of floats; of usual dtypes without NumPy."""
        code = _CODES.get(self.dtype)
        if code is None:
            return Tensor.numbers(self)
        data = self.file.read(self.offset, self.nbytes)
        if self.dtype == "BF16":  # the upper halves of float32
            data = b"".join(b"\0\0" + data[at : at + 2] for at in range(0, len(data), 2))
        return list(struct.unpack(f"<{math.prod(self.shape)}{code}", data))

    def numpy(self) -> Array:
        """The whole tensor, in memory."""
        import numpy as np

        from ..io.arrays import DTYPES

        data = bytearray(self.nbytes)
        self.file.read_into(self.offset, memoryview(data))
        return np.frombuffer(data, DTYPES[self.dtype]).reshape(self.shape)


@dataclass(slots=True, unsafe_hash=True)
class Computed(Tensor):
    """A tensor that is a function of stored ones, such as a dequantised kernel; computed when asked
    for."""

    inputs: tuple[Tensor, ...]
    compute: Callable[..., Array]
    how: str  # a short phrase for reports: "dequantised from int8"

    def numpy(self) -> Array:
        """The whole tensor, in memory."""
        from ..io.arrays import DTYPES

        return self.compute(*(tensor.numpy() for tensor in self.inputs)).astype(
            DTYPES[self.dtype], copy=False
        )


@dataclass(slots=True, unsafe_hash=True)
class LowRank(Computed):
    """A weight with factors of LoRA merged into it.

    Attributes:
        left: the factor of the rows of the weight that PyTorch has, (rows, rank).
        right: the factor of its columns, (rank, columns, ...).
        alpha: by which the product is weighed, divided by the rank.
    """

    left: Tensor
    right: Tensor
    alpha: float


def stored_in(tensor: Tensor) -> Iterator[Stored]:
    """What in files a tensor is made from."""
    if isinstance(tensor, Stored):
        yield tensor
    elif isinstance(tensor, Computed):
        for one in tensor.inputs:
            yield from stored_in(one)


class Loss(NamedTuple):
    """Tensors that a way of saving is known to lose.

    Attributes:
        front: how their keys begin.
        reason: what to tell who saved so; `{count}` stands for their number.
    """

    front: str
    reason: str


class StatedConfig(NamedTuple):
    """The `config.json` that a model came with.

    Attributes:
        class_name: the model's; None where it does not say.
        options: all that it says.
    """

    path: Path
    class_name: str | None
    options: Mapping[str, Any]


@dataclass
class Checkpoint:
    """The tensors of one source, by key, with what the reader knows of them.

    Attributes:
        path: what the user named.
        format: a human name of the file format.
        tensors: key -> tensor, in file order.
        skipped: names the reader left out on purpose -> the reason.
        files: every file that was opened.
        layout: whose key names these are: that of the tables that can read it; empty as long as
            nobody knows.
        root: where inside the file the component lies, when a trainer's save nests several.
        metadata: what the file says beside its tensors, such as the training step.
        whole: the file that this is one part of, with every tensor under its own key.
        ignored_classes: classes that a pickle names; they were neither imported nor created.
        loss: what this way of saving may have lost.
        naming: whose names the keys are, where that is known: `mappings/facts/names.toml`.
        is_strange: whether no key is one that a part of a known model has.
        unused: keys of what a part may do without -> the reason for leaving them out.
        taken_off: what stood around the names and is not in the keys, in words.
        average: whether it is the moving average of the weights.
        beside: names of dicts that lie beside the weights in a pickle -> what they are, in words.
        config: the model's own config, if it came with one.
        stated: class -> options of its config that no tensor tells, as the file or the user says.
    """

    path: Path
    format: str
    tensors: Mapping[str, Tensor]
    skipped: dict[str, str] = field(default_factory=dict)
    files: list[SourceFile] = field(default_factory=list)
    layout: str = ""
    root: str = ""
    metadata: dict[str, str] = field(default_factory=dict)
    ignored_classes: list[str] = field(default_factory=list)
    whole: Checkpoint | None = None
    loss: Loss | None = None
    naming: str = ""
    is_strange: bool = False
    unused: Mapping[str, str] = field(default_factory=dict)
    taken_off: str | None = None
    average: bool = False
    beside: Mapping[str, str] = field(default_factory=dict)
    config: StatedConfig | None = None
    stated: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def check_unchanged(self) -> None:
        """Raise if a file was modified since it was opened."""
        for file in self.files:
            file.check_unchanged()
