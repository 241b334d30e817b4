"""What a module does to the weight that it changes, in float64.

The weight is a matrix of o rows, its other axes flattened. Formulas, in which s is alpha / rank and
m the strength that a user asks for:

    LoRA         W + m s up down                      (Hu et al. 2021, https://arxiv.org/abs/2106.09685)
    LoHa         W + m s (w1a w1b) o (w2a w2b)        (Hyeon-Woo et al. 2021, https://arxiv.org/abs/2108.06098)
    LoKr         W + m s w1 (x) w2                    (Yeh et al. 2023, https://arxiv.org/abs/2309.14859)
    GLoRA        W + m s (W a1 a2 + b1 b2)            (Chavan et al. 2023, https://arxiv.org/abs/2306.07967)
    replaced     W + m (W' - W)
    (IA)3        W (1 + m w), along rows or columns   (Liu et al. 2022, https://arxiv.org/abs/2205.05638)
    OFT, BOFT    (m (R - I) + I)^T W                  (Qiu et al. 2023, https://arxiv.org/abs/2306.07280)
    DoRA         W + m (V M / |V| - W), V = W + dW    (Liu et al. 2024, https://arxiv.org/abs/2402.09353)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import printable
from ..mappings.conventions import conventions
from .modules import Module
from .shapes import BIAS_ROLES, upright

Array = np.ndarray[Any, Any]
Which = slice | Array
Change = Callable[[Array, Which], Array]
"""(rows of the weight, which ones) -> how they change, at the strength asked for."""

_BLOCK = 1 << 17  # elements of a weight that are in float64 at once; they stay in the cache
_EPSILON = 1e-8  # of kohya's and LyCORIS' bound on rotations


def weight_change(
    module: Module[Any], arrays: Mapping[str, Array], weight: Array, strength: float
) -> Change:
    """What a module does to the weight (o, ...) of its first layer.

    Args:
        arrays: role -> tensor, in any dtype.

    Raises:
        ValueError: the change is none of this weight alone.
    """
    if module.is_fused and not module.has_rows_apart:
        raise ValueError(
            f"`{printable(module.name)}` is {module.title} over layers that the model has apart,"
            " and depends on all of them at once"
        )
    wide = {role: array.astype(np.float64) for role, array in arrays.items()}
    rows = own_rows(module)
    height = len(weight) if rows is None else module.height
    shape = (height, *weight.shape[1:])
    wide = upright(wide, {role: array.shape for role, array in wide.items()}, shape)
    change = _whole(module, wide, weight, strength)
    if rows is None:
        return change
    return lambda old, which: change(old, rows[which])


def own_rows(module: Module[Any]) -> Array | None:
    """Which rows of a module are those of its first layer; None for all, in their order."""
    runs = module.rows()
    if not runs:
        return None
    return np.concatenate([np.arange(run.start, run.stop) for run in runs])


def _whole(
    module: Module[Any], wide: Mapping[str, Array], weight: Array, strength: float
) -> Change:
    """The change of all rows of a module."""
    if module.flavour == "oft":
        return _rotation(module, wide, weight, strength)
    if module.flavour == "ia3":
        return _scaling(wide, weight.shape, strength)
    if module.flavour == "replaced":
        new = matrix(wide["whole"])
        return lambda rows, which: strength * (new[which] - rows)
    plain = _padded(_plain(module, wide, weight.shape), weight.shape, wide)
    if module.is_decomposed:
        M = wide["magnitude"].reshape(-1)
        return _decomposed(plain, M, weight, strength, module.is_by_row)
    return lambda rows, which: strength * plain(rows, which)


def bias_change(module: Module[Any], arrays: Mapping[str, Array], strength: float) -> Array | None:
    """How a module changes the bias (o,) of its layer; None if it does not."""
    total: Array | None = None
    for role in BIAS_ROLES:
        if role in arrays:
            factor = module.factor if role == "up_bias" else 1.0
            part = strength * factor * arrays[role].astype(np.float64).reshape(-1)
            total = part if total is None else total + part
    rows = own_rows(module)
    return total if total is None or rows is None else total[rows]


def changes_weight(module: Module[Any]) -> bool:
    """Whether a module changes the weight of its layer, and not the bias alone."""
    return module.flavour != "bias"


def changes_bias(module: Module[Any]) -> bool:
    """Whether a module changes the bias of its layer."""
    return any(role in module.tensors for role in BIAS_ROLES)


def row_blocks(rows: int, columns: int) -> Iterator[slice]:
    """Slices of rows that are in float64 at once."""
    step = max(1, _BLOCK // max(1, columns))
    for start in range(0, rows, step):
        yield slice(start, min(rows, start + step))


# --- changes that do not ask for the weight, and GLoRA --------------------------------------------


def _plain(module: Module[Any], arrays: Mapping[str, Array], shape: Sequence[int]) -> Change:
    """The change at strength 1, without magnitudes, of the weights' own columns."""
    s = module.factor
    if module.flavour == "lora":
        up = matrix(arrays["up"]) * s
        down = down_matrix(arrays)
        return lambda _, which: up[which] @ down
    if module.flavour == "loha":
        a1 = hadamard_left(arrays, "1")
        b1 = hadamard_right(arrays, "1")
        a2 = hadamard_left(arrays, "2")
        b2 = hadamard_right(arrays, "2")
        return lambda _, which: s * ((a1[which] @ b1) * (a2[which] @ b2))
    if module.flavour == "lokr":
        return _kronecker(arrays, s)
    if module.flavour == "glora":
        return _two_sided(arrays, s, shape)
    difference = matrix(arrays["diff" if "diff" in arrays else "w_norm"])
    return lambda _, which: difference[which]


def matrix(array: Array) -> Array:
    """A tensor as rows of its first axis."""
    return array.reshape(len(array), -1)


def down_matrix(arrays: Mapping[str, Array]) -> Array:
    """The right factor of a LoRA, with its mid factor in it: (rank, i k k)."""
    down = arrays["down"]
    if "mid" not in arrays:
        return matrix(down)
    return matrix(np.einsum("abhw,bi->aihw", arrays["mid"], matrix(down)))


def hadamard_left(arrays: Mapping[str, Array], half: str) -> Array:
    """The left factor (o, r) of one half of a LoHa."""
    a = matrix(arrays[f"hada_w{half}_a"])
    return a if f"hada_t{half}" not in arrays else a.T


def hadamard_right(arrays: Mapping[str, Array], half: str) -> Array:
    """The right factor (r, i k k) of one half of a LoHa."""
    b = matrix(arrays[f"hada_w{half}_b"])
    core = arrays.get(f"hada_t{half}")
    return b if core is None else matrix(np.einsum("abhw,bi->aihw", core, b))


def kronecker_factors(arrays: Mapping[str, Array]) -> tuple[Array, Array]:
    """The two factors (a, b) and (c, d[, k, k]) of a LoKr, made of their own factors."""
    first = arrays.get("lokr_w1")
    if first is None:
        first = matrix(arrays["lokr_w1_a"]) @ matrix(arrays["lokr_w1_b"])
    second = arrays.get("lokr_w2")
    if second is not None:
        return matrix(first), second
    a = matrix(arrays["lokr_w2_a"])
    b = arrays["lokr_w2_b"]
    core = arrays.get("lokr_t2")
    if core is not None:
        return matrix(first), np.einsum("abhw,ac,bd->cdhw", core, a, matrix(b))
    second = a @ matrix(b)
    return matrix(first), second.reshape(len(a), *b.shape[1:])


def _kronecker(arrays: Mapping[str, Array], s: float) -> Change:
    first, second = kronecker_factors(arrays)
    first = first * s
    size = len(second)
    flat = matrix(second)

    every = np.arange(len(first) * size)

    def rows(_: Array, which: Which) -> Array:
        indices = every[which]
        left = first[indices // size]
        right = flat[indices % size]
        product: Array = left[:, :, None] * right[:, None, :]
        return product.reshape(len(indices), -1)

    return rows


def _two_sided(arrays: Mapping[str, Array], s: float, shape: Sequence[int]) -> Change:
    a1 = matrix(arrays["glora_a1"])
    a2 = matrix(arrays["glora_a2"])
    b1 = matrix(arrays["glora_b1"])
    b2 = matrix(arrays["glora_b2"])
    if "glora_bm" in arrays:
        b2 = down_matrix({"down": arrays["glora_b2"], "mid": arrays["glora_bm"]})
    inputs = shape[1]

    def rows(weight: Array, which: Which) -> Array:
        cells = weight.reshape(len(weight), inputs, -1)
        mixed = np.einsum("oik,ir->ork", cells, a1)
        mixed = np.einsum("ork,rj->ojk", mixed, a2).reshape(weight.shape)
        change: Array = s * (mixed + b1[which] @ b2)
        return change

    return rows


def _padded(change: Change, shape: Sequence[int], arrays: Mapping[str, Array]) -> Change:
    """A change of a model's usual input channels, for a model that has more: those stay."""
    role = next((role for role in ("down", "diff") if role in arrays), None)
    if role is None or len(shape) < 2 or "mid" in arrays or arrays[role].ndim < 2:
        return change
    kernel = int(np.prod(shape[2:], dtype=int))
    columns = int(np.prod(arrays[role].shape[1:], dtype=int))
    missing = shape[1] * kernel - columns
    if missing <= 0:
        return change
    return lambda rows, which: np.pad(change(rows[:, :columns], which), ((0, 0), (0, missing)))


# --- changes of the weight itself -----------------------------------------------------------------


def _scaling(arrays: Mapping[str, Array], shape: Sequence[int], m: float) -> Change:
    """(IA)3."""
    w = arrays["whole"].reshape(-1)
    if not arrays["on_input"].any():
        return lambda rows, which: rows * (m * w[which, None])
    columns = np.repeat(w, int(np.prod(shape[2:], dtype=int)))
    return lambda rows, _: rows * (m * columns)


def _rotation(module: Module[Any], arrays: Mapping[str, Array], weight: Array, m: float) -> Change:
    """OFT and BOFT: rows mix with one another, so the whole weight is in float64 at once."""
    clamps = conventions()[module.convention].clamps
    R = _rotations(arrays["oft"], module.alpha or 0.0, len(weight), clamps)
    W = matrix(weight).astype(np.float64)
    mix = _blockwise if R.ndim == 3 else _butterfly
    mixed = mix(R, W, m)
    if "rescale" in arrays:
        mixed = mixed * arrays["rescale"].reshape(-1, 1)
    change = mixed - W
    return lambda _, which: change[which]


def _rotations(blocks: Array, alpha: float, rows: int, clamps: bool) -> Array:
    """R = (I + Q) (I - Q)^-1 of every block, Q being skew and of a norm that alpha bounds."""
    Q = blocks - blocks.swapaxes(-1, -2)
    bound = alpha * rows
    norm = float(np.sqrt(np.sum(Q * Q)))
    if clamps:
        Q = Q * ((min(norm, bound) + _EPSILON) / (norm + _EPSILON))
    elif 0 < bound < norm + _EPSILON:
        Q = Q * (bound / (norm + _EPSILON))
    identity = np.eye(blocks.shape[-1])
    rotations: Array = (identity + Q) @ np.linalg.inv(identity - Q)
    return rotations


def _blockwise(R: Array, W: Array, m: float) -> Array:
    number, size, _ = R.shape
    mixing = m * (R - np.eye(size)) + np.eye(size)
    cells = W.reshape(number, size, -1)
    return (mixing.swapaxes(1, 2) @ cells).reshape(W.shape)


def _butterfly(R: Array, W: Array, m: float) -> Array:
    """Stages of blocks, each over rows that lie twice as far apart as before."""
    stages, _, size, _ = R.shape
    identity = np.eye(size)
    columns = W.shape[1]
    for stage in range(stages):
        mixing = m * (R[stage] - identity) + identity
        apart = 2**stage * (size // 2)
        cells = W.reshape(-1, 2, apart, columns).swapaxes(1, 2).reshape(-1, size, columns)
        cells = mixing @ cells
        W = cells.reshape(-1, apart, 2, columns).swapaxes(1, 2).reshape(-1, columns)
    return W


def _decomposed(plain: Change, M: Array, weight: Array, m: float, is_by_row: bool) -> Change:
    """DoRA, between W and V M / |V|, with norms of rows or of input channels."""
    W = matrix(weight)
    if is_by_row:

        def rows(old: Array, which: Which) -> Array:
            V = old + plain(old, which)
            norms = np.sqrt(np.sum(V * V, axis=1, keepdims=True))
            change: Array = m * (V * (M[which, None] / norms) - old)
            return change

        return rows
    inputs = weight.shape[1]
    squares = np.zeros(inputs)
    for which in row_blocks(*W.shape):
        old = W[which].astype(np.float64)
        V = (old + plain(old, which)).reshape(len(old), inputs, -1)
        squares += np.sum(V * V, axis=(0, 2))
    ratios = np.repeat(M / np.sqrt(squares), W.shape[1] // inputs)

    def columns(old: Array, which: Which) -> Array:
        V = old + plain(old, which)
        return m * (V * ratios - old)

    return columns
