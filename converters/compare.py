"""Two checkpoints in any two layouts, compared tensor by tensor in canonical form: is a conversion
1:1?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..differences import max_abs
from .convert import gather
from .planning.family import choose_family
from .planning.plan import PlannedComponent, PlannedTensor, plan
from .settings import Settings

_SHOWN = 10  # tensors that are listed of each kind of difference


@dataclass(frozen=True)
class TensorDifference:
    """One tensor that is not the same on both sides.

    Attributes:
        kind: `only in A`, `only in B`, `shape`, `dtype` or `value`.
        detail: what each side has.
        max_abs: the largest absolute difference of the values, where both have any.
    """

    component: str
    key: str
    kind: str
    detail: str
    max_abs: float | None = None


@dataclass(frozen=True)
class Comparison:
    """The answer of `weightport.diff`.

    Attributes:
        equal: tensors that are the same on both sides, bit for bit.
        differences: all others.
    """

    a: str
    b: str
    families: tuple[str, str]
    equal: int
    differences: tuple[TensorDifference, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return asdict(self)


def compare(
    a: Sequence[Path],
    b: Sequence[Path],
    settings: Settings,
    progress: Callable[[int, int], None],
    whole: bool = True,
) -> Comparison:
    """Compare two models by key, shape, dtype and value; one tensor of each is in memory at a
    time.

    Args:
        a: the files of one.
        b: those of the other.
        whole: False compares what A holds, whatever B holds besides.

    Raises:
        ConversionError: one of them cannot be read or recognised.
    """
    first, left = _side(a, settings)
    second, right = _side(b, settings)
    total = sum(tensor.tensor().nbytes for tensor in left.values())
    differences = []
    names = list(dict.fromkeys([*left, *right])) if whole else list(left)
    for name in names:
        difference = _difference(*name, left.get(name), right.get(name))
        if difference is not None:
            differences.append(difference)
        if name in left:
            progress(left[name].tensor().nbytes, total)
    equal = len(names) - len(differences)
    return Comparison(
        ", ".join(map(str, a)), ", ".join(map(str, b)), (first, second), equal, tuple(differences)
    )


def _side(
    paths: Sequence[Path], settings: Settings
) -> tuple[str, dict[tuple[str, str], PlannedTensor]]:
    """The family of a model, and its tensors in canonical form."""
    parts = gather(paths, settings)
    family = choose_family(parts, settings.family)
    return family.name, _tensors(plan(parts, family))


def _tensors(components: dict[str, PlannedComponent]) -> dict[tuple[str, str], PlannedTensor]:
    return {
        (name, key): tensor
        for name, component in components.items()
        for key, tensor in component.tensors.items()
    }


def _difference(
    component: str, key: str, a: PlannedTensor | None, b: PlannedTensor | None
) -> TensorDifference | None:
    if a is None:
        return TensorDifference(component, key, "only in B", "")
    if b is None:
        return TensorDifference(component, key, "only in A", "")
    if a.shape != b.shape:
        return TensorDifference(component, key, "shape", f"{list(a.shape)} and {list(b.shape)}")
    left = a.tensor().numpy()
    right = b.tensor().numpy()
    if a.dtype == b.dtype and left.tobytes() == right.tobytes():
        return None
    distance = max_abs(left, right)
    if a.dtype != b.dtype:
        return TensorDifference(component, key, "dtype", f"{a.dtype} and {b.dtype}", distance)
    return TensorDifference(component, key, "value", a.dtype, distance)


def describe(comparison: Comparison) -> Iterator[str]:
    """The comparison in lines for people."""
    if comparison.families[0] != comparison.families[1]:
        yield f"families: {comparison.families[0]} and {comparison.families[1]}"
    yield f"{comparison.equal} tensors are the same, bit for bit"
    groups: dict[tuple[str, str], list[TensorDifference]] = {}
    for difference in comparison.differences:
        groups.setdefault((difference.kind, difference.detail), []).append(difference)
    for (kind, detail), differences in groups.items():
        yield from _described(kind, detail, differences)


def _described(kind: str, detail: str, differences: Sequence[TensorDifference]) -> Iterator[str]:
    what = f"{kind} ({detail})" if detail else kind
    yield f"{what}: {len(differences)} tensors"
    for difference in differences[:_SHOWN]:
        by = f"  max abs {difference.max_abs:.2e}" if difference.max_abs is not None else ""
        yield f"  {difference.component} {difference.key}{by}"
    if len(differences) > _SHOWN:
        yield f"  ... and {len(differences) - _SHOWN} more"
