"""Which timesteps a run visits: the scheduler's or the user's, and of these the part that strength,
start and end leave."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Collection
from dataclasses import dataclass
from threading import Lock
from typing import Any, Protocol

import numpy as np
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


class _OfFlows:
    """Another library's scheduler of a flow in these words: the first latents are plain noise, the
    model sees them as they are, and noise is added by `scale_noise`."""

    init_noise_sigma = 1.0

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler

    def __getattr__(self, name: str) -> Any:
        return getattr(self._scheduler, name)

    def scale_model_input(self, sample: Tensor, timestep: Any) -> Tensor:
        return sample

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Any) -> Tensor:
        noisy: Tensor = self._scheduler.scale_noise(original_samples, timesteps, noise)
        return noisy


@dataclass(frozen=True)
class Flow:
    """How a model of a flow visits it.

    Attributes:
        patches: of the image: the more, the further is the flow shifted towards noise, where the
            scheduler's config asks for that.
        max_shift: how far for many patches, where the config does not say.
        is_even: whether σ goes from 1 in even steps, and not as the scheduler spaces it.
    """

    patches: int
    max_shift: float
    is_even: bool

    def given(self, scheduler: Scheduler, steps: Steps) -> dict[str, Any]:
        """What the scheduler is told beside the steps that the user asks for."""
        config = scheduler.config
        told: dict[str, Any] = {}
        mu = steps.mu
        if mu is None and config.get("use_dynamic_shifting"):
            mu = self._mu(config)
        if mu is not None:
            told["mu"] = mu
        is_free = steps.sigmas is None and steps.timesteps is None
        spaces_itself = config.get("use_flow_sigmas") or "sigmas" not in _taken(scheduler)
        if self.is_even and is_free and not spaces_itself:
            count = steps.num_inference_steps
            told["sigmas"] = np.linspace(1.0, 1 / count, count)
        return told

    def _mu(self, config: Any) -> float:
        """A straight line through two numbers of patches (Esser et al., Scaling Rectified Flow
        Transformers, section 5.3.2, as Flux has it)."""
        low = config.get("base_image_seq_len", 256)
        high = config.get("max_image_seq_len", 4096)
        base = config.get("base_shift", 0.5)
        slope = (config.get("max_shift", self.max_shift) - base) / (high - low)
        start = base - slope * low
        mu: float = self.patches * slope + start
        return mu


def _taken(scheduler: Scheduler) -> Collection[str]:
    """What else than a number of steps a run of the scheduler can be made of."""
    known: Collection[str] = inspect.signature(scheduler.set_timesteps).parameters.keys()
    return getattr(scheduler, "takes", known)


def begin(
    shared: Scheduler,
    steps: Steps,
    device: torch.device,
    *,
    is_partial: bool = False,
    is_distilled: bool = False,
    flow: Flow | None = None,
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
        flow: how a model of a flow visits it.

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
    if flow is not None:
        given |= flow.given(shared, steps)
    is_custom = "timesteps" in given or "sigmas" in given
    for name in given.keys() - inspect.signature(shared.set_timesteps).parameters.keys():
        kind = type(shared).__name__
        raise ValueError(f"{kind} does not support {name}; choose another scheduler")
    if not is_custom:
        given["num_inference_steps"] = steps.num_inference_steps
    with _BEGINNING:
        shared.set_timesteps(device=device, **given)
        scheduler = copy.deepcopy(shared)
    scheduler.set_timesteps(device=device, **given)  # what a copy cannot take over is its own now
    if not hasattr(scheduler, "add_noise"):
        scheduler = _OfFlows(scheduler)
    timesteps = scheduler.timesteps
    count = len(timesteps) if is_custom else steps.num_inference_steps
    is_cut = is_partial and not is_distilled
    first = _first(scheduler, steps, count, is_cut, rounds_down=flow is not None)
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


def _first(
    scheduler: Scheduler, steps: Steps, count: int, is_partial: bool, *, rounds_down: bool
) -> int:
    """How many timesteps are left out at the beginning; where strength leaves a part of a step,
    that is rounded up or down."""
    start = steps.denoising_start
    if start is not None:
        trained = scheduler.config.num_train_timesteps
        left = int((scheduler.timesteps < round(trained - start * trained)).sum())
        left += scheduler.order == 2 and left % 2 == 0  # a step of two calls is not torn apart
        return len(scheduler.timesteps) - left
    if is_partial and rounds_down:
        return int(count - min(count * steps.strength, count)) * scheduler.order
    if is_partial:
        return (count - min(int(count * steps.strength), count)) * scheduler.order
    return 0
