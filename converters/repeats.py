"""Tensors that a file holds twice, as a table's `[same]` says: compared, and not copied."""

from __future__ import annotations

from collections.abc import Iterable

from ..errors import ConversionError, printable
from .checkpoint import Stored, Tensor
from .planning.plan import PlannedComponent

_CHUNK = 1 << 20  # bytes compared at once


def check_repeats(components: Iterable[PlannedComponent], *, read: bool) -> None:
    """Refuse a repeated tensor that is not what it repeats.

    Args:
        read: compare what they hold; else only what the header says.

    Raises:
        ConversionError: it is another one; a repository has no place for it.
    """
    for part in (part for component in components for part in component.parts):
        tensors = part.checkpoint.tensors
        for key, other in part.candidates[0].table.same.items():
            if not {key, other} <= tensors.keys():
                continue
            if _differ(tensors[key], tensors[other], read):
                raise ConversionError(
                    f"{part.checkpoint.path}: `{printable(tensors[key].name)}` is not what"
                    f" `{printable(tensors[other].name)}` is, which diffusers uses for both"
                )


def _differ(one: Tensor, other: Tensor, read: bool) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return True
    if not read:
        return False
    if not isinstance(one, Stored) or not isinstance(other, Stored):
        return one.numpy().tobytes() != other.numpy().tobytes()
    return any(
        one.file.read(one.offset + start, count) != other.file.read(other.offset + start, count)
        for start, count in _chunks(one.nbytes)
    )


def _chunks(nbytes: int) -> Iterable[tuple[int, int]]:
    return ((start, min(_CHUNK, nbytes - start)) for start in range(0, nbytes, _CHUNK))
