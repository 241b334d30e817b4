"""Whether the tensors of a module agree with one another and with the weight that they change."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Protocol, TypeVar

Shape = tuple[int, ...]
S = TypeVar("S")

BIAS_ROLES = ("diff_b", "b_norm", "up_bias")
"""What changes a bias."""


class Shaped(Protocol):
    """A tensor, of any library."""

    @property
    def shape(self) -> Shape:
        """The dimensions."""


def flaw(
    tensors: Mapping[str, Shaped], weight: Shape, is_open: bool, is_stock: bool = False
) -> str | None:
    """Why a module does not fit a weight (o, i[, h, w]), if it does not.

    Args:
        tensors: role -> tensor.
        is_open: whether the weight may have more input channels than the module.
        is_stock: whether it is that of a stock model, of which others differ in these channels.

    Raises:
        ValueError: its tensors contradict one another, so that it fits nothing.
    """
    shapes = {role: tuple(tensor.shape) for role, tensor in tensors.items()}
    change = changed_shape(upright(shapes, shapes, weight))
    if change is not None:
        _check_beside(shapes, change)
    for role in BIAS_ROLES:
        if role in shapes and prod(shapes[role]) != weight[0]:
            return f"{_said(role, shapes)} does not fit a bias of {weight[0]}"
    size = prod(shapes["whole"]) if "on_input" in shapes else weight[0]
    if size not in weight[:2]:
        return f"{_said('whole', shapes)} does not fit a weight {list(weight)}"
    if "oft" in shapes and prod(shapes["oft"][-3:-1]) != weight[0]:
        return f"{_said('oft', shapes)} does not fit a weight of {weight[0]} rows"
    if "magnitude" in shapes and prod(shapes["magnitude"]) not in weight[:2]:
        return f"{_said('magnitude', shapes)} does not fit a weight {list(weight)}"
    if change is None or _same(change, weight):
        return None
    if is_open and len(change) == len(weight) and (is_stock or change[1] < weight[1]):
        narrow = (weight[0], change[1], *weight[2:])
        if _same(change, narrow):
            return None
    return f"makes a change {list(change)} of a weight {list(weight)}"


def _check_beside(shapes: Mapping[str, Shape], change: Shape) -> None:
    """Check what lies beside the change of a weight: biases and magnitudes of its rows or columns.

    Raises:
        ValueError: it contradicts the change.
    """
    rows, columns = change[0], prod(change[1:])
    for role in (*BIAS_ROLES, "magnitude"):
        if role not in shapes:
            continue
        size = prod(shapes[role])
        is_of_columns = role == "magnitude" and size and columns % size == 0
        if size != rows and not is_of_columns:
            raise ValueError(f"{_said(role, shapes)} does not fit a change {list(change)}")


def upright(tensors: Mapping[str, S], shapes: Mapping[str, Shape], weight: Shape) -> dict[str, S]:
    """The tensors of a module; of old GLoRA files under the names of today.

    They had right factors under the names of left ones; the weight (o, ...) tells.
    """
    if "glora_b1" not in shapes:
        return dict(tensors)
    left = shapes["glora_b1"]
    right = shapes["glora_b2"]
    if len(left) < 2 or not right or (left[0] == weight[0] and left[1] == right[0]):
        return dict(tensors)
    return {_OLD_NAMES.get(role, role): tensor for role, tensor in tensors.items()}


_OLD_NAMES = {
    "glora_a1": "glora_a2",
    "glora_a2": "glora_a1",
    "glora_b1": "glora_b2",
    "glora_b2": "glora_b1",
}


def changed_shape(shapes: Mapping[str, Shape]) -> Shape | None:
    """The shape of the change that a module makes; None if it fits any or changes a bias alone.

    Raises:
        ValueError: its tensors contradict one another.
    """
    if "down" in shapes:
        return _product(shapes)
    if "hada_w1_a" in shapes:
        return _hadamard(shapes)
    if "lokr_w1" in shapes or "lokr_w1_a" in shapes:
        return _kronecker(shapes)
    if "glora_b1" in shapes:
        return _two_sided(shapes)
    if "oft" in shapes:
        return _rotated(shapes)
    if "on_input" in shapes:
        return None
    for role in ("diff", "w_norm", "whole"):
        if role in shapes:
            return shapes[role]
    return None


def height_of(tensors: Mapping[str, Shaped], weight: Shape) -> int:
    """How many rows a module changes that does not fit a weight, as its tensors have it."""
    shapes = {role: tuple(tensor.shape) for role, tensor in tensors.items()}
    change = changed_shape(upright(shapes, shapes, weight))
    if change is not None:
        return change[0]
    return next((prod(shapes[role]) for role in BIAS_ROLES if role in shapes), weight[0])


def _said(role: str, shapes: Mapping[str, Shape]) -> str:
    return f"{role} {list(shapes[role])}"


def _same(a: Shape, b: Shape) -> bool:
    """Whether shapes are alike but for trailing ones, or one is the matrix of the other."""
    a = _trimmed(a)
    b = _trimmed(b)
    if len(a) > len(b):
        a, b = b, a
    return a == b or (len(a) == 2 and a[0] == b[0] and a[1] == prod(b[1:]))


def _trimmed(shape: Shape) -> Shape:
    while len(shape) > 1 and shape[-1] == 1:
        shape = shape[:-1]
    return shape if len(shape) > 1 else (*shape, 1)


def _matrix(role: str, shapes: Mapping[str, Shape]) -> tuple[int, int]:
    """A tensor as a matrix: its rows, and all the rest."""
    shape = shapes[role]
    if len(shape) < 2 or 0 in shape:
        raise ValueError(f"{_said(role, shapes)} is no matrix")
    return shape[0], prod(shape[1:])


def _chained(left: str, right: str, shapes: Mapping[str, Shape]) -> tuple[int, int]:
    """The shape of a product."""
    rows, inner = _matrix(left, shapes)
    other, columns = _matrix(right, shapes)
    if inner != other:
        raise ValueError(f"{_said(left, shapes)} and {_said(right, shapes)} differ in rank")
    return rows, columns


def _product(shapes: Mapping[str, Shape]) -> Shape:
    down = shapes["down"]
    rows, _ = _matrix("up", shapes)
    _matrix("down", shapes)
    if "mid" not in shapes:
        _chained("up", "down", shapes)
        return rows, *down[1:]
    mid = shapes["mid"]
    _, inner = _matrix("up", shapes)
    if len(mid) != 4 or mid[0] != inner or mid[1] != down[0]:
        raise ValueError(f"{_said('mid', shapes)} does not stand between up and down")
    return rows, prod(down[1:]), *mid[2:]


def _hadamard(shapes: Mapping[str, Shape]) -> Shape:
    halves = []
    for half in ("1", "2"):
        a = f"hada_w{half}_a"
        b = f"hada_w{half}_b"
        t = f"hada_t{half}"
        if t in shapes:
            halves.append(_tucker(a, b, t, shapes))
        else:
            halves.append(_chained(a, b, shapes))
    if not _same(halves[0], halves[1]):
        raise ValueError(f"its halves are {list(halves[0])} and {list(halves[1])}")
    return halves[0]


def _tucker(a: str, b: str, t: str, shapes: Mapping[str, Shape]) -> Shape:
    """t[p, q, k] of a (p, o) and b (q, i) -> (o, i, k), in LyCORIS' tucker decomposition."""
    core = shapes[t]
    rank, rows = _matrix(a, shapes)
    other, columns = _matrix(b, shapes)
    if len(core) != 4 or core[:2] != (rank, other):
        raise ValueError(f"{_said(t, shapes)} does not fit {_said(a, shapes)}")
    return rows, columns, *core[2:]


def _kronecker(shapes: Mapping[str, Shape]) -> Shape:
    if "lokr_w1" in shapes:
        first = _matrix("lokr_w1", shapes)
    else:
        first = _chained("lokr_w1_a", "lokr_w1_b", shapes)
    second: Shape
    if "lokr_w2" in shapes:
        _matrix("lokr_w2", shapes)
        second = shapes["lokr_w2"]
    elif "lokr_t2" in shapes:
        second = _tucker("lokr_w2_a", "lokr_w2_b", "lokr_t2", shapes)
    else:
        second = _chained("lokr_w2_a", "lokr_w2_b", shapes)
    return first[0] * second[0], first[1] * second[1], *second[2:]


def _two_sided(shapes: Mapping[str, Shape]) -> Shape:
    rows, _ = _chained("glora_b1", "glora_b2", shapes)
    a = _matrix("glora_a1", shapes)
    b = _matrix("glora_a2", shapes)
    if a != (b[1], b[0]):
        raise ValueError(f"{_said('glora_a1', shapes)} and {_said('glora_a2', shapes)} differ")
    return rows, *shapes["glora_b2"][1:]


def _rotated(shapes: Mapping[str, Shape]) -> Shape | None:
    blocks = shapes["oft"]
    if len(blocks) not in (3, 4) or blocks[-1] != blocks[-2] or 0 in blocks:
        raise ValueError(f"{_said('oft', shapes)} holds no square blocks")
    return None
