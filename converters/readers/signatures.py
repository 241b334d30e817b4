"""What tells the kinds of files apart, without the modules that read them."""

from __future__ import annotations

import re
from pathlib import Path

from ...errors import ConversionError
from ..checkpoint import SourceFile

HDF5 = b"\x89HDF\r\n\x1a\n"
PNG = b"\x89PNG\r\n\x1a\n"
LEVELDB = (0xDB4775248B80FB57).to_bytes(8, "little")  # at the end
_ZIP = b"PK\x03\x04"
_ZIP_HEADER = 30  # bytes
_TAR = b"ustar"
_TAR_HEADER = 512  # bytes
_PICKLE = re.compile(
    rb"\x80[\x02-\x05]|\(d|\(l|\(i|\}q|\]q|\(?c[\w.]+\n[\w.]+\n"
)  # protocol 2 on; or 0 and 1


def is_hdf5(file: SourceFile, start: int = 0) -> bool:
    """Whether HDF5's signature stands at `start`."""
    return file.size >= start + len(HDF5) and file.read(start, len(HDF5)) == HDF5


def is_zip(file: SourceFile) -> bool:
    """Whether a file begins like a zip archive."""
    return file.size >= _ZIP_HEADER and file.read(0, len(_ZIP)) == _ZIP


def is_tar(file: SourceFile) -> bool:
    """Whether a file begins like a tar archive."""
    return file.size >= _TAR_HEADER and file.read(257, len(_TAR)) == _TAR


def is_picture(path: Path) -> bool:
    """Whether a file is a PNG."""
    if not path.is_file():
        return False
    file = SourceFile(path)
    try:
        return file.read(0, min(file.size, len(PNG))) == PNG
    finally:
        file.close()


def is_torch(file: SourceFile) -> bool:
    """Whether a file looks like a PyTorch checkpoint, another pickle or a tar, for `read_torch` to
    read or refuse."""
    if is_zip(file):
        return _holds_pickle(file)
    if is_tar(file):
        return True
    head = file.read(0, min(file.size, 64))
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < file.size:
        return False  # safetensors
    return _PICKLE.match(head) is not None and (
        head[0] == 0x80 or file.read(file.size - 1, 1) == b"."
    )


def _holds_pickle(archive: SourceFile) -> bool:
    if b"/data.pkl" in archive.read(_ZIP_HEADER, min(archive.size - _ZIP_HEADER, 300)):
        return True  # the first member, as PyTorch writes it
    from .archives import zip_members

    try:
        return any(name.rpartition("/")[2] == "data.pkl" for name in zip_members(archive))
    except ConversionError:
        return False  # damaged, and something else at its beginning
