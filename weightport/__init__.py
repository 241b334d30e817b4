"""Offline checkpoint conversion for Stable Diffusion: KerasCV and diffusers, exact and in bounded
memory.

    import weightport

    weightport.inspect("unet.weights.h5")
    weightport.convert(["unet.weights.h5", "text_encoder.h5"], "my-model", base="sd15")

Nothing heavy is imported before it is used.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .runtime.registry import PUBLIC as _RUNTIME

if TYPE_CHECKING:
    from .api import compare_schedulers, convert, diff, inspect, parity
    from .converters.compare import Comparison
    from .converters.conversion import Conversion
    from .converters.inspection import Inspection
    from .errors import ConversionError
    from .parity.result import Parity
    from .push import Push, push
    from .runtime.public import *  # noqa: F403

    __version__: str

__all__ = [
    "Comparison",
    "Conversion",
    "ConversionError",
    "Inspection",
    "Parity",
    "Push",
    "compare_schedulers",
    "convert",
    "diff",
    "inspect",
    "parity",
    "push",
]
__all__ += [*_RUNTIME]

_HOMES = {
    "Comparison": "converters.compare",
    "Conversion": "converters.conversion",
    "ConversionError": "errors",
    "Inspection": "converters.inspection",
    "Parity": "parity.result",
    "Push": "push",
    "push": "push",
}
"""What is not in `api` -> its module."""


class _Package(ModuleType):
    """A public function keeps its name when a module of that name is imported: `parity`."""

    def __setattr__(self, name: str, value: object) -> None:
        if name in __all__ and isinstance(value, ModuleType):
            return
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name in _RUNTIME:
        return getattr(import_module(f".runtime.{_RUNTIME[name]}", __name__), name)
    if name == "__version__":
        from importlib.metadata import version

        return version("weightport")
    if name in __all__:
        return getattr(import_module(f".{_HOMES.get(name, 'api')}", __name__), name)
    raise AttributeError(f"module 'weightport' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__]
