"""Are the weights right? The inverse mapping, applied to the repo, must give the source back, bit
for bit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..converters.checkpoint import DTYPES, Array
from ..converters.planning.plan import PlannedTensor
from ..converters.planning.recognise import Recognition
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
    equal, rounded, wrong = 0, dict[str, int](), []
    for link in dict.fromkeys(part.of_family(family).links.values()):
        missing = [target for target in link.targets if target not in tensors]
        if missing:
            wrong.append(WrongTensor(link.sources[0], link.targets, link.row, None))
            continue
        dtype = tensors[link.targets[0]].dtype
        for key, back in zip(link.sources, _back(link, tensors), strict=True):
            source = part.checkpoint.tensors[key]
            expected = source.numpy()
            if expected.dtype != back.dtype:
                with np.errstate(over="ignore"):
                    expected = expected.astype(DTYPES[dtype])
            if back.shape != expected.shape or back.tobytes() != expected.tobytes():
                wrong.append(
                    WrongTensor(source.name, link.targets, link.row, _max_abs(back, expected))
                )
            elif source.dtype == dtype:
                equal += 1
            else:
                rounded[dtype] = rounded.get(dtype, 0) + 1
    return Weights(equal, rounded, tuple(wrong))


def _back(link: Link, tensors: Mapping[str, PlannedTensor]) -> list[Array]:
    """The source tensors of a link, from the repo's."""
    arrays = [tensors[target].tensor().numpy() for target in link.targets]
    back = link.inverse
    return list(back.op.apply(arrays, len(back.targets))) if back.op else arrays


def _max_abs(a: Array, b: Array) -> float | None:
    if a.shape != b.shape:
        return None
    return float(np.abs(a.astype(np.float64) - b.astype(np.float64)).max(initial=0.0))
