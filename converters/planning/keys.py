"""Long key lists for people: `down_blocks.{0..3}.resnets.{0..1}.conv1.weight` instead of eight
lines."""

from __future__ import annotations

from collections.abc import Iterable

_LONGEST = 9  # digits of a number; longer ones are part of a name


def collapse(keys: Iterable[str]) -> list[tuple[str, list[str]]]:
    """(pattern, the keys it stands for), in the order of first appearance.

    Keys that differ only in whole-number segments become one pattern; its ranges span the numbers
    that occur.
    """
    groups: dict[tuple[str, ...], list[str]] = {}
    for key in keys:
        skeleton = tuple("#" if _is_number(segment) else segment for segment in key.split("."))
        groups.setdefault(skeleton, []).append(key)
    return [(_pattern(skeleton, group), group) for skeleton, group in groups.items()]


def brief(keys: Iterable[str], limit: int = 3) -> str:
    """A key list in one line: the first patterns and how many more there are."""
    patterns = collapse(keys)
    shown = ", ".join(
        f"{pattern} ({len(group)})" if len(group) > 1 else pattern
        for pattern, group in patterns[:limit]
    )
    rest = sum(len(group) for _, group in patterns[limit:])
    return f"{shown} and {rest} more" if rest else shown


def _is_number(segment: str) -> bool:
    return segment.isdecimal() and len(segment) <= _LONGEST


def _pattern(skeleton: tuple[str, ...], keys: list[str]) -> str:
    if len(keys) == 1:
        return keys[0]
    columns = zip(*(key.split(".") for key in keys), strict=True)
    return ".".join(
        _range([int(value) for value in column]) if segment == "#" else segment
        for segment, column in zip(skeleton, columns, strict=True)
    )


def _range(values: list[int]) -> str:
    distinct = sorted(set(values))
    if len(distinct) == 1:
        return str(distinct[0])
    if distinct == list(range(distinct[0], distinct[-1] + 1)):
        return f"{{{distinct[0]}..{distinct[-1]}}}"
    return f"{{{','.join(map(str, distinct))}}}"
