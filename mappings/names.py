"""How the names of a file are read: `facts/names.toml`, typed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import NamedTuple

from .facts import facts
from .patterns import Names


class Naming(NamedTuple):
    """Whose names the keys of a part are.

    Attributes:
        kind: parts of one kind under one front are one part.
        layout: of the tables that read them; empty for what no table reads.
        first: whether nothing but wrappers may stand before the keys.
    """

    name: str
    kind: str
    layout: str
    first: bool


class Root(NamedTuple):
    """Where the keys of a part begin in a name.

    Attributes:
        at: the number of segments before it.
    """

    at: int
    naming: Naming


def find_root(segments: list[str]) -> Root | None:
    """The first place in a name where a part's own key begins, if there is one."""
    known = _roots().below
    numbered = known.get("#")
    for at, segment in enumerate(segments):
        node = known.get(segment) or (numbered if segment.isdigit() else None)
        naming = _naming(node, segments[at + 1 :]) if node else None
        if naming is not None and not (naming.first and _within(segments[:at])):
            return Root(at, naming)
    return None


def _naming(node: _Roots, segments: list[str]) -> Naming | None:
    """The naming of the longest root that a key begins with, from a segment of it on."""
    found = node.naming
    inside = inside_wrappers()
    for segment in segments:
        if segment in inside:
            continue
        below = node.below.get("#" if segment.isdigit() else segment)
        if below is None:
            return found
        node = below
        found = node.naming or found
    return found


def _within(front: list[str]) -> bool:
    """Whether a front holds anything but wrappers."""
    known = facts("names")["wrappers"]
    return any(segment not in known for segment in front)


@cache
def inside_wrappers() -> frozenset[str]:
    """Segments of wrappers that may stand inside a part."""
    return frozenset(facts("names")["inside"]["names"])


def place_in(front: str) -> str:
    """The place that original checkpoints have for a part, where a front holds one."""
    known = facts("names")["places"]["names"]
    found = [place for place in known if f".{place}." in f".{front}"]
    return max(found, key=len, default="")


def layout_in(front: str) -> str:
    """The layout of the files whose place for a part a front holds; empty if it holds none."""
    return str(facts("names")["places"]["layout"]) if place_in(front) else ""


def without_place(front: str) -> str:
    """A front less the place in it that original checkpoints have for a part."""
    place = place_in(front)
    if not place:
        return front
    before, _, after = f".{front}".rpartition(f".{place}.")
    return f"{before}.{after}".removeprefix(".")


def wrappers_in(front: str) -> list[str]:
    """Whose segments are in a front, in order, each once."""
    known = facts("names")["wrappers"]
    segments = front.split(".")
    return list(dict.fromkeys(known[segment] for segment in segments if segment in known))


@dataclass(frozen=True)
class Spelling:
    """Modules inside a part that files name in several ways.

    Attributes:
        fronts: what stands before their names in a key; `#` is a number.
        names: what files say -> what tables say.
        layers: those that are a matrix or a 1x1 convolution, which have the same numbers.
        rank: axes of their weights as tables have them.
    """

    fronts: tuple[str, ...]
    names: Mapping[str, str]
    layers: tuple[str, ...]
    rank: int

    @cached_property
    def _key(self) -> re.Pattern[str]:
        fronts = "|".join(re.escape(front).replace(r"\#", r"\d+") for front in self.fronts)
        return re.compile(rf"(.*(?:{fronts}))(.*)\.([^.]*)")

    def read(self, key: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
        """A key and the shape of its tensor as tables have them."""
        found = self._key.fullmatch(key)
        if found is None:
            return key, shape
        front, module, leaf = found.groups()
        module = self.names.get(module, module)
        is_layer = module in self.layers and leaf == "weight" and len(shape) > 1
        if is_layer and shape[2:] in ((), (1, 1)):
            shape = (*shape[:2], 1, 1)[: self.rank]
        return f"{front}{module}.{leaf}", shape


@cache
def spellings(naming: str) -> tuple[Spelling, ...]:
    """What files under some naming spell in several ways."""
    return tuple(
        Spelling(tuple(entry["fronts"]), entry["names"], tuple(entry["layers"]), entry["rank"])
        for entry in facts("names")["spellings"]
        if entry["naming"] == naming
    )


def unused(kind: str, keys: Iterable[str]) -> dict[str, str]:
    """Keys of what may lie at a part of some kind and is nothing that it uses -> the reason."""
    return _matched(facts("names")["unused"].get(kind, {}), keys)


def leftovers(names: Iterable[str], joined: bool = False) -> dict[str, str]:
    """Names of what trainers and mergers leave beside a model -> the reason.

    Args:
        joined: the names are written without dots.
    """
    patterns = {**facts("ldm")["skip"], **facts("names")["leftovers"]}
    if joined:
        patterns = {pattern.replace(".", ""): reason for pattern, reason in patterns.items()}
    return _matched(patterns, names)


def is_average(front: str) -> bool | None:
    """Whether a front says that what is below is an average; None where it does not say.

    The segment that is nearest to the model decides.
    """
    known = facts("names")["averages"]
    for segment in reversed(front.split(".")):
        words = set(re.findall("[a-z]+", segment.lower()))
        if words & set(known["average"]):
            return True
        if words & set(known["weights"]):
            return False
    return None


def _matched(patterns: Mapping[str, str], names: Iterable[str]) -> dict[str, str]:
    """Names that one of some patterns fits -> the reason that the first such pattern has."""
    found: dict[str, str] = {}
    listed = Names(list(names))
    for pattern, reason in patterns.items():
        for name in listed.matching(pattern):
            found.setdefault(name, reason)
    return found


@dataclass
class _Roots:
    """The roots that begin with some segments.

    Attributes:
        naming: of the root that is these segments, if there is one.
        below: the next segment -> the roots that go on with it.
    """

    naming: Naming | None = None
    below: dict[str, _Roots] = field(default_factory=dict)


@cache
def _roots() -> _Roots:
    roots = _Roots()
    for name, entry in facts("names")["namings"].items():
        naming = Naming(name, entry["kind"], entry["layout"], entry.get("first", False))
        for root in entry["roots"]:
            node = roots
            for segment in root.split("."):
                node = node.below.setdefault(segment, _Roots())
            node.naming = naming
    return roots
