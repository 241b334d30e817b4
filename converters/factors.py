"""LoRA that training left in a model as factors beside the weights, as an adapter of its own."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

from ..adapters.alphas import Alphas
from ..adapters.modules import Adapter, Module, Part
from ..errors import ConversionError, printable
from ..mappings.families import Family
from .checkpoint import Checkpoint, LowRank, Tensor
from .layouts.adapters import AdapterFile
from .planning.plan import PlannedComponent, PlannedTensor

_WEIGHT = ".weight"


def factors_of(
    components: Mapping[str, PlannedComponent], family: Family, convention: str
) -> tuple[AdapterFile, Adapter[Tensor]]:
    """The factors in planned components.

    Args:
        convention: whose names the adapter will get.

    Raises:
        ConversionError: there are none, or one is of a weight that is made of several.
    """
    modules: dict[tuple[str, str], Module[Tensor]] = {}
    parts = [part for component in components.values() for part in component.parts]
    for name, component in components.items():
        for key, planned in component.tensors.items():
            merged = [source for source in planned.sources if isinstance(source, LowRank)]
            if merged:
                module = _module(name, key, planned, merged[0], convention)
                modules[name, module.path] = module
    first = parts[0].checkpoint
    if not modules:
        raise ConversionError(
            f"{first.path}: neither an adapter, nor a model with factors of LoRA beside its weights"
        )
    files = [file for part in parts for file in part.checkpoint.files]
    tensors = {
        f"{path}.{role}": tensor
        for (_, path), module in modules.items()
        for role, tensor in module.tensors.items()
    }
    checkpoint = Checkpoint(first.path, first.format, tensors, files=files)
    checkpoint.metadata["format"] = "pt"
    return AdapterFile(checkpoint, Alphas()), Adapter(family.name, modules)


def _module(
    component: str, key: str, planned: PlannedTensor, merged: LowRank, convention: str
) -> Module[Tensor]:
    """The module of one weight."""
    rank = merged.left.shape[1]
    rows, *columns = planned.shape
    fits = (
        planned.parts == 1
        and len(planned.sources) == 1
        and key.endswith(_WEIGHT)
        and merged.left.shape[0] == rows
        and prod(merged.right.shape) == rank * prod(columns)
    )
    if not fits:
        raise ConversionError(
            f"`{printable(merged.name)}`: its factors of LoRA are not those of one layer of the"
            f" {component}"
        )
    ones = (1,) * (len(columns) - 1)
    tensors = {
        "down": merged.right.reshaped((rank, *columns)),
        "up": merged.left.reshaped((rows, rank, *ones)),
    }
    return Module(
        component=component,
        parts=(Part(key.removesuffix(_WEIGHT)),),
        name=merged.name,
        convention=convention,
        flavour="lora",
        tensors=tensors,
        alpha=merged.alpha,
        rank=rank,
        factor=merged.alpha / rank,
        is_by_row=True,
    )
