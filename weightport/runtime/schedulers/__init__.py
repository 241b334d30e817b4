"""The schedulers: diffusers' names, options and calls; few ideas. `base.py` says how they are
made."""

from . import discrete as diffusion
from . import exponential, flow
from . import sigmas as karras
from .base import Scheduler, SchedulerOutput
from .config import COMPATIBLE

SCHEDULERS: dict[str, type[Scheduler]] = {
    name: scheduler
    for module in (diffusion, karras, exponential, flow)
    for name, scheduler in vars(module).items()
    if name.endswith("Scheduler") and scheduler.__module__ == module.__name__
}
__all__ = ["COMPATIBLE", "SCHEDULERS", "Scheduler", "SchedulerOutput"]


def __getattr__(name: str) -> type[Scheduler]:
    if name in SCHEDULERS:
        return SCHEDULERS[name]
    raise AttributeError(f"there is no scheduler {name!r}")
