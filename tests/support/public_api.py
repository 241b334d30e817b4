"""The public API as text, a line a call: what `import weightport` offers, with parameters and defaults.

python -m tests.support.public_api > tests/golden/public_api.txt
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from typing import Any

import weightport


def lines() -> Iterator[str]:
    """Every public name; of a class also its constructor and public methods."""
    for name in sorted(weightport.__all__):
        value = getattr(weightport, name)
        if isinstance(value, type):
            yield f"{name}{_parameters(value)}"
            yield from _methods(name, value)
        elif callable(value):
            yield f"{name}{_parameters(value)}"
        else:
            yield name


def _methods(name: str, kind: type) -> Iterator[str]:
    """Public methods and properties that are ours, inherited ones included; not those of torch."""
    for attribute in sorted(dir(kind)):
        if attribute.startswith("_") and attribute != "__call__":
            continue
        owner = next(base for base in kind.__mro__ if attribute in vars(base))
        if not owner.__module__.startswith("weightport"):
            continue
        value = inspect.getattr_static(kind, attribute)
        if isinstance(value, property):
            yield f"{name}.{attribute}"
        elif callable(getattr(kind, attribute)):
            yield f"{name}.{attribute}{_parameters(getattr(kind, attribute))}"


def _parameters(value: Any) -> str:
    """The signature without annotations."""
    try:
        signature = inspect.signature(value)
    except ValueError:
        return "(?)"
    bare = [
        parameter.replace(annotation=inspect.Parameter.empty)
        for parameter in signature.parameters.values()
    ]
    text = str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty))
    return text.replace(repr(sys.executable), "sys.executable")


if __name__ == "__main__":
    print(*lines(), sep="\n")
