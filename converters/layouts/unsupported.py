"""Refuses models of other architectures by name: `mappings/facts/unsupported.toml`."""

from __future__ import annotations

import fnmatch

from ...errors import ConversionError, printable
from ...mappings.facts import facts
from ...mappings.families import families
from ..checkpoint import Checkpoint, Tensor


def refuse_unsupported(checkpoint: Checkpoint) -> None:
    """Name a model of another architecture, of which a part may well look like one of ours.

    Raises:
        ConversionError: the checkpoint holds a tensor that only such a model has.
    """
    tensors = checkpoint.tensors
    for pattern, model in facts("unsupported")["tensors"].items():
        for key in fnmatch.filter(tensors, pattern):
            _refuse(checkpoint, key, model)
    for place, model in facts("unsupported")["sizes"].items():
        pattern, axis, size = place.split()
        for key in fnmatch.filter(tensors, pattern):
            if _has_size(tensors[key], int(axis), int(size)):
                _refuse(checkpoint, key, model)


def _has_size(tensor: Tensor, axis: int, size: int) -> bool:
    return len(tensor.shape) > axis and tensor.shape[axis] == size


def _refuse(checkpoint: Checkpoint, key: str, model: str) -> None:
    supported = ", ".join(family.title for family in families().values())
    raise ConversionError(
        f"{checkpoint.path}: looks like {model} (`{printable(key)}`), which is not supported;"
        f" supported are {supported} and their ControlNets"
    )
