"""The values of options, as people type them; ValueError is what the parser makes a usage error
of."""

from __future__ import annotations


def positive(text: str) -> int:
    """A number from 1 on."""
    if (value := int(text)) < 1:
        raise ValueError
    return value


def natural(text: str) -> int:
    """A number from 0 on, small enough for a seed."""
    if not 0 <= (value := int(text)) < 2**63:
        raise ValueError
    return value


def size(text: str) -> tuple[int, int]:
    """Width and height, as in `512x768`; `512` is a square."""
    width, _, height = text.partition("x")
    return positive(width), positive(height or width)


def numbers(text: str) -> tuple[int, ...]:
    """Numbers from 1 on, with commas between them."""
    return tuple(positive(part) for part in text.split(","))


def names(text: str) -> tuple[str, ...]:
    """Names with commas between them."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def port(text: str) -> int:
    """A number of a TCP port."""
    if not 0 < (value := int(text)) < 2**16:
        raise ValueError
    return value
