"""The one family that all parts of a model are of."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ...errors import ConversionError
from ...mappings.families import Family, families
from .keys import brief
from .recognise import Recognition

# what a model must be liker to one family than to the next, as a share of what tensors tell of it
_MARGIN = 0.02


def choose_family(parts: Sequence[Recognition], asked: str | None) -> Family:
    """The one family all parts agree on; the first where they leave a choice (a VAE alone).

    Raises:
        ConversionError: the parts are of different families, or none is of the one asked for, or
            they are about as near to one family as to another, or the same in several that
            configure them otherwise and ask to be named.
    """
    known = families()
    if asked is not None and asked not in known:
        raise ConversionError(f"--family {asked}: unknown; one of {', '.join(known)}")
    common = _likenesses(parts)
    if asked in common:
        return known[asked]
    if common and asked is None:
        best = max(common, key=lambda name: common[name])
        _check_told(parts, best, shared(parts))
        _check_margin(parts, best, common)
        return known[best]
    described = "; ".join(
        f"{part.checkpoint.path}: {part.part} of {' or '.join(part.families)}" for part in parts
    )
    if asked is not None:
        raise ConversionError(f"--family {asked} does not fit {described}")
    raise ConversionError(f"the sources are not of one family: {described}")


def shared(parts: Sequence[Recognition]) -> list[str]:
    """Names of the families that all parts fit equally well, in order."""
    common = _likenesses(parts)
    best = max(common.values(), default=0)
    return [name for name in common if common[name] == best]


def _likenesses(parts: Sequence[Recognition]) -> dict[str, float]:
    """Family, of those that all parts may be of -> how like they are to its stock model."""
    found = {}
    for name in families():
        mine = [one for part in parts for one in part.candidates if one.family.name == name]
        if len(mine) == len(parts):
            found[name] = math.fsum(one.likeness for one in mine) / len(mine)
    return found


def _check_told(parts: Sequence[Recognition], best: str, common: Sequence[str]) -> None:
    """Refuse parts that are other components, or configured otherwise, in families that ask.

    What comes with a config of its own is configured.
    """
    first = families()[best]
    if not first.asks:
        return
    for part in parts:
        stock = [part.of_family(name).component for name in common]
        has_config = part.checkpoint.config is not None
        known = [(one.name, None if has_config else one.config) for one in stock]
        if any(one != known[0] for one in known):
            titles = ", ".join(families()[name].title for name in common)
            raise ConversionError(
                f"{part.checkpoint.path}: the same tensors are part of {titles}, which configure"
                f" them otherwise; give the {first.denoiser} too, or say --family"
                f" {' or '.join(common)}"
            )


def _check_margin(parts: Sequence[Recognition], best: str, common: dict[str, float]) -> None:
    """Refuse to choose between families that are about as near; a config of its own settles it."""
    rivals = [name for name in common if 0 < common[best] - common[name] < _MARGIN]
    unsure = [part for part in parts if part.checkpoint.config is None]
    if not rivals or not unsure:
        return
    first = unsure[0]
    described = " and ".join(
        f"{families()[name].title} ({common[name]:.1%} alike, not in"
        f" {brief(first.of_family(name).unlike_stock, 1)})"
        for name in (best, rivals[0])
    )
    raise ConversionError(
        f"{first.checkpoint.path}: the {first.part} is about as near to {described}; say --family"
        f" {best} or --family {rivals[0]}"
    )
