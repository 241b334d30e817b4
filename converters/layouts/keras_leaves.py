"""The variables of one Keras leaf layer as one weight and one bias.

Layers are Dense, Conv2D, Embedding and normalisations; plain ones pass through. int8 and int4
kernels are dequantised and LoRA factors merged when the tensor is read. Sources:
keras/src/layers/core/{dense,embedding}.py and keras/src/quantizers/quantizers.py, Keras 3.15.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial

import numpy as np

from ...errors import ConversionError, printable
from ...io.arrays import Array
from ..checkpoint import Computed, LowRank, Tensor

_WEIGHT = ("kernel", "_kernel", "embeddings", "_embeddings", "gamma")
_BIAS = ("bias", "beta")
_QUANTISED = ("I8", "U8")
_SCALES = ("kernel_scale", "kernel_zero", "embeddings_scale", "embeddings_zero", "g_idx")
_WITHOUT_SCALES = "a quantised kernel without the scales that belong to it"
_NUMBER = re.compile(r"\d{1,9}").fullmatch


def leaf_tensors(
    layer: str, variables: Mapping[str, Tensor], lora_alpha: float | None
) -> dict[str, Tensor]:
    """`{"weight": ..., "bias": ...}` of one layer.

    Args:
        variables: by name or by position (`"0"`, `"1"`, ...).
        lora_alpha: LoRA factors beside a kernel are merged with it, or refused where it is None.

    Raises:
        ConversionError: LoRA factors without `--lora-alpha`, or variables that are no known layer's
            or do not fit.
    """
    by_position = all(map(_NUMBER, variables))
    named = _name(variables) if by_position else dict(variables)
    found = {"weight": _take(named, _WEIGHT), "bias": _take(named, _BIAS)}
    tensors = {name: tensor for name, tensor in found.items() if tensor is not None}
    lora_a = _take(named, ("lora_kernel_a", "lora_embeddings_a"))
    lora_b = _take(named, ("lora_kernel_b", "lora_embeddings_b"))
    scales = _take_scales(named)
    if named:
        raise ConversionError(
            f"{layer}: unknown variable `{printable(next(iter(named)))}` in this Keras layer"
        )
    weight = tensors.get("weight")
    if weight is None:
        if scales or lora_a or lora_b:
            raise ConversionError(
                f"{layer}: holds scales or LoRA factors, but no kernel that they belong to"
            )
        return tensors
    if scales or weight.dtype in _QUANTISED:
        weight = _dequantised(layer, weight, scales)
    if lora_a or lora_b:
        weight = _merged(layer, weight, lora_a, lora_b, lora_alpha)
    return tensors | {"weight": weight}


def _take(named: dict[str, Tensor], names: tuple[str, ...]) -> Tensor | None:
    """The first of some variables that is there; it is removed."""
    for name in names:
        if name in named:
            return named.pop(name)
    return None


def _take_scales(named: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a quantised kernel comes with: `scale`, `zero`, `g_idx`; they are removed."""
    scales = {}
    for name in _SCALES:
        if name in named:
            kind = name.removeprefix("kernel_").removeprefix("embeddings_")
            scales[kind] = named.pop(name)
    return scales


def _name(variables: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Name variables saved by position.

    Kernel, [bias], and for quantised kernels scale, [zero, g_idx]; what comes after keeps numbers.
    """
    kernel, *rest = [variables[name] for name in sorted(variables, key=int)]
    names = ["bias"]
    if kernel.dtype in _QUANTISED:
        grouped = any(tensor.dtype == "I8" for tensor in rest)
        tail = ["kernel_scale", "kernel_zero", "g_idx"] if grouped else ["kernel_scale"]
        names = ["bias", *tail] if len(rest) > len(tail) else tail
    names += map(str, range(len(names) + 1, len(rest) + 1))
    return {"kernel": kernel} | dict(zip(names, rest, strict=False))


def _dequantised(layer: str, kernel: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
    """The float32 kernel of an int8 or int4 layer.

    int8: `q / scale`; int4, two in a byte: `(q - zero[g]) * scale[g]`. Scales belong to columns of
    a kernel (in, out), but to rows of an embedding (rows, width).
    """
    scale = parts.get("scale")
    zero = parts.get("zero")
    groups = parts.get("g_idx")
    if kernel.dtype != "I8" or len(kernel.shape) != 2 or scale is None:
        raise ConversionError(f"{layer}: {_WITHOUT_SCALES}")
    if zero is not None and groups is not None:
        return _dequantised_int4(layer, kernel, scale, zero, groups)
    if zero is not None or groups is not None:
        raise ConversionError(f"{layer}: {_WITHOUT_SCALES}")
    by_row = _is_by_row(layer)
    rows, columns = kernel.shape
    if scale.shape != (rows if by_row else columns,):
        raise ConversionError(
            f"{layer}: int8 scales {list(scale.shape)} do not fit a kernel {list(kernel.shape)}"
        )
    compute = partial(_from_int8, by_row=by_row)
    return Computed(
        kernel.name, "F32", kernel.shape, (kernel, scale), compute, "dequantised from int8"
    )


def _dequantised_int4(
    layer: str, packed: Tensor, scale: Tensor, zero: Tensor, groups: Tensor
) -> Tensor:
    """The float32 kernel of an int4 layer."""
    rows, half = packed.shape
    columns = 2 * half
    by_row = _is_by_row(layer)
    inputs = columns if by_row else rows  # each of which is of a group
    outputs = rows if by_row else columns
    outputs_axis = 0 if by_row else 1
    fits = (
        len(scale.shape) == 2
        and scale.shape[outputs_axis] == outputs
        and zero.shape == scale.shape
        and groups.shape == (inputs,)
    )
    if not fits:
        raise ConversionError(
            f"{layer}: int4 scales {list(scale.shape)} do not fit a kernel {[rows, columns]}"
        )
    sources = (packed, scale, zero, groups)
    compute = partial(_from_int4, layer)
    return Computed(packed.name, "F32", (rows, columns), sources, compute, "dequantised from int4")


def _is_by_row(layer: str) -> bool:
    """Whether scales belong to rows: those of an embedding do."""
    return layer.endswith("_embedding")


def _from_int8(kernel: Array, scale: Array, by_row: bool) -> Array:
    divisor = scale[:, None] if by_row else scale
    return kernel.astype(np.float32) / divisor.astype(np.float32)


def _from_int4(layer: str, packed: Array, scale: Array, zero: Array, groups: Array) -> Array:
    """Two numbers in a byte, the low one first.

    `g_idx` gives the group of each input of a kernel, or of each column of an embedding.
    """
    nibbles = np.stack([packed << 4, packed], axis=-1).astype(np.int8) >> 4
    kernel = nibbles.reshape(packed.shape[0], -1)
    axis = 1 if _is_by_row(layer) else 0
    if not np.isin(groups, np.arange(scale.shape[axis])).all():
        raise ConversionError(
            f"{layer}: `g_idx` names groups that its int4 kernel does not have; the file is damaged"
        )
    index = groups.astype(np.int64)
    zeros = np.take(zero.astype(np.float32), index, axis)
    scales = np.take(scale.astype(np.float32), index, axis)
    return (kernel.astype(np.float32) - zeros) * scales


def _merged(
    layer: str, kernel: Tensor, a: Tensor | None, b: Tensor | None, lora_alpha: float | None
) -> Tensor:
    """`kernel + alpha / rank * a @ b`, which Keras computes with.

    Hu et al., arXiv:2106.09685, section 4.1.
    """
    if a is None or b is None or not b.shape or b.shape[0] == 0:
        raise ConversionError(f"{layer}: holds only one of the two LoRA factors, or empty ones")
    rank = b.shape[0]
    if a.shape != (*kernel.shape[:-1], rank) or b.shape != (rank, *kernel.shape[-1:]):
        shapes = f"{list(a.shape)} and {list(b.shape)}"
        raise ConversionError(
            f"{layer}: LoRA factors {shapes} do not fit a kernel {list(kernel.shape)}"
        )
    if lora_alpha is None:
        raise ConversionError(
            f"{layer}: holds LoRA factors `{printable(a.name)}` of rank {rank}; give --lora-alpha"
            f" to merge them, or with --to kohya to take them out (Keras's default alpha is the"
            f" rank: {rank})"
        )
    scale = np.float32(lora_alpha / rank)

    def merge(base: Array, left: Array, right: Array) -> Array:
        change = left.astype(np.float32) @ right.astype(np.float32)
        return base.astype(np.float32) + scale * change

    right, left = (b, a) if _is_by_row(layer) else (_turned(a), _turned(b))
    return LowRank(
        kernel.name,
        kernel.dtype,
        kernel.shape,
        (kernel, a, b),
        merge,
        f"LoRA, alpha {lora_alpha:g}",
        left=left,
        right=right,
        alpha=lora_alpha,
    )


def _turned(factor: Tensor) -> Tensor:
    """A factor (..., in, out) as PyTorch has it, (out, in, ...)."""

    def turn(array: Array) -> Array:
        axes = (array.ndim - 1, array.ndim - 2, *range(array.ndim - 2))
        return np.ascontiguousarray(array.transpose(axes))

    *kernel, rows, columns = factor.shape
    shape = (columns, rows, *kernel)
    return Computed(factor.name, factor.dtype, shape, (factor,), turn, "transposed")
