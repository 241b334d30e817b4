"""Schedulers by the names that people call them, for command lines and reports."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from ..loading.options import Options
from . import SCHEDULERS
from .base import Scheduler

# name -> class, and the options that are meant
NAMES: dict[str, tuple[str, Options]] = {
    name: (class_name, options)
    for class_name, scheduler in SCHEDULERS.items()
    for name, options in vars(scheduler).get("names", {}).items()
}


def named_scheduler(name: str, config: Mapping[str, Any]) -> Scheduler:
    """The scheduler of a name, for a model with the scheduler config `config`.

    Args:
        name: one of `NAMES`, or the name of a class, with or without its endings; case does not
            matter.

    Raises:
        ValueError: there is no such scheduler, or it cannot serve the model.
    """
    classes = {_bare(known): known for known in SCHEDULERS}
    class_name, options = NAMES.get(name.lower(), (classes.get(_bare(name), ""), {}))
    if not class_name:
        close = difflib.get_close_matches(name, [*NAMES, *SCHEDULERS], 1)
        hint = (
            f"did you mean {close[0]}?" if close else f"one of {', '.join(NAMES)}, or a class name"
        )
        raise ValueError(f"there is no scheduler {name!r}; {hint}")
    return SCHEDULERS[class_name].from_config(config, **options)


def _bare(name: str) -> str:
    """The name of a class without its endings."""
    bare = name.lower().replace("-", "")
    for ending in ("scheduler", "discrete", "multistep"):
        bare = bare.removesuffix(ending)
    return bare
