"""Names of tensors -> modules: what an adapter changes, and how.

A name is one of the model's, spelled as a convention has it, and the ending of a role; see
`mappings.conventions`. What belongs to no module is listed, never guessed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, Generic, NamedTuple, TypeVar

from ..errors import printable
from ..mappings.conventions import Convention, Layer, Naming, conventions, stock_layers
from ..mappings.facts import facts
from ..mappings.families import families
from .alphas import Alphas
from .marks import BUNDLED
from .shapes import Shape, Shaped, flaw, height_of

T = TypeVar("T", bound=Shaped)
Read = Callable[[T], float]


class Model(NamedTuple):
    """What there is to change.

    Attributes:
        shapes: key -> shape of every tensor.
        config: by which tables count layers.
        open_axes: keys of tensors that a model may have with more input channels.
    """

    shapes: Mapping[str, Shape]
    config: Mapping[str, Any]
    open_axes: frozenset[str] = frozenset()


class Part(NamedTuple):
    """A layer of the model, of whose weight a module changes all or some rows.

    Attributes:
        path: its name, `down_blocks.0.attentions.0.proj_in`.
        shares: where its rows lie among those of the module, run by run: the first and last of so
            many equal shares; empty for all rows.
    """

    path: str
    shares: tuple[tuple[int, int, int], ...] = ()


@dataclass(frozen=True)
class Module(Generic[T]):
    """A layer that an adapter changes, as its file has it: one of the model's, or several fused.

    Attributes:
        component: the model that it is of.
        parts: the layers of the model.
        name: as the file spells it.
        convention: whose names they are.
        flavour: a key of `flavours` in `facts/adapters.toml`.
        tensors: role -> tensor.
        alpha: as stated, by a tensor or a header; None where nothing states it.
        rank: of its factors; 0 without factors.
        factor: what its change is multiplied with at strength 1: alpha / rank.
        is_by_row: whether magnitudes are those of rows, not of input channels.
        height: how many rows it changes, of all its layers.
    """

    component: str
    parts: tuple[Part, ...]
    name: str
    convention: str
    flavour: str
    tensors: Mapping[str, T]
    alpha: float | None
    rank: int
    factor: float
    is_by_row: bool
    height: int = 0

    @property
    def path(self) -> str:
        """The name of its layer, or the first of several."""
        return self.parts[0].path

    @property
    def is_fused(self) -> bool:
        """Whether its rows are those of several layers, or lie in another order than there."""
        return bool(self.parts[0].shares)

    def rows(self) -> list[slice]:
        """Which of its rows are those of its first layer, run by run; empty for all of them.

        Raises:
            ValueError: its rows have no such shares.
        """
        runs = []
        for first, last, of in self.parts[0].shares:
            if self.height % of:
                raise ValueError(
                    f"`{printable(self.name)}` has {self.height} rows, which are not {of} equal"
                    " shares"
                )
            unit = self.height // of
            runs.append(slice(first * unit, last * unit))
        return runs

    @property
    def has_rows_apart(self) -> bool:
        """Whether each row changes by itself, whatever the others are."""
        return self.flavour != "oft" and (self.is_by_row or not self.is_decomposed)

    def layers(self) -> Iterator[Module[T]]:
        """What it is to each of its layers: the same, with that part alone."""
        for part in self.parts:
            yield replace(self, parts=(part,))

    @property
    def is_decomposed(self) -> bool:
        """Whether direction and magnitude of the weight change apart: DoRA."""
        return "magnitude" in self.tensors

    @property
    def depends_on_base(self) -> bool:
        """Whether the change is a function of the weight, so that two of them do not add up."""
        entry = facts("adapters")["flavours"][self.flavour]
        return self.is_decomposed or bool(entry.get("depends_on_base"))

    @property
    def title(self) -> str:
        """What its flavour is called."""
        title: str = facts("adapters")["flavours"][self.flavour]["title"]
        if "mid" in self.tensors:
            title = f"{title} with mid factors"
        if self.flavour == "oft" and len(self.tensors["oft"].shape) > 3:
            title = "BOFT"
        return f"{title} + DoRA" if self.is_decomposed else title


@dataclass(frozen=True)
class Adapter(Generic[T]):
    """What a file changes in models of one family.

    Attributes:
        modules: (component, path of the first layer) -> module, in the order of the file.
        bundled: names of embeddings in it, less `BUNDLED`, -> tensor.
        unmatched: names that belong to no module of the family.
        flaws: modules that do not fit the model: name -> why.
    """

    family: str
    modules: Mapping[tuple[str, str], Module[T]]
    bundled: Mapping[str, T] = field(default_factory=dict)
    unmatched: tuple[str, ...] = ()
    flaws: Mapping[str, str] = field(default_factory=dict)

    @property
    def fits(self) -> bool:
        """Whether all that the file holds is understood, and is of the model's widths."""
        return not self.unmatched and not self.flaws

    @property
    def is_of_other_widths(self) -> bool:
        """Whether it is of a model with the same modules, but other sizes.

        Where a few modules do not fit, they are damaged; where most do not, the model is another.
        """
        return not self.unmatched and 2 * len(self.flaws) > len(self.modules)


@cache
def stock_models(family: str) -> dict[str, Model]:
    """The models of a family, by component. Treat as read-only."""
    components = families()[family].components.values()
    return {
        one.name: Model(one.manifest(), one.config, one.model.own_tensors)
        for one in components
        if not one.extends
    }


def decode(
    tensors: Mapping[str, T],
    family: str,
    models: Mapping[str, Model],
    alphas: Alphas,
    read: Read[T],
) -> Adapter[T]:
    """Sort the tensors of a file into modules of a family's models.

    Args:
        models: component -> what there is to change; `stock_models` where no model is given.
        alphas: what the header says.
        read: gives the number in a tensor of one element.

    Raises:
        ValueError: a module is there twice, incomplete, contradicts itself, or is of a kind that
            cannot be applied.
    """
    places = _places(tensors, family, models)
    endings = _endings()
    found: dict[str, dict[str, tuple[str, T]]] = {}
    owners: dict[tuple[str, str], str] = {}
    bundled: dict[str, T] = {}
    unmatched: list[str] = []
    for name, tensor in tensors.items():
        if name.startswith(BUNDLED):
            bundled[name.removeprefix(BUNDLED)] = tensor
            continue
        split = _split(name, places, endings)
        if split is None:
            unmatched.append(name)
            continue
        place, role = split
        roles = found.setdefault(place.name, {})
        for path in place.layer.modules:
            owner = owners.setdefault((place.naming.component, path), place.name)
            if owner != place.name:
                raise ValueError(
                    f"`{printable(owner)}` and `{printable(name)}` are the same module"
                )
        if role in roles and role not in facts("adapters")["refused"]:
            raise ValueError(
                f"`{printable(roles[role][0])}` and `{printable(name)}` are the same module"
            )
        roles[role] = name, tensor
    modules: dict[tuple[str, str], Module[T]] = {}
    flaws = {}
    for spelled, roles in found.items():
        place = places[spelled]
        model = models[place.naming.component]
        module = _module(place, roles, alphas, read)
        weight = layer_shape(module, model.shapes)
        is_open = f"{module.path}.weight" in model.open_axes
        try:
            why = flaw(module.tensors, weight, is_open, models is stock_models(family))
        except ValueError as error:
            raise ValueError(f"`{printable(module.name)}`: {error}") from None
        if why is not None:
            flaws[module.name] = why
        height = weight[0] if why is None else height_of(module.tensors, weight)
        modules[module.component, module.path] = replace(module, height=height)
    return Adapter(family, modules, bundled, tuple(unmatched), flaws)


def _same_module(one: str, other: str) -> ValueError:
    return ValueError(f"`{printable(one)}` and `{printable(other)}` are the same module")


def layer_shape(module: Module[Any], shapes: Mapping[str, Shape]) -> Shape:
    """The shape of the weight that a module changes, be it of several layers.

    Args:
        shapes: key -> shape of every tensor of the model.
    """
    several = [shapes[f"{part.path}.weight"] for part in module.parts]
    return sum(shape[0] for shape in several), *several[0][1:]


def parts_of(layer: Layer) -> tuple[Part, ...]:
    """The layers of a model in a layer of a convention, and where their rows lie."""
    if layer.op is None:
        return tuple(map(Part, layer.modules))
    count = len(layer.modules)
    parts = []
    for place, path in enumerate(layer.modules):
        runs = layer.op.runs(place, count, 1)
        parts.append(Part(path, tuple((run.first, run.last, run.of) for run in runs)))
    return tuple(parts)


# --- names ----------------------------------------------------------------------------------------


class _Place(NamedTuple):
    """A module, by one of its names."""

    layer: Layer
    convention: Convention
    naming: Naming

    @property
    def name(self) -> str:
        """How it is spelled."""
        return self.layer.name


def _places(
    tensors: Mapping[str, T], family: str, models: Mapping[str, Model]
) -> dict[str, _Place]:
    """Name -> module, by all conventions in whose names some tensor begins."""
    every = [
        (convention, naming, naming.beginnings(models[naming.component].shapes))
        for convention in conventions().values()
        for naming in convention.namings
        if naming.component in models and naming.serves(family)
    ]
    longest = max(len(one) for _, _, beginnings in every for one in beginnings)
    heads = {name[:longest] for name in tensors if not name.startswith(BUNDLED)}
    places: dict[str, _Place] = {}
    for convention, naming, beginnings in every:
        fronts = tuple(beginnings)
        if not any(head.startswith(fronts) for head in heads):
            continue  # to expand a table takes time
        for layer in _layers(naming, family, models):
            places.setdefault(layer.name, _Place(layer, convention, naming))
    return places


def _layers(naming: Naming, family: str, models: Mapping[str, Model]) -> Iterable[Layer]:
    if models is stock_models(family):
        return stock_layers(naming, family).values()
    model = models[naming.component]
    return naming.layers(model.shapes, model.config)


@cache
def _endings() -> dict[str, str]:
    """Ending of a name -> role."""
    roles: dict[str, list[str]] = facts("adapters")["roles"]
    return {ending: role for role, several in roles.items() for ending in several}


def _split(
    name: str, places: Mapping[str, _Place], endings: Mapping[str, str]
) -> tuple[_Place, str] | None:
    """The module and role of a tensor: the longest ending that leaves the name of a module."""
    dot = name.find(".")
    while dot >= 0:
        place = places.get(name[:dot])
        role = endings.get(name[dot + 1 :])
        if place is not None and name[dot + 1 :] == place.layer.leaf:
            return place, "whole"
        if place is not None and role is not None:
            return place, role
        dot = name.find(".", dot + 1)
    return None


# --- modules --------------------------------------------------------------------------------------


def _module(
    place: _Place, named: Mapping[str, tuple[str, T]], alphas: Alphas, read: Read[T]
) -> Module[T]:
    """A module from its tensors."""
    name = printable(place.name)
    for role, why in facts("adapters")["refused"].items():
        if role in named:
            raise ValueError(f"`{name}` is {why}")
    flavour = _flavour(name, named)
    tensors = {role: tensor for role, (_, tensor) in named.items()}
    rank = _rank(flavour, tensors)
    component = place.naming.component
    parts = parts_of(place.layer)
    alpha = alphas.of(component, parts[0].path, rank) if rank else None
    if "alpha" in tensors:
        alpha = _number(name, "alpha", tensors["alpha"], read)
    factor = _factor(flavour, tensors, alpha, rank)
    if "scale" in tensors:
        factor = _number(name, "scale", tensors["scale"], read)
    return Module(
        component=component,
        parts=parts,
        name=place.name,
        convention=place.convention.name,
        flavour=flavour,
        tensors=tensors,
        alpha=alpha,
        rank=rank,
        factor=factor,
        is_by_row=_is_by_row(named),
    )


def _flavour(name: str, roles: Iterable[str]) -> str:
    """What a module is."""
    there = set(roles)
    for flavour, entry in facts("adapters")["flavours"].items():
        needed = [_met(need, there) for need in entry["needs"]]
        if not all(needed):
            continue
        used = {role for roles in needed if roles for role in roles}
        strange = there - used - set(entry["may"])
        if strange:
            raise ValueError(f"`{name}` is {entry['title']} with {', '.join(sorted(strange))}")
        return str(flavour)
    lacks = _lack(there)
    raise ValueError(f"`{name}` has {', '.join(sorted(there))}{lacks}")


def _met(need: str, there: set[str]) -> set[str]:
    """The roles by which a need is met, or none; all that are named may be there."""
    ways = [set(way.split()) for way in need.split(" | ")]
    return next((way for way in ways if way <= there), set())


def _lack(there: set[str]) -> str:
    """What the nearest flavour has beside, in words."""
    for entry in facts("adapters")["flavours"].values():
        needs = {role for need in entry["needs"] for role in need.replace("|", " ").split()}
        if needs & there:
            missing = [need for need in entry["needs"] if not _met(need, there)]
            return f", but not {', '.join(missing)}: half of a {entry['title']}"
    return ", which is no change of a weight"


_COLUMNS = "dora_scale"  # the ending of magnitudes that may be of columns
_RANKS = {  # flavour -> (role, axis), the first that is there
    "lora": (("down", 0),),
    "loha": (("hada_w1_b", 0),),
    "lokr": (("lokr_w1_b", 0), ("lokr_w2_b", 0)),
}


def _rank(flavour: str, tensors: Mapping[str, T]) -> int:
    if flavour == "glora":
        return min(tensors["glora_b1"].shape[:2], default=0)  # of old files it is the other factor
    for role, axis in _RANKS.get(flavour, ()):
        if role in tensors:
            shape = tensors[role].shape
            return shape[axis] if shape else 0
    return 0


def _factor(flavour: str, tensors: Mapping[str, T], alpha: float | None, rank: int) -> float:
    """alpha / rank; 1 without factors, and where alpha is 0, which training takes for the rank."""
    whole = {"lokr_w1", "lokr_w2"} <= tensors.keys()
    if not rank or not alpha or whole:
        return 1.0
    return alpha / rank


def _is_by_row(named: Mapping[str, tuple[str, Shaped]]) -> bool:
    """Whether magnitudes are those of rows.

    `dora_scale` is (o, 1, ...) then, or else (1, i, ...); PEFT's are of rows even where they are
    (1, o, 1, 1).
    """
    name, tensor = named.get("magnitude", ("", None))
    if tensor is None or len(tensor.shape) < 2 or not name.endswith(_COLUMNS):
        return True
    return tensor.shape[0] != 1


def _number(name: str, role: str, tensor: T, read: Read[T]) -> float:
    if math.prod(tensor.shape) != 1:
        raise ValueError(f"`{name}`: its {role} has shape {list(tensor.shape)}, not one number")
    value = read(tensor)
    if not math.isfinite(value):
        raise ValueError(f"`{name}`: its {role} is {value}")
    return value
