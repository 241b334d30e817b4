"""Schedulers by the names that people call them, for command lines and reports."""

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
STOCHASTIC = {  # classes whose runs depend on more noise than what they begin with
    "CMStochasticIterativeScheduler",
    "CosineDPMSolverMultistepScheduler",
    "DDPMScheduler",
    "DPMSolverSDEScheduler",
    "EulerAncestralDiscreteScheduler",
    "FlowMatchLCMScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "LCMScheduler",
    "SASolverScheduler",
    "TCDScheduler",
}


def named_scheduler(name: str, config: Mapping[str, Any]) -> Any:
    """The scheduler of a name, for a model with the scheduler config `config`.

    Args:
        name: one of `NAMES`, or the name of a class, with or without its endings; case does not
            matter.

    Raises:
        ValueError: there is no such scheduler, or it cannot serve the model.
    """
    from . import SCHEDULERS

    classes = {_bare(known): known for known in SCHEDULERS}
    class_name, options = NAMES.get(name.lower(), (classes.get(_bare(name), ""), {}))
    if not class_name:
        close = difflib.get_close_matches(name, [*NAMES, *SCHEDULERS], 1)
        hint = (
            f"did you mean {close[0]}?" if close else f"one of {', '.join(NAMES)}, or a class name"
        )
        raise ValueError(f"there is no scheduler {name!r}; {hint}")
    return SCHEDULERS[class_name].from_config(config, **options)


def is_stochastic(scheduler: Any) -> bool:
    """Whether a run adds noise, so that it does not follow the probability flow ODE."""
    return type(scheduler).__name__ in STOCHASTIC or str(
        scheduler.config.get("algorithm_type")
    ).startswith("sde-")


def _bare(name: str) -> str:
    return (
        name.lower()
        .replace("-", "")
        .removesuffix("scheduler")
        .removesuffix("discrete")
        .removesuffix("multistep")
    )
