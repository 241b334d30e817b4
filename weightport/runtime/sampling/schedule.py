"""Which timesteps a run visits: the scheduler's or the user's, and of these the part that strength,
start and end leave."""

from __future__ import annotations

import copy
import inspect
from threading import Lock
from typing import Any, Protocol

import torch
from torch import Tensor

from .arguments import Steps, require

_BEGINNING = Lock()  # who may change a scheduler that several threads have


class Scheduler(Protocol):
    """What a run asks of a scheduler, ours or another library's."""

    config: Any
    timesteps: Tensor
    num_inference_steps: Any

    @property
    def order(self) -> int:
        """Model calls a step."""
        ...

    @property
    def init_noise_sigma(self) -> Any:
        """The standard deviation of the first latents."""
        ...

    def set_timesteps(self, *arguments: Any, **named: Any) -> Any:
        """Begin a run of so many steps, or of these timesteps or sigmas."""
        ...

    def step(self, *arguments: Any, **named: Any) -> Any:
        """From one timestep to the next: model output, timestep, latents -> latents."""
        ...

    def scale_model_input(self, sample: Tensor, timestep: Any) -> Tensor:
        """What the model sees of the latents."""
        ...

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Any) -> Tensor:
        """Latents as they are at timesteps."""
        ...


def begin(
    shared: Scheduler,
    steps: Steps,
    device: torch.device,
    *,
    is_partial: bool = False,
    is_distilled: bool = False,
) -> tuple[Scheduler, Tensor]:
    """A scheduler for one run alone, and the timesteps that it visits.

    The scheduler that threads share shows the timesteps of the run that began last, and never
    steps.

    Args:
        shared: the pipeline's scheduler.
        steps: what is asked for.
        device: for the timesteps.
        is_partial: whether strength leaves out the first steps.
        is_distilled: whether it is an LCM, whose scheduler takes the strength itself.

    Raises:
        ValueError: the scheduler cannot take them, or none is left.
    """
    given: dict[str, Any] = {
        "timesteps": steps.timesteps,
        "sigmas": steps.sigmas,
        "original_inference_steps": steps.original_inference_steps,
        "strength": steps.strength if is_distilled and is_partial else None,
    }
    given = {name: value for name, value in given.items() if value is not None}
    is_custom = steps.timesteps is not None or steps.sigmas is not None
    for name in given.keys() - inspect.signature(shared.set_timesteps).parameters.keys():
        kind = type(shared).__name__
        raise ValueError(f"{kind} does not support {name}; choose another scheduler")
    if not is_custom:
        given["num_inference_steps"] = steps.num_inference_steps
    with _BEGINNING:
        shared.set_timesteps(device=device, **given)
        scheduler = copy.deepcopy(shared)
    scheduler.set_timesteps(device=device, **given)  # what a copy cannot take over is its own now
    timesteps = scheduler.timesteps
    count = len(timesteps) if is_custom else steps.num_inference_steps
    first = _first(scheduler, steps, count, is_partial and not is_distilled)
    if first:
        timesteps = timesteps[first:]
        if hasattr(scheduler, "set_begin_index"):  # else it looks the first timestep up
            scheduler.set_begin_index(first)
    end = steps.denoising_end
    if end is not None and 0 < end < 1:
        trained = scheduler.config.num_train_timesteps
        kept = int((timesteps >= round(trained - end * trained)).sum())
        timesteps = timesteps[:kept]
    advice = "raise num_inference_steps, strength or denoising_end"
    require(len(timesteps) > 0, f"no step is left of {count}: {advice}")
    return scheduler, timesteps


def _first(scheduler: Scheduler, steps: Steps, count: int, is_partial: bool) -> int:
    """How many timesteps are left out at the beginning."""
    start = steps.denoising_start
    if start is not None:
        trained = scheduler.config.num_train_timesteps
        left = int((scheduler.timesteps < round(trained - start * trained)).sum())
        left += scheduler.order == 2 and left % 2 == 0  # a step of two calls is not torn apart
        return len(scheduler.timesteps) - left
    if is_partial:
        return (count - min(int(count * steps.strength), count)) * scheduler.order
    return 0
