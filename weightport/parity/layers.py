"""Where two models part: activations compared module by module, in the order of computing."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile

from ..differences import Array
from ..mappings.ops import Sections
from ..mappings.table import Link
from .measure import measure

# an error this many times the one before it, or the tolerance, did not grow from it by rounding
LEAP = 5
_OF_MODULES = ("weight", "bias")
_BLOCK = re.compile(
    r".*?(?:(?:resnets|attentions|downsamplers|upsamplers|layers)\.\d+|embeddings?(?=\.))"
)


@dataclass(frozen=True)
class Layer:
    """The error after one module.

    Attributes:
        block: a module that the plot shows, such as a residual block.
    """

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
    """The block that a module belongs to: `down_blocks.0.resnets.1` of its `conv1`.

    A lone layer is its own.
    """
    found = _BLOCK.match(module)
    return found[0] if found else module


def watched(links: Iterable[Link], prefix: str) -> tuple[dict[str, str], dict[str, str]]:
    """Which modules of a source are which of ours, by the tables.

    A module with weights is the same on both sides where its weights are. A block of ours is what
    the paths of its modules' sources have in common.

    Returns:
        source path -> our path, and our path -> table row.
    """
    paths = dict[str, str]()
    rows = dict[str, str]()
    members = dict[str, list[str]]()
    for link in links:
        if link.targets[0].rpartition(".")[2] not in _OF_MODULES:
            continue  # a tensor beside modules, such as a table of positions
        if isinstance(link.op, Sections):
            continue  # parts of what the modules return lie elsewhere too
        ours = [_module_of(target) for target in link.targets]
        theirs = _module_of(link.sources[0].removeprefix(prefix))
        for module in ours:
            block = block_of(module)
            rows.setdefault(module, link.row)
            rows.setdefault(block, link.row.partition(" / ")[0])
            if block != module:  # what is a block of its own may be one of several in theirs
                members.setdefault(block, []).append(theirs)
        if len(ours) == len(link.sources) == 1:
            paths[theirs] = ours[0]
    for block, modules in members.items():
        common = _in_common(modules)
        if common:
            paths.setdefault(common, block)
    return paths, rows


def _module_of(key: str) -> str:
    return key.rpartition(".")[0]


def _in_common(paths: Sequence[str]) -> str:
    """The segments with which all paths begin."""
    segments = zip(*(path.split(".") for path in paths), strict=False)
    same = takewhile(lambda step: len(set(step)) == 1, segments)
    return ".".join(step[0] for step in same)


def compare_layers(ours: Mapping[str, Array], theirs: Mapping[str, Array]) -> list[Layer]:
    """The error of every module that both sides recorded, in our order.

    Arrays may be read on access.
    """
    layers = []
    for module in ours:
        if module in theirs:
            array = ours[module]
            error = measure([array], [_like(theirs[module], array)])
            layers.append(Layer(module, block_of(module), error.relative_l2, error.max_abs))
    return layers


def _like(theirs: Array, ours: Array) -> Array:
    """Theirs in our shape.

    The pixels of an image are (b, c, h, w), a sequence is (b, n, c), or (b, c, n) for a norm.
    """
    if theirs.shape == ours.shape or theirs.size != ours.size:
        return theirs
    flat = theirs.reshape(*theirs.shape[:2], -1)
    image_and_sequence = theirs.ndim + ours.ndim == 7
    if image_and_sequence and flat.shape[1] != ours.shape[1]:
        flat = flat.swapaxes(1, 2)
    return flat.reshape(ours.shape)


def first_fault(layers: Sequence[Layer], tolerance: float, rows: Mapping[str, str]) -> Fault | None:
    """The first module whose error leaps; None where errors only grow, by rounding."""
    before = 0.0
    for layer in layers:
        if not layer.relative_l2 <= LEAP * max(before, tolerance):
            row = rows.get(layer.module, rows.get(layer.block, ""))
            return Fault(layer.module, layer.block, row, layer.relative_l2, before)
        before = max(before, layer.relative_l2)
    return None
