"""What makes a run faster; docs/runtime.md says what each lever is worth, and which of them changes
bits."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..io.pages import drop_file_pages
from .outputs import Output


class Packed(NamedTuple):
    """Weights in the order in which a kernel reads them for one shape of input."""

    shape: torch.Size
    weight: Tensor


class PackedConvolution:
    """The forward of a convolution with its weights in the order in which a CPU's kernel reads
    them.

    oneDNN orders them at each call, which for wide layers on small images takes half as long as the
    sums. Here that is done once for each shape of input. Kernels are others than without, so bits
    change.
    """

    def __init__(self, layer: nn.Conv2d) -> None:
        self.layer: Any = layer
        self.packed: Packed | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """What the layer makes of `x`, channels last."""
        layer = self.layer
        ops = torch.ops.mkldnn
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return nn.Conv2d.forward(layer, x)
        sizes = (layer.padding, layer.stride, layer.dilation, layer.groups)
        packed = self.packed  # another thread may come with another shape
        if packed is None or packed.shape != x.shape:
            weight = ops._reorder_convolution_weight(layer.weight, *sizes, x.shape)
            packed = Packed(x.shape, weight)
            self.packed = packed
            drop_file_pages(layer.weight)
        result: Tensor = ops._convolution_pointwise(
            x, packed.weight, layer.bias, *sizes, "none", [], ""
        )
        return result


def pack_model(model: nn.Module) -> None:
    """Bring a model's weights into the order in which kernels read them; they must not change or
    move afterwards.

    On a CPU with kernels for the dtype that is done at the first call for each shape, for
    convolutions: linear layers gain nothing, and in bfloat16 theirs run on fewer threads, which
    costs all other layers new threads each time. Weights in a mapped file then leave the memory.
    Elsewhere weights become channels last.
    """
    weight = next(model.parameters())
    bfloat16 = weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if weight.device.type != "cpu" or not (bfloat16 or weight.dtype == torch.float32):
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            layer.forward = PackedConvolution(layer)  # type: ignore[assignment]


def compile_model(model: nn.Module) -> None:
    """Make a model's steps one graph each on CUDA; on a CPU, where compiling gains less than
    packing, pack it.

    Weights must not change or move afterwards. Bits change.
    """
    pack_model(model)
    if next(model.parameters()).is_cuda:
        compile_steps(model)


def compile_steps(model: nn.Module) -> None:
    """Compile a model's forward, at the first call for each shape. Sums are fused and reordered."""
    compiled: Any = torch.compile(
        type(model).forward.__get__(model), mode="reduce-overhead", dynamic=False
    )

    def forward(*args: Any, **kwargs: Any) -> Any:
        outputs = compiled(*args, **kwargs)
        # a CUDA graph writes to the same memory again
        if isinstance(outputs, Output):
            return type(outputs)(*(output.clone() for output in outputs.to_tuple()))
        return tuple(output.clone() for output in outputs)

    model.forward = forward
