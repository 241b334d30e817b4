"""From Keras's names to structure: `res_block_7/padded_conv2d_12/conv2d_12/kernel:0` ->
`res_block.2.entry_flow...`.

Keras numbers layers by the history of the saving process, so a number says only which of two layers
came first. Every way of saving is brought to one canonical key: class, rank among its class,
attribute path, `weight` or `bias`. What the layers hold is data:
`mappings/facts/keras_layers.toml`.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

from ...mappings.facts import facts
from ..checkpoint import Tensor
from ..readers.tensorflow import Node
from .keras_names import Leaves, ranked, stem, stem_and_number

_NORMS = ("group_normalization", "layer_normalization")
_NO_ATTRIBUTES = ("variables", "trainable_variables", "non_trainable_variables", "keras_api")
_MAX_DEPTH = 8  # of attributes; KerasCV's layers nest four deep
_LEAF_VARIABLES = {
    "kernel": "dense",
    "_kernel": "dense",
    "gamma": "norm",
    "embeddings": "embedding",
}


@dataclass(frozen=True)
class Slot:
    """An attribute of a layer that holds a sublayer."""

    attribute: str
    classes: tuple[str, ...]
    pointwise: bool  # the sublayer with a 1x1 kernel


@dataclass(frozen=True)
class KerasModels:
    """The content of `mappings/facts/keras_layers.toml`."""

    layers: Mapping[str, tuple[Slot, ...]]
    models: Mapping[str, tuple[str, ...]]

    @cached_property
    def blocks(self) -> frozenset[str]:
        """Composite classes of the top level: what makes a group of layers look like a
        component."""
        return frozenset(name for name in self.top_level if len(self.layers.get(name, ())) > 1)

    @cached_property
    def top_level(self) -> frozenset[str]:
        """Classes whose layers a component holds directly."""
        return frozenset(
            layer_class(entry.rstrip("*")) for order in self.models.values() for entry in order
        )


@lru_cache(maxsize=1)
def keras_models() -> KerasModels:
    """Load `mappings/facts/keras_layers.toml`."""
    document = facts("keras_layers")
    return KerasModels(
        layers={
            name: tuple(_slot(*item) for item in slots.items())
            for name, slots in document["layers"].items()
        },
        models={name: tuple(order) for name, order in document["models"].items()},
    )


def _slot(attribute: str, text: str) -> Slot:
    classes = text.removesuffix("1x1")
    return Slot(attribute, tuple(name.strip() for name in classes.split("|")), text.endswith("1x1"))


def layer_class(name: str) -> str:
    """The class in a numbered name; both normalisations are `norm`."""
    found = stem(name)
    return "norm" if found in _NORMS else found


# --- saved by attribute: .weights.h5 of every Keras -----------------------------------------------


def from_attributes(paths: Mapping[tuple[str, ...], Tensor]) -> Leaves:
    """Paths `(layer, attribute, ..., "vars", "0")`: the number of a layer counts its class, in
    steps of one or two."""
    names = ranked(dict.fromkeys(path[0] for path in paths), layer_class)
    leaves: Leaves = defaultdict(dict)
    for (layer, *attributes, variables, position), tensor in paths.items():
        inner = attributes if variables == "vars" else [*attributes, variables]
        leaves[".".join([names[layer], *inner])][position] = tensor
    return leaves


# --- saved by class: legacy .h5 -------------------------------------------------------------------


_Tree = tuple[dict[str, Tensor], dict[str, Any]]  # variables by name, trees of sublayers by name


def from_classes(paths: Mapping[tuple[str, ...], Tensor]) -> Leaves:
    """Paths `(model?, layer, class_12, ..., "kernel")`: sublayers are known by class and number
    only."""
    trees: dict[str, _Tree] = {}
    for path, tensor in paths.items():
        layer, *inner = _from_layer(path)
        variables, sublayers = trees.setdefault(layer, ({}, {}))
        for segment in inner[:-1]:
            variables, sublayers = sublayers.setdefault(segment, ({}, {}))
        variables[inner[-1].removesuffix(":0") if inner else "variable"] = tensor
    names = ranked(trees, layer_class)
    return {
        path: leaf
        for layer, tree in trees.items()
        for path, leaf in _placed(names[layer], layer, tree)
    }


def _from_layer(path: tuple[str, ...]) -> tuple[str, ...]:
    """The path from the layer on: leading model names (`decoder_1/...`) are dropped."""
    known = keras_models().top_level
    return next(
        (path[i:] for i, segment in enumerate(path[:-1]) if layer_class(segment) in known), path
    )


def _placed(path: str, name: str, tree: _Tree) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Walk a tree of class names; yield canonical layer paths."""
    variables, sublayers = tree
    if variables:
        yield path, variables
    slots = keras_models().layers.get(stem_and_number(name)[0], ())
    for child, attribute in _assigned(sublayers, slots).items():
        yield from _placed(f"{path}.{attribute}", child, sublayers[child])


def _assigned(children: Mapping[str, _Tree], slots: Sequence[Slot]) -> dict[str, str]:
    """Which attribute each child fills: by class, 1x1 kernels first, then in the order of
    numbers."""
    assigned: dict[str, str] = {}
    waiting = sorted(children, key=lambda name: stem_and_number(name)[1])
    for slot in sorted(slots, key=lambda slot: not slot.pointwise):
        for child in waiting:
            if stem_and_number(child)[0] in slot.classes and (
                not slot.pointwise or _is_pointwise(children[child])
            ):
                assigned[child] = slot.attribute
                waiting.remove(child)
                break
    return assigned | {
        child: child for child in waiting
    }  # an unknown sublayer keeps its name and is reported later


def _is_pointwise(tree: _Tree) -> bool:
    variables, sublayers = tree
    kernels = (variable.shape for variable in variables.values() if len(variable.shape) == 4)
    return any(shape[:2] == (1, 1) for shape in kernels) or any(
        map(_is_pointwise, sublayers.values())
    )


# --- saved as an object graph: TensorFlow checkpoints and SavedModels -----------------------------


class Graph:
    """An object graph of a save. Its parts may be shared, so what a node is, is found out once.

    Attributes:
        nodes: the objects, the root first; there may be cycles.
    """

    def __init__(self, nodes: Sequence[Node]) -> None:
        self.nodes = nodes
        self._classes: dict[int, str] = {}
        self._lists: dict[int, list[int]] = {}

    def components(self, limit: int) -> dict[str, list[int]]:
        """Where the components are, at most so many: path -> node ids of their layers, in order."""
        components: dict[str, list[int]] = {}
        steps = [(-1, "", 0)] if self.nodes else []  # the step before, attribute, node
        seen: set[int] = set()
        for number, (_, _, node) in enumerate(steps):  # they grow meanwhile
            if node in seen:
                continue
            seen.add(node)
            if layers := self._component(node):
                components[_path(steps, number)] = layers
                if len(components) == limit:
                    break
                continue
            for name, child in self.nodes[node].children.items():
                if name not in ("optimizer", "keras_api") and child not in seen:
                    steps.append((number, name, child))
        return components

    def leaves(self, layers: Sequence[int], tensors: Mapping[str, Tensor]) -> Leaves:
        """Canonical layer paths of one component."""
        counts: Counter[str] = Counter()
        leaves: Leaves = {}
        seen = set(layers)
        for layer in layers:
            found = self._leaves_of(layer, tensors, seen)
            if not found:
                continue
            name = self.class_of(layer)
            for attributes, variables in found.items():
                leaves[".".join([name, str(counts[name]), *attributes])] = variables
            counts[name] += 1
        return leaves

    def class_of(self, node: int) -> str:
        """The class of a layer, told from the names of its attributes."""
        if node not in self._classes:
            names = {*self.nodes[node].children, *self.nodes[node].variables}
            self._classes[node] = _class_with(names)
        return self._classes[node]

    def _component(self, node: int) -> list[int]:
        """The layers of a component: children `layer-<i>` (Keras 2), or the list `_operations`
        (Keras 3). None if the node is no component."""
        children = self.nodes[node].children
        layers = _numbered(children, "layer-")
        if layers or "_operations" not in children:
            return self._with_blocks(layers)
        operations = children["_operations"]
        if operations not in self._lists:
            numbered = _numbered(self.nodes[operations].children, "")
            self._lists[operations] = self._with_blocks(numbered)
        return self._lists[operations]

    def _with_blocks(self, layers: list[int]) -> list[int]:
        """The layers, if blocks of a model are among them."""
        blocks = keras_models().blocks
        return layers if any(self.class_of(layer) in blocks for layer in layers) else []

    def _leaves_of(
        self, layer: int, tensors: Mapping[str, Tensor], seen: set[int]
    ) -> dict[tuple[str, ...], dict[str, Tensor]]:
        """Attribute path -> variables, of every layer below one that holds variables."""
        leaves: dict[tuple[str, ...], dict[str, Tensor]] = defaultdict(dict)
        queue: list[tuple[tuple[str, ...], int]] = [((), layer)]
        for path, node in queue:  # it grows meanwhile
            for name, child in self.nodes[node].children.items():
                key = self.nodes[child].variables.get("VARIABLE_VALUE", "")
                if key in tensors:
                    leaves[path][name] = tensors[key]
                elif child not in seen and name not in _NO_ATTRIBUTES and len(path) < _MAX_DEPTH:
                    seen.add(child)
                    attribute = self._list_item(child) if name.isdecimal() else name
                    queue.append(((*path, attribute), child))
        return leaves

    def _list_item(self, node: int) -> str:
        """Keras names an item of a layer list by its class."""
        name = self.class_of(node)
        return "group_normalization" if name == "norm" else name


def _path(steps: Sequence[tuple[int, str, int]], number: int) -> str:
    """The attributes that lead to a step."""
    names = []
    while number > 0:
        number, name, _ = steps[number]
        names.append(name)
    return "/".join(reversed(names))


def _numbered(children: Mapping[str, int], beginning: str) -> list[int]:
    """The children that are numbered, in order."""
    numbered = {
        int(name.removeprefix(beginning)): child
        for name, child in children.items()
        if re.fullmatch(rf"{beginning}\d{{1,9}}", name)
    }
    return [numbered[i] for i in sorted(numbered)]


def _class_with(names: set[str]) -> str:
    """The class of layers that have these attributes."""
    for variable, leaf in _LEAF_VARIABLES.items():
        if variable in names:
            return leaf
    scores = {
        cls: len(names & attributes) / len(attributes)
        for cls, slots in keras_models().layers.items()
        if (attributes := {slot.attribute.split(".")[0] for slot in slots if not slot.pointwise})
    }
    best = max(scores, key=lambda cls: (scores[cls], len(keras_models().layers[cls])))
    return best if scores[best] == 1 else "unknown"


# --- saved by position: Keras 3 export ------------------------------------------------------------


def model_layers(model: str, keys: Iterable[str]) -> list[tuple[str, list[str]]]:
    """(Keras class, canonical keys) of every layer of a component, in the order of `model.weights`.

    This is what the positional formats rely on: Keras 3 exports, and legacy `.h5` when Keras loads
    it.
    """
    layers: dict[str, list[str]] = defaultdict(list)
    for key in keys:
        layers[".".join(key.split(".")[:2])].append(key)
    counts: Counter[str] = Counter()
    ordered = []
    for entry in keras_models().models[model]:
        cls = layer_class(entry.rstrip("*"))
        repeat = sum(name.split(".")[0] == cls for name in layers) if entry.endswith("*") else 1
        for _ in range(repeat):
            inside = layers.get(f"{cls}.{counts[cls]}", [])
            ordered.append(
                (
                    entry.rstrip("*"),
                    sorted(inside, key=lambda key: _slot_order(cls, key.split(".")[2:])),
                )
            )
            counts[cls] += 1
    return ordered


def class_path(cls: str, path: Sequence[str]) -> list[tuple[str, str]]:
    """(attribute, class) of the sublayers along a path inside a layer of class `cls`, that layer
    excluded."""
    for slot in keras_models().layers.get(cls, ()):
        attribute = slot.attribute.split(".")
        if list(path[: len(attribute)]) == attribute:
            rest = path[len(attribute) :]
            inner = next(c for c in slot.classes if bool(rest) == (c in keras_models().layers))
            return [(slot.attribute, inner), *class_path(inner, rest)]
    return []


def _slot_order(cls: str, path: Sequence[str]) -> tuple[int, ...]:
    """Sort key of a variable inside a layer: creation order of the sublayers, weight before
    bias."""
    for index, slot in enumerate(keras_models().layers.get(cls, ())):
        attribute = slot.attribute.split(".")
        if list(path[: len(attribute)]) == attribute:
            return (index, *min(_slot_order(c, path[len(attribute) :]) for c in slot.classes))
    return (path[-1] != "weight",)
