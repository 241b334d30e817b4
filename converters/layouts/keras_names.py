"""Keras's names for layers: a class in snake case, numbered from its second layer on."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable

from ..checkpoint import Tensor

Paths = dict[tuple[str, ...], Tensor]
"""Names from the outermost group to the variable -> the variable."""

Leaves = dict[str, dict[str, Tensor]]
"""Canonical layer path -> variable name (or position) -> tensor."""


def stem_and_number(name: str) -> tuple[str, int]:
    """`res_block_12` -> `("res_block", 12)`; no number is 0."""
    found = re.fullmatch(r"(.+?)_(\d{1,9})", name)
    return (found[1], int(found[2])) if found else (name, 0)


def stem(name: str) -> str:
    """The class in a numbered name."""
    return stem_and_number(name)[0]


def ranked(names: Iterable[str], class_of: Callable[[str], str] = stem) -> dict[str, str]:
    """Names of layers beside each other -> `class.rank`, counting each class in the order of its
    numbers."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name in names:
        groups[class_of(name)].append(name)
    ordered = {
        group: sorted(members, key=lambda name: stem_and_number(name)[1])
        for group, members in groups.items()
    }
    return {
        name: f"{group}.{rank}"
        for group, members in ordered.items()
        for rank, name in enumerate(members)
    }
