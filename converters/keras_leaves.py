"""The variables of one Keras leaf layer (Dense, Conv2D, Embedding, normalisation) as one weight and one bias.

Plain layers pass through. int8 and int4 kernels are dequantised and LoRA factors merged when the tensor is read.
Sources: keras/src/layers/core/{dense,embedding}.py and keras/src/quantizers/quantizers.py, Keras 3.15.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from .checkpoint import Array, Computed, Tensor
from .errors import ConversionError

_WEIGHT = ("kernel", "_kernel", "embeddings", "_embeddings", "gamma")
_BIAS = ("bias", "beta")


@dataclass(frozen=True)
class Lora:
    """How LoRA factors found beside a kernel are treated: merged with `alpha`, or refused when it is None."""

    alpha: float | None = None


def leaf_tensors(layer: str, variables: Mapping[str, Tensor], lora: Lora) -> dict[str, Tensor]:
    """`{"weight": ..., "bias": ...}` of one layer from its variables, keyed by name or by position (`"0"`, `"1"`, ...).

    Raises:
        ConversionError: LoRA factors without `--lora-alpha`, or variables that are no known layer's.
    """
    named = _name(variables) if all(name.isdigit() for name in variables) else dict(variables)
    found = {"weight": _take(named, _WEIGHT), "bias": _take(named, _BIAS)}
    tensors = {name: tensor for name, tensor in found.items() if tensor is not None}
    lora_a, lora_b = (_take(named, (f"lora_kernel_{ab}", f"lora_embeddings_{ab}")) for ab in "ab")
    quantised = {
        name.removeprefix("kernel_").removeprefix("embeddings_"): named.pop(name)
        for name in list(named)
        if name in ("kernel_scale", "kernel_zero", "embeddings_scale", "embeddings_zero", "g_idx")
    }
    if named:
        raise ConversionError(f"{layer}: unknown variable `{next(iter(named))}` in this Keras layer")
    if quantised and "weight" in tensors:
        tensors["weight"] = _dequantised(layer, tensors["weight"], quantised)
    if lora_a and lora_b and "weight" in tensors:
        tensors["weight"] = _merged(layer, tensors["weight"], lora_a, lora_b, lora)
    return tensors


def _take(named: dict[str, Tensor], names: tuple[str, ...]) -> Tensor | None:
    return next((named.pop(name) for name in names if name in named), None)


def _name(variables: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Name variables saved by position: kernel, [bias], and for quantised kernels scale, [zero, g_idx]."""
    kernel, *rest = [variables[name] for name in sorted(variables, key=int)]
    if kernel.dtype not in ("I8", "U8"):
        return {"kernel": kernel} | dict(zip(("bias", *map(str, range(2, 9))), rest, strict=False))
    grouped = any(tensor.dtype == "I8" for tensor in rest)
    tail = ("kernel_scale", "kernel_zero", "g_idx") if grouped else ("kernel_scale",)
    names = ("bias", *tail) if len(rest) > len(tail) else tail
    return {"kernel": kernel} | dict(zip((*names, *map(str, range(5, 9))), rest, strict=False))


def _dequantised(layer: str, kernel: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
    """float32 kernel of an int8 (`q / scale`) or int4 (`(q - zero[g]) * scale[g]`, two per byte) layer.

    Scales belong to columns of a kernel (in, out), but to rows of an embedding (rows, width).
    """
    scale, zero, groups = parts.get("scale"), parts.get("zero"), parts.get("g_idx")
    by_row = layer.endswith("_embedding")
    if scale is None or len(kernel.shape) != 2 or (zero is None) != (groups is None):
        raise ConversionError(f"{layer}: a quantised kernel without the scales that belong to it")
    rows, columns = kernel.shape
    if zero is None or groups is None:
        if scale.shape != (rows if by_row else columns,):
            raise ConversionError(f"{layer}: int8 scales {list(scale.shape)} do not fit a kernel {list(kernel.shape)}")
        compute = partial(_from_int8, by_row=by_row)
        return Computed(kernel.name, "F32", kernel.shape, (kernel, scale), compute, "dequantised from int8")
    compute = partial(_from_int4, by_row=by_row)
    inputs = (kernel, scale, zero, groups)
    return Computed(kernel.name, "F32", (rows, 2 * columns), inputs, compute, "dequantised from int4")


def _from_int8(kernel: Array, scale: Array, by_row: bool) -> Array:
    return kernel.astype(np.float32) / (scale[:, None] if by_row else scale).astype(np.float32)


def _from_int4(packed: Array, scale: Array, zero: Array, groups: Array, by_row: bool) -> Array:
    """`g_idx` gives the group of each input of a kernel, or of each column of an embedding; low nibble first."""
    kernel = (np.stack([packed << 4, packed], axis=-1).astype(np.int8) >> 4).reshape(packed.shape[0], -1)
    group = groups.astype(np.int64)
    zeros, scales = (zero[:, group], scale[:, group]) if by_row else (zero[group], scale[group])
    return (kernel.astype(np.float32) - zeros.astype(np.float32)) * scales.astype(np.float32)


def _merged(layer: str, kernel: Tensor, a: Tensor, b: Tensor, lora: Lora) -> Tensor:
    """`kernel + alpha / rank * a @ b`, which Keras computes with (Hu et al., arXiv:2106.09685, section 4.1)."""
    if lora.alpha is None:
        raise ConversionError(
            f"{layer}: holds LoRA factors `{a.name}` of rank {a.shape[-1]}; give --lora-alpha to merge them "
            f"(Keras's default alpha is the rank: {a.shape[-1]})"
        )
    scale = np.float32(lora.alpha / a.shape[-1])

    def merge(base: Array, left: Array, right: Array) -> Array:
        return base.astype(np.float32) + scale * (left.astype(np.float32) @ right.astype(np.float32)).reshape(
            base.shape
        )

    return Computed(kernel.name, kernel.dtype, kernel.shape, (kernel, a, b), merge, f"LoRA, alpha {lora.alpha:g}")
