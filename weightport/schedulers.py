"""The schedulers, where scripts look for them."""

from .runtime.schedulers import *  # noqa: F403
from .runtime.schedulers import __all__ as _NAMES
from .runtime.schedulers.ays import AysSchedules

__all__ = ["AysSchedules"]
__all__ += [*_NAMES]
