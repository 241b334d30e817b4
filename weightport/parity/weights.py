"""Whether the weights are right: the inverse mapping must give the source back, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..converters.planning.plan import PlannedTensor
from ..converters.planning.recognise import Recognition
from ..differences import max_abs
from ..io.arrays import DTYPES, Array
from ..mappings.table import Link


@dataclass(frozen=True)
class WrongTensor:
    """A tensor of the source that the repo does not give back."""

    source: str
    keys: tuple[str, ...]  # of the repo
    row: str  # the table row that connects them
    max_abs: float | None  # None where shapes differ


@dataclass(frozen=True)
class Weights:
    """What the comparison found.

    Attributes:
        equal: tensors that come back bit for bit.
        rounded: dtype of the repo -> tensors that come back bit for bit once the source is rounded
            to it.
        wrong: all others.
    """

    equal: int
    rounded: Mapping[str, int]
    wrong: tuple[WrongTensor, ...]


def compare_weights(
    part: Recognition, family: str, tensors: Mapping[str, PlannedTensor]
) -> Weights:
    """Compare a source with a repo's component, one tensor at a time in memory."""
    equal = 0
    rounded = dict[str, int]()
    wrong = list[WrongTensor]()
    candidate = part.of_family(family)
    named = candidate.named(part.checkpoint)
    for link in dict.fromkeys(candidate.links.values()):
        if any(target not in tensors for target in link.targets):
            wrong.append(WrongTensor(link.sources[0], link.targets, link.row, None))
            continue
        dtype = tensors[link.targets[0]].dtype
        for key, back in zip(link.sources, _back(link, tensors), strict=True):
            source = named[key]
            expected = _rounded(source.numpy(), dtype, back.dtype)
            if back.shape != expected.shape:
                wrong.append(WrongTensor(source.name, link.targets, link.row, None))
            elif back.tobytes() != expected.tobytes():
                distance = max_abs(back, expected)
                wrong.append(WrongTensor(source.name, link.targets, link.row, distance))
            elif source.dtype == dtype:
                equal += 1
            else:
                rounded[dtype] = rounded.get(dtype, 0) + 1
    return Weights(equal, rounded, tuple(wrong))


def _rounded(array: Array, dtype: str, wanted: np.dtype[Any]) -> Array:
    """A tensor of the source in the repo's dtype, if that is another."""
    if array.dtype == wanted:
        return array
    with np.errstate(over="ignore"):
        return array.astype(DTYPES[dtype])


def _back(link: Link, tensors: Mapping[str, PlannedTensor]) -> list[Array]:
    """The source tensors of a link, from the repo's."""
    arrays = [tensors[target].tensor().numpy() for target in link.targets]
    back = link.inverse
    return list(back.op.apply(arrays, len(back.targets))) if back.op else arrays
