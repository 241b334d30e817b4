"""Long key lists for people: `down_blocks.{0..3}.resnets.{0..1}.conv1.weight` instead of eight
lines."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

_NUMBER = re.compile(r"(?<![^.])\d{1,9}(?![^.])")  # a whole segment; longer ones are part of a name
_ANY = "\0"  # stands for a number; readers let no name with it pass


def collapse(keys: Iterable[str]) -> list[tuple[str, list[str]]]:
    """(pattern, the keys it stands for), in the order of first appearance.

    Keys that differ only in whole-number segments become one pattern; its ranges span the numbers
    that occur.
    """
    groups: dict[str, list[str]] = {}
    for key in keys:
        groups.setdefault(_NUMBER.sub(_ANY, key), []).append(key)
    return [
        (group[0] if len(group) == 1 else _pattern(skeleton, group), group)
        for skeleton, group in groups.items()
    ]


def brief(keys: Iterable[str], limit: int = 3) -> str:
    """A key list in one line: the first patterns and how many more there are."""
    patterns = collapse(keys)
    shown = ", ".join(
        f"{pattern} ({len(group)})" if len(group) > 1 else pattern
        for pattern, group in patterns[:limit]
    )
    rest = sum(len(group) for _, group in patterns[limit:])
    return f"{shown} and {rest} more" if rest else shown


def _pattern(skeleton: str, keys: Sequence[str]) -> str:
    columns = zip(*(key.split(".") for key in keys), strict=True)
    return ".".join(
        _range(set(column)) if segment == _ANY else segment
        for segment, column in zip(skeleton.split("."), columns, strict=True)
    )


def _range(texts: Iterable[str]) -> str:
    distinct = sorted(set(map(int, texts)))
    if len(distinct) == 1:
        return str(distinct[0])
    if distinct == list(range(distinct[0], distinct[-1] + 1)):
        return f"{{{distinct[0]}..{distinct[-1]}}}"
    return f"{{{','.join(map(str, distinct))}}}"
