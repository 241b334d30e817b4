"""What the header of a renamed adapter keeps, so that the way back gives the file that was there.

Most follows by rule and is not kept: names, shapes. What does not (an alpha of another dtype than
its factors, none at all, a name of another time, hashes of the file) is listed by the name that the
rule gives.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from ...adapters.alphas import KEY
from ...errors import ConversionError
from ...io.arrays import DTYPES, Array
from ..checkpoint import Computed, Tensor
from ..layouts.adapters import AdapterFile, number_in
from ..writers.safetensors import Output

RECORD = "weightport"
"""The key of the header."""
STALE = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256")
"""What a header says of the file's bytes, which names are a part of."""

Place = tuple[str, str, str]
"""Component, module, role."""


class Kept(NamedTuple):
    """A tensor that was there.

    Attributes:
        value: the number in it, where it is no longer in the file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    value: float | None


@dataclass(frozen=True)
class Record:
    """What differs between a file and what the rules make of it.

    Attributes:
        origin: the convention of the file.
        metadata: what its header said besides.
        tensors: name by the rule -> the tensor that was there; None where there was none.
        ranks: module over several layers -> the ranks of those that it was made of; see
            `adapters.fusion.apart`.
        order: of what its header said, where the rules give another; safetensors' own library has
            none.
    """

    origin: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)
    tensors: Mapping[str, Kept | None] = field(default_factory=dict)
    ranks: Mapping[str, list[int]] = field(default_factory=dict)
    order: Sequence[str] = ()

    @classmethod
    def of(
        cls,
        file: AdapterFile,
        origin: str,
        before: Mapping[Place, Tensor],
        back: Mapping[Place, Output],
        ranks: Mapping[str, list[int]],
    ) -> Record:
        """What the way back lacks of the tensors that were there before."""
        tensors: dict[str, Kept | None] = {}
        for place, out in back.items():
            tensor = before.get(place)
            if tensor is None:
                tensors[out.key] = None
                continue
            value = None
            if place[2] == "alpha" and number_in(tensor) != number_in(out.sources[0]):
                value = number_in(tensor)
            kept = Kept(tensor.name, tensor.dtype, tensor.shape, value)
            if kept != Kept(out.key, out.dtype, out.shape, None):
                tensors[out.key] = kept
        for place in before.keys() - back.keys():
            tensor = before[place]
            tensors[tensor.name] = Kept(tensor.name, tensor.dtype, tensor.shape, number_in(tensor))
        said = file.checkpoint.metadata
        metadata = {key: said[key] for key in (KEY, *STALE) if key in said}
        by_rule = [*(key for key in said if key not in metadata), *metadata]
        order = () if by_rule == list(said) else tuple(said)
        return cls(origin, metadata, dict(sorted(tensors.items())), ranks, order)

    @classmethod
    def read(cls, file: AdapterFile, convention: str) -> Record:
        """The record in a file's header, if the file came from that convention.

        Raises:
            ConversionError: it cannot be read.
        """
        text = file.checkpoint.metadata.get(RECORD)
        if text is None:
            return cls()
        try:
            content = json.loads(text)
            if content["origin"] != convention:
                return cls()
            tensors = {name: _kept(entry) for name, entry in content["tensors"].items()}
            metadata = {str(key): str(value) for key, value in content["metadata"].items()}
            ranks = {name: _ranks(entry) for name, entry in content.get("ranks", {}).items()}
            order = tuple(map(str, content.get("order", ())))
        except (ValueError, RecursionError, TypeError, KeyError, AttributeError):
            raise ConversionError(
                f"{file.path}: what its header says under `{RECORD}` cannot be read; was it edited?"
            ) from None
        return cls(convention, metadata, tensors, ranks, order)

    def text(self) -> str:
        """What the header says."""
        content = {"origin": self.origin, "metadata": self.metadata, "tensors": self.tensors}
        if self.ranks:
            content["ranks"] = self.ranks
        if self.order:
            content["order"] = self.order
        return json.dumps(content, separators=(",", ":"))

    def header(self, metadata: Mapping[str, str]) -> dict[str, str]:
        """What a header says, and what it said besides before, in the order of then."""
        every = {**metadata, **self.metadata}
        return {key: every[key] for key in dict.fromkeys((*self.order, *every)) if key in every}

    def restored(self, outputs: Mapping[Place, Output]) -> list[Output]:
        """The outputs as they were before.

        Raises:
            ConversionError: the record is of another file.
        """
        found = []
        met = set()
        for out in outputs.values():
            met.add(out.key)
            kept = self.tensors.get(out.key, Kept(out.key, out.dtype, out.shape, None))
            if kept is not None:
                found.append(_as_it_was(out, kept))
        for name, kept in self.tensors.items():
            if name not in met and kept is not None and kept.value is not None:
                tensor = number_tensor(kept.name, kept.value, kept.dtype, kept.shape)
                found.append(Output(kept.name, tensor.dtype, tensor.shape, (tensor,)))
        return found


def number_tensor(name: str, value: float, dtype: str, shape: tuple[int, ...]) -> Tensor:
    """A tensor of one number, in float32 if the dtype cannot hold it."""
    array = np.full(shape, value, DTYPES[dtype])
    if float(array.reshape(-1)[0]) != value:
        dtype = "F32"
        array = np.full(shape, value, DTYPES[dtype])

    def compute() -> Array:
        return array

    return Computed(name, dtype, shape, (), compute, "from the header")


def _as_it_was(out: Output, kept: Kept) -> Output:
    elements = math.prod(out.shape)
    if math.prod(kept.shape) != elements or (kept.dtype != out.dtype and elements != 1):
        raise ConversionError(
            f"`{out.key}` is not the tensor that its header's `{RECORD}` tells of"
        )
    if kept.value is None and kept.dtype == out.dtype:
        return replace(out, key=kept.name, shape=kept.shape)
    value = number_in(out.sources[0]) if kept.value is None else kept.value
    tensor = number_tensor(kept.name, value, kept.dtype, kept.shape)
    return Output(kept.name, tensor.dtype, tensor.shape, (tensor,))


def _ranks(entry: Any) -> list[int]:
    ranks = list(entry)
    if any(type(rank) is not int or rank < 0 for rank in ranks):
        raise ValueError(ranks)
    return ranks


def _kept(entry: Any) -> Kept | None:
    if entry is None:
        return None
    name, dtype, shape, value = entry
    sizes = tuple(shape)
    are_sizes = all(type(size) is int and size >= 0 for size in sizes)
    if not isinstance(name, str) or dtype not in DTYPES or not are_sizes:
        raise ValueError(name)
    return Kept(name, dtype, sizes, None if value is None else float(value))
