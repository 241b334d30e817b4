"""What code written for diffusers does with a scheduler beside running it: the same comes of it."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from weightport.runtime import schedulers

from ...support.scheduler_cases import CASES

LIBRARIES: tuple[Any, Any] = (diffusers, schedulers)
SAMPLE = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
OUTPUT = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(2))
UNTIMED = [
    "DDPMScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "LMSDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "DPMSolverSDEScheduler",
    "EDMEulerScheduler",
    "IPNDMScheduler",
]
STRAYS = [
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "DEISMultistepScheduler",
    "UniPCMultistepScheduler",
    "SASolverScheduler",
    "EDMDPMSolverMultistepScheduler",
]


@pytest.fixture(autouse=True)
def quiet() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def both(name: str, act: Callable[[Any], Any], **options: Any) -> tuple[Any, Any]:
    """What comes of an act on a scheduler of each library."""
    results = []
    for library in LIBRARIES:
        torch.manual_seed(0)
        results.append(act(getattr(library, name)(**options)))
    return results[0], results[1]


def timed(scheduler: Any, steps: int = 10) -> Any:
    scheduler.set_timesteps(steps)
    return scheduler


def step(scheduler: Any, timestep: Any, **options: Any) -> Any:
    return scheduler.step(OUTPUT, timestep, SAMPLE, **options)


def at_place(place: int, scheduler: Any) -> Any:
    """A step at that of the scheduler's timesteps."""
    return step(scheduler, scheduler.timesteps[place]).prev_sample


@pytest.mark.parametrize("name", UNTIMED)
def test_steps_without_set_timesteps(name: str) -> None:
    for place in (500, 998):
        theirs, ours = both(name, partial(at_place, place))
        if theirs.isfinite().all():
            assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4)
        assert ours.isfinite().all()


@pytest.mark.parametrize("name", sorted(set(CASES) - set(UNTIMED)))
def test_other_steps_need_it(name: str) -> None:
    if not schedulers.SCHEDULERS[name].steps_untimed:
        with pytest.raises(ValueError, match="call set_timesteps"):
            step(getattr(schedulers, name)(), 500)


@pytest.mark.parametrize("name", STRAYS)
def test_a_timestep_that_is_not_in_the_run_means_the_last_step(name: str) -> None:
    theirs, ours = both(name, lambda s: step(timed(s), 7).prev_sample)
    assert torch.allclose(ours, theirs, atol=1e-5)
    strange = torch.tensor([500, 3])
    theirs, ours = both(name, lambda s: timed(s).add_noise(SAMPLE, OUTPUT, strange))
    assert torch.allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "DDPMScheduler", "LCMScheduler"])
def test_where_it_is_an_error_there_it_is_one_here(name: str) -> None:
    with pytest.raises(ValueError, match=r"7\.0 is not one of the scheduler's timesteps"):
        step(timed(getattr(schedulers, name)()), 7)


@pytest.mark.parametrize("name", ["LCMScheduler", "TCDScheduler"])
def test_distilled_steps_are_counted(name: str) -> None:
    def act(scheduler: Any) -> Any:
        timed(scheduler, 4)
        step(scheduler, scheduler.timesteps[1])
        return step(scheduler, 7).prev_sample

    theirs, ours = both(name, act)
    assert torch.allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_outputs_are_dicts_and_tuples(name: str) -> None:
    def act(scheduler: Any) -> Any:
        timed(scheduler)
        out = step(scheduler, scheduler.timesteps[4])
        is_dict = isinstance(out, dict)
        assert is_dict
        assert out[0] is out["prev_sample"] is out.prev_sample is out.to_tuple()[0]
        return list(out)

    theirs, ours = both(name, act)
    assert ours == theirs
    for position in (False, True):
        plain = both(name, partial(tupled, position))
        assert [type(one) for one in plain] == [tuple, tuple]
        assert len(plain[0]) == len(plain[1])


def tupled(by_position: bool, scheduler: Any) -> Any:
    """A step with `return_dict=False`, by name or where a step of this class has it."""
    t = timed(scheduler).timesteps[4]
    if not by_position:
        return step(scheduler, t, return_dict=False)
    names = list(inspect.signature(scheduler.step).parameters)[3:]
    given = [
        inspect.signature(scheduler.step).parameters[name].default
        for name in names[: names.index("return_dict")]
    ]
    return scheduler.step(OUTPUT, t, SAMPLE, *given, False)


@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler", "EDMEulerScheduler"])
def test_configs_come_back_as_they_were(name: str, tmp_path: Path) -> None:
    scheduler = getattr(schedulers, name)()
    scheduler.save_pretrained(tmp_path)
    config = dict(scheduler.config)
    del config["_use_default_values"]
    assert type(scheduler).from_pretrained(tmp_path).config == config


def test_the_config_is_read_through_the_object() -> None:
    scheduler: Any = schedulers.DDIMScheduler(beta_start=0.001)
    scheduler.register_to_config(note=5)
    with pytest.warns(FutureWarning, match=r"read DDIMScheduler\.config\.beta_start"):
        assert scheduler.beta_start == 0.001
    with pytest.warns(FutureWarning):
        assert scheduler.note == scheduler.config.note == 5
    with pytest.raises(AttributeError, match="'DDIMScheduler' object has no attribute 'sharpness'"):
        _ = scheduler.sharpness
    assert '"beta_start": 0.001' in scheduler.to_json_string()


@pytest.mark.parametrize("name", ["DDIMScheduler", "KDPM2DiscreteScheduler", "IPNDMScheduler"])
@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_trained_betas_of_every_kind(name: str, kind: Any, tmp_path: Path) -> None:
    scheduler = getattr(schedulers, name)(trained_betas=kind([0.1, 0.3]))
    scheduler.save_pretrained(tmp_path)
    assert torch.equal(type(scheduler).from_pretrained(tmp_path).betas, scheduler.betas)


def test_pndm_by_its_two_methods() -> None:
    def act(scheduler: Any) -> list[torch.Tensor]:
        timed(scheduler)
        visited = [SAMPLE]
        for t in scheduler.prk_timesteps:
            visited.append(scheduler.step_prk(OUTPUT * t / 999, t, visited[-1]).prev_sample)
        for t in scheduler.plms_timesteps:
            visited.append(scheduler.step_plms(OUTPUT * t / 999, t, visited[-1])[0])
        return [*visited, *scheduler.ets]

    theirs, ours = both("PNDMScheduler", act)
    assert len(theirs) == len(ours)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(theirs, ours, strict=True))
    with pytest.raises(ValueError, match="step_plms follows twelve calls"):
        timed(schedulers.PNDMScheduler()).step_plms(OUTPUT, 1, SAMPLE)


def test_what_is_of_no_use_is_said() -> None:
    with pytest.warns(UserWarning, match="DDIMInverseScheduler has no use for thresholding"):
        schedulers.DDIMInverseScheduler(thresholding=True)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"takes options; a config is for DDIMScheduler\.from_conf"):
        schedulers.DDIMScheduler({})  # type: ignore[arg-type]


def test_small_things() -> None:
    assert schedulers.DDPMScheduler(num_train_timesteps=1).timesteps.tolist() == [0]
    assert isinstance(schedulers.EulerDiscreteScheduler().init_noise_sigma, torch.Tensor)
    ddpm = timed(schedulers.DDPMScheduler())
    assert ddpm.previous_timestep(900).item() == 800
    assert schedulers.SASolverScheduler().scale_model_input(SAMPLE, 3, generator=None) is SAMPLE
    theirs, ours = both("CMStochasticIterativeScheduler", lambda s: s.sigma_to_t(80.0))
    assert theirs == ours
    theirs, ours = both(
        "DPMSolverMultistepInverseScheduler",
        lambda s: timed(s, 1000).num_inference_steps,
        use_karras_sigmas=True,
    )
    assert theirs == ours
