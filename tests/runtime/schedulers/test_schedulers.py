"""Schedulers against diffusers: same timesteps, and the same sample after every step."""

from __future__ import annotations

import inspect
import itertools
import warnings
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from weightport.runtime import schedulers

from ...support.scheduler_cases import CASES, Config

pytestmark = pytest.mark.filterwarnings("ignore")
diffusers.logging.set_verbosity_error()
LIMIT = 1e-5  # of the largest value of a sample, in float32


def toy_model(x: Tensor, timestep: Tensor) -> Tensor:
    """Something smooth, not linear, and bounded."""
    return (
        0.9 * torch.tanh(0.7 * x + 0.1 * x.roll(1, -1))
        + 0.1 * torch.sin(3 * x)
        + 1e-4 * float(timestep)
    )


def trajectory(scheduler: Any, steps: int, begin: int = 0, **step_options: Any) -> list[Tensor]:
    """The sample after every step of a run that starts with noise."""
    generator = torch.Generator().manual_seed(0)
    scheduler.set_timesteps(steps)
    sample = torch.randn(1, 4, 6, 6, generator=generator) * float(
        getattr(scheduler, "init_noise_sigma", 1)
    )
    if "generator" in inspect.signature(scheduler.step).parameters:
        step_options["generator"] = generator
    if begin:
        scheduler.set_begin_index(begin)
    samples, scale = [], getattr(scheduler, "scale_model_input", lambda sample, timestep: sample)
    for timestep in scheduler.timesteps[begin:]:
        output = toy_model(scale(sample, timestep), timestep)
        sample = scheduler.step(output, timestep, sample, **step_options)[0]
        samples.append(sample)
    return samples


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).abs().max() / expected.abs().max())


def difference(name: str, config: Config, steps: int, **run: Any) -> float:
    """The largest relative difference of the samples after the same step of two runs.

    Where diffusers is not finite the run is not compared any further, but ours must be finite.
    """
    ours, theirs = getattr(schedulers, name)(**config), getattr(diffusers, name)(**config)
    expected, found = trajectory(theirs, steps, **run), trajectory(ours, steps, **run)
    assert ours.timesteps.dtype == theirs.timesteps.dtype
    assert ours.timesteps.float().tolist() == theirs.timesteps.float().tolist()
    assert all(sample.isfinite().all() for sample in found)
    finite = itertools.takewhile(
        lambda pair: pair[1].isfinite().all(), zip(found, expected, strict=True)
    )
    return max((relative(*pair) for pair in finite), default=0.0)


def amplifies(name: str, config: Config) -> bool:
    """Whether runs multiply rounding, in diffusers as here: slopes are extrapolated from σ that
    nearly coincide."""
    return name == "LMSDiscreteScheduler" and config.get("use_beta_sigmas", False)


def difference_of_steps(name: str, config: Config, steps: int) -> float:
    """The same of steps that all begin with the sample of diffusers, and know only its outputs."""
    ours, theirs = getattr(schedulers, name)(**config), getattr(diffusers, name)(**config)
    ours.set_timesteps(steps)
    theirs.set_timesteps(steps)
    sample = torch.randn(1, 4, 6, 6, generator=torch.Generator().manual_seed(0)) * float(
        theirs.init_noise_sigma
    )
    worst = 0.0
    for t in theirs.timesteps:
        output, _ = (
            toy_model(theirs.scale_model_input(sample, t), t),
            ours.scale_model_input(sample, t),
        )
        found, sample = ours.step(output, t, sample)[0], theirs.step(output, t, sample)[0]
        worst = max(worst, relative(found, sample))
    return worst


def own_difference(name: str, config: Config, steps: int) -> float:
    """The largest relative difference between diffusers in float32, and with σ and samples in
    float64."""
    class_ = getattr(diffusers, name)

    class Exact(class_):  # type: ignore[misc, valid-type]
        def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
            super().set_timesteps(*args, **kwargs)
            self.sigmas: Any = self.sigmas.double()

    pairs = zip(
        trajectory(class_(**config), steps), trajectory(Exact(**config), steps), strict=True
    )
    return max(relative(*pair) for pair in pairs)


def steps_of(name: str) -> tuple[int, ...]:
    return (4, 7, 20) if name in ("LCMScheduler", "TCDScheduler") else (7, 20)


def check(name: str, configs: list[Config], steps: tuple[int, ...]) -> None:
    """Compare runs; those that amplify rounding as exactly as diffusers agrees with itself, and
    their single steps."""
    failed, worst, runs = [], 0.0, list(itertools.product(configs, steps))
    for config, n in runs:
        try:
            found = difference(name, config, n)
            if amplifies(name, config):
                assert found <= max(LIMIT, 2 * own_difference(name, config, n))
                found = difference_of_steps(name, config, n)
        except Exception as error:
            failed.append((config, n, repr(error)[:200]))
        else:
            worst = max(worst, found)
            if found > LIMIT:
                failed.append((config, n, f"{found:.1e}"))
    print(f"\n{name}: {len(runs)} runs, largest difference of a step {worst:.1e}")
    assert not failed, f"{len(failed)} of {len(runs)}: {failed[:4]} … {failed[-1]}"


@pytest.mark.parametrize("name", CASES)
def test_steps_are_those_of_diffusers(name: str) -> None:
    check(name, CASES[name][:: len(CASES[name]) // 9 + 1], (7,))


@pytest.mark.full
@pytest.mark.parametrize("name", CASES)
def test_every_configuration_steps_as_in_diffusers(name: str) -> None:
    check(name, CASES[name], steps_of(name))


def test_there_are_thousands_of_configurations() -> None:
    runs = sum(len(steps_of(name)) * len(configs) for name, configs in CASES.items())
    print(f"\n{runs} runs of {len(CASES)} schedulers")
    assert runs >= 5000
    assert set(CASES) == schedulers.SCHEDULERS.keys() - {"KerasCVScheduler"}


def test_a_swap_drops_defaults_and_keeps_foreign_options() -> None:
    old = {
        "_class_name": "PNDMScheduler",
        "beta_end": 0.012,
        "clip_sample": False,
        "skip_prk_steps": True,
    }
    pndm = schedulers.PNDMScheduler.from_config(old)
    euler = schedulers.EulerDiscreteScheduler.from_config(pndm.config)
    assert euler.config.timestep_spacing == "linspace"
    assert euler.config.clip_sample is False
    assert euler.config.beta_end == 0.012
    assert schedulers.PNDMScheduler.from_config(euler.config).config.skip_prk_steps is True


def test_a_saved_config_holds_its_defaults(tmp_path: Path) -> None:
    schedulers.PNDMScheduler(beta_schedule="scaled_linear").save_pretrained(tmp_path / "scheduler")
    euler = schedulers.EulerDiscreteScheduler.from_pretrained(
        tmp_path, subfolder="scheduler", use_karras_sigmas=True
    )
    assert euler.config.timestep_spacing == "leading"
    assert euler.config.use_karras_sigmas
    theirs = diffusers.EulerDiscreteScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    assert theirs.config.timestep_spacing == "leading"


@pytest.mark.parametrize("old", ["PNDMScheduler", "DPMSolverMultistepScheduler"])
@pytest.mark.parametrize("new", sorted(schedulers.COMPATIBLE))
def test_swaps_give_the_config_that_diffusers_gives(old: str, new: str) -> None:
    given = {"beta_schedule": "scaled_linear", "beta_end": 0.012, "prediction_type": "v_prediction"}
    ours, theirs = (
        getattr(library, new).from_config(getattr(library, old)(**given).config)
        for library in (schedulers, diffusers)
    )
    shown = {key: value for key, value in theirs.config.items() if not key.startswith("_")}
    assert {key: value for key, value in ours.config.items() if not key.startswith("_")} == shown
    assert sorted(ours.config["_use_default_values"]) == sorted(
        theirs.config["_use_default_values"]
    )


@pytest.mark.parametrize("name", CASES)
def test_compatible_classes_are_those_of_diffusers(name: str) -> None:
    ours, theirs = getattr(schedulers, name)().compatibles, getattr(diffusers, name)().compatibles
    assert {kind.__name__ for kind in ours} == {kind.__name__ for kind in theirs}
    assert [kind.__name__ for kind in ours][:15] in ([*schedulers.COMPATIBLE], [name])


@pytest.mark.parametrize("name", CASES)
def test_defaults_are_those_of_diffusers(name: str) -> None:
    theirs = {k: v for k, v in getattr(diffusers, name)().config.items() if not k.startswith("_")}
    assert getattr(schedulers, name).defaults == theirs


def test_unknown_options_warn_by_name() -> None:
    with pytest.warns(UserWarning, match="sharpness"):
        scheduler = schedulers.DDIMScheduler.from_config({"sharpness": 3})
    assert scheduler.config.sharpness == 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        schedulers.DDIMScheduler.from_config({"skip_prk_steps": True})


def test_a_prediction_type_that_cannot_be_served_is_refused() -> None:
    with pytest.raises(ValueError, match="PNDMScheduler: prediction_type = 'sample'"):
        schedulers.PNDMScheduler(prediction_type="sample")  # type: ignore[arg-type]


NOT_FINITE: dict[str, tuple[str, Config]] = {  # in diffusers
    "a last step of no length, second derivative": (
        "DPMSolverMultistepScheduler",
        {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min", "solver_type": "heun"},
    ),
    "a last step of no length, third order": (
        "DPMSolverMultistepScheduler",
        {"use_exponential_sigmas": True, "final_sigmas_type": "sigma_min", "solver_order": 3},
    ),
    "UniPC on the noise, to zero": ("UniPCMultistepScheduler", {"predict_x0": False}),
    "UniPC with bh1, to zero": ("UniPCMultistepScheduler", {"solver_type": "bh1"}),
    "the logarithm of a variance as a variance": (
        "DDPMScheduler",
        {"variance_type": "fixed_large_log"},
    ),
    "no image at the first timestep": (
        "DDIMScheduler",
        {"rescale_betas_zero_snr": True, "clip_sample": False, "timestep_spacing": "trailing"},
    ),
}


@pytest.mark.parametrize("case", NOT_FINITE)
def test_runs_that_are_not_finite_in_diffusers_are_here(case: str) -> None:
    name, config = NOT_FINITE[case]
    theirs, ours = (
        trajectory(getattr(library, name)(**config), 20)[-1] for library in (diffusers, schedulers)
    )
    assert not theirs.isfinite().all()
    assert ours.isfinite().all()


@given(data=st.data())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_random_configurations_step_as_in_diffusers(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(CASES)))
    config = data.draw(
        st.sampled_from([config for config in CASES[name] if not amplifies(name, config)])
    )
    if "beta_start" in getattr(schedulers, name).defaults:
        start = data.draw(st.floats(1e-4, 1e-3))
        config = config | {"beta_start": start, "beta_end": start * data.draw(st.floats(5, 20))}
    assert difference(name, config, data.draw(st.integers(4, 24))) <= LIMIT
