"""Offline checkpoint conversion for Stable Diffusion: KerasCV and diffusers, exact and in bounded memory.

    import weightport

    weightport.inspect("unet.weights.h5")
    weightport.convert(["unet.weights.h5", "text_encoder.h5"], "my-model", base="sd15")

Nothing heavy is imported before it is used.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import Comparison, Conversion, ConversionError, Inspection, convert, diff, inspect

__all__ = ["Comparison", "Conversion", "ConversionError", "Inspection", "convert", "diff", "inspect"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from . import api

        return getattr(api, name)
    raise AttributeError(f"module 'weightport' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
