"""The schedulers: diffusers' names, options and calls; few ideas. `base.py` says how they are made."""

from .base import Scheduler, SchedulerOutput
from .config import COMPATIBLE
from .diffusion import DDIMInverseScheduler, DDIMScheduler, DDPMScheduler, PNDMScheduler
from .exponential import DPMSolverMultistepScheduler
from .karras import EulerDiscreteScheduler

SCHEDULERS: dict[str, type[Scheduler]] = {
    scheduler.__name__: scheduler
    for scheduler in (
        DDIMInverseScheduler,
        DDIMScheduler,
        DDPMScheduler,
        DPMSolverMultistepScheduler,
        EulerDiscreteScheduler,
        PNDMScheduler,
    )
}

__all__ = ["COMPATIBLE", "SCHEDULERS", "Scheduler", "SchedulerOutput", *SCHEDULERS]
