"""The arithmetic of mapping rows: `{2*i + j}`, `{n*i}`, `{1 + (up_block_types[i] != 'UpBlock2D')}`.

An `ast` whitelist: integers, strings, names, `+ - * // %`, `==`, `!=`, indexing and `len`. Nothing else, so a table
from anybody is safe to expand.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from .errors import MappingError

_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


def evaluate(text: str, names: Mapping[str, Any]) -> Any:
    """The value of an expression over the given names.

    Raises:
        MappingError: the text is not an expression of the whitelist, or a name is unknown.
    """
    try:
        return _value(_parse(text), names)
    except (TypeError, LookupError, ArithmeticError, SyntaxError) as error:
        raise MappingError(f"`{{{text}}}`: {error}") from None


@lru_cache(maxsize=None)
def _parse(text: str) -> ast.expr:
    return ast.parse(text.strip(), mode="eval").body


def _value(node: ast.expr, names: Mapping[str, Any]) -> Any:
    match node:
        case ast.Constant(value=int() | str() as value):
            return value
        case ast.Name(id=name):
            return names[name]
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            sides = _value(left, names), _value(right, names)
            if not all(isinstance(side, int) for side in sides):
                raise TypeError("arithmetic is on integers only")
            return _BINARY[type(op)](*sides)
        case ast.Compare(left=left, ops=[ast.Eq() | ast.NotEq() as op], comparators=[right]):
            return (_value(left, names) == _value(right, names)) is isinstance(op, ast.Eq)
        case ast.Subscript(value=value, slice=index):
            return _value(value, names)[_value(index, names)]
        case ast.Call(func=ast.Name(id="len"), args=[argument], keywords=[]):
            return len(_value(argument, names))
    raise TypeError("only integers, names, + - * // %, == !=, [] and len() are allowed")
