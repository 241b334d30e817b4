"""Schedulers by the names that people call them, for command lines and reports."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from ..loading.options import Options
from . import SCHEDULERS
from .base import Scheduler
from .config import RESPACING
from .flow import FlowSolver

# what the name of a class means for a flow, where another one is meant
FLOWS = {
    "EulerDiscreteScheduler": "FlowMatchEulerDiscreteScheduler",
    "HeunDiscreteScheduler": "FlowMatchHeunDiscreteScheduler",
    "LCMScheduler": "FlowMatchLCMScheduler",
}
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
    if class_name and is_of_flow(config):
        return _of_flow(name, class_name, options, config)
    if not class_name:
        close = difflib.get_close_matches(name, [*NAMES, *SCHEDULERS], 1)
        hint = (
            f"did you mean {close[0]}?" if close else f"one of {', '.join(NAMES)}, or a class name"
        )
        raise ValueError(f"there is no scheduler {name!r}; {hint}")
    return SCHEDULERS[class_name].from_config(config, **options)


def is_of_flow(config: Mapping[str, Any]) -> bool:
    """Whether a model with this scheduler config is one of a flow."""
    is_own = "shift" in config and "beta_start" not in config
    return is_own or config.get("prediction_type") == "flow_prediction"


def _of_flow(name: str, class_name: str, options: Options, config: Mapping[str, Any]) -> Scheduler:
    """The solver that a name means for a flow: one that knows nothing else, or one that can be told
    to solve one.

    Raises:
        ValueError: it solves no flows, or none with these options.
    """
    kind = SCHEDULERS[FLOWS.get(class_name, class_name)]
    if issubclass(kind, FlowSolver):
        return kind.from_config(config, **options)
    if "use_flow_sigmas" not in kind.defaults or set(options) & set(RESPACING):
        raise ValueError(f"{name} cannot serve a model of a flow, as SD 3 and Flux are")
    flow = {
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "flow_shift": config.get("shift", config.get("flow_shift", 1.0)),
    }
    return kind.from_config(config, **flow, **options)


def _bare(name: str) -> str:
    """The name of a class without its endings."""
    bare = name.lower().replace("-", "")
    for ending in ("scheduler", "discrete", "multistep"):
        bare = bare.removesuffix(ending)
    return bare
