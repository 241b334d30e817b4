"""How files of textual inversion are written: the forms of `facts/embeddings.toml`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import NamedTuple

from .facts import facts


class Form(NamedTuple):
    """A way to write words.

    Attributes:
        suffixes: endings of the names of its files.
        roles: encoder, or "" for the one that the width tells -> the name of its vectors; empty
            where the token itself is the name.
        several: whether a file may hold several words.
    """

    name: str
    title: str
    suffixes: tuple[str, ...]
    roles: Mapping[str, str]
    several: bool


@cache
def forms() -> tuple[Form, ...]:
    """Every form."""
    return tuple(
        Form(
            name=entry["name"],
            title=entry["title"],
            suffixes=tuple(entry["suffixes"]),
            roles=entry.get("roles", {}),
            several=entry.get("several", False),
        )
        for entry in facts("embeddings")["forms"]
    )


def written() -> tuple[str, ...]:
    """The names of the forms."""
    return tuple(dict.fromkeys(form.name for form in forms()))
