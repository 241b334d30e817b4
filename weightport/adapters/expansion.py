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

from .change import Array, down_matrix, hadamard_half, matrix
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


def expanded(arrays: Mapping[str, Array]) -> tuple[Array, Array]:
    """The factors up (o, r) and down (r, i k k) of a module that expands.

    Args:
        arrays: role -> tensor, in any dtype.
    """
    wide = {role: array.astype(np.float64) for role, array in arrays.items()}
    if "up" in wide:
        return matrix(wide["up"]), down_matrix(wide)
    if "hada_w1_a" in wide:
        return _paired(hadamard_half(wide, "1"), hadamard_half(wide, "2"))
    up1, down1 = _kronecker_half("1", wide)
    up2, down2 = _kronecker_half("2", wide)
    return np.kron(up1, up2), np.kron(down1, down2)


def _paired(first: tuple[Array, Array], second: tuple[Array, Array]) -> tuple[Array, Array]:
    """The factors of the Hadamard product of two changes."""
    a, b = first
    c, d = second
    up = a[:, :, None] * c[:, None, :]
    down = b[:, None, :] * d[None, :, :]
    return up.reshape(len(a), -1), down.reshape(-1, b.shape[1])


def _kronecker_rank(half: str, shapes: Mapping[str, tuple[int, ...]]) -> int:
    whole = shapes.get(f"lokr_w{half}")
    if whole is not None:
        return min(whole[0], prod(whole[1:]))
    return _inner_rank("lokr", half, shapes)


def _inner_rank(kind: str, half: str, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Over how many columns and rows the factors of a half are multiplied."""
    core = shapes.get(f"{kind}_t{half}")
    return shapes[f"{kind}_w{half}_b"][0] if core is None else core[0]


def _kronecker_half(half: str, arrays: Mapping[str, Array]) -> tuple[Array, Array]:
    """Factors (o, r) and (r, i k k) of one half of a LoKr."""
    whole = arrays.get(f"lokr_w{half}")
    if whole is not None:
        cells = matrix(whole)
        rows, columns = cells.shape
        return (np.eye(rows), cells) if rows < columns else (cells, np.eye(columns))
    a = arrays[f"lokr_w{half}_a"]
    b = matrix(arrays[f"lokr_w{half}_b"])
    core = arrays.get(f"lokr_t{half}")
    if core is None:
        return matrix(a), b
    return matrix(a).T, matrix(np.einsum("abhw,bd->adhw", core, b))
