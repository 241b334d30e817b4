"""Where two models part: their activations compared module by module, in the order in which they
are computed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile

from ..differences import Array
from ..mappings.table import Link
from .measure import measure

# an error this many times the one before it, or the tolerance, did not grow from it by rounding
LEAP = 5
_BLOCK = re.compile(
    r".*?(?:(?:resnets|attentions|downsamplers|upsamplers|layers)\.\d+|embeddings?(?=\.))"
)


@dataclass(frozen=True)
class Layer:
    """The error after one module; a block is a module that the plot shows, such as a residual
    block."""

    module: str
    block: str
    relative_l2: float
    max_abs: float


@dataclass(frozen=True)
class Fault:
    """The first module whose output is wrong.

    Attributes:
        row: the table row that filled it.
        before: the largest relative L2 of all modules before it.
    """

    module: str
    block: str
    row: str
    relative_l2: float
    before: float


def block_of(module: str) -> str:
    """The block that a module belongs to: `down_blocks.0.resnets.1` of its `conv1`; a lone layer is
    its own."""
    found = _BLOCK.match(module)
    return found[0] if found else module


def watched(links: Iterable[Link], prefix: str) -> tuple[dict[str, str], dict[str, str]]:
    """Which modules of a source are which of ours, by the tables: (source path -> our path, our
    path -> table row).

    A module with weights is the same on both sides where its weights are. A block of ours is what
    the paths of its modules' sources have in common.
    """
    paths, rows = dict[str, str](), dict[str, str]()
    members: dict[str, list[list[str]]] = {}
    for link in links:
        ours = [target.rpartition(".")[0] for target in link.targets]
        theirs = link.sources[0].removeprefix(prefix).rpartition(".")[0]
        for module in ours:
            rows.setdefault(module, link.row)
            rows.setdefault(block_of(module), link.row.partition(" / ")[0])
            members.setdefault(block_of(module), []).append(theirs.split("."))
        if len(ours) == len(link.sources) == 1:
            paths[theirs] = ours[0]
    for block, lists in members.items():
        common = ".".join(
            step[0]
            for step in takewhile(lambda step: len(set(step)) == 1, zip(*lists, strict=False))
        )
        if common and common not in paths:
            paths[common] = block
    return paths, rows


def compare_layers(ours: Mapping[str, Array], theirs: Mapping[str, Array]) -> list[Layer]:
    """The error of every module that both sides recorded, in our order; arrays may be read on
    access."""
    layers = []
    for module in ours:
        if module in theirs:
            a, b = ours[module], theirs[module]
            error = measure([a], [_like(b, a)])
            layers.append(Layer(module, block_of(module), error.relative_l2, error.max_abs))
    return layers


def _like(theirs: Array, ours: Array) -> Array:
    """Theirs in our shape: the pixels of an image are (b, c, h, w), a sequence (b, n, c), or (b, c,
    n) for a norm."""
    flat = theirs.reshape(*theirs.shape[:2], -1)
    if theirs.ndim + ours.ndim == 7 and flat.shape[1] != ours.shape[1]:
        flat = flat.swapaxes(1, 2)
    return (
        flat.reshape(ours.shape)
        if flat.size == ours.size and theirs.shape != ours.shape
        else theirs
    )


def first_fault(layers: Sequence[Layer], tolerance: float, rows: Mapping[str, str]) -> Fault | None:
    """The first module whose error leaps; None where errors only grow, by rounding."""
    before = 0.0
    for layer in layers:
        if not layer.relative_l2 <= LEAP * max(before, tolerance):
            row = rows.get(layer.module, rows.get(layer.block, ""))
            return Fault(layer.module, layer.block, row, layer.relative_l2, before)
        before = max(before, layer.relative_l2)
    return None
