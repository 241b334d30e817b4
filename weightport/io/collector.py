"""Python's search for garbage, put off where many objects are made of which none is garbage."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

_PATIENCE = 20_000  # new objects that a search is put off for; Python's own is 700, or 2,000


@contextmanager
def collector_paused() -> Iterator[None]:
    """No search within; it looks at every object there is, again and again, which takes longer than
    to make them."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


@contextmanager
def collector_patient() -> Iterator[None]:
    """Fewer searches within; for a program, which makes tens of thousands of objects that stay
    before it does anything."""
    before = gc.get_threshold()
    gc.set_threshold(_PATIENCE, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)
