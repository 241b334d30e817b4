"""The schedulers: diffusers' names, options and calls; few ideas. `base.py` says how they are
made."""

from .base import Scheduler, SchedulerOutput
from .deis import DEISMultistepScheduler
from .discrete import (
    DDIMInverseScheduler,
    DDIMScheduler,
    DDPMScheduler,
    IPNDMScheduler,
    KerasCVScheduler,
    PNDMScheduler,
)
from .distilled import LCMScheduler, TCDScheduler
from .dpm import (
    CosineDPMSolverMultistepScheduler,
    DPMSolverMultistepInverseScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EDMDPMSolverMultistepScheduler,
)
from .edm import CMStochasticIterativeScheduler, EDMEulerScheduler
from .flow import (
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
)
from .sa import SASolverScheduler
from .sigmas import EulerAncestralDiscreteScheduler, EulerDiscreteScheduler, LMSDiscreteScheduler
from .two_stage import (
    DPMSolverSDEScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
)
from .unipc import UniPCMultistepScheduler

SCHEDULERS: dict[str, type[Scheduler]] = dict(sorted(Scheduler.known.items()))
COMPATIBLE = tuple(name for name, scheduler in SCHEDULERS.items() if scheduler.compatible)

__all__ = [
    "COMPATIBLE",
    "SCHEDULERS",
    "CMStochasticIterativeScheduler",
    "CosineDPMSolverMultistepScheduler",
    "DDIMInverseScheduler",
    "DDIMScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepInverseScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSDEScheduler",
    "DPMSolverSinglestepScheduler",
    "EDMDPMSolverMultistepScheduler",
    "EDMEulerScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "FlowMatchLCMScheduler",
    "HeunDiscreteScheduler",
    "IPNDMScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KerasCVScheduler",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "SASolverScheduler",
    "Scheduler",
    "SchedulerOutput",
    "TCDScheduler",
    "UniPCMultistepScheduler",
]
