"""`.bin` and `.pt` files: read by the machine that conversions use, which executes nothing."""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from ...converters.checkpoint import Checkpoint, Stored
from ...converters.checkpoint import Tensor as Lazy
from ...converters.readers.torch_file import read_torch
from ...errors import ConversionError
from ...io.arrays import DTYPES
from ...io.dtypes import WORDS

_ALIGNED = 16  # what an offset in the file must be a multiple of, for torch to compute there


def read_pickle(path: Path, use_mmap: bool = True) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a file of `torch.save` with their names.

    Args:
        path: the file.
        use_mmap: leave tensors in the file, which is mapped privately, where they lie there as they
            are.

    Raises:
        ValueError: it is damaged or hostile, or holds no tensors.
    """
    checkpoint = open_pickle(path)
    content = _mapped(checkpoint) if use_mmap else None
    for name, tensor in checkpoint.tensors.items():
        yield name, as_torch(tensor, content)


def open_pickle(path: Path) -> Checkpoint:
    """What a file of `torch.save` holds; no tensor is read.

    Raises:
        ValueError: it is damaged or hostile, or holds no tensors.
    """
    try:
        return read_torch(path)
    except ConversionError as error:
        raise ValueError(str(error)) from None


def _mapped(checkpoint: Checkpoint) -> mmap.mmap:
    with checkpoint.path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)


def as_torch(tensor: Lazy, content: mmap.mmap | None = None) -> torch.Tensor:
    """A tensor of a checkpoint; where it lies, if its file is mapped and it may."""
    dtype = getattr(torch, WORDS[tensor.dtype])
    count = math.prod(tensor.shape)
    if not count:
        return torch.empty(tensor.shape, dtype=dtype)
    if content is not None and isinstance(tensor, Stored) and tensor.offset % _ALIGNED == 0:
        flat = torch.frombuffer(content, dtype=dtype, count=count, offset=tensor.offset)
        return flat.reshape(tensor.shape)
    array = np.ascontiguousarray(tensor.numpy())
    words = array.reshape(-1).view(f"V{DTYPES[tensor.dtype].itemsize}")
    return torch.frombuffer(words, dtype=dtype).reshape(tensor.shape)
