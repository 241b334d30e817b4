"""HDF5 files as Keras writes them, by h5py: names, attributes and order as in files of Keras 2.15
and 3.15."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import ml_dtypes
import numpy as np

VERSIONS: dict[
    str, dict[str, Any]
] = {  # keyword arguments of h5py.File -> superblock, object headers, groups
    "v0": {},
    "v2": {"libver": ("v108", "v108")},
    "v3": {"libver": "latest"},
    "tracked": {"track_order": True},  # superblock 0, but new-style groups
}
MODEL_CONFIG = '{"class_name": "Functional", "config": "' + "é" * 30_000 + '"}'


def kernel(*shape: int, dtype: str = "f4") -> np.ndarray:
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(dtype)


def legacy(file: h5py.Group, layers: int = 25, text: Callable[[list[str]], Any] = list) -> None:
    """`save_weights("x.h5")`: a group per layer, named weights below it."""
    names = ["dense", *(f"dense_{i}" for i in range(1, layers))]
    file.attrs["layer_names"] = text(["input_1", *names])
    file.attrs["backend"], file.attrs["keras_version"] = "tensorflow", "2.15.0"
    file.create_group("input_1").attrs["weight_names"] = []
    file.create_group("top_level_model_weights").attrs["weight_names"] = []
    for i, name in enumerate(names):
        group = file.create_group(name)
        group.attrs["weight_names"] = text([f"{name}/kernel:0", f"{name}/bias:0"])
        group[f"{name}/kernel:0"], group[f"{name}/bias:0"] = kernel(3, i + 1), kernel(i + 1)


def fixed(names: list[str]) -> np.ndarray:
    """Names as Keras 2 wrote them through h5py 2: fixed-length bytes."""
    return np.array([name.encode() for name in names])


def whole_model(file: h5py.File) -> None:
    """`save("x.h5")`: the legacy layout below a group, the configuration and the optimizer beside
    it."""
    legacy(file.create_group("model_weights"))
    file.attrs["model_config"] = MODEL_CONFIG
    file.attrs["training_config"] = '{"loss": "mse"}'
    file["optimizer_weights/adam/iter:0"] = np.int64(7)
    file["optimizer_weights/adam/m:0"] = kernel(3, 4)


def modern(file: h5py.File, layers: int = 25) -> None:
    """`save_weights("x.weights.h5")`: numbered variables, every kind of data that Keras stores."""
    file.create_group("vars")
    for i in range(layers):
        variables = file.create_group(f"layers/conv2d_{i}/vars" if i else "layers/conv2d/vars")
        variables.attrs["name"] = f"conv2d_{i + 7}"
        variables["0"], variables["1"] = kernel(3, 3, 2, i + 1), kernel(i + 1)
    of_types = file.create_group("layers/types/vars")
    for i, dtype in enumerate(("f2", "f4", "f8", "i1", "u1", "i2", "i4", "i8", "?")):
        of_types[str(i)] = kernel(2, 5).astype(dtype)
    of_types["9"] = kernel(4, 3).astype(ml_dtypes.bfloat16)
    of_types["9"].attrs["dtype"] = "bfloat16"
    file["optimizer/vars/0"] = np.int64(1000)
    file["optimizer/vars/1"] = np.float32(1e-5)
    file["empty"] = np.zeros((0, 4), "f4")


def attributes(file: h5py.File) -> None:
    values = {
        "text": "naïve ✓",
        "empty": "",
        "bytes": np.bytes_("ascii"),
        "int": 7,
        "bool": True,
        "float": 0.1,
    }
    arrays = {
        "texts": ["a", "", "çé"],
        "fixed": fixed(["one", "three"]),
        "matrix": np.array([[1, 2], [3, 4]], "i4"),
        "none": [],
        "null": h5py.Empty("f4"),
        "half": np.array([0.5], np.float16),
    }
    file.create_group("scalars").attrs.update(values)
    file.create_group("arrays").attrs.update(arrays)
    file["on_dataset"] = kernel(3)
    file["on_dataset"].attrs.update(arrays)


def write(folder: Path, fill: Callable[[h5py.File], Any], **options: Any) -> Path:
    """Write `x.h5` with h5py, by a function that fills it."""
    path = folder / "x.h5"
    with h5py.File(path, "w", **options) as file:
        fill(file)
    return path


def few(file: h5py.File) -> None:
    """As `modern` and `legacy`, with groups of at most eight children, which the newer formats keep
    in the header."""
    legacy(file.create_group("model_weights"), 5)
    file["layers/dense/vars/0"], file["layers/dense/vars/1"] = kernel(4, 5), kernel(5)
    file["layers/dense_1/vars/0"] = kernel(4, 5).astype(ml_dtypes.bfloat16)
    file["layers/dense_1/vars"].attrs["name"] = "dense_8"
    file["flags"] = np.array([True, False])
    file["counter"] = np.int64(3)
    file.create_group("größe")
