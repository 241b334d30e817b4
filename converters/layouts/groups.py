"""Splits the names of a file into parts: what stands before a part's own keys, and the keys.

Nothing is known of sizes yet. A part is told by how its keys begin, wherever it lies and whatever
wrapped it: `mappings/facts/names.toml`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from ...mappings.layouts import CANONICAL
from ...mappings.names import (
    Naming,
    find_root,
    inside_wrappers,
    layout_in,
    leftovers,
    spellings,
    unused,
    without_place,
    wrappers_in,
)
from ..checkpoint import Tensor


@dataclass
class Group:
    """The tensors of one part.

    Attributes:
        front: what stands before the keys of the part in the file, with its last dot.
        kind: of the part: parts of two kinds may share a front.
        tensors: key, as the tables spell it -> tensor.
        wrapped: segments of wrappers that stood inside the part.
        merged: what was merged into the weights, in words; empty where they are those of the file.
    """

    front: str
    kind: str
    tensors: dict[str, Tensor] = field(default_factory=dict)
    wrapped: set[str] = field(default_factory=set)
    namings: Counter[Naming] = field(default_factory=Counter)
    merged: str = ""

    @property
    def place(self) -> str:
        """The front without its last dot."""
        return self.front.removesuffix(".")

    @property
    def naming(self) -> str:
        """Whose names the keys are; empty where no table reads such."""
        known = self._naming
        return known.name if known else ""

    @property
    def layout(self) -> str:
        """The layout of the tables that read the part."""
        known = self._naming
        return known.layout if known else ""

    @property
    def _naming(self) -> Naming | None:
        known = {naming: count for naming, count in self.namings.items() if naming.layout}
        return max(known, key=lambda naming: known[naming]) if known else None

    @property
    def is_unused(self) -> bool:
        """Whether nothing in it is of use without a part of its kind elsewhere."""
        return len(unused(self.kind, self.tensors)) == len(self.tensors)

    @property
    def taken_off(self) -> str | None:
        """What was taken off the names, in words."""
        around = without_place(self.front).removesuffix(".")
        whose = wrappers_in(".".join([around, *sorted(self.wrapped)]))
        told = [f"`{around}.` before every name"] if around else []
        told += [f"`{segment}.` inside names" for segment in sorted(self.wrapped)]
        by = f" ({', '.join(whose)})" if whose else ""
        facts = [f"taken off: {' and '.join(told)}{by}"] if told else []
        facts += [self.merged] if self.merged else []
        return "; ".join(facts) or None


class Split(NamedTuple):
    """The names of a file, taken apart.

    Attributes:
        groups: the parts, in file order.
        rest: tensors that are in none.
        leftovers: what trainers leave beside a model, under names without what stands before all
            of the model's.
        reasons: names of the leftovers in the file -> why they are left out.
    """

    groups: list[Group]
    rest: dict[str, Tensor]
    leftovers: dict[str, Tensor]
    reasons: dict[str, str]

    @property
    def layout(self) -> str:
        """That of the file: the canonical one if nothing in it is otherwise."""
        found = [layout_in(group.front) or group.layout for group in self.groups]
        return next((layout for layout in found if layout not in ("", CANONICAL)), CANONICAL)


def split(tensors: Mapping[str, Tensor]) -> Split:
    """Take the names of a file's tensors apart."""
    found: dict[tuple[str, str], Group] = {}
    rest: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        segments = name.split(".")
        root = find_root(segments)
        if root is None:
            rest[name] = tensor
            continue
        front = "".join(f"{segment}." for segment in segments[: root.at])
        group = found.setdefault((front, root.naming.kind), Group(front, root.naming.kind))
        group.tensors[name.removeprefix(front)] = tensor
        group.namings[root.naming] += 1
    groups = list(found.values())
    reasons, stripped = _leftovers(groups, rest)
    for group in groups:
        kept = {key: one for key, one in group.tensors.items() if one.name not in reasons}
        group.tensors = _without_wrappers(group, kept)
    groups = _with_unused([group for group in groups if group.tensors])
    for group in groups:
        group.tensors = _spelled(group)
    others = {name: tensor for name, tensor in rest.items() if name not in reasons}
    return Split(groups, others, stripped, reasons)


def _leftovers(
    groups: Iterable[Group], rest: Mapping[str, Tensor]
) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Names of leftovers -> the reason, and the leftovers under names without a front.

    Asked is what belongs to no part, what no part needs, and of each part one tensor, which speaks
    for it.
    """
    spoken_for: dict[str, list[Tensor]] = {}
    fronts = {""}
    for group in groups:
        fronts.update(_fronts(without_place(group.front).split(".")[:-1]))
        for key in unused(group.kind, group.tensors):
            spoken_for[group.front + key] = [group.tensors[key]]
        first = next(iter(group.tensors))
        spoken_for[group.front + first] = list(group.tensors.values())
    reasons: dict[str, str] = {}
    stripped: dict[str, Tensor] = {}
    for front in sorted(fronts):
        below = {
            name.removeprefix(front): name
            for name in (*rest, *spoken_for)
            if name.startswith(front)
        }
        for short, reason in leftovers(below).items():
            name = below[short]
            for tensor in spoken_for.get(name) or [rest[name]]:
                reasons.setdefault(tensor.name, reason)
                stripped[tensor.name.removeprefix(front)] = tensor
    return reasons, stripped


def _fronts(segments: list[str]) -> list[str]:
    """What names below a path and below all above it begin with."""
    return ["".join(f"{one}." for one in segments[:at]) for at in range(len(segments) + 1)]


def _above(name: str) -> Iterator[str]:
    """The fronts of a name, the longest first."""
    end = len(name)
    while end >= 0:
        end = name.rfind(".", 0, end)
        yield name[: end + 1]


def _renamed(tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """Tensors under other keys; under their own where two would have the same."""
    taken = Counter(names.values())
    return {
        names[key] if taken[names[key]] == 1 else key: tensor for key, tensor in tensors.items()
    }


def _spelled(group: Group) -> dict[str, Tensor]:
    """The tensors of a group as the tables spell and shape them."""
    tensors = group.tensors
    for spelling in spellings(group.naming):
        read = {key: spelling.read(key, tensor.shape) for key, tensor in tensors.items()}
        shaped = {
            key: tensor if read[key][1] == tensor.shape else tensor.reshaped(read[key][1])
            for key, tensor in tensors.items()
        }
        tensors = _renamed(shaped, {key: name for key, (name, _) in read.items()})
    return tensors


def _without_wrappers(group: Group, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A group's tensors without the segments that a wrapper of a module added, where all below it
    have them."""
    known = inside_wrappers()
    parts = {key: key.split(".") for key in tensors}
    found = {segment for segments in parts.values() for segment in known.intersection(segments)}
    if not found:
        return tensors
    wrapped: set[str] = set()  # modules
    bare: set[str] = set()  # modules with keys that go on without a wrapper
    for segments in parts.values():
        for at in range(1, len(segments)):
            module = ".".join(segments[:at])
            (wrapped if segments[at] in known else bare).add(module)
    if wrapped & bare:
        return tensors
    group.wrapped = found
    names = {
        key: ".".join(segment for segment in segments if segment not in known)
        for key, segments in parts.items()
    }
    return _renamed(tensors, names)


def _with_unused(groups: list[Group]) -> list[Group]:
    """The groups, with those of no use put to the part of their kind that they lie at."""
    kept = [group for group in groups if not group.is_unused]
    for group in groups:
        if group in kept:
            continue
        owner = next((one for one in kept if _is_at(group, one)), None)
        if owner is None:
            kept.append(group)
            continue
        for key, tensor in group.tensors.items():
            owner.tensors.setdefault(key, tensor)
    return [group for group in groups if group in kept]


def _is_at(group: Group, owner: Group) -> bool:
    """Whether a group lies where the part of its kind does: around it, or inside its front."""
    fronts = group.front, owner.front
    same = fronts[0].startswith(fronts[1]) or fronts[1].startswith(fronts[0])
    return same and group.kind == owner.kind


def attach(groups: Iterable[Group], rest: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Put tensors that lie at a part to it, where they are unknown; returns the others."""
    by_front: dict[str, list[Group]] = {}
    for group in groups:
        by_front.setdefault(group.front, []).append(group)
    if not by_front:
        return dict(rest)
    others = {}
    for name, tensor in rest.items():
        owners = next((by_front[front] for front in _above(name) if front in by_front), None)
        if owners:
            owners[0].tensors[name.removeprefix(owners[0].front)] = tensor
        else:
            others[name] = tensor
    return others
