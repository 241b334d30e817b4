"""Writes one component as a Keras file that keras-cv loads: `.weights.h5` (Keras 2.15 and 3), or
legacy `.h5`.

Needs h5py, the only place that does (extra `[h5]`).
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import ConversionError
from ..checkpoint import DTYPES, Array
from ..layouts.kerascv_layers import class_path, model_layers

_VARIABLES = {
    "embedding": ("embeddings",),
    "group_normalization": ("gamma", "beta"),
    "layer_normalization": ("gamma", "beta"),
}
_KERNEL = ("kernel", "bias")
Compute = Callable[[], Array]


def write_keras(
    path: Path, part: str, tensors: Mapping[str, Compute], progress: Callable[[int], None]
) -> None:
    """Write a part's tensors (canonical Keras key -> a function that computes the array).

    The layout follows the name: `.weights.h5` by attribute, any other `.h5` the legacy one.

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
    layers = model_layers(part, tensors)
    write = _write_by_attribute if path.name.endswith(".weights.h5") else _write_legacy
    with _OutputFile(path, "x+") as output:

        def put(group: Any, name: str, key: str) -> None:
            _put(group, name, tensors[key](), progress)
            output.check()

        with h5py.File(output, "w") as file:
            write(file, layers, put)
        output.check()


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


_Put = Callable[[Any, str, str], None]
_Layers = Iterable[tuple[str, list[str]]]


def _put(group: Any, name: str, array: Array, progress: Callable[[int], None]) -> None:
    """One contiguous dataset; bfloat16 the way Keras stores it, as two opaque bytes with a `dtype`
    attribute."""
    if array.dtype == DTYPES["BF16"]:
        dataset = group.create_dataset(name, data=np.ascontiguousarray(array).view("V2"))
        dataset.attrs["dtype"] = "bfloat16"
    else:
        group.create_dataset(name, data=array)
    progress(array.nbytes)


def _write_by_attribute(file: Any, layers: _Layers, put: _Put) -> None:
    """`layers/<class>[_<rank>]/<attribute>/.../vars/<0 or 1>`; Keras 2.15 looks for `vars` in every
    group it meets."""
    file.create_group("vars")
    for cls, keys in layers:
        for key in keys:
            _, rank, *attributes, leaf = key.split(".")
            layer = cls if rank == "0" else f"{cls}_{rank}"
            group = file.require_group(f"layers/{layer}")
            for attribute in attributes:
                group.require_group("vars")
                group = group.require_group(attribute)
            put(group.require_group("vars"), "0" if leaf == "weight" else "1", key)


def _write_legacy(file: Any, layers: _Layers, put: _Put) -> None:
    """A group per layer with its `weight_names`, numbered by class as a fresh Keras process
    would."""
    number = _Numbers()
    names = []
    for cls, keys in layers:
        layer = number(cls)
        names.append(layer)
        group = file.create_group(layer)
        weight_names = [*_legacy_names(cls, layer, keys, number)]
        group.attrs["weight_names"] = [name.encode() for name in weight_names]
        for name, key in zip(weight_names, keys, strict=True):
            put(group, name, key)
    file.create_group("top_level_model_weights").attrs["weight_names"] = np.array([], "S1")
    file.attrs["layer_names"] = [name.encode() for name in names]
    file.attrs["backend"] = "tensorflow"
    file.attrs["keras_version"] = "2.15.0"


def _legacy_names(cls: str, layer: str, keys: Iterable[str], number: _Numbers) -> Iterator[str]:
    """`<layer>/<class>[_<n>]/.../kernel:0` for each key; a sublayer is numbered when it is first
    met."""
    named: dict[tuple[str, ...], str] = {}
    for key in keys:
        _, _, *attributes, leaf = key.split(".")
        steps = class_path(cls, attributes)
        path = [layer]
        for depth, (_, sublayer) in enumerate(steps, 1):
            route = tuple(attribute for attribute, _ in steps[:depth])
            if route not in named:
                named[route] = number(sublayer)
            path.append(named[route])
        variables = _VARIABLES.get(steps[-1][1] if steps else cls, _KERNEL)
        yield "/".join([*path, f"{variables[leaf != 'weight']}:0"])


class _Numbers:
    """Keras's names for layers: `dense`, `dense_1`, `dense_2`, ..."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()

    def __call__(self, cls: str) -> str:
        count = self._counts[cls]
        self._counts[cls] += 1
        return f"{cls}_{count}" if count else cls
