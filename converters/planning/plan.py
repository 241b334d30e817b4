"""What a conversion will write, decided from headers alone: each tensor, its sources and its op."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from ...errors import ConversionError, printable
from ...io.dtypes import EIGHT_BITS, FLOATS, KEEP
from ...mappings.families import Component, Family, config_for, families
from ...mappings.layouts import CANONICAL, Layout, layouts
from ...mappings.ops import Op
from ...mappings.table import Link
from ..checkpoint import Array, Computed, Tensor
from .candidates import Candidate
from .keys import brief
from .recognise import Recognition, complete

Shape = tuple[int, ...]
Config = Mapping[str, Any]
# (class name, config) -> key -> shape: the state dict of a model outside the stock families
StateDictShapes = Callable[[str, Config], Mapping[str, Shape]]


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the canonical state dict and where it comes from.

    Attributes:
        part: which result of the op.
        parts: how many results the op has.
        row: the table row that says so.
    """

    key: str
    shape: Shape
    sources: tuple[Tensor, ...]
    op: Op | None
    part: int
    parts: int
    row: str

    @property
    def dtype(self) -> str:
        """The source's dtype."""
        return self.sources[0].dtype

    def output_dtype(self, wanted: str) -> str:
        """The dtype it is written in: the one that is wanted, or its own for `keep`.

        Floats of eight bits become bfloat16, which holds them exactly.
        """
        if self.dtype not in FLOATS:
            return self.dtype
        if wanted == KEEP:
            return "BF16" if self.dtype in EIGHT_BITS else self.dtype
        return wanted

    def tensor(self) -> Tensor:
        """The canonical tensor: the source itself, or computed from the sources when asked for."""
        op = self.op
        if op is None:
            return self.sources[0]

        def compute(*arrays: Array) -> Array:
            return op.apply(arrays, self.parts)[self.part]

        return Computed(self.key, self.dtype, self.shape, self.sources, compute, str(op))


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

    @property
    def layout(self) -> Layout:
        """The layout it comes from; of a VAE made of a base and a given half, the given one's."""
        found = [part.checkpoint.layout for part in self.parts]
        given = [layout for layout in found if layout != CANONICAL]
        return layouts()[given[0] if given else CANONICAL]


def choose_family(parts: Sequence[Recognition], asked: str | None) -> Family:
    """The one family all parts agree on; the first where they leave a choice (a VAE alone).

    Raises:
        ConversionError: the parts are of different families, or none is of the one asked for.
    """
    known = families()
    if asked is not None and asked not in known:
        raise ConversionError(f"--family {asked}: unknown; one of {', '.join(known)}")
    common = shared(parts)
    if asked in common:
        return known[asked]
    if common and asked is None:
        return known[common[0]]
    described = "; ".join(
        f"{part.checkpoint.path}: {part.part} of {' or '.join(part.families)}" for part in parts
    )
    if asked is not None:
        raise ConversionError(f"--family {asked} does not fit {described}")
    raise ConversionError(f"the sources are not of one family: {described}")


def shared(parts: Sequence[Recognition]) -> list[str]:
    """Names of the families that all parts fit, in order."""
    return [name for name in families() if all(name in part.families for part in parts)]


def plan(
    parts: Sequence[Recognition], family: Family, state_dict_shapes: StateDictShapes
) -> dict[str, PlannedComponent]:
    """Plan every component that the parts fill, in the family's order.

    Raises:
        ConversionError: two sources for one part, a part that is incomplete, or a tensor of the
            wrong shape.
    """
    seen: dict[str, Recognition] = {}
    for part in parts:
        complete(part)
        if part.part in seen:
            raise ConversionError(
                f"{part.checkpoint.path}: a second {part.part}, after"
                f" {seen[part.part].checkpoint.path}; give one"
            )
        seen[part.part] = part
    planned = {}
    for name in family.components:
        mine = [part for part in parts if part.of_family(family.name).component.name == name]
        if mine:
            mine.sort(key=lambda part: part.part)  # the order of the sources does not matter
            planned[name] = _component(name, mine, family, state_dict_shapes)
    return planned


def _component(
    name: str, parts: list[Recognition], family: Family, state_dict_shapes: StateDictShapes
) -> PlannedComponent:
    tensors: dict[str, PlannedTensor] = {}
    for part in parts:
        from_base = part.checkpoint.layout == CANONICAL
        for planned in _planned(part, part.of_family(family.name)):
            if planned.key not in tensors or not from_base:  # a base gives way to what is given
                tensors[planned.key] = planned
    config, shapes = _expected(family.components[name], tensors, state_dict_shapes)
    if name == family.denoiser and config["in_channels"] not in family.pipelines:
        known = ", ".join(map(str, family.pipelines))
        raise ConversionError(
            f"{parts[0].checkpoint.path}: the {name} has {config['in_channels']} input channels;"
            f" known: {known}"
        )
    for part in parts:
        _check_shapes(part, family.name, tensors, shapes)
    ordered = {key: tensors[key] for key in shapes if key in tensors}
    return PlannedComponent(name, config, ordered, parts)


def _expected(
    component: Component, tensors: Mapping[str, PlannedTensor], state_dict_shapes: StateDictShapes
) -> tuple[dict[str, Any], Mapping[str, Shape]]:
    """The config that fits the tensors, and the shapes they must have.

    Where most tensors have other sizes than the stock model's, it is a model of other widths, which
    the runtime knows; where a few have, it is a damaged stock model.
    """
    found = {key: planned.shape for key, planned in tensors.items()}
    config = config_for(component, found)
    stock = component.manifest(config)
    wrong = sum(found[key] != stock[key] for key in found)
    if 2 * wrong > len(found):
        try:
            return config, state_dict_shapes(component.class_name, config)
        except ValueError:  # no model has such widths: say how it differs from the stock one
            pass
    own = {option: config[option] for option in component.own}
    return {**component.config, **own}, stock


def _planned(part: Recognition, candidate: Candidate) -> list[PlannedTensor]:
    """Every canonical tensor that a part gives."""
    planned = []
    named = candidate.named(part.checkpoint)
    for link in dict.fromkeys(candidate.links.values()):
        sources = tuple(named[key] for key in link.sources)
        shapes = _target_shapes(part, link, sources)
        for index, key in enumerate(link.targets):
            planned.append(
                PlannedTensor(key, shapes[index], sources, link.op, index, len(shapes), link.row)
            )
    return planned


def _target_shapes(part: Recognition, link: Link, sources: Sequence[Tensor]) -> Sequence[Shape]:
    """The shapes of a link's targets."""
    for tensor in sources:
        if tensor.dtype not in FLOATS:
            _refuse(part, tensor, f"holds {tensor.dtype} numbers, not floating-point weights")
    shapes = [tensor.shape for tensor in sources]
    if link.op is None:
        return shapes
    try:
        return link.op.shapes(shapes, len(link.targets))
    except ValueError as error:
        _refuse(part, sources[0], f"has the wrong shape {list(shapes[0])} ({error})")


def _check_shapes(
    part: Recognition,
    family: str,
    tensors: Mapping[str, PlannedTensor],
    shapes: Mapping[str, Shape],
) -> None:
    """Refuse a tensor of a part that has not the shape it must have."""
    mine = set(map(id, part.checkpoint.tensors.values()))
    wrong = [
        planned
        for planned in tensors.values()
        if planned.shape != shapes[planned.key] and id(planned.sources[0]) in mine
    ]
    if not wrong:
        return
    source = wrong[0].sources[0]
    candidate = part.of_family(family)
    named = candidate.named(part.checkpoint)
    name = next(name for name, tensor in named.items() if tensor is source)
    expected = candidate.links[name].source_shape(shapes)
    flaw = f"has the wrong shape {list(source.shape)}, expected {list(expected)}"
    if len(wrong) > 1:
        flaw += f"; also {brief(planned.sources[0].name for planned in wrong[1:])}"
    _refuse(part, source, flaw)


def _refuse(part: Recognition, tensor: Tensor, why: str) -> NoReturn:
    raise ConversionError(f"{part.checkpoint.path}: `{printable(tensor.name)}` {why}")
