"""The pages of mapped files that are in memory."""

from __future__ import annotations

import ctypes
import os
from mmap import MADV_DONTNEED, PAGESIZE
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

PAGEMAP = Path("/proc/self/pagemap")  # only Linux has it, and not in every sandbox
_STATE = 61  # the bit from which on an entry says: of a file, swapped, in memory
_OF_FILE = 0b101


def drop_file_pages(tensor: Tensor, unwritten: bool = False) -> None:
    """Take the pages of a tensor that holds bytes of a mapped file out of memory.

    They are read again when needed. A page that was written to is not of the file any more, and
    stays, with all others of the tensor: https://docs.kernel.org/admin-guide/mm/pagemap.html. To
    look that up takes as long as a cast; `unwritten` promises that the tensor is of a mapped file
    and nobody wrote to it.
    """
    start = tensor.data_ptr()
    first = -(-start // PAGESIZE)
    last = (start + tensor.nbytes) // PAGESIZE
    if first >= last or not os.access(PAGEMAP, os.R_OK):
        return
    if unwritten or _are_of_file(first, last):
        address = ctypes.c_size_t(first * PAGESIZE)
        nbytes = ctypes.c_size_t((last - first) * PAGESIZE)
        ctypes.CDLL(None).madvise(address, nbytes, MADV_DONTNEED)


def _are_of_file(first: int, last: int) -> bool:
    """Whether each page is in memory and of a file, or not in memory."""
    with PAGEMAP.open("rb") as file:
        file.seek(8 * first)
        entries = np.frombuffer(file.read(8 * (last - first)), np.uint64)
    states = entries >> np.uint64(_STATE)
    return bool(((states == _OF_FILE) | (states == 0)).all())
