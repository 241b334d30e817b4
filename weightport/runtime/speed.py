"""What makes a pipeline faster; docs/runtime.md says what each lever is worth, and which of them changes bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Projected = tuple[Tensor, Tensor]


class ConstantContext:
    """Keys and values of the text, which are the same in every step of a run: computed once. Bits do not change."""

    def __init__(self) -> None:
        self.seen: tuple[Any, ...] = ()
        self.context: Tensor | None = None  # held, so that no other tensor takes its memory
        self.projected: Projected | None = None

    def get(self, context: Tensor, project: Callable[[Tensor], Projected]) -> Projected:
        """`project(context)`, or what that gave for the same memory with the same content."""
        if context.is_inference() or (torch.is_grad_enabled() and context.requires_grad):
            return project(context)
        seen = (context.data_ptr(), context.shape, context.stride(), context._version)
        if self.projected is None or seen != self.seen:
            self.seen, self.context, self.projected = seen, context, project(context)
        return self.projected


@contextmanager
def constant_context(*models: nn.Module) -> Iterator[None]:
    """Within it, the models' cross-attentions keep what they compute of the text; weights must not change meanwhile."""
    from .transformer import Attention

    layers = [module for model in models for module in model.modules() if isinstance(module, Attention)]
    for layer in layers:
        layer.constant = ConstantContext()
    try:
        yield
    finally:
        for layer in layers:
            layer.constant = None


def compile_model(model: nn.Module) -> None:
    """Compile a model's forward, at the first call for each shape; weights must not change afterwards.

    On a CPU weights become constants, laid out for the kernels; on CUDA a step is one graph. Sums are fused and
    reordered, so bits change.
    """
    if next(model.parameters()).is_cuda:
        model.compile(mode="reduce-overhead")
    else:
        model.compile(options={"freezing": True})
