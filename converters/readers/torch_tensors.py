"""Turns the inert nodes of a torch pickle into lazy tensors, which lie in the file as views of
storages.

A storage is a run of elements of one type; a tensor is an offset, a shape and a stride in one, all
counted in elements. Written by torch's `_utils._rebuild_tensor*` and `storage` modules and by
numpy's `_reconstruct`.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Literal, TypeGuard

from ...errors import printable
from ...io.dtypes import ITEMSIZES, NAMES
from ..checkpoint import Computed, SourceFile, Stored, Tensor
from .pickle_globals import Global, PickleError
from .pickle_machine import Object

if TYPE_CHECKING:
    from ...io.arrays import Array

_EXPANDED = (
    1 << 20
)  # bytes that a tensor which repeats its elements may have beyond those of its storage
_TOO_LARGE = 1 << 63
RANK = 64  # dimensions a tensor may have
_WRAPPED = 8  # parameters of parameters
_KEY = re.compile(r"[0-9A-Za-z_.-]{1,64}")
# storage class -> (dtype, bytes of an element); a dtype that is none of `ITEMSIZES` is known by
# torch's name
_STORAGES = {
    "BFloat16Storage": ("BF16", 2), "BoolStorage": ("BOOL", 1), "ByteStorage": ("U8", 1),
    "CharStorage": ("I8", 1),
    "ComplexDoubleStorage": ("complex128", 16), "ComplexFloatStorage": ("complex64", 8),
    "DoubleStorage": ("F64", 8),
    "FloatStorage": ("F32", 4), "HalfStorage": ("F16", 2), "IntStorage": ("I32", 4),
    "LongStorage": ("I64", 8),
    "QInt32Storage": ("qint32", 4), "QInt8Storage": ("qint8", 1),
    "QUInt2x4Storage": ("quint2x4", 1),
    "QUInt4x2Storage": ("quint4x2", 1), "QUInt8Storage": ("quint8", 1), "ShortStorage": ("I16", 2),
    "UntypedStorage": ("U8", 1),
}  # fmt: skip
_PARAMETERS = {
    "torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state",
    "torch.nn.parameter.Parameter",
}  # fmt: skip
_TYPED = "torch._tensor._rebuild_from_type_v2"
_WRAPPERS = {*_PARAMETERS, _TYPED}
_PLAIN = {
    "torch.Tensor",
    "torch._tensor.Tensor",
    "torch.nn.parameter.Parameter",
    "torch.nn.parameter.Buffer",
}
_ARRAYS = {
    "numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct",
    "numpy.core.numeric._frombuffer",
    "numpy._core.numeric._frombuffer",
}  # fmt: skip
_MADE = re.compile(
    r"torch\._utils\._rebuild_\w+|torch\._tensor\._rebuild_from_type_v2|torch(\.\w+)*\.\w*Tensor"
)
# torch's functions -> how many arguments each has; what follows are bits
_ARGUMENTS = {"_rebuild_tensor": 4, "_rebuild_tensor_v2": 6, "_rebuild_tensor_v3": 7}
_DTYPE = 6  # which of them is the dtype, where there are so many
_NUMPY = {  # numpy's codes of element types, which PyTorch has too
    "f2": "F16", "f4": "F32", "f8": "F64", "i1": "I8", "i2": "I16", "i4": "I32", "i8": "I64",
    "u1": "U8", "b1": "BOOL",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Storage:
    """`numel` elements of the storage `key`, from element `first` on: all of it, except in files
    before torch 0.4."""

    key: str
    dtype: str
    itemsize: int
    numel: int
    first: int = 0


@dataclass(slots=True, eq=False)
class View:
    """A tensor as a view of a storage, not checked yet. `dtype` is None where the storage knows
    it."""

    storage: Storage
    offset: object
    shape: object
    stride: object
    dtype: str | None = None


class Storages:
    """The storages that a file declares, and where each lies once its container is known."""

    def __init__(self, file: SourceFile) -> None:
        self.file = file
        self.declared: dict[str, Storage] = {}
        self.starts: dict[str, int] = {}

    def persistent(self, identity: object) -> object:
        """What a persistent id of the pickle refers to: a storage, or in old files a class with its
        source code.

        Raises:
            PickleError: the id has another form, or says otherwise than another one of the same
                storage.
        """
        if isinstance(identity, tuple) and len(identity) == 5:  # of nearly every tensor: no match
            kind, cls, key, _, numel = identity
            if (
                kind == "storage"
                and isinstance(cls, Global)
                and isinstance(key, str | int)
                and isinstance(numel, int)
            ):
                return self.declare(cls, key, numel)
        match identity:
            case ("storage", Global() as cls, str() | int() as key, _, int(numel), None):
                return self.declare(cls, key, numel)
            case (
                "storage",
                Global() as cls,
                str() | int() as key,
                _,
                int(numel),
                (_, int(first), int(count)),
            ):
                return view_of(self.declare(cls, key, numel), first, count)
            case ("module", Global() as cls, _, _):
                return cls
        raise PickleError(
            "a reference of the pickle to its data has a form that PyTorch never writes"
        )

    def declare(self, cls: Global, key: str | int, numel: int) -> Storage:
        """The storage of a key, which every declaration must describe alike."""
        known = self.declared.get(str(key)[:80])
        dtype = _STORAGES.get(cls.name) if cls.module.partition(".")[0] == "torch" else None
        if known is not None and (known.dtype, known.itemsize) == dtype and known.numel == numel:
            return known
        if dtype is None or numel < 0 or not _KEY.fullmatch(str(key)[:80]):
            raise PickleError(
                f"storage `{printable(key)}` of {numel} elements in `{cls}` is none that PyTorch"
                " knows"
            )
        storage = Storage(str(key), *dtype, numel)
        if self.declared.setdefault(storage.key, storage) != storage:
            raise PickleError(
                f"storage `{storage.key}` is described in two ways; the file is damaged"
            )
        return storage

    def place(self, key: str, start: int, nbytes: int) -> None:
        """Say where a storage lies.

        Raises:
            PickleError: nothing declares it, or with another size.
        """
        if key not in self.declared or key in self.starts:
            raise PickleError(f"storage `{printable(key)}` belongs to no tensor, or is there twice")
        wanted = self.declared[key].numel * self.declared[key].itemsize
        if nbytes != wanted:
            raise PickleError(
                f"storage `{key}` has {nbytes} bytes, its tensors need {wanted}; is the file"
                " damaged?"
            )
        self.starts[key] = start

    def check_complete(self) -> None:
        """Raise if a declared storage is missing."""
        missing = self.declared.keys() - self.starts.keys()
        if missing:
            raise PickleError(
                f"{len(missing)} storages are missing (`{min(missing)}`); is the file complete?"
            )

    def tensor(self, name: str, node: object) -> Tensor | None:
        """The tensor that a node describes, or None if it describes something else.

        Raises:
            PickleError: it lies outside its storage, or is of a kind that cannot be converted.
        """
        node = _unwrapped(node)
        if isinstance(node, Object) and _makes_tensors(node.cls.dotted):
            if node.cls.dotted in _ARRAYS:
                return _numpy_tensor(name, node)
            node = _view(name, node)
        return self._placed(name, node) if isinstance(node, View) else None

    def _placed(self, name: str, view: View) -> Tensor:
        """Check the geometry: all elements inside the storage, no more of them than it has."""
        storage = view.storage
        dtype = view.dtype or view.storage.dtype
        if dtype not in ITEMSIZES:
            raise PickleError(
                f"`{printable(name)}` has dtype {printable(dtype)}, which is not supported"
            )
        shape = _sizes(name, view.shape)
        stride = _sizes(name, view.stride)
        offset = view.offset
        if not _is_size(offset):
            raise _no_sizes(name)
        itemsize = ITEMSIZES[dtype]
        stored = storage.numel * storage.itemsize
        count, last, is_contiguous = _geometry(shape, stride)
        end = (offset + last + 1) * itemsize
        if len(shape) != len(stride) or (count and end > stored):
            raise PickleError(
                f"`{printable(name)}` reaches outside its storage; the file is damaged"
            )
        if count * itemsize > max(stored, _EXPANDED):
            raise PickleError(
                f"`{printable(name)}` has {count} elements, more than its storage; the file is"
                " damaged"
            )
        start = (
            self.starts[storage.key]
            + storage.first * storage.itemsize
            + (offset * itemsize if count else 0)
        )
        if count == 0 or is_contiguous:
            return Stored(name, dtype, shape, self.file, start)
        run = Stored(name, dtype, (last + 1,), self.file, start)
        return Computed(
            name, dtype, shape, (run,), partial(_strided, shape, stride), "made contiguous"
        )


def view_of(storage: Storage, first: int, numel: int) -> Storage:
    """A part of a storage."""
    if first < 0 or numel < 0 or first + numel > storage.numel:
        raise PickleError(
            f"a view of storage `{storage.key}` reaches outside of it; the file is damaged"
        )
    return Storage(storage.key, storage.dtype, storage.itemsize, numel, storage.first + first)


def is_tensor(node: object) -> bool:
    """Whether a node describes a tensor, even one that cannot be read."""
    node = _unwrapped(node)
    if isinstance(node, Object):
        return _makes_tensors(node.cls.dotted)
    return isinstance(node, View)


@lru_cache(1000)
def _makes_tensors(name: str) -> bool:
    return name in _ARRAYS or _MADE.fullmatch(name) is not None


def _unwrapped(node: object) -> object:
    """The tensor in a parameter, or under the attributes that were saved with it."""
    if not isinstance(node, Object) or node.cls.dotted not in _WRAPPERS:
        return node  # nearly always
    for _ in range(_WRAPPED):
        if not isinstance(node, Object) or node.cls.dotted not in _WRAPPERS:
            break
        match node:
            case Object(cls=cls, args=(inner, *_)) if cls.dotted in _PARAMETERS:
                node = inner
            case Object(cls=cls, args=(Global() as rebuild, Global() as kind, tuple(args), _)) if (
                cls.dotted == _TYPED and kind.dotted in _PLAIN
            ):
                node = Object(rebuild, args)
            case _:
                break
    return node


def _view(name: str, node: Object) -> View:
    """The arguments of torch's functions; `bits` say that the elements are stored negated or
    conjugated."""
    args = node.args
    count = _ARGUMENTS.get(node.cls.name, len(args) + 1)
    if len(args) >= count and not any(args[count:]):
        storage, offset, shape, stride = args[:4]
        if isinstance(storage, Storage) and count <= _DTYPE:
            return View(storage, offset, shape, stride)
        dtype = args[_DTYPE] if count > _DTYPE else None
        if isinstance(storage, Storage) and isinstance(dtype, Global):
            return View(storage, offset, shape, stride, NAMES.get(dtype.name, dtype.name))
    raise PickleError(
        f"`{printable(name)}` is a tensor made by `{node.cls}`, which is not supported"
    )


def _sizes(name: str, node: object) -> tuple[int, ...]:
    """A shape or a stride; torch.Size wraps a tuple."""
    if isinstance(node, Object) and node.cls.dotted == "torch.Size" and len(node.args) == 1:
        node = node.args[0]
    if isinstance(node, tuple) and len(node) <= RANK and all(map(_is_size, node)):
        return node
    raise _no_sizes(name)


def _is_size(value: object) -> TypeGuard[int]:
    return type(value) is int and 0 <= value < _TOO_LARGE


def _no_sizes(name: str) -> PickleError:
    return PickleError(
        f"the shape, stride or offset of `{printable(name)}` is no list of sizes; the file is"
        " damaged"
    )


@lru_cache(1000)  # most tensors of a model are like others
def _geometry(shape: tuple[int, ...], stride: tuple[int, ...]) -> tuple[int, int, bool]:
    """How many elements there are, which place the last has, and whether they fill the places."""
    last = sum((size - 1) * step for size, step in zip(shape, stride, strict=False))
    is_contiguous = len(shape) == len(stride) and _is_contiguous(shape, stride)
    return math.prod(shape), last, is_contiguous


def _is_contiguous(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    expected = 1
    for size, step in zip(reversed(shape), reversed(stride), strict=True):
        if size != 1 and step != expected:
            return False
        expected *= size
    return True


def _strided(shape: tuple[int, ...], stride: tuple[int, ...], run: Array) -> Array:
    import numpy as np

    steps = [step * run.itemsize for step in stride]
    return np.lib.stride_tricks.as_strided(run, shape, steps, writeable=False).copy(order="C")


# ---- numpy arrays


def _numpy_tensor(name: str, node: Object) -> Tensor:
    """An array whose elements stand in the pickle itself."""
    match node:
        case Object(state=(_, tuple(shape), dtype, bool(fortran), data)):
            order: Literal["C", "F"] = "F" if fortran else "C"
        case Object(args=(data, dtype, tuple(shape), "C" | "F" as written)):
            order = "F" if written == "F" else "C"
        case _:
            raise PickleError(
                f"`{printable(name)}` is a numpy array of a kind that is not supported"
            )
    code = _numpy_code(dtype)
    raw = _numpy_bytes(data)
    sizes = _sizes(name, shape)
    if code is None or raw is None or math.prod(sizes) * int(code[-1]) != len(raw):
        raise PickleError(f"`{printable(name)}` is a numpy array of a kind that is not supported")
    import numpy as np

    array = np.frombuffer(raw, code).reshape(sizes, order=order)
    values = partial(_array, array)
    return Computed(name, _NUMPY[code[1:]], sizes, (), values, "from a numpy array")


def _array(array: Array) -> Array:
    return array.astype(array.dtype.newbyteorder("<"), order="C")


def _numpy_code(dtype: object) -> str | None:
    """Like `<f4`; None if it is no simple type."""
    match dtype:
        case Object(cls=cls, args=(str(code), *_), state=(_, "<" | ">" | "|" | "=" as order, *_)):
            return order + code if cls.dotted == "numpy.dtype" and code in _NUMPY else None
    return None


def _numpy_bytes(data: object) -> bytes | None:
    """Protocol 2 writes bytes as Latin-1 text and `_codecs.encode`, Python 2 as text."""
    match data:
        case Object(cls=Global("_codecs", "encode"), args=(str(text), "latin1" | "latin-1")):
            data = text
    try:
        return (
            data
            if isinstance(data, bytes)
            else data.encode("latin-1")
            if isinstance(data, str)
            else None
        )
    except UnicodeEncodeError:
        return None


def understood(names: frozenset[Global]) -> frozenset[Global]:
    """Those of the names that torch and numpy use to describe tensors."""
    modules = {
        "torch",
        "torch.cuda",
        "torch.storage",
        "torch._utils",
        "torch._tensor",
        "torch.nn.parameter",
    }
    return frozenset(
        name for name in names if name.module in modules or name.module.partition(".")[0] == "numpy"
    )
