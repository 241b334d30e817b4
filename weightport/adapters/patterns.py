"""The patterns by which PEFT's configs speak of modules, as PEFT reads them: regular expressions of
the ends of names, of which the first that fits counts.

They come from files, so none backtracks: a match takes a step for each sign of the expression. The
places of a name that it may have come to are the bits of a number.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache, reduce
from typing import NamedTuple

ONLY = "^"
"""What a pattern begins with that stands for one module, and not for those whose names it ends."""
_NAME = re.compile(r"(\^?)(\(\.\*\\?\.\)\?)?((?:[\w-]|\\?\.)+)\$?")
_SIGN = re.compile(r"\\[.dw-]|\[\^?[\w.-]+\]|[\w.-]")
_GROUP = re.compile(r"\((\?:)?")
_LONGEST = 300  # signs of all expressions of a config: each is tried with every name


class Patterns:
    """Values of modules, by patterns of their names."""

    def __init__(self, values: Mapping[str, float]) -> None:
        """Read patterns, in the order in which they count.

        Raises:
            ValueError: one is an expression that is not understood.
        """
        self._names: dict[str, tuple[int, float]] = {}
        self._expressions: list[tuple[int, float, _Ways]] = []
        signs = 0
        for rank, (pattern, value) in enumerate(values.items()):
            found = _NAME.fullmatch(pattern)
            if found is not None:
                name = found[3].replace("\\.", ".")
                whole = ONLY if found[1] and not found[2] else ""
                self._names.setdefault(whole + name, (rank, value))
                continue
            signs += len(pattern)
            if signs > _LONGEST:
                raise ValueError(pattern)
            self._expressions.append((rank, value, _parsed(pattern)))

    def first(self, name: str) -> float | None:
        """The value of the first pattern that stands for a module, if one does."""
        fitting = (self._names[end] for end in (ONLY + name, *_ends(name)) if end in self._names)
        rank, value = min(fitting, default=(-1, None))
        for at, other, expression in self._expressions:
            if 0 <= rank < at:
                break
            if _fits(expression, name):
                return other
        return value


def _ends(name: str) -> list[str]:
    """A name, and what is behind each of its dots."""
    return [name, *(name[at + 1 :] for at, sign in enumerate(name) if sign == ".")]


# --- expressions ----------------------------------------------------------------------------------


class _Sign(NamedTuple):
    """A sign of a name, so often."""

    accepts: str
    times: str


class _Group(NamedTuple):
    """One of several ways, or nothing where it is optional."""

    ways: _Ways
    is_optional: bool


_Piece = _Sign | _Group | str
"""`^` and `$` are themselves."""
_Ways = tuple[tuple[_Piece, ...], ...]


def _parsed(pattern: str) -> _Ways:
    """The ways in which a pattern may be met.

    Raises:
        ValueError: it is not understood.
    """
    ways, end = _ways(pattern, 0)
    if end < len(pattern):
        raise ValueError(pattern)
    return ways


def _ways(pattern: str, at: int) -> tuple[_Ways, int]:
    """The ways of a group from a place on, and where it ends."""
    ways: list[list[_Piece]] = [[]]
    while at < len(pattern) and pattern[at] != ")":
        if pattern[at] == "|":
            ways.append([])
            at += 1
            continue
        piece, at = _piece(pattern, at)
        ways[-1].append(piece)
    return tuple(map(tuple, ways)), at


def _piece(pattern: str, at: int) -> tuple[_Piece, int]:
    if pattern[at] in "^$":
        return pattern[at], at + 1
    group = _GROUP.match(pattern, at)
    if group is not None:
        ways, at = _ways(pattern, group.end())
        if pattern[at : at + 1] != ")" or pattern[at + 1 : at + 2] in ("*", "+"):
            raise ValueError(pattern)
        is_optional = pattern[at + 1 : at + 2] == "?"
        return _Group(ways, is_optional), at + 1 + is_optional
    sign = _SIGN.match(pattern, at)
    if sign is None or not _is_expression(sign[0]):
        raise ValueError(pattern)
    at = sign.end()
    times = pattern[at] if pattern[at : at + 1] in ("*", "+", "?") else ""
    return _Sign(sign[0], times), at + len(times)


def _is_expression(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return True


def _fits(ways: _Ways, name: str) -> bool:
    """Whether a name, or what is behind one of its dots, is met."""
    starts = 1
    for at, sign in enumerate(name, 1):
        starts |= (sign == ".") << at
    return bool(_reached(ways, name, starts) >> len(name))


def _reached(ways: _Ways, name: str, starts: int) -> int:
    """The places of a name that ways lead to; bit `i` is the place before sign `i`."""
    found = 0
    for way in ways:
        found |= reduce(lambda here, piece: _behind(piece, name, here), way, starts)
    return found


def _behind(piece: _Piece, name: str, here: int) -> int:
    """The places behind a piece."""
    if not here:
        return 0
    if isinstance(piece, str):
        return here & (1 if piece == "^" else 1 << len(name))
    if isinstance(piece, _Group):
        behind = _reached(piece.ways, name, here)
        return behind | here if piece.is_optional else behind
    mask = _mask(piece.accepts, name)
    once = (here & mask) << 1
    if not piece.times:
        return once
    if piece.times == "?":
        return here | once
    start = once if piece.times == "+" else here
    return start | (mask + (start & mask)) ^ mask  # a sum carries through a run of ones


@lru_cache(maxsize=1000)
def _mask(accepts: str, name: str) -> int:
    """Where the signs of a name are that an expression of one sign accepts."""
    return sum(1 << found.start() for found in re.finditer(accepts, name))
