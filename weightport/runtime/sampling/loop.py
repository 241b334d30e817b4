"""The one sampling loop, which every pipeline calls. It knows schedulers, not models.

The order of random draws is that of diffusers, so that one seed gives one image: first the noise of
the VAE's posterior, then the noise of the latents, then the posterior of the masked image.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from .arguments import Arguments
from .protocol import Sampled
from .starts import keep_unmasked
from .state import Images, Run


@torch.no_grad()
def sample(pipe: Sampled, arguments: Arguments) -> Images:
    """Make images: every pipeline's call.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: the arguments do not fit together, or not to the models.
    """
    run = pipe.prepare(arguments)
    draws = _draws(run)
    with pipe.running(run) as bar:
        for i, t in enumerate(run.timesteps):
            if run.guide.dials.interrupt:
                break
            x = run.scheduler.scale_model_input(run.guide.repeat(run.latents), t)
            prediction = pipe.predict(run, i, x)
            step = run.scheduler.step(prediction, t, run.latents, **draws)
            run.latents = step.prev_sample
            run.denoised = getattr(step, "denoised", None)
            if run.beside.clean is not None:
                run.latents = keep_unmasked(run, i)
            _tell(pipe, run, i, t)
            bar.update()
    return pipe.finish(run)


def _draws(run: Run) -> dict[str, Any]:
    """What the scheduler's step takes of what is random."""
    known = inspect.signature(run.scheduler.step).parameters
    given = {"eta": run.arguments.draws.eta, "generator": run.noise.generator}
    return {name: value for name, value in given.items() if name in known}


def _tell(pipe: Sampled, run: Run, i: int, t: Tensor) -> None:
    """The user's callbacks, and what they change."""
    result = run.arguments.result
    if result.callback_on_step_end is not None:
        tensors = {name: run.tensor(name) for name in result.callback_on_step_end_tensor_inputs}
        changed = result.callback_on_step_end(pipe, i, t, tensors)
        for name, value in (changed or {}).items():
            run.replace(name, value)
    if result.callback is not None and i % result.callback_steps == 0 and _is_whole(run, i):
        result.callback(i // run.scheduler.order, t, run.latents)


def _is_whole(run: Run, i: int) -> bool:
    """Whether a step of the scheduler ends with visit `i`: some take several, or one more at
    first."""
    scheduler = run.scheduler
    extra = len(scheduler.timesteps) - scheduler.num_inference_steps * scheduler.order
    is_last = i == len(run.timesteps) - 1
    return is_last or (i + 1 > extra and (i + 1) % scheduler.order == 0)
