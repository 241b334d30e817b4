"""A model and the adapters on it.

A plain LoRA runs beside its layer, in PEFT's order of operations: y + up(down(x)) * scale, an
adapter at a time. All other kinds, and what is fused, take the place of the layer's parameters,
whose base is kept: to go back is to put it back, which changes no bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapters.change import (
    Array,
    Change,
    bias_change,
    changes_bias,
    changes_weight,
    row_blocks,
    weight_change,
)
from ..adapters.fusion import apart
from ..adapters.modules import Module
from ..adapters.rounding import rounded
from ..io.arrays import DTYPES
from .speed import PackedConvolution

Modules = Mapping[str, Module[Tensor]]
_SCALE: ContextVar[float] = ContextVar("scale", default=1.0)  # of a run, in its thread
_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@contextmanager
def scaled(scale: float) -> Iterator[None]:
    """Within it, adapters that run beside their layers are scaled, in this thread."""
    token = _SCALE.set(scale)
    try:
        yield
    finally:
        _SCALE.reset(token)


class _TorchScissors:
    """What cuts tensors of torch."""

    def rows(self, tensor: Tensor, which: Array) -> Tensor:
        """Some rows."""
        first, last = int(which[0]), int(which[-1]) + 1
        if last - first == len(which):
            return tensor[first:last]
        return tensor[torch.from_numpy(which)]

    def columns(self, tensor: Tensor, which: slice) -> Tensor:
        """Some columns."""
        return tensor[:, which].contiguous()

    def is_set(self, tensor: Tensor) -> Array:
        """Which elements are not 0."""
        return (tensor != 0).cpu().numpy()

    def number(self, value: float, like: Tensor) -> Tensor:
        """A tensor of one number."""
        return torch.tensor(value)


def by_layer(modules: Iterable[Module[Tensor]]) -> dict[str, Module[Tensor]]:
    """Path of a layer -> what changes it.

    A plain LoRA of a fused layer becomes one of each of its layers, as in diffusers.
    """
    found = {}
    for module in modules:
        several = apart(module, _TorchScissors()) if is_plain(module) else module.layers()
        for one in several:
            found[one.path] = one
    return found


class Fused(NamedTuple):
    """An adapter that is part of the parameters, at a strength."""

    modules: Modules
    strength: float


class SidePath:
    """The two factors of a plain LoRA, and the bias that may be behind them, in the dtype and on
    the device of what they meet."""

    def __init__(self, layer: nn.Module, module: Module[Tensor]) -> None:
        self._layer: Any = layer
        self._factors = module.tensors["down"], module.tensors["up"]
        self._bias = module.tensors.get("up_bias")
        self._here: tuple[Tensor, Tensor, Tensor | None] | None = None
        self._alpha = module.factor * module.rank
        self._rank = module.rank
        self.strength = 1.0

    def __call__(self, x: Tensor) -> Tensor:
        """What it adds to the layer's output."""
        scale = self.strength * self._alpha / self._rank
        if not torch.compiler.is_compiling():
            scale *= _SCALE.get()
        here = self._here
        if here is None or here[0].dtype != x.dtype or here[0].device != x.device:
            here = self._shaped(x)
            self._here = here
        down, up, bias = here
        layer = self._layer
        if isinstance(layer, nn.Conv2d):
            y = F.conv2d(x, down, None, layer.stride, layer.padding, layer.dilation)
            return F.conv2d(y, up, bias) * scale
        return F.linear(F.linear(x, down), up, bias) * scale

    def _shaped(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """The factors with as many axes as the layer's weight, and as many input channels: those
        of the layer that they lack change nothing."""
        down, up = (factor.to(x.device, x.dtype) for factor in self._factors)
        bias = None if self._bias is None else self._bias.to(x.device, x.dtype).flatten()
        layer = self._layer
        if not isinstance(layer, nn.Conv2d):
            down = down.flatten(1)
            return F.pad(down, (0, layer.in_features - down.shape[1])), up.flatten(1), bias
        down = down.reshape(len(down), -1, *layer.kernel_size)
        missing = layer.in_channels - down.shape[1]
        down = F.pad(down, (0, 0, 0, 0, 0, missing))
        return down, up.reshape(len(up), -1, 1, 1), bias


class SideForward:
    """The forward of a layer with LoRA beside it."""

    def __init__(self, layer: nn.Module) -> None:
        packed = vars(layer).get("forward")
        self._base: Any = packed or type(layer).forward.__get__(layer)
        self.packed = packed
        self.paths: list[SidePath] = []

    def __call__(self, x: Tensor) -> Tensor:
        """What the layer makes of `x`."""
        y: Tensor = self._base(x)
        for path in self.paths:
            y = y + path(x)
        return y


class State(NamedTuple):
    """What is said of a model's adapters."""

    adapters: dict[str, Modules]
    strengths: dict[str, float]
    is_enabled: bool
    fused: dict[str, Fused]


class AdaptedModel:
    """The adapters of a model, and which of them are at work.

    Attributes:
        adapters: name -> path of a layer -> what changes it.
        strengths: name -> how strongly, of those at work, in their order.
        is_enabled: whether any is at work.
        fused: name -> what is part of the parameters.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._bases: dict[str, Tensor] = {}
        self.adapters: dict[str, Modules] = {}
        self.strengths: dict[str, float] = {}
        self.is_enabled = True
        self.fused: dict[str, Fused] = {}

    @classmethod
    def of(cls, model: nn.Module) -> AdaptedModel:
        """That of a model, which pipelines may share."""
        found: AdaptedModel = vars(model).setdefault("_adapted", cls(model))
        return found

    @property
    def state(self) -> State:
        """What is said of the model now."""
        return State(dict(self.adapters), dict(self.strengths), self.is_enabled, dict(self.fused))

    def restore(self, state: State) -> None:
        """Bring the model back to what was said of it."""
        self.adapters, self.strengths, self.is_enabled, self.fused = state
        self.update()

    def update(self) -> None:
        """Bring the model in line with what is said of it.

        Raises:
            ValueError: two adapters change a layer in ways whose order matters.
        """
        active = self._active()
        merged: dict[str, list[tuple[Module[Tensor], float]]] = {}
        beside: dict[str, list[SidePath]] = {}
        for fused in self.fused.values():
            for path, module in fused.modules.items():
                merged.setdefault(path, []).append((module, fused.strength))
        for modules, strength in active:
            for path, module in modules.items():
                if is_plain(module):
                    layer = self._model.get_submodule(path)
                    side = SidePath(layer, module)
                    side.strength = strength
                    beside.setdefault(path, []).append(side)
                elif strength:
                    merged.setdefault(path, []).append((module, strength))
        for path, several in merged.items():
            if sum(module.depends_on_base for module, _ in several) > 1:
                raise ValueError(
                    f"two adapters change {path} in ways whose order matters"
                    f" ({several[0][0].title}, {several[1][0].title}); use one of them alone"
                )
        self._set_parameters(merged)
        self._set_paths(beside)

    def _active(self) -> list[tuple[Modules, float]]:
        if not self.is_enabled:
            return []
        return [
            (self.adapters[name], strength)
            for name, strength in self.strengths.items()
            if name not in self.fused
        ]

    def _set_paths(self, beside: Mapping[str, list[SidePath]]) -> None:
        for path, layer in self._model.named_modules():
            forward = vars(layer).get("forward")
            if path in beside:
                if not isinstance(forward, SideForward):
                    forward = SideForward(layer)
                    layer.forward = forward
                forward.paths = beside[path]
            elif isinstance(forward, SideForward):
                del layer.forward
                if forward.packed is not None:
                    layer.forward = forward.packed

    def _set_parameters(self, merged: Mapping[str, list[tuple[Module[Tensor], float]]]) -> None:
        wanted: dict[str, list[tuple[Module[Tensor], float]]] = {}
        for path, several in merged.items():
            for module, strength in several:
                for key in _changed(path, module):
                    wanted.setdefault(key, []).append((module, strength))
        bases = {}
        changed = {}
        for key in self._bases.keys() | wanted.keys():  # all of them, or none if one is faulty
            parameter = self._parameter(key)
            bases[key] = self._bases.get(key, parameter)
            base = bases[key].to(parameter.device, parameter.dtype)
            changed[key] = _sum(key, base, wanted[key]) if key in wanted else base
        for key, value in changed.items():
            self._replace(key, value)
        self._bases = {key: base for key, base in bases.items() if key in wanted}

    def _parameter(self, key: str) -> Tensor:
        path, _, name = key.rpartition(".")
        found = getattr(self._model.get_submodule(path), name)
        if found is None:
            raise ValueError(f"an adapter changes {key}, which the model lacks")
        return found.detach()  # type: ignore[no-any-return]

    def _replace(self, key: str, value: Tensor) -> None:
        path, _, name = key.rpartition(".")
        layer = self._model.get_submodule(path)
        setattr(layer, name, nn.Parameter(value, requires_grad=False))
        forward = vars(layer).get("forward")
        packed = forward.packed if isinstance(forward, SideForward) else forward
        if isinstance(packed, PackedConvolution):
            packed.packed = None


def is_plain(module: Module[Tensor]) -> bool:
    """Whether a module is two factors and what goes with them, which can run beside the layer."""
    others = module.tensors.keys() - {"down", "up", "up_bias", "alpha", "scale"}
    return module.flavour == "lora" and not others


def _changed(path: str, module: Module[Tensor]) -> Iterator[str]:
    """The parameters that a module changes."""
    if changes_weight(module):
        yield f"{path}.weight"
    if changes_bias(module):
        yield f"{path}.bias"


def _sum(key: str, base: Tensor, changes: list[tuple[Module[Tensor], float]]) -> Tensor:
    """A weight (o, ...) or bias (o,) with changes on top, in float64, rounded once."""
    wide = base.cpu().double().numpy()
    made = [_change(key, wide, module, strength) for module, strength in changes]
    matrix = wide.reshape(len(wide), -1)
    result = np.empty(matrix.shape, DTYPES[_NAMES[base.dtype]])
    for which in row_blocks(*matrix.shape):
        old = matrix[which]
        total = sum((change(old, which) for change in made), np.zeros_like(old))
        result[which] = rounded(old + total, result.dtype)
        if not np.isfinite(result[which]).all():
            raise ValueError(f"adapters make NaN or Inf of {key}")
    bits = result.reshape(wide.shape).view(f"i{result.dtype.itemsize}")
    return torch.from_numpy(bits).view(base.dtype).to(base.device)


def _change(key: str, base: Array, module: Module[Tensor], strength: float) -> Change:
    arrays = {role: tensor.cpu().double().numpy() for role, tensor in module.tensors.items()}
    if key.endswith(".weight"):
        return weight_change(module, arrays, base, strength)
    change = bias_change(module, arrays, strength)
    assert change is not None
    columns = change[:, None]
    return lambda _, which: columns[which]
