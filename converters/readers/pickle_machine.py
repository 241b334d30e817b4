"""Reads a pickle into a tree of inert nodes: nothing is imported, nothing that the file names is
ever called.

A pickle is a program for a stack machine. This one knows the instructions of protocols 0 to 5 that
checkpoints use. Where Python would import a name it pushes a `Global`; where Python would call
something it pushes an `Object` that remembers what was to be called. What it makes is never larger
than the instructions that asked for it, so the limits on their number and bytes bound time and
memory. Instructions: the `pickletools` module, PEPs 307 and 3154.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn, TypeVar

from ...errors import printable
from ..checkpoint import SourceFile
from .pickle_cursor import Cursor
from .pickle_globals import Global, PickleError, check_called, named

_MAX_INSTRUCTIONS = 2_000_000  # of one pickle; such a run has 600 000
_MAX_INTEGER = 1 << 10  # bytes
_T = TypeVar("_T")


@dataclass(slots=True, eq=False)
class Object:
    """What Python would have made by calling `cls(*args)`: only remembered, with all that was then
    done to it.

    Attributes:
        cls: what was to be called.
        args: its arguments.
        state: what was to be restored in the object.
        items: entries that were set in it, if it is a kind of dict.
        elements: values that were appended to it, if it is a kind of list or set.
    """

    cls: Global
    args: tuple[object, ...]
    state: object = None
    items: dict[object, object] | None = None
    elements: list[object] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Key:
    """A key of a dict that is neither text nor a number. Hashed by identity: the hash of a tuple
    can take for ever."""

    value: object


@dataclass(frozen=True)
class Pickle:
    """A pickle that was read.

    Attributes:
        value: the tree: None, bool, int, float, str, bytes, tuple, list (for sets too), dict,
            `Global`, `Object`, and what `persistent` returned. It may contain itself.
        names: every name in it.
        end: where in the file it ends.
    """

    value: object
    names: frozenset[Global]
    end: int


def _no_persistent(identity: object) -> NoReturn:
    raise PickleError(
        "it refers to data outside of itself, which a file of this kind does not have"
    )


def read_pickle(
    file: SourceFile, start: int, end: int, persistent: Callable[[object], object] = _no_persistent
) -> Pickle:
    """Read the pickle that begins at `start` and ends before `end`; `persistent` resolves its
    persistent ids.

    Raises:
        PickleError: it is damaged or too large, or names or calls what no checkpoint needs.
    """
    machine = _Machine(Cursor(file, start, end), persistent)
    try:
        value = machine.run()
    except PickleError:
        raise
    except (IndexError, KeyError):  # an empty stack, an empty memo
        raise PickleError("the pickle in it is damaged: a value is missing") from None
    except ValueError:
        raise PickleError("the pickle in it is damaged: a text or number cannot be read") from None
    return Pickle(value, frozenset(machine.names.values()), machine.cursor.at)


class _Machine:
    """The stack, the memo, and what the instructions have in common."""

    def __init__(self, cursor: Cursor, persistent: Callable[[object], object]) -> None:
        self.cursor = cursor
        self.persistent = persistent
        self.stack: list[object] = []
        self.below: list[list[object]] = []  # the stacks under each mark
        self.memo: dict[int, object] = {}
        self.names: dict[tuple[str, str], Global] = {}

    def run(self) -> object:
        """Follow the instructions up to STOP."""
        take = self.cursor.take
        pushes = _PUSHES
        acts = _ACTS
        for _ in range(_MAX_INSTRUCTIONS):
            code = take(1)
            push = pushes.get(code)
            if push is not None:
                value = push(self)  # which may exchange the stack
                self.stack.append(value)
            elif code in acts:
                acts[code](self)
            elif code == b".":
                return self._result()
            else:
                raise PickleError(
                    f"the pickle in it is damaged, or uses instruction {code!r}, which PyTorch"
                    " never does"
                )
        raise PickleError(
            f"the pickle in it has more than {_MAX_INSTRUCTIONS} instructions; no checkpoint needs"
            " that"
        )

    def _result(self) -> object:
        value = self.stack.pop()
        if self.stack or self.below:
            raise PickleError("the pickle in it is damaged: values are left over")
        return value

    def top(self, kind: type[_T]) -> _T:
        """Take the top of the stack, which must be of a kind."""
        return _typed(self.stack.pop(), kind)

    def marked(self) -> list[object]:
        """Take what lies above the topmost mark."""
        values = self.stack
        self.stack = self.below.pop()
        return values

    def name(self, module: str, name: str) -> Global:
        """Mention a name."""
        key = module, name
        if key not in self.names:
            self.names[key] = named(module, name)
        return self.names[key]


def _typed(value: object, kind: type[_T]) -> _T:
    if not isinstance(value, kind):
        raise PickleError(
            f"the pickle in it is damaged: {_kind(value)} where {kind.__name__} is needed"
        )
    return value


def _kind(value: object) -> str:
    return f"`{value}`" if isinstance(value, Global) else type(value).__name__


# ---- instructions that push a value


def _integer(data: bytes) -> int:
    if len(data) > _MAX_INTEGER:
        raise PickleError(
            f"the pickle in it has a number of {len(data)} bytes; no checkpoint needs that"
        )
    return int.from_bytes(data, "little", signed=True)


def _decimal(line: str) -> int:
    if len(line) > _MAX_INTEGER:
        raise PickleError(
            f"the pickle in it has a number of {len(line)} digits; no checkpoint needs that"
        )
    return int(line.removesuffix("L"))


def _quoted(line: str) -> str:
    """A Python 2 literal: its quotes and escapes are undone."""
    if len(line) < 2 or line[0] not in "'\"" or line[-1] != line[0]:
        raise PickleError("the pickle in it is damaged: a text without quotes")
    return line[1:-1].encode("latin-1").decode("unicode_escape")


def _stack_global(m: _Machine) -> Global:
    name = m.top(str)
    module = m.top(str)
    return m.name(module, name)


def _called(function: object, args: object) -> Object:
    """REDUCE, INST, OBJ: what Python would call, only remembered."""
    if not isinstance(function, Global):
        what = (
            f"what `{function.cls}` returns"
            if isinstance(function, Object)
            else f"a {_kind(function)}"
        )
        raise PickleError(f"it calls {what}, which is not a class: the file may be malicious")
    arguments = _typed(args, tuple)
    check_called(function, arguments)
    return Object(function, arguments)


def _reduce(m: _Machine) -> Object:
    args = m.stack.pop()
    return _called(m.stack.pop(), args)


def _inst(m: _Machine) -> Object:
    name = m.name(m.cursor.line(), m.cursor.line())
    return _called(name, tuple(m.marked()))


def _obj(m: _Machine) -> Object:
    function, *args = m.marked()
    return _called(function, tuple(args))


def _newobj(m: _Machine) -> Object:
    """An instance that is made without calling its class, which may have any name, even one in
    lower case."""
    args = m.top(tuple)
    return Object(m.top(Global), args)


def _newobj_ex(m: _Machine) -> Object:
    m.top(dict)  # named arguments
    return _newobj(m)


def _tuple(m: _Machine, count: int) -> tuple[object, ...]:
    values = [m.stack.pop() for _ in range(count)]
    return tuple(reversed(values))


def _dict(m: _Machine) -> dict[object, object]:
    result: dict[object, object] = {}
    _set(result, m.marked())
    return result


# ---- instructions that change something


def _set(items: dict[object, object], pairs: list[object]) -> None:
    if len(pairs) % 2:
        raise PickleError("the pickle in it is damaged: a key without a value")
    for key, value in zip(pairs[::2], pairs[1::2], strict=True):
        # Large integers are chosen to collide; small ones hash to themselves.
        plain = isinstance(key, str) or (isinstance(key, int) and abs(key) < 1 << 60)
        name = key if plain else Key(key)
        if name in items:
            raise PickleError(f"the pickle in it has `{printable(key)}` twice in one dict")
        items[name] = value


def _set_items(m: _Machine, pairs: list[object]) -> None:
    owner = m.stack[-1]
    if isinstance(owner, Object):
        owner.items = {} if owner.items is None else owner.items
        owner = owner.items
    _set(_typed(owner, dict), pairs)


def _append(m: _Machine, values: list[object]) -> None:
    owner = m.stack[-1]
    if isinstance(owner, Object):
        owner.elements = [] if owner.elements is None else owner.elements
        owner = owner.elements
    _typed(owner, list).extend(values)


def _build(m: _Machine) -> None:
    state = m.stack.pop()
    owner = m.stack[-1]
    if isinstance(owner, Global):
        raise PickleError(
            f"it changes `{owner}` itself, which no checkpoint needs: the file may be malicious"
        )
    if isinstance(owner, Object):
        owner.state = state


def _mark(m: _Machine) -> None:
    m.below.append(m.stack)
    m.stack = []


def _pop(m: _Machine) -> None:
    if m.stack:
        m.stack.pop()
    else:
        m.marked()


def _remember(m: _Machine, index: int) -> None:
    m.memo[index] = m.stack[-1]


def _protocol(m: _Machine) -> None:
    if (version := m.cursor.uint(1)) > 5:
        raise PickleError(f"the pickle in it has protocol {version}, which is not known")


def _frame(m: _Machine) -> None:
    """How far Python may read ahead; nothing depends on it."""
    if m.cursor.uint(8) > m.cursor.left:
        raise PickleError("the pickle in it ends too early; is the file truncated?")


_PUSHES: dict[bytes, Callable[[_Machine], object]] = {
    b"N": lambda m: None,  # NONE
    b"\x88": lambda m: True,  # NEWTRUE
    b"\x89": lambda m: False,  # NEWFALSE
    b"K": lambda m: m.cursor.uint(1),  # BININT1
    b"M": lambda m: m.cursor.uint(2),  # BININT2
    b"J": lambda m: _integer(m.cursor.take(4)),  # BININT
    b"\x8a": lambda m: _integer(m.cursor.counted(1)),  # LONG1
    b"\x8b": lambda m: _integer(m.cursor.counted(4)),  # LONG4
    b"I": lambda m: _decimal(m.cursor.line()),  # INT
    b"L": lambda m: _decimal(m.cursor.line()),  # LONG
    b"G": lambda m: struct.unpack(">d", m.cursor.take(8))[0],  # BINFLOAT
    b"F": lambda m: float(m.cursor.line()),  # FLOAT
    b"\x8c": lambda m: m.cursor.text(1),  # SHORT_BINUNICODE
    b"X": lambda m: m.cursor.text(4),  # BINUNICODE
    b"\x8d": lambda m: m.cursor.text(8),  # BINUNICODE8
    b"V": lambda m: m.cursor.line().encode("latin-1").decode("raw_unicode_escape"),  # UNICODE
    b"U": (
        lambda m: m.cursor.counted(1).decode("latin-1")
    ),  # SHORT_BINSTRING: Python 2 text or bytes, both kept
    b"T": lambda m: m.cursor.counted(4).decode("latin-1"),  # BINSTRING
    b"S": lambda m: _quoted(m.cursor.line()),  # STRING
    b"C": lambda m: m.cursor.counted(1),  # SHORT_BINBYTES
    b"B": lambda m: m.cursor.counted(4),  # BINBYTES
    b"\x8e": lambda m: m.cursor.counted(8),  # BINBYTES8
    b"\x96": lambda m: m.cursor.counted(8),  # BYTEARRAY8
    b"}": lambda m: {},  # EMPTY_DICT
    b"]": lambda m: [],  # EMPTY_LIST
    b"\x8f": lambda m: [],  # EMPTY_SET: a list, nothing is hashed
    b")": lambda m: (),  # EMPTY_TUPLE
    b"t": lambda m: tuple(m.marked()),  # TUPLE
    b"\x85": lambda m: _tuple(m, 1),  # TUPLE1
    b"\x86": lambda m: _tuple(m, 2),  # TUPLE2
    b"\x87": lambda m: _tuple(m, 3),  # TUPLE3
    b"l": lambda m: m.marked(),  # LIST
    b"\x91": lambda m: m.marked(),  # FROZENSET
    b"d": _dict,  # DICT
    b"c": lambda m: m.name(m.cursor.line(), m.cursor.line()),  # GLOBAL
    b"\x93": _stack_global,  # STACK_GLOBAL
    b"R": _reduce,  # REDUCE
    b"i": _inst,  # INST
    b"o": _obj,  # OBJ
    b"\x81": _newobj,  # NEWOBJ
    b"\x92": _newobj_ex,  # NEWOBJ_EX
    b"Q": lambda m: m.persistent(m.stack.pop()),  # BINPERSID
    b"g": lambda m: m.memo[_decimal(m.cursor.line())],  # GET
    b"h": lambda m: m.memo[m.cursor.uint(1)],  # BINGET
    b"j": lambda m: m.memo[m.cursor.uint(4)],  # LONG_BINGET
}
_ACTS: dict[bytes, Callable[[_Machine], object]] = {
    b"\x80": _protocol,  # PROTO
    b"\x95": _frame,  # FRAME
    b"(": _mark,  # MARK
    b"0": _pop,  # POP
    b"1": lambda m: m.marked(),  # POP_MARK
    b"p": lambda m: _remember(m, _decimal(m.cursor.line())),  # PUT
    b"q": lambda m: _remember(m, m.cursor.uint(1)),  # BINPUT
    b"r": lambda m: _remember(m, m.cursor.uint(4)),  # LONG_BINPUT
    b"\x94": lambda m: _remember(m, len(m.memo)),  # MEMOIZE
    b"s": lambda m: _set_items(m, list(_tuple(m, 2))),  # SETITEM
    b"u": lambda m: _set_items(m, m.marked()),  # SETITEMS
    b"a": lambda m: _append(m, [m.stack.pop()]),  # APPEND
    b"e": lambda m: _append(m, m.marked()),  # APPENDS
    b"\x90": lambda m: _append(m, m.marked()),  # ADDITEMS
    b"b": _build,  # BUILD
}
