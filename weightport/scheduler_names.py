"""Short names of the schedulers, as people call them, for command lines and reports."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

KARRAS = {"use_karras_sigmas": True}
NAMES: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "pndm": ("PNDMScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-karras": ("EulerDiscreteScheduler", KARRAS),
    "euler-a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "kdpm2": ("KDPM2DiscreteScheduler", {}),
    "kdpm2-a": ("KDPM2AncestralDiscreteScheduler", {}),
    "dpm++2m": ("DPMSolverMultistepScheduler", {}),
    "dpm++2m-karras": ("DPMSolverMultistepScheduler", KARRAS),
    "dpm++2m-sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "dpm++2s": ("DPMSolverSinglestepScheduler", {}),
    "dpm++sde": ("DPMSolverSDEScheduler", {}),
    "deis": ("DEISMultistepScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "sa-solver": ("SASolverScheduler", {}),
    "lcm": ("LCMScheduler", {}),
    "tcd": ("TCDScheduler", {}),
}
STOCHASTIC = {"ddpm", "euler-a", "kdpm2-a", "dpm++2m-sde", "dpm++sde", "sa-solver", "lcm", "tcd"}


def named_scheduler(name: str, config: Mapping[str, Any]) -> Any:
    """The scheduler of a short name or a class name, for a model with the scheduler config `config`.

    Raises:
        ValueError: there is no such scheduler, or it cannot serve the model.
    """
    from .runtime.schedulers import SCHEDULERS

    class_name, options = NAMES.get(name, (name, {}))
    if class_name not in SCHEDULERS:
        close = difflib.get_close_matches(name, [*NAMES, *SCHEDULERS], 1)
        hint = f"did you mean {close[0]}?" if close else f"one of {', '.join(NAMES)}, or a class name"
        raise ValueError(f"there is no scheduler {name}; {hint}")
    return SCHEDULERS[class_name].from_config(config, **options)
