"""Which names a pickle may use: the policy of the pickle reader, on top of a machine that calls
nothing anyway.

A checkpoint needs classes of its trainer, which are left alone, and very few names of the standard
library. A name of the standard library that is not listed here, and anything that is called without
being a class, is what malicious pickles are made of: such a file is refused by that name. No list
of known gadgets is needed.
"""

from __future__ import annotations

import re
import sys
from _compat_pickle import IMPORT_MAPPING
from dataclasses import dataclass
from functools import cached_property

from ...errors import printable


class PickleError(ValueError):
    """A pickle is damaged, too large or refused; the message goes after the name of the file."""


@dataclass(frozen=True)
class Global:
    """A name that a pickle mentions. It is text: nothing is imported."""

    module: str
    name: str

    @cached_property
    def dotted(self) -> str:
        """The whole name."""
        return f"{self.module}.{self.name}"

    @cached_property
    def is_called(self) -> bool:
        """Whether checkpoints call it, with any arguments: a class, or one of the few functions
        that torch and numpy write."""
        if self.dotted in _ACCESS:
            return False
        return is_standard(self) or _is_class(self) or _is_known(self)

    def __str__(self) -> str:
        return printable(self.dotted)


# The standard library of every Python, so that the verdict does not depend on the one that runs.
_REMOVED = (
    "asynchat asyncore binhex commands distutils dummy_threading formatter imp macpath parser"
    " popen2 smtpd symbol"
)
_ADDED = "_colorize _interpreters _pyrepl annotationlib compression"
_STDLIB = frozenset(
    name.partition(".")[0]
    for name in (*sys.stdlib_module_names, *IMPORT_MAPPING, *_REMOVED.split(), *_ADDED.split())
)
_PYTHON2 = {
    "__builtin__": "builtins",
    "copy_reg": "copyreg",
}  # protocol 2, which torch writes, has the old names
_PATHS = "Path PosixPath PurePath PurePosixPath PureWindowsPath WindowsPath"
_INERT = {
    module: frozenset(names.split())
    for module, names in {
        "_codecs": "encode",
        "_operator": "getitem",
        "argparse": "Namespace",
        "builtins": (
            "bool bytearray bytes complex dict float frozenset getattr int list long object range"
            " set slice str tuple type unicode xrange"
        ),
        "collections": "Counter OrderedDict defaultdict deque",
        "copyreg": "_reconstructor",
        "datetime": "date datetime time timedelta timezone",
        "decimal": "Decimal",
        "fractions": "Fraction",
        "functools": "partial",
        "inspect": "Parameter Signature _ParameterKind",
        "pathlib": _PATHS,
        "pathlib._local": _PATHS,  # Python 3.13
        "types": "GenericAlias SimpleNamespace",
        "uuid": "SafeUUID UUID",
    }.items()
}
_CLASSES = frozenset({"enum", "typing"})  # of these, every class
_ACCESS = frozenset({"builtins.getattr", "_operator.getitem"})  # only of a class
_FUNCTIONS = frozenset({  # what torch and numpy write that is no class, or one in lower case
    "numpy._core.multiarray._reconstruct", "numpy._core.multiarray.scalar",
    "numpy._core.numeric._frombuffer",
    "numpy.core.multiarray._reconstruct", "numpy.core.multiarray.scalar",
    "numpy.core.numeric._frombuffer",
    "numpy.dtype", "numpy.random.__RandomState_ctor", "numpy.random._pickle.__bit_generator_ctor",
    "numpy.random._pickle.__generator_ctor", "numpy.random._pickle.__randomstate_ctor",
    "torch._tensor._rebuild_from_type_v2", "torch.device", "torch.serialization._get_layout",
})  # fmt: skip
_MAX_NAME = 512
_CLASS = re.compile(r"_*[A-Z]\w*")
_REBUILD = re.compile(r"_rebuild_\w+")  # torch._utils: one function per kind of tensor


def named(module: str, name: str) -> Global:
    """The name a pickle mentions, in the spelling of Python 3.

    Raises:
        PickleError: it belongs to the standard library and no checkpoint needs it, or it reaches
            through a module.
    """
    if len(module) + len(name) > _MAX_NAME:
        raise PickleError("a name in it is too long to be one; the file is damaged")
    found = Global(_PYTHON2.get(module, module), name)
    if is_standard(found) and not _is_inert(found):
        raise PickleError(
            f"it names `{found}`, which no checkpoint needs: the file may be malicious"
        )
    *outer, _ = name.split(".")
    if not all(map(_CLASS.fullmatch, outer)):
        raise PickleError(
            f"it names `{found}`, which reaches through a module: the file may be malicious"
        )
    return found


def is_standard(name: Global) -> bool:
    """Whether a name belongs to the standard library of any Python."""
    return name.module.partition(".")[0] in _STDLIB


def _is_inert(name: Global) -> bool:
    if name.module in _CLASSES:
        return _CLASS.fullmatch(name.name) is not None
    return name.name in _INERT.get(name.module, ())


def check_access(name: Global, args: tuple[object, ...]) -> None:
    """A pickle calls `name(*args)`, which is not called with any arguments.

    Raises:
        PickleError: it reaches for something else than a member of a class.
    """
    if name.dotted not in _ACCESS:
        raise PickleError(f"it calls `{name}`, which is not a class: the file may be malicious")
    if not _is_access(name, args):
        raise PickleError(
            f"it calls `{name}` on something else than a class: the file may be malicious"
        )


def _is_access(function: Global, args: tuple[object, ...]) -> bool:
    """`getattr(Enumeration, "MEMBER")`, as Python 3.11 writes members, or `getitem(typing.List,
    int)`."""
    match args:
        case (Global() as owner, str(member)) if function.name == "getattr":
            public = member.isidentifier() and not member.startswith("_")
            return public and _is_class(owner) and not is_standard(owner)
        case (Global("typing"), _):
            return function.name == "getitem"
    return False


def _is_class(name: Global) -> bool:
    return _CLASS.fullmatch(name.name.rpartition(".")[2]) is not None


def _is_known(name: Global) -> bool:
    if name.module == "torch._utils":
        return _REBUILD.fullmatch(name.name) is not None
    return name.dotted in _FUNCTIONS
