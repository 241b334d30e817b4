"""Text encoders of another family that a merge left in a file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from .recognise import Recognition


def without_strays(parts: Sequence[Recognition]) -> list[Recognition]:
    """The parts less text encoders that the model of the denoiser in their file has no place for.

    They are left out where the model has one of its own; the denoiser tells of them.
    """
    kept = list(parts)
    for denoiser in parts:
        if not denoiser.known or not denoiser.candidates[0].is_denoiser:
            continue
        files = denoiser.checkpoint.files
        encoders = [p for p in kept if p.is_text_encoder and p.checkpoint.files == files]
        own = [part for part in encoders if part.may_be_of(denoiser.families)]
        strays = [part for part in encoders if part not in own] if own else []
        if strays:
            kept = [part for part in kept if part not in strays]
            kept[kept.index(denoiser)] = _told(denoiser, strays)
    return kept


def _told(denoiser: Recognition, strays: Sequence[Recognition]) -> Recognition:
    """The denoiser, with what was left out beside it."""
    title = denoiser.candidates[0].family.title
    left_out = {
        tensor.name: f"{stray.candidates[0].title}, which {title} has no place for"
        for stray in strays
        for tensor in stray.checkpoint.tensors.values()
    }
    return replace(denoiser, left_out={**denoiser.left_out, **left_out})
