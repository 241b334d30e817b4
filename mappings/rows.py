"""One line of a table, `target = "source : then"`: what it matches, and what it writes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import chain, zip_longest
from typing import Any

from .expressions import evaluate

_ALTERNATIVES = re.compile(r"\{([\w.]+(?:,[\w.]+)+)\}")


@dataclass(frozen=True)
class Row:
    """One line of a table, parsed once; with alternatives, `{q,k,v}`, one for each of them.

    Attributes:
        left: the left side as the table has it.
        path: the same with one of the alternatives in its place.
        place: which of the alternatives, the parts of a fused tensor; None without.
    """

    section: str
    left: str
    path: str
    place: int | None
    right: str
    then: str

    @classmethod
    def parse(cls, section: str, left: str, value: str) -> list[Row]:
        """Read `left = "right : then"`."""
        right, _, then = value.partition(" : ")
        sides = right.strip(), then.strip()
        found = _ALTERNATIVES.search(left)
        if found is None:
            return [cls(section, left, left, None, *sides)]
        return [
            cls(section, left, left.replace(found[0], part), place, *sides)
            for place, part in enumerate(found[1].split(","))
        ]

    @property
    def value(self) -> str:
        """What stands to the right of the equals sign."""
        return f"{self.right} : {self.then}" if self.then else self.right

    def __str__(self) -> str:
        return self.text

    @cached_property
    def text(self) -> str:
        """The line."""
        return f'{self.left} = "{self.value}"'

    @cached_property
    def _segments(self) -> tuple[str, ...]:
        return tuple(_split(self.path))

    @cached_property
    def _patterns(self) -> tuple[str | re.Pattern[str], ...]:
        """What the segments of a key have to be, or to fit."""
        return tuple(map(_pattern, self._segments))

    @cached_property
    def source(self) -> tuple[str, ...]:
        """The segments of the right-hand side, not filled in yet."""
        return tuple(_split(self.right))

    @property
    def length(self) -> int:
        """Number of segments the row takes from a key."""
        return len(self._segments)

    @property
    def rank(self) -> tuple[int, int, int]:
        """How specific the row is: more segments first, then fewer wildcards, then fewer
        bindings."""
        return self.length, -self.path.count("*"), -self.path.count("{")

    @property
    def parts(self) -> int:
        """How many alternatives its left side has."""
        found = _ALTERNATIVES.search(self.left)
        return 1 + found[1].count(",") if found else 1

    def match(self, segments: tuple[str, ...]) -> dict[str, str] | None:
        """What the row binds when it matches the first segments of a key, else None."""
        if len(segments) < self.length:
            return None
        bound: dict[str, str] = {}
        for pattern, segment in zip(self._patterns, segments, strict=False):
            if isinstance(pattern, str):
                if pattern != segment:
                    return None
                continue
            found = pattern.fullmatch(segment)
            if found is None:
                return None
            bound |= found.groupdict()
        return bound

    def write(self, bound: Mapping[str, str], scope: Mapping[str, Any]) -> tuple[str, ...]:
        """The segments of the source path; an empty right side adds nothing.

        Args:
            bound: what the left side matched, as text.
            scope: the values that expressions may use.
        """
        starred = [segment.replace("*", bound.get("star", "*")) for segment in self.source]
        return tuple(filter(None, (filled(segment, scope) for segment in starred)))

    def then_for(self, scope: Mapping[str, Any]) -> str:
        """The section or op that goes on, for the values of a scope."""
        return filled(self.then, scope)


def _split(path: str) -> list[str]:
    """Split at the dots that are not inside braces."""
    return re.findall(r"(?:\{[^}]*\}|[^.{])+", path)


def _pattern(segment: str) -> str | re.Pattern[str]:
    """`linear_{k}` -> a regex; `{k}` binds an integer, `*` anything. A plain word stays one."""
    if "{" not in segment and "*" not in segment:
        return segment
    return _compiled(segment)


@cache
def _compiled(segment: str) -> re.Pattern[str]:
    pieces = []
    for piece in re.split(r"(\{[^}]*\}|\*)", segment):
        if piece == "*":
            pieces.append("(?P<star>.+)")
        elif piece.startswith("{"):
            pieces.append(rf"(?P<{piece[1:-1]}>\d+)")
        else:
            pieces.append(re.escape(piece))
    return re.compile("".join(pieces))


def filled(text: str, names: Mapping[str, Any]) -> str:
    """A text with the values of the expressions in its braces; 1 or 0 for comparisons."""
    if "{" not in text:
        return text
    between, expressions = _pieces(text)
    written = (_written(evaluate(expression, names)) for expression in expressions)
    return "".join(chain.from_iterable(zip_longest(between, written, fillvalue="")))


@cache
def _pieces(text: str) -> tuple[list[str], list[str]]:
    """What stands between braces, before and after them, and what stands inside."""
    pieces = re.split(r"\{([^}]*)\}", text)
    return pieces[::2], pieces[1::2]


def _written(value: Any) -> str:
    return str(int(value) if isinstance(value, bool) else value)
