"""Keras files as they are written, whatever the model. Needs h5py, the only place that does (extra
`[h5]`)."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import ConversionError
from ...io.arrays import DTYPES, Array

Compute = Callable[[], Array]
"""Makes the array of a variable when it is written."""

Put = Callable[[Any, str, Compute], None]
"""(group, name, array): puts a variable into a group of a file."""


@contextmanager
def keras_file(path: Path, progress: Callable[[int], None]) -> Iterator[tuple[Any, Put]]:
    """A new HDF5 file, and what puts variables into its groups.

    Args:
        progress: called with the bytes just written.

    Raises:
        ConversionError: h5py is not installed.
        OSError: the disk is full or fails.
    """
    try:
        import h5py
    except ImportError:
        raise ConversionError(
            'writing Keras files needs h5py; run `pip install "weightport[h5]"`'
        ) from None
    with _OutputFile(path, "x+") as output:

        def put(group: Any, name: str, compute: Compute) -> None:
            _put(group, name, compute(), progress)
            output.check()

        with h5py.File(output, "w") as file:
            yield file, put
        output.check()


def put_by_attribute(file: Any, put: Put, variables: Mapping[tuple[str, ...], Compute]) -> None:
    """Write the layout of `.weights.h5`: a group for each layer, its variables in `vars`.

    Args:
        variables: path of a layer, `layers/dense_1`, names of the groups in it, and last of the
            variable, `0` or `1` -> the array.
    """
    file.create_group("vars")
    for (layer, *attributes, name), compute in variables.items():
        group = file.require_group(layer)
        for attribute in attributes:
            group.require_group("vars")  # Keras 2.15 looks for it in every group it meets
            group = group.require_group(attribute)
        put(group.require_group("vars"), name, compute)


class _OutputFile(io.FileIO):
    """A file for libhdf5, which crashes when a disk is full: it is not told of a failure; `check`
    raises it."""

    _error: OSError | None = None

    def check(self) -> None:
        if self._error is not None:
            raise self._error

    def write(self, data: Any) -> int:
        view = memoryview(data)
        try:
            while view and self._error is None:
                view = view[super().write(view) :]
        except OSError as error:
            self._error = error
        return len(data)

    def truncate(self, size: int | None = None) -> int:
        try:
            return super().truncate(size)
        except OSError as error:
            self._error = self._error or error
            return size or 0


def _put(group: Any, name: str, array: Array, progress: Callable[[int], None]) -> None:
    """One contiguous dataset; bfloat16 the way Keras stores it, as two opaque bytes with a `dtype`
    attribute."""
    if array.dtype == DTYPES["BF16"]:
        dataset = group.create_dataset(name, data=np.ascontiguousarray(array).view("V2"))
        dataset.attrs["dtype"] = "bfloat16"
    else:
        group.create_dataset(name, data=array)
    progress(array.nbytes)
