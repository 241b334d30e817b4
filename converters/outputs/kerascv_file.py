"""Writes one component as a Keras file that keras-cv loads: `.weights.h5` (Keras 2.15 and 3), or
legacy `.h5`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..layouts.kerascv_layers import class_path, model_layers
from .keras_file import Compute, Put, keras_file, put_by_attribute

_VARIABLES = {
    "embedding": ("embeddings",),
    "group_normalization": ("gamma", "beta"),
    "layer_normalization": ("gamma", "beta"),
}
_KERNEL = ("kernel", "bias")

_Layers = Iterable[tuple[str, list[str]]]


def write_keras(
    path: Path, part: str, tensors: Mapping[str, Compute], progress: Callable[[int], None]
) -> None:
    """Write a part's tensors (canonical Keras key -> a function that computes the array).

    The layout follows the name: `.weights.h5` by attribute, any other `.h5` the legacy one.

    Raises:
        ConversionError: h5py is not installed.
        OSError: the disk is full or fails.
    """
    layers = model_layers(part, tensors)
    with keras_file(path, progress) as (file, put):
        if path.name.endswith(".weights.h5"):
            names = (_names(cls, key) for cls, keys in layers for key in keys)
            keys = (key for _, keys in layers for key in keys)
            variables = {name: tensors[key] for name, key in zip(names, keys, strict=True)}
            put_by_attribute(file, put, variables)
        else:
            _write_legacy(file, layers, tensors, put)


def _names(cls: str, key: str) -> tuple[str, ...]:
    """`layers/<class>[_<rank>]/<attribute>/...`, and 0 for a weight or 1 for a bias."""
    _, rank, *attributes, leaf = key.split(".")
    layer = cls if rank == "0" else f"{cls}_{rank}"
    return f"layers/{layer}", *attributes, "0" if leaf == "weight" else "1"


def _write_legacy(file: Any, layers: _Layers, tensors: Mapping[str, Compute], put: Put) -> None:
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
            put(group, name, tensors[key])
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
