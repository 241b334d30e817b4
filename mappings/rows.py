"""One line of a table, `target = "source : then"`: what it matches, and what it writes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from .expressions import evaluate


@dataclass(frozen=True)
class Row:
    """One line of a table, parsed once."""

    section: str
    left: str
    right: str
    then: str

    @classmethod
    def parse(cls, section: str, left: str, value: str) -> Row:
        """Read `left = "right : then"`."""
        right, _, then = value.partition(" : ")
        return cls(section, left, right.strip(), then.strip())

    @property
    def value(self) -> str:
        """What stands to the right of the equals sign."""
        return f"{self.right} : {self.then}" if self.then else self.right

    def __str__(self) -> str:
        return f'{self.left} = "{self.value}"'

    @cached_property
    def _patterns(self) -> tuple[re.Pattern[str], ...]:
        return tuple(re.compile(_segment_regex(segment)) for segment in _split(self.left))

    @cached_property
    def source(self) -> tuple[str, ...]:
        """The segments of the right-hand side, not filled in yet."""
        return tuple(_split(self.right))

    @property
    def length(self) -> int:
        """Number of segments the row takes from a key."""
        return len(self._patterns)

    @property
    def rank(self) -> tuple[int, int]:
        """How specific the row is: more segments first, then fewer wildcards."""
        return self.length, -self.left.count("*")

    @property
    def parts(self) -> tuple[str, ...]:
        """The names in the row's `{q,k,v}`, or nothing."""
        found = re.search(r"\{(\w+(?:,\w+)+)\}", self.left)
        return tuple(found[1].split(",")) if found else ()

    def match(self, segments: tuple[str, ...]) -> dict[str, str] | None:
        """What the row binds when it matches the first segments of a key, else None."""
        if len(segments) < self.length:
            return None
        bound: dict[str, str] = {}
        for pattern, segment in zip(self._patterns, segments, strict=False):
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
        filled = [_fill(segment, scope, bound) for segment in self.source]
        return tuple(segment for segment in filled if segment)


def _split(path: str) -> list[str]:
    """Split at the dots that are not inside braces."""
    return re.findall(r"(?:\{[^}]*\}|[^.{])+", path)


def _segment_regex(segment: str) -> str:
    """`linear_{k}` -> a regex; `{k}` binds an integer, `{q,k}` a part, `*` anything."""
    pieces = []
    for piece in re.split(r"(\{[^}]*\}|\*)", segment):
        inside = piece[1:-1]
        if piece == "*":
            pieces.append("(?P<star>.+)")
        elif "," in piece:
            names = "|".join(map(re.escape, inside.split(",")))
            pieces.append(f"(?P<part>{names})")
        elif piece.startswith("{"):
            pieces.append(rf"(?P<{inside}>\d+)")
        else:
            pieces.append(re.escape(piece))
    return "".join(pieces)


def _fill(segment: str, scope: Mapping[str, Any], bound: Mapping[str, str]) -> str:
    """Put values into a right-hand segment."""
    filled = segment.replace("*", bound.get("star", "*"))
    return re.sub(r"\{([^}]*)\}", lambda found: str(evaluate(found[1], scope)), filled)
