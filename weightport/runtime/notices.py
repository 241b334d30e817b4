"""What is said once: that a call has no effect here."""

from __future__ import annotations

import warnings
from functools import cache

SLICED = "has no effect: attention never holds all its scores, and is not sliced"
FUSED = "has no effect: projections are not fused, which would take the same time"


@cache
def say_once(message: str) -> None:
    """Warn, the first time."""
    warnings.warn(message, stacklevel=4)
