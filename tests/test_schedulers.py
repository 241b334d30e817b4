"""Schedulers against diffusers: same timesteps, and the same sample after every step."""

from __future__ import annotations

import inspect
import itertools
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from weightport.runtime import schedulers

SPACINGS = ["linspace", "leading", "trailing"]
VP = ["epsilon", "sample", "v_prediction"]
VE = ["epsilon", "v_prediction"]


def toy_model(x: Tensor, timestep: Tensor) -> Tensor:
    """Something smooth, not linear, and bounded."""
    return 0.9 * torch.tanh(0.7 * x + 0.1 * x.roll(1, -1)) + 0.1 * torch.sin(3 * x) + 1e-4 * float(timestep)


def trajectory(scheduler: Any, steps: int, begin: int = 0, **step_options: Any) -> list[Tensor]:
    """The sample after every step of a run that starts with noise."""
    generator = torch.Generator().manual_seed(0)
    scheduler.set_timesteps(steps)
    sample = torch.randn(2, 4, 8, 8, generator=generator) * float(scheduler.init_noise_sigma)
    if "generator" in inspect.signature(scheduler.step).parameters:
        step_options["generator"] = generator
    if begin:
        scheduler.set_begin_index(begin)
    samples = []
    for timestep in scheduler.timesteps[begin:]:
        output = toy_model(scheduler.scale_model_input(sample, timestep), timestep)
        sample = scheduler.step(output, timestep, sample, **step_options)[0]
        samples.append(sample)
    return samples


def options(**choices: list[Any]) -> Iterator[dict[str, Any]]:
    """The product of the values of some options."""
    return (dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values()))


def assert_equal(name: str, config: dict[str, Any], steps: int) -> None:
    ours, theirs = getattr(schedulers, name)(**config), getattr(diffusers, name)(**config)
    expected, found = trajectory(theirs, steps), trajectory(ours, steps)
    torch.testing.assert_close(ours.timesteps.double(), theirs.timesteps.double(), rtol=0, atol=0)
    for number, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert a.isfinite().all(), (config, number)
        if not b.isfinite().all():
            break
        assert (a - b).abs().max() <= 1e-5 * b.abs().max(), (config, steps, number)


GRIDS: dict[str, list[dict[str, Any]]] = {
    "DDIMScheduler": [*options(timestep_spacing=SPACINGS, prediction_type=VP, clip_sample=[True, False])],
    "PNDMScheduler": [*options(timestep_spacing=SPACINGS, prediction_type=VE, skip_prk_steps=[True, False])],
    "EulerDiscreteScheduler": [
        *options(timestep_spacing=SPACINGS, prediction_type=VP, use_karras_sigmas=[False, True])
    ],
    "DPMSolverMultistepScheduler": [
        *options(
            prediction_type=VP,
            solver_order=[1, 2, 3],
            algorithm_type=["dpmsolver++", "sde-dpmsolver++"],
            use_karras_sigmas=[False, True],
        )
    ],
}


@pytest.mark.parametrize("name", GRIDS)
def test_steps_are_those_of_diffusers(name: str) -> None:
    for config in GRIDS[name]:
        assert_equal(name, config, 8)


def test_a_swap_drops_defaults_and_keeps_foreign_options() -> None:
    old = {
        "_class_name": "PNDMScheduler",
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "skip_prk_steps": True,
    }
    pndm = schedulers.PNDMScheduler.from_config(old)
    euler = schedulers.EulerDiscreteScheduler.from_config(pndm.config)
    assert euler.config.timestep_spacing == "linspace"
    assert euler.config.clip_sample is False
    assert euler.config.beta_schedule == "scaled_linear"
    assert schedulers.PNDMScheduler.from_config(euler.config).config.skip_prk_steps is True


def test_a_saved_config_holds_its_defaults(tmp_path: Path) -> None:
    schedulers.PNDMScheduler(beta_schedule="scaled_linear").save_pretrained(tmp_path / "scheduler")
    euler = schedulers.EulerDiscreteScheduler.from_pretrained(tmp_path, subfolder="scheduler", use_karras_sigmas=True)
    assert euler.config.timestep_spacing == "leading"
    assert euler.config.use_karras_sigmas
    theirs = diffusers.EulerDiscreteScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    assert theirs.config.timestep_spacing == "leading"


def test_unknown_options_warn_by_name() -> None:
    with pytest.warns(UserWarning, match="sharpness"):
        scheduler = schedulers.DDIMScheduler.from_config({"sharpness": 3})
    assert scheduler.config.sharpness == 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        schedulers.DDIMScheduler.from_config({"skip_prk_steps": True})


def test_a_prediction_type_that_cannot_be_served_is_refused() -> None:
    with pytest.raises(ValueError, match="PNDMScheduler: prediction_type = 'sample'"):
        schedulers.PNDMScheduler(prediction_type="sample")
