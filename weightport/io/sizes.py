"""Sizes in bytes as people write them."""

from __future__ import annotations

import re

_SIZE = re.compile(r"(\d{1,18}(?:\.\d{1,18})?)\s*(?:([KMGT])(I?))?B?", re.IGNORECASE | re.ASCII)
_POWERS = {None: 0, "K": 1, "M": 2, "G": 3, "T": 4}


def parse_size(size: int | str) -> int:
    """Bytes: a number, or text such as `5GB`, `800 MB`, `2GiB` or `1T`; without an `i` a thousand
    counts 1000.

    Raises:
        ValueError: it is not a size, or less than one byte.
    """
    match = _SIZE.fullmatch(str(size).strip())
    nbytes = 0
    if match is not None:
        from decimal import Decimal

        number, unit, binary = match.groups()
        thousand = 1024 if binary else 1000
        nbytes = int(Decimal(number) * thousand ** _POWERS[unit and unit.upper()])
    if nbytes < 1:
        raise ValueError("not a size; write it as 5GB, 800MB or 2GiB")
    return nbytes


def in_words(nbytes: int) -> str:
    """Bytes in the unit that suits them."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= scale:
            return f"{nbytes / scale:.2f} {unit}"
    return f"{nbytes} B"
