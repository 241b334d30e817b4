"""What a conversion will write, decided from headers alone: every target tensor, its sources and its op."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..mappings.families import Family, config_for, families
from ..mappings.ops import Op
from ..mappings.table import Link
from .checkpoint import FLOATS, Tensor
from .collapse import brief
from .errors import ConversionError
from .recognise import Candidate, Recognition, complete

Shape = tuple[int, ...]
Config = Mapping[str, Any]
# (class name, config) -> key -> shape: the state dict of a model outside the stock families
StateDictShapes = Callable[[str, Config], Mapping[str, Shape]]


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the canonical state dict and where it comes from."""

    key: str
    shape: Shape
    sources: tuple[Tensor, ...]
    op: Op | None
    part: int  # which result of the op
    row: str  # the table row that says so

    @property
    def dtype(self) -> str:
        """The source's dtype."""
        return self.sources[0].dtype


@dataclass
class PlannedComponent:
    """One folder of the repo: its config and its whole state dict.

    Attributes:
        parts: what fills it; two for a VAE made of a decoder and an image encoder.
    """

    name: str
    config: dict[str, Any]
    tensors: dict[str, PlannedTensor]
    parts: list[Recognition] = field(default_factory=list)


def choose_family(parts: Sequence[Recognition], asked: str | None) -> Family:
    """The one family all parts agree on; the first where they leave a choice (a VAE alone).

    Raises:
        ConversionError: the parts are of different families, or none is of the one asked for.
    """
    if asked is not None and asked not in families():
        raise ConversionError(f"--family {asked}: unknown; one of {', '.join(families())}")
    common = [name for name in families() if all(name in part.families for part in parts)]
    if asked in common:
        return families()[asked]
    described = "; ".join(f"{part.checkpoint.path}: {part.part} of {' or '.join(part.families)}" for part in parts)
    if asked is not None:
        raise ConversionError(f"--family {asked} does not fit {described}")
    if not common:
        raise ConversionError(f"the sources are not of one family: {described}")
    return families()[common[0]]


def plan(
    parts: Sequence[Recognition], family: Family, state_dict_shapes: StateDictShapes
) -> dict[str, PlannedComponent]:
    """Plan every component that the parts fill, in the family's order.

    Raises:
        ConversionError: two sources for one part, a part that is incomplete, or a tensor of the wrong shape.
    """
    seen: dict[str, Recognition] = {}
    for part in parts:
        complete(part)
        if part.part in seen:
            raise ConversionError(
                f"{part.checkpoint.path}: a second {part.part}, after {seen[part.part].checkpoint.path}; give one"
            )
        seen[part.part] = part
    planned = {}
    for name in family.components:
        mine = [part for part in parts if part.of_family(family.name).table.about["component"] == name]
        if mine:
            planned[name] = _component(name, mine, family, state_dict_shapes)
    return planned


def _component(
    name: str, parts: list[Recognition], family: Family, state_dict_shapes: StateDictShapes
) -> PlannedComponent:
    tensors: dict[str, PlannedTensor] = {}
    for part in parts:
        for planned in _planned(part.of_family(family.name), part.checkpoint.tensors):
            previous = tensors.get(planned.key)
            if previous is None or part.checkpoint.layout != "diffusers":  # a base's half gives way to a given one
                tensors[planned.key] = planned
    component = family.components[name]
    found = {key: planned.shape for key, planned in tensors.items()}
    config = config_for(component, found)
    shapes = component.manifest() if config == component.config else state_dict_shapes(component.class_name, config)
    wrong = [key for key in found if found[key] != shapes[key]]
    if wrong:
        _refuse_shapes(parts[0], tensors, shapes, wrong)
    return PlannedComponent(name, config, {key: tensors[key] for key in shapes if key in tensors}, parts)


def _planned(candidate: Candidate, tensors: Mapping[str, Tensor]) -> list[PlannedTensor]:
    planned = []
    for link in _links(candidate):
        sources = tuple(tensors[key] for key in link.sources)
        integers = [tensor for tensor in sources if tensor.dtype not in FLOATS]
        if integers:
            raise ConversionError(
                f"`{integers[0].name}` holds {integers[0].dtype} numbers, not the floating-point weights expected"
            )
        shapes = [tensor.shape for tensor in sources]
        try:
            results = link.op.shapes(shapes, len(link.targets)) if link.op else shapes
        except ValueError as error:
            raise ConversionError(f"`{sources[0].name}` has the wrong shape {list(shapes[0])}: {error}") from None
        planned += [
            PlannedTensor(key, shape, sources, link.op, index, link.row)
            for index, (key, shape) in enumerate(zip(link.targets, results, strict=True))
        ]
    return planned


def _links(candidate: Candidate) -> list[Link]:
    return list(dict.fromkeys(candidate.links.values()))


def _refuse_shapes(
    part: Recognition, tensors: Mapping[str, PlannedTensor], shapes: Mapping[str, Shape], wrong: Sequence[str]
) -> None:
    first = tensors[wrong[0]]
    source = first.sources[0]
    expected = shapes[first.key]
    if first.op is not None:
        expected = first.op.inverse.shapes([expected])[0]
    raise ConversionError(
        f"{part.checkpoint.path}: {len(wrong)} tensors of the wrong shape: `{source.name}` is {list(source.shape)}, "
        f"expected {list(expected)}{'; also ' + brief(wrong[1:]) if wrong[1:] else ''}"
    )
