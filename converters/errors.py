"""Where `ConversionError` was before 0.2; it is `weightport.ConversionError`."""

from ..errors import ConversionError, printable

__all__ = ["ConversionError", "printable"]
