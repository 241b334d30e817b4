"""Finds the weights in what a torch pickle holds: a state dict, a trainer's save around one, or
whole modules."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeGuard

from ...errors import printable
from ..checkpoint import Tensor
from .pickle_globals import PickleError
from .pickle_machine import Object
from .torch_tensors import Storages, is_tensor

_WRAPPERS = ("state_dict", "model_state_dict", "model", "module")  # where trainers put the weights
_BESIDE = {  # what trainers save with them
    "optimizer": "state of the optimizer",
    "lr_scheduler": "state of the learning-rate schedule",
    "callback": "state of the trainer's callbacks",
    "loops": "state of the training loop",
    "hyper_parameters": "settings of the training",
}
_MAX_ENTRIES = 150_000  # that are looked at, each as often as it is met
_MAX_WRAPPERS = 4
_MAX_TRANSIENT = 100  # buffers of one module that are not saved
_MAX_NAME = 1024  # which bounds the depth too
_Entries = Iterator[tuple[object, object]]


@dataclass
class Weights:
    """What was found: tensors by name in file order, what was left out and why, and the scalars
    beside them.

    Attributes:
        beside: names of dicts that hold tensors too, which may be other parts, an average or
            nothing of use -> what they are, in words. The names of their tensors begin with them.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    beside: dict[str, str] = field(default_factory=dict)


def find_weights(root: object, storages: Storages) -> Weights:
    """The weights in a tree of nodes.

    Raises:
        PickleError: there are none, or a tensor among them cannot be read.
    """
    weights = Weights()
    walk = _Walk()
    node, others = _unwrap(root, weights, walk)
    nameless: dict[str, list[object]] = {}
    if not is_tensor(node):
        _note_scalars(node, weights)
        for lists in (False, True):  # what lies in lists is mostly not the model
            for name, value in walk.leaves(node, weights, lists):
                if _is_list_of_tensors(value):
                    nameless[name] = value
                _add(name, value, storages, weights)
            if weights.tensors:
                break
        if node is root:
            weights.beside |= _side_by_side(node, walk)
    if not weights.tensors:
        raise PickleError(f"there are no named tensors in it, but {_describe(root)}")
    for name, (other, words) in others.items():
        nameless |= _add_beside(name, other, words, storages, weights, walk)
    models = _models(weights) if nameless else {}
    for name, value in nameless.items():
        _add_nameless(name, value, models.get(len(value), []), storages, weights, walk)
    return weights


def _side_by_side(node: object, walk: _Walk) -> dict[str, str]:
    """The dicts that hold tensors where a tree first has several: path -> what they are."""
    front = ""
    for _ in range(_MAX_WRAPPERS):
        entries = _mapping(node) or {}
        found = {key: value for key, value in entries.items() if walk.holds_tensors(value)}
        if len(found) != 1:
            return {
                f"{front}{_shown(key)}": f"beside the weights: {_describe(value)}"
                for key, value in found.items()
            }
        ((key, node),) = found.items()
        front += f"{_shown(key)}."
    return {}


def _add_beside(
    name: str, node: object, words: str, storages: Storages, weights: Weights, walk: _Walk
) -> dict[str, list[object]]:
    """The tensors of a dict beside the weights, if they can be read; else it is left out.

    Returns:
        Lists of tensors in it, by name.
    """
    found = Weights()
    nameless = {}
    try:
        for key, value in walk.leaves(node, found):
            if _is_list_of_tensors(value):
                nameless[f"{name}.{key}"] = value
            _add(f"{name}.{key}", value, storages, found)
    except PickleError:
        found = Weights()
    if not found.tensors or found.tensors.keys() & weights.tensors.keys():
        weights.skipped[name] = words
        return nameless
    weights.tensors |= found.tensors
    weights.beside[name] = words
    return nameless


def _is_list_of_tensors(value: object) -> TypeGuard[list[object]]:
    """Whether a list begins with a tensor; one may be met often, so that no more is looked at."""
    return isinstance(value, list) and len(value) > 1 and is_tensor(value[0])


def _models(weights: Weights) -> dict[int, list[dict[str, Tensor]]]:
    """State dicts among the weights, by their sizes: those under each front, and all of them."""
    fronts: dict[str, dict[str, Tensor]] = {}
    for key, one in weights.tensors.items():
        front, _, rest = key.partition(".")
        fronts.setdefault(front, {})[rest] = one
    found: dict[int, list[dict[str, Tensor]]] = {}
    for model in (*fronts.values(), dict(weights.tensors)):
        found.setdefault(len(model), []).append(model)
    return found


def _add_nameless(
    name: str,
    value: list[object],
    models: list[dict[str, Tensor]],
    storages: Storages,
    weights: Weights,
    walk: _Walk,
) -> None:
    """A list of the parameters of a model whose state dict is there too: they have its names.

    Averages are kept so by diffusers' `EMAModel` and others.

    Args:
        models: state dicts of as many tensors.
    """
    for model in models:
        walk.count(len(model))
        if not all(map(is_tensor, value)):
            return
        found = Weights()
        try:
            for key, one in zip(model, value, strict=True):
                _add(f"{name}.{key}", one, storages, found)
        except PickleError:
            return
        alike = all(
            one.shape == other.shape
            for one, other in zip(found.tensors.values(), model.values(), strict=True)
        )
        if alike and not found.tensors.keys() & weights.tensors.keys():
            weights.tensors |= found.tensors
            weights.beside[name] = f"beside the weights: {_describe(value)}"
            weights.skipped.pop(printable(name), None)
            weights.skipped.pop(name.partition(".")[0], None)
            return


def _add(name: str, value: object, storages: Storages, weights: Weights) -> None:
    tensor = storages.tensor(name, value)
    if tensor is None and value is None:  # a parameter that a module does without
        return
    if tensor is None:
        weights.skipped[printable(name)] = f"no tensor, but {_describe(value)}"
        return
    if not name.isprintable():
        raise PickleError(f"the tensor name `{printable(name)}` holds control characters")
    if name in weights.tensors:
        raise PickleError(f"the tensor `{printable(name)}` is there twice")
    weights.tensors[name] = tensor


def _unwrap(
    node: object, weights: Weights, walk: _Walk
) -> tuple[object, dict[str, tuple[object, str]]]:
    """Go down to the weights that a trainer put beside other things, noting those.

    Returns:
        The weights, and by name what else holds tensors, with what it is in words.
    """
    others: dict[str, tuple[object, str]] = {}
    for _ in range(_MAX_WRAPPERS):
        entries = _mapping(node)
        if entries is None:
            break
        wrappers = (key for key in _WRAPPERS if key in entries)
        inner = next((key for key in wrappers if walk.holds_tensors(entries[key])), None)
        if inner is None:
            break
        _note_scalars(node, weights)
        for key, value in entries.items():
            if key == inner:
                continue
            name = _shown(key)
            words = f"beside `{inner}`: {_describe(value)}"
            reason = _reason(name)
            if reason is None and walk.holds_tensors(value, lists=True):
                others[name] = value, words
            else:
                weights.skipped[name] = reason or words
        node = entries[inner]
    return node, others


def _note_scalars(node: object, weights: Weights) -> None:
    for key, value in (_mapping(node) or {}).items():
        if isinstance(key, str) and isinstance(value, bool | int | float | str):
            weights.metadata[_shown(key)] = _shown(value)


def _reason(name: str) -> str | None:
    return next((reason for word, reason in _BESIDE.items() if word in name), None)


def _describe(value: object) -> str:
    if is_tensor(value):
        return "a tensor"
    if isinstance(value, Object):
        return f"an object of class `{value.cls}`"
    names = {
        dict: "a dict",
        list: "a list",
        tuple: "a tuple",
        str: "a text",
        int: "a number",
        float: "a number",
    }
    return names.get(type(value), "another value")


def _shown(key: object) -> str:
    """A key or scalar; only the beginning is looked at, for it may be long and be met often."""
    if not isinstance(key, str | int | float):
        return "a key that is no text"
    return printable(str(key)[:200])


# ---- the tree


class _Walk:
    """Ways through a tree, which may meet a node again and again: bounded all together."""

    def __init__(self) -> None:
        self._left = _MAX_ENTRIES

    def count(self, entries: int) -> None:
        """Note that so many entries are looked at.

        Raises:
            PickleError: they are too many.
        """
        self._left -= entries
        if self._left <= 0:
            raise PickleError(
                f"there are more than {_MAX_ENTRIES} entries in it; no checkpoint needs that"
            )

    def holds_tensors(self, node: object, lists: bool = False) -> bool:
        """Whether a tensor is below a node.

        Args:
            lists: a list of them is enough.
        """
        if is_tensor(node):
            return False
        return any(
            is_tensor(value) or (lists and _is_list_of_tensors(value))
            for _, value in self.leaves(node, Weights())
        )

    def leaves(
        self, root: object, weights: Weights, lists: bool = False
    ) -> Iterator[tuple[str, object]]:
        """Everything below a node that is no mapping or module, by dotted name, depth first.

        Args:
            weights: gets the names of what is passed over, with the reason.
            lists: go into lists too, whose entries are named by their place.
        """
        levels = [("", _children(root) or iter(()))]
        while self._left:
            while levels and (entry := next(levels[-1][1], None)) is None:
                levels.pop()
            if not levels or entry is None:
                return
            self._left -= 1
            prefix = levels[-1][0]
            key, value = entry
            name = f"{prefix}{key}" if isinstance(key, str | int) else f"{prefix}{_shown(key)}"
            if len(name) > _MAX_NAME:
                raise PickleError(f"the name `{printable(name)}` is too long or too deep")
            children = None if is_tensor(value) else _children(value)
            if children is None and lists and isinstance(value, list):
                children = enumerate(value)
            if children is None:
                yield name, value
            elif reason := None if prefix else _reason(name):
                weights.skipped[name] = reason
            else:
                levels.append((f"{name}.", children))
        raise PickleError(
            f"there are more than {_MAX_ENTRIES} entries in it; no checkpoint needs that"
        )


def _children(node: object) -> _Entries | None:
    """The entries of a mapping, or the parameters, buffers and modules of a module; None for
    anything else."""
    if isinstance(node, Object) and isinstance(node.state, dict) and "_modules" in node.state:
        parameters, buffers, modules = (
            (_mapping(node.state.get(key)) or {}).items()
            for key in ("_parameters", "_buffers", "_modules")
        )
        transient = _transient(node.state.get("_non_persistent_buffers_set"))
        return itertools.chain(
            parameters, (entry for entry in buffers if entry[0] not in transient), modules
        )
    mapping = _mapping(node)
    return None if mapping is None else iter(mapping.items())


def _transient(node: object) -> set[str]:
    """The names in the set of buffers that are not saved; protocol 2 writes a set as a call with a
    list."""
    if isinstance(node, Object) and node.args:
        node = node.args[0]
    names = node if isinstance(node, list) else []
    if len(names) > _MAX_TRANSIENT:
        raise PickleError(
            "a module in it has too many buffers that are not saved; no checkpoint needs that"
        )
    return {name for name in names if isinstance(name, str)}


def _mapping(node: object) -> dict[object, object] | None:
    """The entries of a dict or of an object of a kind of dict."""
    if isinstance(node, Object):
        if node.cls.dotted == "collections.OrderedDict" and (node.args or node.items is None):
            node.items = _pairs(node.args) | (node.items or {})
            node.args = ()
        return node.items
    return node if isinstance(node, dict) else None


def _pairs(args: tuple[object, ...]) -> dict[object, object]:
    """Python 2 writes an ordered dict as a call with a list of pairs."""
    pairs = args[0] if args and isinstance(args[0], list) else []
    result: dict[object, object] = {}
    for pair in pairs:
        if (
            not isinstance(pair, list | tuple)
            or len(pair) != 2
            or not isinstance(pair[0], str)
            or pair[0] in result
        ):
            raise PickleError("an ordered dict in it is damaged")
        result[pair[0]] = pair[1]
    return result
