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
from itertools import repeat
from typing import NoReturn, TypeVar

from ...errors import printable
from ..checkpoint import SourceFile
from .pickle_cursor import Cursor
from .pickle_globals import Global, PickleError, check_access, named

_MAX_INSTRUCTIONS = 3_000_000  # of one pickle; 100,000 tensors have 2.2 million
_MAX_INTEGER = 1 << 10  # bytes
_UINT4 = struct.Struct("<I").unpack_from
_INT4 = struct.Struct("<i").unpack_from
_NOTHING = object()  # where the memo has a gap
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


@dataclass(slots=True, eq=False)
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
        self.memo: list[object] = []  # picklers number what they remember one by one
        self.names: dict[tuple[str, str], Global] = {}

    def run(self) -> object:
        """Follow the instructions up to STOP.

        Those that nine of ten are follow right here, where they cost a third. A tuple, a text or
        an object that was made is mostly remembered by the next instruction, which is followed and
        counted with it.
        """
        cursor = self.cursor
        memo = self.memo
        stack = self.stack
        data = cursor.data
        at = cursor.next
        last = cursor.last
        for _ in range(_MAX_INSTRUCTIONS):
            if at >= last:
                cursor.next = at
                cursor.read_ahead()
                data = cursor.data
                at = cursor.next
                last = cursor.last
            code = data[at]
            at += 1
            if code == 0x68:  # BINGET
                value = memo[data[at]]
                if value is _NOTHING:
                    raise IndexError
                stack.append(value)
                at += 1
                continue
            if code == 0x4B:  # BININT1
                stack.append(data[at])
                at += 1
                continue
            if code == 0x28:  # MARK
                self.below.append(stack)
                stack = []
                continue
            if code == 0x4A:  # BININT
                stack.append(_INT4(data, at)[0])
                at += 4
                continue
            if code in _CONSTANTS:
                stack.append(_CONSTANTS[code])
                continue
            if code == 0x4D:  # BININT2
                stack.append(data[at] | data[at + 1] << 8)
                at += 2
                continue
            if code in _EMPTY:
                stack.append(_EMPTY[code]())
                continue
            if code == 0x74:  # TUPLE
                values = tuple(stack)
                stack = self.below.pop()
                stack.append(values)
            elif code == 0x85:  # TUPLE1
                stack[-1] = (stack[-1],)
            elif code == 0x52:  # REDUCE
                args = stack.pop()
                stack[-1] = _called(stack[-1], args)
            elif code == 0x58:  # BINUNICODE
                end = at + 4 + _UINT4(data, at)[0]
                if end > last:
                    cursor.next = at
                    stack.append(cursor.text(4))
                    data = cursor.data
                    at = cursor.next
                    last = cursor.last
                    continue
                stack.append(data[at + 4 : end].decode("utf-8", "surrogatepass"))
                at = end
            elif code == 0x51:  # BINPERSID
                stack[-1] = self.persistent(stack[-1])
                continue
            elif code == 0x86:  # TUPLE2
                second = stack.pop()
                stack[-1] = (stack[-1], second)
            elif code == 0x71:  # BINPUT
                self.remember(data[at], stack[-1])
                at += 1
                continue
            elif code == 0x72:  # LONG_BINPUT
                at -= 1
            elif code == 0x2E:  # STOP
                self.stack = stack
                cursor.next = at
                return self._result()
            else:
                self.stack = stack
                cursor.next = at
                self._follow(code)
                stack = self.stack
                data = cursor.data
                at = cursor.next
                last = cursor.last
                continue
            if data[at] == 0x72:  # LONG_BINPUT
                index = _UINT4(data, at + 1)[0]
                if index == len(memo):
                    memo.append(stack[-1])
                else:
                    self.remember(index, stack[-1])
                at += 5
            elif data[at] == 0x94:  # MEMOIZE
                memo.append(stack[-1])
                at += 1
        raise PickleError(
            f"the pickle in it has more than {_MAX_INSTRUCTIONS} instructions; no checkpoint needs"
            " that"
        )

    def _follow(self, code: int) -> None:
        """Follow one of the other instructions."""
        if code in _ACTS:
            _ACTS[code](self)
        elif code in _PUSHES:
            value = _PUSHES[code](self)  # which may exchange the stack
            self.stack.append(value)
        elif self.cursor.left < 0:
            raise self.cursor.ended(1)
        else:
            raise PickleError(
                f"the pickle in it is damaged, or uses instruction {bytes([code])!r}, which PyTorch"
                " never does"
            )

    def _result(self) -> object:
        value = self.stack.pop()
        if self.stack or self.below:
            raise PickleError("the pickle in it is damaged: values are left over")
        return value

    def remember(self, index: int, value: object) -> None:
        """Put a value into the memo."""
        if not 0 <= index < _MAX_INSTRUCTIONS:
            raise PickleError("the pickle in it is damaged: a number in its memo is too large")
        self.memo.extend(repeat(_NOTHING, index + 1 - len(self.memo)))
        self.memo[index] = value

    def remembered(self, index: int) -> object:
        """A value in the memo."""
        value = self.memo[index] if index >= 0 else _NOTHING
        if value is _NOTHING:
            raise IndexError
        return value

    def top(self, kind: type[_T]) -> _T:
        """Take the top of the stack, which must be of a kind."""
        return _typed(self.stack.pop(), kind)

    def last(self, count: int) -> list[object]:
        """Take so many values from the top of the stack."""
        values = self.stack[-count:]
        if len(values) < count:
            raise IndexError
        del self.stack[-count:]
        return values

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
    if isinstance(function, Global):
        arguments = _typed(args, tuple)
        if not function.is_called:
            check_access(function, arguments)
        return Object(function, arguments)
    what = (
        f"what `{function.cls}` returns" if isinstance(function, Object) else f"a {_kind(function)}"
    )
    raise PickleError(f"it calls {what}, which is not a class: the file may be malicious")


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


def _dict(m: _Machine) -> dict[object, object]:
    result: dict[object, object] = {}
    _set(result, m.marked())
    return result


# ---- instructions that change something


def _set(items: dict[object, object], pairs: list[object]) -> None:
    if len(pairs) % 2:
        raise PickleError("the pickle in it is damaged: a key without a value")
    values = iter(pairs)
    for key, value in zip(values, values, strict=True):
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


def _pop(m: _Machine) -> None:
    if m.stack:
        m.stack.pop()
    else:
        m.marked()


def _protocol(m: _Machine) -> None:
    if (version := m.cursor.uint(1)) > 5:
        raise PickleError(f"the pickle in it has protocol {version}, which is not known")


def _frame(m: _Machine) -> None:
    """How far Python may read ahead; nothing depends on it."""
    if m.cursor.uint(8) > m.cursor.left:
        raise PickleError("the pickle in it ends too early; is the file truncated?")


_CONSTANTS: dict[int, object] = {
    0x4E: None,  # NONE
    0x88: True,  # NEWTRUE
    0x89: False,  # NEWFALSE
    0x29: (),  # EMPTY_TUPLE
}
_EMPTY: dict[int, Callable[[], object]] = {
    0x7D: dict,  # EMPTY_DICT
    0x5D: list,  # EMPTY_LIST
    0x8F: list,  # EMPTY_SET: nothing is hashed
}
_PUSHES: dict[int, Callable[[_Machine], object]] = {
    0x4D: lambda m: m.cursor.uint(2),  # BININT2
    0x4A: lambda m: _integer(m.cursor.fixed(4)),  # BININT
    0x8A: lambda m: _integer(m.cursor.counted(1)),  # LONG1
    0x8B: lambda m: _integer(m.cursor.counted(4)),  # LONG4
    0x49: lambda m: _decimal(m.cursor.line()),  # INT
    0x4C: lambda m: _decimal(m.cursor.line()),  # LONG
    0x47: lambda m: struct.unpack(">d", m.cursor.fixed(8))[0],  # BINFLOAT
    0x46: lambda m: float(m.cursor.line()),  # FLOAT
    0x8C: lambda m: m.cursor.text(1),  # SHORT_BINUNICODE
    0x8D: lambda m: m.cursor.text(8),  # BINUNICODE8
    0x56: lambda m: m.cursor.line().encode("latin-1").decode("raw_unicode_escape"),  # UNICODE
    0x55: (
        lambda m: m.cursor.counted(1).decode("latin-1")
    ),  # SHORT_BINSTRING: Python 2 text or bytes, both kept
    0x54: lambda m: m.cursor.counted(4).decode("latin-1"),  # BINSTRING
    0x53: lambda m: _quoted(m.cursor.line()),  # STRING
    0x43: lambda m: m.cursor.counted(1),  # SHORT_BINBYTES
    0x42: lambda m: m.cursor.counted(4),  # BINBYTES
    0x8E: lambda m: m.cursor.counted(8),  # BINBYTES8
    0x96: lambda m: m.cursor.counted(8),  # BYTEARRAY8
    0x87: lambda m: tuple(m.last(3)),  # TUPLE3
    0x6C: lambda m: m.marked(),  # LIST
    0x91: lambda m: m.marked(),  # FROZENSET
    0x64: _dict,  # DICT
    0x63: lambda m: m.name(m.cursor.line(), m.cursor.line()),  # GLOBAL
    0x93: _stack_global,  # STACK_GLOBAL
    0x69: _inst,  # INST
    0x6F: _obj,  # OBJ
    0x81: _newobj,  # NEWOBJ
    0x92: _newobj_ex,  # NEWOBJ_EX
    0x67: lambda m: m.remembered(_decimal(m.cursor.line())),  # GET
    0x6A: lambda m: m.remembered(m.cursor.uint(4)),  # LONG_BINGET
}
_ACTS: dict[int, Callable[[_Machine], object]] = {
    0x80: _protocol,  # PROTO
    0x95: _frame,  # FRAME
    0x30: _pop,  # POP
    0x31: lambda m: m.marked(),  # POP_MARK
    0x70: lambda m: m.remember(_decimal(m.cursor.line()), m.stack[-1]),  # PUT
    0x94: lambda m: m.memo.append(m.stack[-1]),  # MEMOIZE
    0x73: lambda m: _set_items(m, m.last(2)),  # SETITEM
    0x75: lambda m: _set_items(m, m.marked()),  # SETITEMS
    0x61: lambda m: _append(m, [m.stack.pop()]),  # APPEND
    0x65: lambda m: _append(m, m.marked()),  # APPENDS
    0x90: lambda m: _append(m, m.marked()),  # ADDITEMS
    0x62: _build,  # BUILD
}
