"""Moving averages beside the weights: of any part and under any name.

An average has the keys and shapes of weights beside it, and is offered in their place. Which of the
two it is, words in what stands before the names say, or that the other stands where weights do.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from ...errors import ConversionError, printable
from ...mappings.names import is_average, place_in
from ..checkpoint import Tensor
from .groups import Group

_NOT_TAKEN = "the moving average of the weights; --ema takes it instead of the weights themselves"
_REPLACED = "its moving average is taken instead, as --ema says"
_ANOTHER = "another copy of the weights"


@dataclass
class Chosen:
    """One group of each part.

    Attributes:
        averages: those of the groups that are averages.
        skipped: names of what is not taken -> the reason.
    """

    groups: list[Group] = field(default_factory=list)
    averages: list[Group] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    def leave_out(self, tensors: Iterable[Tensor], reason: str) -> None:
        """Note tensors that are not taken."""
        self.skipped |= {tensor.name: reason for tensor in tensors}


def choose(groups: Iterable[Group], wanted: bool) -> Chosen:
    """Of weights and their average, one.

    An average that is alone is taken, whether it is wanted or not.

    Raises:
        ConversionError: nothing says which of two models with the same keys is the average, or
            which of two averages is wanted.
    """
    chosen = Chosen()
    for copies in _copies(groups):
        averages = [group for group in copies if is_average(group.place)]
        weights = sorted((group for group in copies if group not in averages), key=_strangeness)
        if len(averages) > 1 and (wanted or not weights):
            raise ConversionError(_several(*averages[:2]))
        if not weights:
            chosen.groups.append(averages[0])
            chosen.averages.append(averages[0])
            continue
        main, *others = weights
        if others and not _is_plainer(main, others[0]):
            raise ConversionError(_ambiguous(main, others[0]))
        if others and not averages and is_average(others[0].place) is None:
            averages.append(others.pop(0))
        for other in others:
            chosen.leave_out(other.tensors.values(), _ANOTHER)
        _choose_one(main, averages, wanted, chosen)
    return chosen


def _choose_one(main: Group, averages: list[Group], wanted: bool, chosen: Chosen) -> None:
    """The weights, or their average in their place."""
    for average in averages:
        if not wanted:
            chosen.leave_out(average.tensors.values(), _NOT_TAKEN)
            continue
        replaced = [main.tensors[key] for key in average.tensors if key in main.tensors]
        chosen.leave_out(replaced, _REPLACED)
        main = replace(main, tensors={**main.tensors, **average.tensors})
        chosen.averages.append(main)
    chosen.groups.append(main)


def _copies(groups: Iterable[Group]) -> list[list[Group]]:
    """The groups, those of one part together."""
    found: list[list[Group]] = []
    for group in groups:
        owner = next((copies for copies in found if _is_copy(group, copies[0])), None)
        if owner is None:
            found.append([group])
        else:
            owner.append(group)
    return found


def _is_copy(group: Group, other: Group) -> bool:
    """Whether two groups hold the same part: the keys and shapes of one are among the other's."""
    places = {place_in(group.front), place_in(other.front)} - {""}
    if group.kind != other.kind or len(places) > 1:
        return False
    fewer, more = sorted((group.tensors, other.tensors), key=len)
    return all(key in more and more[key].shape == fewer[key].shape for key in fewer)


def _strangeness(group: Group) -> tuple[bool, int, int]:
    """How far a group is from where weights lie: first, those under no front or a known one."""
    place = group.place
    known = place == place_in(group.front)
    return not known, place.count("."), len(place)


def _is_plainer(main: Group, other: Group) -> bool:
    """Whether of two groups the first is where weights lie, or the second is named after it."""
    named_after = main.place.rpartition(".")[2] in other.place.rpartition(".")[2]
    return _strangeness(main)[:2] < _strangeness(other)[:2] or named_after


def _ambiguous(main: Group, other: Group) -> str:
    """What to say of two models of which nothing says which is the average."""
    fronts = " and ".join(f"`{printable(group.place)}`" for group in (main, other))
    return (
        f"two models with the same names and shapes, {fronts}, and nothing says which is the moving"
        " average; save one of them alone"
    )


def _several(one: Group, other: Group) -> str:
    """What to say of two averages of one model, of which one is wanted."""
    return (
        f"two moving averages of the same weights, `{printable(one.place)}` and"
        f" `{printable(other.place)}`; save one of them alone"
    )
