"""What a model holds, module by module: the key and shape of every tensor, from its config alone.

A module is a section of a class's file, `["resnet(a, b)"]`; each row names a part of it:
`"conv1" = "conv(a, b, 3)"`. A row may be repeated (`for j < n`) and depend on something (`when`);
of several values the first that is there counts. See `classes/UNet2DConditionModel.toml`.
"""

from __future__ import annotations

import ast
import re
from collections import ChainMap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from .errors import MappingError
from .expressions import MOST, evaluate
from .rows import filled

Shape = tuple[int, ...]
Tensors = Sequence[tuple[str, Shape]]

_MODEL = "model"
_LARGEST = 100_000  # tensors; a config must not decide how long we list them
_VALUE = re.compile(r"(?P<what>.+?)(?: for (?P<index>\w+) < (?P<count>.+?))?(?: when (?P<if>.+))?")


@dataclass(frozen=True)
class Part:
    """One value of a row.

    Attributes:
        module: the section that it is; empty for a tensor.
        arguments: of the section, or the sides of the tensor.
        index: the name that counts the repetitions; empty for one.
        count: how many repetitions there are.
        condition: when it is there.
    """

    module: str
    arguments: tuple[str, ...]
    index: str
    count: str
    condition: str

    @classmethod
    def parse(cls, text: str) -> Part:
        """Read `module(arguments) for j < n when condition`, or `[sides]` in place of the module.

        Raises:
            MappingError: it is neither.
        """
        found = _VALUE.fullmatch(text)
        assert found is not None
        what = found["what"]
        node = ast.parse(what, mode="eval").body
        more = (found["index"] or "", found["count"] or "", found["if"] or "True")
        match node:
            case ast.List(elts=sides):
                return cls("", _texts(what, sides), *more)
            case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]):
                return cls(name, _texts(what, arguments), *more)
        raise MappingError(f"`{text}`: neither a module nor the shape of a tensor")


def _texts(line: str, nodes: Iterable[ast.expr]) -> tuple[str, ...]:
    """What stands in a line of ASCII for expressions in it."""
    return tuple(line[node.col_offset : node.end_col_offset] for node in nodes)


class Module(NamedTuple):
    """A section: its parameters, and its parts by name."""

    parameters: tuple[str, ...]
    rows: Mapping[str, tuple[Part, ...]]


def parse_modules(sections: Mapping[str, Any], base: Mapping[str, Module]) -> dict[str, Module]:
    """The modules of a class's file, on top of those of the file that it extends."""
    modules = dict(base)
    for header, entries in sections.items():
        name, _, parameters = header.removesuffix(")").partition("(")
        rows = dict(modules[name].rows) if name in modules else {}
        for row, value in entries.items():
            texts = [value] if isinstance(value, str) else value
            rows[row] = tuple(map(Part.parse, texts))
        names = tuple(filter(None, (word.strip() for word in parameters.split(","))))
        modules[name] = Module(names, rows)
    return modules


def tensors(modules: Mapping[str, Module], config: Mapping[str, Any]) -> dict[str, Shape]:
    """Key -> shape of every tensor of the model with a config, in the order of its state dict.

    Raises:
        MappingError: the config makes no sense, or asks for more tensors than any model has.
    """
    found = dict(_Model(modules, config).module(_MODEL, ()))
    sides = {side for shape in found.values() for side in shape}
    if any(type(side) is not int or side < 1 for side in sides):
        raise MappingError("a size is not a number above zero")
    return found


class _Model:
    """The modules at work on one config. Like modules hold like tensors, so they are remembered."""

    def __init__(self, modules: Mapping[str, Module], config: Mapping[str, Any]) -> None:
        self._modules = modules
        self._config = config
        self._known: dict[tuple[str, tuple[Any, ...]], Tensors] = {}

    def module(self, name: str, arguments: tuple[Any, ...]) -> Tensors:
        """The tensors of a module, without its own name."""
        key = (name, arguments)
        if key not in self._known:
            module = self._modules[name]
            names = dict(zip(module.parameters, arguments, strict=True))
            found: list[tuple[str, Shape]] = []
            for row, parts in module.rows.items():
                found += self._row(row, parts, names)
                if len(found) > _LARGEST:
                    raise MappingError(f"more than {_LARGEST} tensors")
            self._known[key] = found
        return self._known[key]

    def _row(
        self, row: str, parts: Sequence[Part], names: dict[str, Any]
    ) -> Iterator[tuple[str, Shape]]:
        scope = ChainMap(names, self._config)  # type: ignore[arg-type]  # nothing is written
        for part in parts:
            if not evaluate(part.condition, scope):
                continue
            if not part.index:
                yield from self._part(row, part, scope)
                return
            count = evaluate(part.count, scope)
            if not isinstance(count, int) or count > MOST:
                raise MappingError(f"{count} is more than a model has of anything")
            for number in range(count):
                yield from self._part(row, part, scope.new_child({part.index: number}))
            return

    def _part(self, row: str, part: Part, scope: Mapping[str, Any]) -> Iterator[tuple[str, Shape]]:
        front = filled(row, scope)
        values = tuple(evaluate(argument, scope) for argument in part.arguments)
        if any(isinstance(value, list | dict) for value in values):
            raise MappingError("a size is not a number above zero")
        if not part.module:
            yield front, values
            return
        for key, shape in self.module(part.module, values):
            yield (f"{front}.{key}" if front and key else front or key), shape
