"""What a scheduler class says of itself: its options, its names, what it is compatible with."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers
import pytest

import weightport
from weightport.runtime import schedulers
from weightport.runtime.registry import MODULES
from weightport.runtime.schedulers import Scheduler
from weightport.runtime.schedulers.names import NAMES

from ...support.scheduler_cases import CASES

HERE = "weightport."


def parameters(function: Any) -> dict[str, inspect.Parameter]:
    """But for `self`."""
    _, *named = inspect.signature(function).parameters.items()
    return {name: p for name, p in named if p.kind is not p.VAR_KEYWORD}


def test_the_registry_names_every_scheduler() -> None:
    assert set(MODULES["schedulers"]) == set(schedulers.SCHEDULERS)
    for name, kind in schedulers.SCHEDULERS.items():
        assert getattr(schedulers, name) is getattr(weightport, name) is kind
        assert name in schedulers.__all__


@pytest.mark.parametrize("name", schedulers.SCHEDULERS)
def test_classes_lie_flat(name: str) -> None:
    """What varies is held, not inherited."""
    kind = schedulers.SCHEDULERS[name]
    ours = [base for base in kind.__mro__ if base.__module__.startswith(HERE)]
    assert len(ours) <= 5, [base.__name__ for base in ours]
    others = set(schedulers.SCHEDULERS.values()) - {kind}
    assert not others.intersection(kind.__mro__)


@pytest.mark.parametrize("name", CASES)
def test_options_are_parameters_in_the_order_of_diffusers(name: str) -> None:
    ours, theirs = (
        parameters(getattr(library, name).__init__) for library in (schedulers, diffusers)
    )
    assert list(ours) == list(theirs)
    assert [p.default for p in ours.values()] == [p.default for p in theirs.values()]
    assert all(p.annotation is not p.empty for p in ours.values())
    assert list(inspect.signature(getattr(schedulers, name)).parameters) == list(theirs)


NOT_HERE = {  # parameters without effect in diffusers, and of models with a timestep a token
    "EDMEulerScheduler": {"pred_original_sample"},
    "FlowMatchEulerDiscreteScheduler": {
        "s_churn",
        "s_tmin",
        "s_tmax",
        "s_noise",
        "per_token_timesteps",
    },
}


@pytest.mark.parametrize("name", CASES)
def test_steps_take_what_they_take_in_diffusers_in_its_order(name: str) -> None:
    ours, theirs = (
        list(parameters(getattr(library, name).step)) for library in (schedulers, diffusers)
    )
    assert set(theirs) - set(ours) == NOT_HERE.get(name, set())
    assert [key for key in ours if key in theirs] == [key for key in theirs if key in ours]


def test_options_can_be_given_by_position() -> None:
    scheduler = schedulers.DDIMScheduler(500, 0.001)
    assert (len(scheduler), scheduler.config.beta_start) == (500, 0.001)
    assert "beta_start" not in scheduler.config["_use_default_values"]
    with pytest.raises(TypeError, match="DDIMScheduler has no option sharpness"):
        schedulers.DDIMScheduler(sharpness=2)  # type: ignore[call-arg]


def test_a_class_of_somebody_else_is_not_ours() -> None:
    class DDIMScheduler(schedulers.DDIMScheduler):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options, beta_end=0.5)

    assert Scheduler.known["DDIMScheduler"] is schedulers.DDIMScheduler
    assert DDIMScheduler(clip_sample=False).config.beta_end == 0.5
    assert DDIMScheduler.defaults == schedulers.DDIMScheduler.defaults


def test_a_base_is_no_scheduler() -> None:
    with pytest.raises(NotImplementedError, match="SigmaSolver is not a scheduler"):
        schedulers.sigmas.SigmaSolver()


def test_short_names_are_those_of_one_class() -> None:
    for name, (class_name, options) in NAMES.items():
        kind = schedulers.SCHEDULERS[class_name]
        assert kind.names[name] is options
        assert kind.from_config({}, **options).config.items() >= options.items()
    assert len(NAMES) == sum(len(kind.names) for kind in schedulers.SCHEDULERS.values())


def test_stochastic_by_class_or_by_algorithm() -> None:
    always = {name for name, kind in schedulers.SCHEDULERS.items() if kind.stochastic}
    assert always == {
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
    for name in schedulers.SCHEDULERS:
        if "algorithm_type" in schedulers.SCHEDULERS[name].defaults and name.count("DPMSolver"):
            kind: Any = schedulers.SCHEDULERS[name]
            assert kind(algorithm_type="sde-dpmsolver++").stochastic
            assert not kind().stochastic
