"""Modules over fused layers, as modules of each of the layers.

A left factor (o, r) over n layers has the rows of all of them, one layer after another. Each layer
takes its own, and the right factor (r, i) is that of all:

    up = [up_1; up_2; ...]             ->  up_k, down
    up = diag(up_1, up_2, ...)         ->  up_k, down_k, with down = [down_1; down_2; ...]

The second is what trainers write that have a LoRA of its own for each layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol, TypeVar

import numpy as np

from ..errors import printable
from ..mappings.facts import facts
from .change import Array, own_rows
from .modules import Module
from .shapes import Shaped

T = TypeVar("T", bound=Shaped)


class Scissors(Protocol[T]):
    """What cuts tensors of a library."""

    def rows(self, tensor: T, which: Array) -> T:
        """Some rows of a tensor (o, ...)."""

    def columns(self, tensor: T, which: slice) -> T:
        """Some columns of a tensor (o, r, ...)."""

    def is_set(self, tensor: T) -> Array:
        """Which elements of a tensor have bits that are not 0."""

    def number(self, value: float, like: T) -> T:
        """A tensor of one number."""


def apart(
    module: Module[T], scissors: Scissors[T], ranks: Sequence[int] | None = None
) -> list[Module[T]]:
    """A module for each layer that a module is over.

    Args:
        ranks: of the LoRA of each layer, if they are known; 0 where there was none. Empty if all
            have the right factor of the whole. If None, the left factor tells.

    Raises:
        ValueError: a layer's change is no module of that kind.
    """
    if not module.is_fused:
        return [module]
    known = facts("adapters")["fused"]
    name = printable(module.name)
    strange = module.tensors.keys() - {*known["rows"], *known["shared"]}
    is_tucker = {"hada_t1", "hada_t2"} & module.tensors.keys()
    if strange or is_tucker or not module.has_rows_apart:
        several = ", ".join(part.path for part in module.parts)
        raise ValueError(
            f"`{name}` is {module.title} over {several}, which cannot be taken apart exactly"
        )
    if ranks is None:
        ranks = ranks_told(module, scissors)
    if ranks and (len(ranks) != len(module.parts) or sum(ranks) != module.rank):
        raise ValueError(f"`{name}` has rank {module.rank}, and not the blocks {list(ranks)}")
    found = []
    start = 0
    for place, whole in enumerate(module.layers()):
        tensors = _cut(whole, scissors)
        rank = module.rank
        if ranks:
            rank = ranks[place]
            block = slice(start, start + rank)
            start += rank
            tensors |= _block(whole, tensors, block, scissors)
        if rank or not ranks:
            found.append(_alone(whole, tensors, rank))
    return found


def _alone(whole: Module[T], tensors: dict[str, T], rank: int) -> Module[T]:
    """A module of one layer."""
    rows = own_rows(whole)
    assert rows is not None
    alpha = whole.alpha
    if alpha is not None and rank != whole.rank:
        alpha = whole.factor * rank
    (part,) = whole.parts
    parts = (part._replace(shares=()),)
    return replace(whole, parts=parts, tensors=tensors, alpha=alpha, rank=rank, height=len(rows))


def _cut(module: Module[T], scissors: Scissors[T]) -> dict[str, T]:
    """The tensors of a module, with the rows of its layer."""
    rows = own_rows(module)
    assert rows is not None
    every = set(facts("adapters")["fused"]["rows"])
    if "on_input" in module.tensors and bool(scissors.is_set(module.tensors["on_input"]).any()):
        every.discard("whole")
    return {
        role: scissors.rows(tensor, rows) if role in every else tensor
        for role, tensor in module.tensors.items()
    }


def _block(
    module: Module[T], tensors: dict[str, T], which: slice, scissors: Scissors[T]
) -> dict[str, T]:
    """The factors of a layer that has its own."""
    block = {
        "up": scissors.columns(tensors["up"], which),
        "down": scissors.rows(tensors["down"], np.arange(which.start, which.stop)),
    }
    if "alpha" in tensors:
        value = module.factor * (which.stop - which.start)
        block["alpha"] = scissors.number(value, tensors["alpha"])
    return block


def ranks_told(module: Module[T], scissors: Scissors[T]) -> list[int]:
    """The ranks of the blocks that a left factor is made of, all alike; empty if it is not."""
    count = len(module.parts)
    if "up" not in module.tensors or "mid" in module.tensors or count < 2 or module.rank % count:
        return []
    rank = module.rank // count
    is_set = scissors.is_set(module.tensors["up"])
    is_set = is_set.reshape(len(is_set), -1)
    for place, layer in enumerate(module.layers()):
        own = is_set[own_rows(layer)]
        beside = np.delete(own, np.s_[place * rank : (place + 1) * rank], axis=1)
        if beside.any():
            return []
    return [rank] * count
