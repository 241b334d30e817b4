"""Adapters: files of LoRA and its relatives, sorted into modules of a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ...adapters.alphas import WEIGHTS, Alphas
from ...adapters.marks import CONFIG
from ...adapters.modules import Adapter, Model, Module, decode, layer_shape, stock_models
from ...errors import ConversionError
from ...io.documents import read_json
from ...mappings.families import families
from ..checkpoint import Checkpoint, Tensor
from ..planning.keys import brief
from ..readers.listed import NAMED, read_listed
from .source import Source

_MAX_CONFIG = 10_000_000


@dataclass(frozen=True)
class AdapterFile:
    """A file or PEFT folder, and what its header says of alphas."""

    checkpoint: Checkpoint
    alphas: Alphas

    @property
    def path(self) -> Path:
        """What the user named."""
        return self.checkpoint.path

    def sorted_for(self, family: str, models: Mapping[str, Model] | None = None) -> Adapter[Tensor]:
        """What it changes in models of a family, by default the stock ones.

        Raises:
            ConversionError: a module is incomplete, contradicts itself, or cannot be applied.
        """
        known = stock_models(family) if models is None else models
        try:
            return decode(self.checkpoint.tensors, family, known, self.alphas, number_in)
        except ValueError as error:
            raise ConversionError(f"{self.path}: {error}") from None

    def fitting(self, family: str | None = None) -> list[Adapter[Tensor]]:
        """What it changes, for each family that it fits; for the nearest if it fits none.

        A family of other widths will do where none has the right ones.

        Args:
            family: ask this one only.

        Raises:
            ConversionError: a module is incomplete, contradicts itself, or cannot be applied.
        """
        names = [name for name, one in families().items() if one.adapted]
        if family:
            names = [family]
        found = [self.sorted_for(name) for name in names]
        fitting = [one for one in found if one.fits]
        similar = [one for one in found if one.is_of_other_widths]
        fewest = min((_strange_axes(one) for one in similar), default=0)
        similar = [one for one in similar if _strange_axes(one) == fewest]
        nearest = min(found, key=lambda one: (len(one.unmatched), len(one.flaws)))
        return fitting or similar or [nearest]


def open_adapter(source: Source) -> AdapterFile:
    """Open an adapter; `Source.is_adapter` says that it is one.

    Raises:
        ConversionError: its header cannot be read.
    """
    if source.path.is_dir():
        return _folder(source.path)
    raw = source.raw
    assert raw is not None
    try:
        return AdapterFile(raw, Alphas.parse(raw.metadata))
    except ValueError as error:
        raise ConversionError(f"{raw.path}: {error}") from None


def refuse_unfit(file: AdapterFile, adapter: Adapter[Tensor]) -> None:
    """Refuse an adapter that is not of a family's models, be they of other widths.

    Raises:
        ConversionError: names what does not fit.
    """
    title = families()[adapter.family].title
    if adapter.unmatched:
        raise ConversionError(
            f"{file.path}: {len(adapter.unmatched)} tensors belong to no module of {title}:"
            f" {brief(adapter.unmatched)}"
        )
    if adapter.is_of_other_widths:
        return
    for name, why in adapter.flaws.items():
        more = f" (and {len(adapter.flaws) - 1} more)" if len(adapter.flaws) > 1 else ""
        raise ConversionError(f"{file.path}: `{name}` does not fit {title}: it {why}{more}")


def _folder(folder: Path) -> AdapterFile:
    """A folder that PEFT saved."""
    files = [folder / name for name in WEIGHTS if (folder / name).is_file()]
    if not files:
        raise ConversionError(f"{folder}: {CONFIG} without {' or '.join(WEIGHTS)} beside it")
    checkpoint = read_listed(files[0], NAMED[files[0].suffix])
    try:
        alphas = Alphas.of_config(read_json(folder / CONFIG, limit=_MAX_CONFIG))
    except ValueError as error:
        raise ConversionError(f"{folder}: {error}") from None
    checkpoint.path = folder
    checkpoint.format = "PEFT folder"
    return AdapterFile(checkpoint, alphas)


def _strange_axes(adapter: Adapter[Tensor]) -> int:
    """How many right factors have another number of axes than the weights of the stock model.

    Linear projections and 1x1 convolutions share names.
    """
    return sum(
        len(module.tensors["down"].shape) != len(weight_shape(adapter.family, module))
        for module in adapter.modules.values()
        if "down" in module.tensors
    )


def weight_shape(family: str, module: Module[Tensor]) -> tuple[int, ...]:
    """The shape of the weight that a module changes, in the stock model of a family."""
    return layer_shape(module, stock_models(family)[module.component].shapes)


def number_in(tensor: Tensor) -> float:
    """The number in a tensor of one element."""
    return tensor.numbers()[0]
