"""The heads of attention, which no tensor tells: what a person says of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...errors import ConversionError, printable
from ...mappings.families import Family
from .plan import PlannedComponent


def choose_heads(
    components: Mapping[str, PlannedComponent], family: Family, given: Sequence[str]
) -> None:
    """Put numbers of heads into configs.

    Args:
        given: `unet=8`, or one for each block, `unet=5,10,20,20`.

    Raises:
        ConversionError: a component is not there or has no heads to choose, or its widths cannot be
            split so.
    """
    for text in given:
        name, _, numbers = text.partition("=")
        component = components.get(name)
        if component is None:
            raise ConversionError(
                f"--heads {printable(text)}: the sources hold {', '.join(components)}; say it as"
                " unet=8"
            )
        model = component.described.model
        if model.heads is None:
            raise ConversionError(f"--heads {printable(text)}: {model.name} has no choice of it")
        widths = _as_list(component.config[model.heads.width])
        heads = _numbers(text, numbers, widths)
        component.chosen[model.heads.option] = heads[0] if len(heads) == 1 else heads
        component.config |= component.chosen


def _numbers(text: str, numbers: str, widths: Sequence[int]) -> list[int]:
    """One number, or one for each width."""
    parts = numbers.split(",")
    if not all(part.isdecimal() and int(part) for part in parts) or len(parts) not in {
        1,
        len(widths),
    }:
        raise ConversionError(
            f"--heads {printable(text)}: one number after the =, or {len(widths)}, one for each"
            " block"
        )
    heads = [int(part) for part in parts]
    spread = heads * len(widths) if len(heads) == 1 else heads
    for number, width in zip(spread, widths, strict=True):
        if width % number:
            raise ConversionError(
                f"--heads {printable(text)}: {width} channels cannot be split into {number} heads"
            )
    return heads


def _as_list(value: Any) -> list[int]:
    return value if isinstance(value, list) else [value]
