"""What a conversion will write, decided from headers alone: each tensor, its sources and its op."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from ...errors import ConversionError, printable
from ...io.dtypes import EIGHT_BITS, FLOATS, KEEP
from ...mappings.errors import MappingError
from ...mappings.families import Component, Family
from ...mappings.layouts import CANONICAL, Layout, layouts
from ...mappings.ops import Op
from ...mappings.table import Link
from ..checkpoint import Computed, Tensor
from .candidates import Candidate
from .keys import brief
from .recognise import Recognition, complete

if TYPE_CHECKING:
    from ...io.arrays import Array

Shape = tuple[int, ...]
Config = Mapping[str, Any]


class PlannedTensor(NamedTuple):
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
        described: what it is in its family, with a model of its class.
        expected: key -> shape of every tensor of the model; `tensors` may be half of them.
        parts: what fills it; two for a VAE made of a decoder and an image encoder.
        chosen: options of the config that the user decides.
        words: tokens that embeddings bring -> their rows in the table of tokens.
    """

    described: Component
    config: dict[str, Any]
    tensors: dict[str, PlannedTensor]
    expected: Mapping[str, Shape]
    parts: list[Recognition] = field(default_factory=list)
    chosen: dict[str, Any] = field(default_factory=dict)
    words: dict[str, int] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Of its folder."""
        return self.described.name

    @property
    def missing(self) -> list[str]:
        """Keys of the model's tensors that nothing gives."""
        return [key for key in self.expected if key not in self.tensors]

    @property
    def layout(self) -> Layout:
        """The layout it comes from; of a VAE made of a base and a given half, the given one's."""
        found = [part.checkpoint.layout for part in self.parts]
        given = [layout for layout in found if layout != CANONICAL]
        return layouts()[given[0] if given else CANONICAL]


def plan(parts: Sequence[Recognition], family: Family) -> dict[str, PlannedComponent]:
    """Plan every component that the parts fill, in the family's order.

    Raises:
        ConversionError: two sources for one part, a part that is incomplete, or a tensor of the
            wrong shape.
    """
    parts = [part.narrowed(family.name) for part in parts]
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
            planned[name] = _component(mine, family)
    return planned


def _component(parts: list[Recognition], family: Family) -> PlannedComponent:
    described = _described(parts, family)
    tensors: dict[str, PlannedTensor] = {}
    for part in parts:
        from_base = part.checkpoint.layout == CANONICAL
        for planned in _planned(part, part.of_family(family.name)):
            if planned.key not in tensors or not from_base:  # a base gives way to what is given
                tensors[planned.key] = planned
    config, shapes = _expected(described, tensors, parts, family.name)
    is_denoiser = described.name == family.denoiser
    unknown = is_denoiser and family.kind(config) not in family.pipelines
    if unknown and parts[0].checkpoint.config is None:
        known = ", ".join(map(str, family.pipelines))
        raise ConversionError(
            f"{parts[0].checkpoint.path}: the {described.name} has {config['in_channels']} input"
            f" channels; known: {known}"
        )
    for part in parts:
        _check_shapes(part, family.name, tensors, shapes)
    ordered = {key: tensors[key] for key in shapes if key in tensors}
    return PlannedComponent(described, config, ordered, shapes, parts)


def _described(parts: Sequence[Recognition], family: Family) -> Component:
    """What parts fill, which must be parts of models of one class."""
    components = [part.of_family(family.name).component for part in parts]
    first = components[0]
    for part, other in zip(parts, components, strict=True):
        if other.class_name != first.class_name:
            raise ConversionError(
                f"{part.checkpoint.path}: the {part.part} is one of an {other.class_name}, but the"
                f" {parts[0].part} in {parts[0].checkpoint.path} is one of an {first.class_name};"
                f" give all of the {first.name} from one of them"
            )
    return first


def _expected(
    component: Component,
    tensors: Mapping[str, PlannedTensor],
    parts: Sequence[Recognition],
    family: str,
) -> tuple[dict[str, Any], Mapping[str, Shape]]:
    """The config that fits the tensors best, and the shapes that they must have by it.

    That is the one that they were recognised by, which knows what no tensor tells; or what their
    shapes tell; or the stock model's, of which a few tensors are damaged.
    """
    found = {key: planned.shape for key, planned in tensors.items()}
    first = parts[0].of_family(family)
    if first.given is not None:
        return dict(first.config), first.given
    configs = _configs(component, found, [part.of_family(family) for part in parts])
    fits = [(_misfits(component, config, found), config) for config in configs]
    _, config = min(fits, key=lambda pair: pair[0])
    for part in parts:
        _check_stated(part, component, config)
    return config, component.model.tensors(config)


def _check_stated(part: Recognition, component: Component, config: Config) -> None:
    """Refuse a config that does not fit the weights that it came with."""
    stated = part.checkpoint.config
    if stated is None:
        return
    given = component.model.stated(stated.options)
    option = component.model.unlike(given, config)
    if option is not None:
        raise ConversionError(
            f"{stated.path}: `{option}` is {printable(given[option])}, but the weights have"
            f" {config.get(option)}"
        )


def unfit(part: Recognition) -> str | None:
    """Why a whole part fills no model, for its shapes or the config that it came with; None if it
    does."""
    if part.flaw is not None:
        return None
    why = None
    for candidate in part.candidates:
        try:
            _component([part], candidate.family)
        except ConversionError as error:
            why = why or str(error)
        else:
            return None
    return why


def _configs(
    component: Component, found: Mapping[str, Shape], candidates: Sequence[Candidate]
) -> list[dict[str, Any]]:
    """The configs that tensors of these shapes may have, the surest first."""
    model = component.model
    known = [dict(one.config) for one in candidates if one.config is not component.config]
    try:
        told = model.read(lambda key, _: found.get(key))
    except MappingError:  # no such model: say how it differs from the stock one
        return [*known, component.config]
    own = {option: value for option, value in told.items() if option in model.own}
    return [*known, component.config_for(told), component.config | own]


def _misfits(component: Component, config: Config, found: Mapping[str, Shape]) -> int:
    """How many of the tensors found have not the shape that a config asks for."""
    try:
        shapes = component.model.tensors(config)
    except MappingError:
        return len(found) + 1
    return sum(shapes.get(key) != shape for key, shape in found.items())


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
    for key, rule in candidate.table.make.items():
        planned.append(_made(key, rule, candidate.targets[key], planned[0].dtype))
    return planned


def _made(key: str, rule: str, shape: Shape, dtype: str) -> PlannedTensor:
    """A tensor that no source holds, as a table's `[make]` says."""
    source = Computed(key, dtype, shape, (), partial(make, rule, shape), f"made: {rule}")
    return PlannedTensor(key, shape, (source,), None, 0, 1, f'{key} = "{rule}"')


def make(rule: str, shape: Shape) -> Array:
    """A tensor that a rule of `[make]` describes."""
    if rule == "identity":
        import numpy as np

        return np.eye(*shape, dtype=np.float32)
    raise ValueError(f"`{rule}` is no rule of [make]")


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
        if planned.shape != shapes.get(planned.key) and id(planned.sources[0]) in mine
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
