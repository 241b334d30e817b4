"""LoHa, LoKr and mid factors as plain LoRA: the factors of the same change, in float64.

A Hadamard product of two changes of ranks r1 and r2 is one of rank r1 r2, and so is a Kronecker
product: (a b) o (c d) and (a b) (x) (c d) both pair every column of a with every one of c, and
every row of b with every one of d. A whole factor of a LoKr is itself times an identity.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import numpy as np

from .change import Array, down_matrix, hadamard_left, hadamard_right, matrix
from .modules import Module
from .shapes import Shaped

_WHOLE_KRONECKER = {"lokr_w1", "lokr_w2"}


def expands(module: Module[Any]) -> bool:
    """Whether a module is a plain LoRA in other factors, and none as it is."""
    if module.flavour == "lora":
        return "mid" in module.tensors
    if module.flavour == "lokr":
        return not module.tensors.keys() >= _WHOLE_KRONECKER
    return module.flavour == "loha"


def expanded_rank(tensors: Mapping[str, Shaped]) -> int:
    """The rank of a module as a plain LoRA.

    Args:
        tensors: role -> tensor of a module that expands.
    """
    shapes = {role: tuple(tensor.shape) for role, tensor in tensors.items()}
    if "up" in shapes:
        return prod(shapes["up"][1:])
    if "hada_w1_a" in shapes:
        return _inner_rank("hada", "1", shapes) * _inner_rank("hada", "2", shapes)
    return _kronecker_rank("1", shapes) * _kronecker_rank("2", shapes)


def left_factor(arrays: Mapping[str, Array]) -> Array:
    """The factor up (o, r) of a module that expands.

    Args:
        arrays: role -> tensor, in any dtype.
    """
    wide = {role: array.astype(np.float64) for role, array in arrays.items()}
    if "up" in wide:
        return matrix(wide["up"])
    if "hada_w1_a" in wide:
        a = hadamard_left(wide, "1")
        c = hadamard_left(wide, "2")
        pairs = a[:, :, None] * c[:, None, :]
        return pairs.reshape(len(a), -1)
    return np.kron(_kronecker_left("1", wide), _kronecker_left("2", wide))


def right_factor(arrays: Mapping[str, Array]) -> Array:
    """The factor down (r, i k k) of a module that expands.

    Args:
        arrays: role -> tensor, in any dtype.
    """
    wide = {role: array.astype(np.float64) for role, array in arrays.items()}
    if "up" in wide:
        return down_matrix(wide)
    if "hada_w1_a" in wide:
        b = hadamard_right(wide, "1")
        d = hadamard_right(wide, "2")
        pairs = b[:, None, :] * d[None, :, :]
        return pairs.reshape(-1, b.shape[1])
    return np.kron(_kronecker_right("1", wide), _kronecker_right("2", wide))


def _kronecker_rank(half: str, shapes: Mapping[str, tuple[int, ...]]) -> int:
    whole = shapes.get(f"lokr_w{half}")
    if whole is not None:
        return min(whole[0], prod(whole[1:]))
    return _inner_rank("lokr", half, shapes)


def _inner_rank(kind: str, half: str, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Over how many columns and rows the factors of a half are multiplied."""
    core = shapes.get(f"{kind}_t{half}")
    return shapes[f"{kind}_w{half}_b"][0] if core is None else core[0]


def _kronecker_left(half: str, arrays: Mapping[str, Array]) -> Array:
    """The left factor (o, r) of one half of a LoKr."""
    whole = arrays.get(f"lokr_w{half}")
    if whole is not None:
        cells = matrix(whole)
        rows, columns = cells.shape
        return np.eye(rows) if rows < columns else cells
    a = matrix(arrays[f"lokr_w{half}_a"])
    return a if f"lokr_t{half}" not in arrays else a.T


def _kronecker_right(half: str, arrays: Mapping[str, Array]) -> Array:
    """The right factor (r, i k k) of one half of a LoKr."""
    whole = arrays.get(f"lokr_w{half}")
    if whole is not None:
        cells = matrix(whole)
        rows, columns = cells.shape
        return cells if rows < columns else np.eye(columns)
    b = matrix(arrays[f"lokr_w{half}_b"])
    core = arrays.get(f"lokr_t{half}")
    return b if core is None else matrix(np.einsum("abhw,bd->adhw", core, b))
