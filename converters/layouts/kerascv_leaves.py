"""The variables of one Keras leaf layer (Dense, Conv2D, Embedding, normalisation) as one weight and
one bias.

Plain layers pass through. int8 and int4 kernels are dequantised and LoRA factors merged when the
tensor is read. Sources: keras/src/layers/core/{dense,embedding}.py and
keras/src/quantizers/quantizers.py, Keras 3.15.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial

import numpy as np

from ...errors import ConversionError, printable
from ..checkpoint import Array, Computed, Tensor

_WEIGHT = ("kernel", "_kernel", "embeddings", "_embeddings", "gamma")
_BIAS = ("bias", "beta")
_QUANTISED = ("I8", "U8")
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
    named = _name(variables) if all(map(_NUMBER, variables)) else dict(variables)
    found = {"weight": _take(named, _WEIGHT), "bias": _take(named, _BIAS)}
    tensors = {name: tensor for name, tensor in found.items() if tensor is not None}
    lora_a, lora_b = (_take(named, (f"lora_kernel_{ab}", f"lora_embeddings_{ab}")) for ab in "ab")
    quantised = {
        name.removeprefix("kernel_").removeprefix("embeddings_"): named.pop(name)
        for name in list(named)
        if name in ("kernel_scale", "kernel_zero", "embeddings_scale", "embeddings_zero", "g_idx")
    }
    if named:
        raise ConversionError(
            f"{layer}: unknown variable `{printable(next(iter(named)))}` in this Keras layer"
        )
    weight = tensors.get("weight")
    if weight is None:
        if quantised or lora_a or lora_b:
            raise ConversionError(
                f"{layer}: holds scales or LoRA factors, but no kernel that they belong to"
            )
        return tensors
    if quantised or weight.dtype in _QUANTISED:
        weight = _dequantised(layer, weight, quantised)
    if lora_a or lora_b:
        weight = _merged(layer, weight, lora_a, lora_b, lora_alpha)
    return tensors | {"weight": weight}


def _take(named: dict[str, Tensor], names: tuple[str, ...]) -> Tensor | None:
    return next((named.pop(name) for name in names if name in named), None)


def _name(variables: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Name variables saved by position: kernel, [bias], and for quantised kernels scale, [zero,
    g_idx]."""
    kernel, *rest = [variables[name] for name in sorted(variables, key=int)]
    if kernel.dtype not in _QUANTISED:
        return {"kernel": kernel} | dict(zip(("bias", *map(str, range(2, 9))), rest, strict=False))
    grouped = any(tensor.dtype == "I8" for tensor in rest)
    tail = ("kernel_scale", "kernel_zero", "g_idx") if grouped else ("kernel_scale",)
    names = ("bias", *tail) if len(rest) > len(tail) else tail
    return {"kernel": kernel} | dict(zip((*names, *map(str, range(5, 9))), rest, strict=False))


def _dequantised(layer: str, kernel: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
    """float32 kernel of an int8 (`q / scale`) or int4 (`(q - zero[g]) * scale[g]`, two per byte)
    layer.

    Scales belong to columns of a kernel (in, out), but to rows of an embedding (rows, width).
    """
    scale, zero, groups = parts.get("scale"), parts.get("zero"), parts.get("g_idx")
    by_row = layer.endswith("_embedding")
    if (
        kernel.dtype != "I8"
        or len(kernel.shape) != 2
        or scale is None
        or (zero is None) != (groups is None)
    ):
        raise ConversionError(f"{layer}: a quantised kernel without the scales that belong to it")
    rows, columns = kernel.shape
    if zero is None or groups is None:
        if scale.shape != (rows if by_row else columns,):
            raise ConversionError(
                f"{layer}: int8 scales {list(scale.shape)} do not fit a kernel {list(kernel.shape)}"
            )
        compute = partial(_from_int8, by_row=by_row)
        return Computed(
            kernel.name, "F32", kernel.shape, (kernel, scale), compute, "dequantised from int8"
        )
    shape = (rows, 2 * columns)
    fits = scale.shape[:1] == (rows,) if by_row else scale.shape[1:] == (shape[1],)
    if (
        len(scale.shape) != 2
        or not fits
        or zero.shape != scale.shape
        or groups.shape != (shape[by_row],)
    ):
        raise ConversionError(
            f"{layer}: int4 scales {list(scale.shape)} do not fit a kernel {list(shape)}"
        )
    inputs = (kernel, scale, zero, groups)
    return Computed(
        kernel.name, "F32", shape, inputs, partial(_from_int4, layer), "dequantised from int4"
    )


def _from_int8(kernel: Array, scale: Array, by_row: bool) -> Array:
    return kernel.astype(np.float32) / (scale[:, None] if by_row else scale).astype(np.float32)


def _from_int4(layer: str, packed: Array, scale: Array, zero: Array, groups: Array) -> Array:
    """`g_idx` gives the group of each input of a kernel, or of each column of an embedding; low
    nibble first."""
    kernel = (np.stack([packed << 4, packed], axis=-1).astype(np.int8) >> 4).reshape(
        packed.shape[0], -1
    )
    axis = 1 if layer.endswith("_embedding") else 0
    if not np.isin(groups, np.arange(scale.shape[axis])).all():
        raise ConversionError(
            f"{layer}: `g_idx` names groups that its int4 kernel does not have; the file is damaged"
        )
    zeros, scales = (
        np.take(part.astype(np.float32), groups.astype(np.int64), axis) for part in (zero, scale)
    )
    return (kernel.astype(np.float32) - zeros) * scales


def _merged(
    layer: str, kernel: Tensor, a: Tensor | None, b: Tensor | None, lora_alpha: float | None
) -> Tensor:
    """`kernel + alpha / rank * a @ b`, which Keras computes with (Hu et al., arXiv:2106.09685,
    section 4.1)."""
    if a is None or b is None or not b.shape or b.shape[0] == 0:
        raise ConversionError(f"{layer}: holds only one of the two LoRA factors, or empty ones")
    rank = b.shape[0]
    if (a.shape, b.shape) != ((*kernel.shape[:-1], rank), (rank, *kernel.shape[-1:])):
        shapes = f"{list(a.shape)} and {list(b.shape)}"
        raise ConversionError(
            f"{layer}: LoRA factors {shapes} do not fit a kernel {list(kernel.shape)}"
        )
    if lora_alpha is None:
        raise ConversionError(
            f"{layer}: holds LoRA factors `{printable(a.name)}` of rank {rank}; give --lora-alpha"
            f" to merge them (Keras's default alpha is the rank: {rank})"
        )
    scale = np.float32(lora_alpha / rank)

    def merge(base: Array, left: Array, right: Array) -> Array:
        return base.astype(np.float32) + scale * (
            left.astype(np.float32) @ right.astype(np.float32)
        )

    return Computed(
        kernel.name,
        kernel.dtype,
        kernel.shape,
        (kernel, a, b),
        merge,
        f"LoRA, alpha {lora_alpha:g}",
    )
