"""The options of a config that tensors tell: read off their names and shapes.

A rule asks for tensors by their canonical keys, one after another, so that a layout whose numbers
depend on what was read before can answer. See `classes/UNet2DConditionModel.toml` for the notation.
"""

from __future__ import annotations

import itertools
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from .errors import MappingError
from .expressions import MOST, evaluate
from .rows import filled

Shape = tuple[int, ...]
Options = dict[str, Any]
ShapeOf = Callable[[str, Mapping[str, Any]], Shape | None]
"""(canonical key, what was read before) -> the shape of the tensor; None if it is not there."""

_NULL = "null"
_ANY = "*"
_INDICES = ("i", "j")


@dataclass(frozen=True)
class Rule:
    """How tensors tell an option; see the module's notation.

    Attributes:
        each: what the indices of a list count up to; empty for an option that is no list.
    """

    size: tuple[str, ...] = ()
    count: tuple[str, ...] = ()
    value: str = ""
    each: tuple[str, ...] = ()

    @classmethod
    def parse(cls, entry: Mapping[str, Any]) -> Rule:
        """Read a rule of a class's file."""
        each = entry.get("each", ())
        ends = (each,) if isinstance(each, str) else tuple(each)
        size = tuple(entry.get("size", ()))
        return cls(size, tuple(entry.get("count", ())), entry.get("value", ""), ends)


def read(rules: Mapping[str, Rule], lets: Mapping[str, str], shape_of: ShapeOf) -> Options:
    """What tensors tell: option -> value; of a list, elements that they do not tell are None.

    Raises:
        MappingError: they are those of no such model.
    """
    reader = _Reader(rules, lets, shape_of)
    told = {option: reader.told(option) for option in rules if not option.startswith("_")}
    known = {option: value for option, value in told.items() if value is not None}
    return {option: None if value == _NULL else value for option, value in known.items()}


class _Reader(Mapping[str, Any]):
    """The options as names for expressions; each is read when it is first asked for."""

    def __init__(
        self, rules: Mapping[str, Rule], lets: Mapping[str, str], shape_of: ShapeOf
    ) -> None:
        self._rules = rules
        self._lets = lets
        self._shape_of = shape_of
        self._told: Options = {}
        self._asked: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        if name in self._told or name in self._rules:
            value = self.told(name)
            return None if value == _NULL else value
        return evaluate(self._lets[name], self)

    def __iter__(self) -> Iterator[str]:
        return iter({**self._rules, **self._lets})

    def __len__(self) -> int:
        return len({**self._rules, **self._lets})

    def told(self, option: str) -> Any:
        """What tensors tell of an option.

        Raises:
            MappingError: they do only when they have told it already.
        """
        if option not in self._told:
            if option in self._asked:
                raise MappingError(f"`{option}` depends on itself")
            self._asked.add(option)
            try:
                self._told[option] = self._read(option, self._rules[option])
            finally:
                self._asked.discard(option)
        return self._told[option]

    def _read(self, option: str, rule: Rule) -> Any:
        if rule.each != (_ANY,):
            return self._value(rule, rule.each, {})
        found: list[Any] = []
        self._told[option] = found  # what was read of a list helps to find the rest
        for i in range(MOST):
            element = self._one(rule, {"i": i})
            if not element:
                break
            found.append(element)
        return found

    def _value(self, rule: Rule, each: tuple[str, ...], indices: Mapping[str, int]) -> Any:
        if not each:
            return self._one(rule, indices)
        count = evaluate(each[0], ChainMap(dict(indices), self))  # type: ignore[arg-type]
        if not isinstance(count, int) or count > MOST:
            raise MappingError(f"{count} is no number of anything in a model")
        index = _INDICES[len(indices)]
        return [self._value(rule, each[1:], {**indices, index: n}) for n in range(count)]

    def _one(self, rule: Rule, indices: Mapping[str, int]) -> Any:
        names = ChainMap(dict(indices), self)  # type: ignore[arg-type]  # nothing is written
        if rule.value:
            return evaluate(rule.value, names)
        if rule.count:
            numbered = (names.new_child({"n": n}) for n in itertools.count())
            there = (any(map(partial(self._shape, names=n), rule.count)) for n in numbered)
            return next(n for n, is_there in enumerate(there) if not is_there)
        return next(filter(None, (self._size(place, names) for place in rule.size)), None)

    def _size(self, place: str, names: Mapping[str, Any]) -> int | None:
        key, _, axis = place.rpartition(" ")
        shape = self._shape(key, names)
        if shape is None:
            return None
        if axis == "axes":
            return len(shape)
        return shape[int(axis)] if int(axis) < len(shape) else None

    def _shape(self, pattern: str, names: Mapping[str, Any]) -> Shape | None:
        return self._shape_of(filled(pattern, names), self)
