"""LoHa, LoKr and mid factors of an adapter, written as plain LoRA."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import prod

import numpy as np

from ..adapters.expansion import expanded_rank, expands, left_factor, right_factor
from ..adapters.modules import Adapter, Module
from ..adapters.shapes import changed_shape
from ..io.arrays import Array
from .checkpoint import Computed, Tensor
from .layouts.adapters import weight_shape
from .outputs.adapters_record import number_tensor

_FACTORS = ("up", "down", "mid", "hada", "lokr", "alpha", "scale")  # what the new ones replace
_HOW = "expanded to LoRA"


@dataclass
class Expansion:
    """What became of the modules that were no plain LoRA.

    Attributes:
        modules: how many there were.
        ranks: the smallest and the largest rank that they have now.
        nbytes: of their factors before and after.
        error: the largest relative error of a factor, known once the factors are written.
    """

    modules: int = 0
    ranks: tuple[int, int] = (0, 0)
    nbytes: tuple[int, int] = (0, 0)
    error: float = 0.0

    def note(self) -> str:
        """What it was, in a sentence."""
        smallest, largest = self.ranks
        before, after = self.nbytes
        ranks = str(smallest) if smallest == largest else f"{smallest} to {largest}"
        lost = f"off by at most {self.error:.1e} of the largest" if self.error else "exact"
        return (
            f"{self.modules} modules are plain LoRA now, of rank {ranks}: {after:,} bytes in place"
            f" of {before:,}; their factors are {lost}"
        )


def expand(adapter: Adapter[Tensor]) -> tuple[Adapter[Tensor], Expansion]:
    """An adapter whose LoHa, LoKr and mid factors are plain LoRA, in float32.

    A LoKr of two whole factors stays what it is: its rank would be that of the weight.
    """
    expansion = Expansion()
    modules = {
        place: _plain(adapter.family, module, expansion) if expands(module) else module
        for place, module in adapter.modules.items()
    }
    return replace(adapter, modules=modules), expansion


def _plain(family: str, module: Module[Tensor], expansion: Expansion) -> Module[Tensor]:
    """A module as plain LoRA."""
    old = {role: one for role, one in module.tensors.items() if role.startswith(_FACTORS)}
    factors = {role: one for role, one in old.items() if role not in ("alpha", "scale")}
    rank = expanded_rank(factors)
    kernel = weight_shape(family, module)[2:]
    tensors: dict[str, Tensor] = _computed(module.name, factors, rank, kernel, expansion)
    alpha = module.factor * rank
    tensors["alpha"] = number_tensor(f"{module.name}.alpha", alpha, "F32", ())
    others = {role: one for role, one in module.tensors.items() if role not in old}
    _count(expansion, rank, old, tensors)
    return replace(module, flavour="lora", tensors=tensors | others, alpha=alpha, rank=rank)


def _count(
    expansion: Expansion, rank: int, before: Mapping[str, Tensor], after: Mapping[str, Tensor]
) -> None:
    smallest, largest = expansion.ranks if expansion.modules else (rank, rank)
    old, new = expansion.nbytes
    old += sum(one.nbytes for one in before.values())
    new += sum(one.nbytes for one in after.values())
    expansion.modules += 1
    expansion.ranks = min(smallest, rank), max(largest, rank)
    expansion.nbytes = old, new


def _computed(
    name: str,
    factors: Mapping[str, Tensor],
    rank: int,
    kernel: tuple[int, ...],
    expansion: Expansion,
) -> dict[str, Tensor]:
    """The two factors, which are made as they are asked for."""
    change = changed_shape({role: one.shape for role, one in factors.items()})
    assert change is not None
    rows, *columns = change
    shapes = {
        "up": (rows, rank, *(1 for _ in kernel)),
        "down": (rank, prod(columns) // prod(kernel), *kernel),
    }

    def factor(role: str, made: Callable[[Mapping[str, Array]], Array]) -> Tensor:
        def compute(*arrays: Array) -> Array:
            wide = made(dict(zip(factors, arrays, strict=True)))
            narrow = wide.astype(np.float32)
            scale = float(np.abs(wide).max()) or 1.0
            error = float(np.abs(wide - narrow).max()) / scale
            expansion.error = max(expansion.error, error)
            return narrow.reshape(shapes[role])

        inputs = tuple(factors.values())
        return Computed(f"{name}.{role}", "F32", shapes[role], inputs, compute, _HOW)

    return {"up": factor("up", left_factor), "down": factor("down", right_factor)}
