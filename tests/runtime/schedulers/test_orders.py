"""Deterministic solvers converge on an exactly solvable ODE as fast as their papers say.

The data are N(μ, 1). At level (α, σ) the sample α·x₀ + σ·ε then is N(α·μ, α² + σ²), the best
prediction of x₀ is known, and the probability flow ODE (Song et al., Score-Based Generative
Modeling through SDEs, eq. 13) keeps every point as many standard deviations from the mean as it
was.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from weightport.runtime import schedulers

from ...support.scheduler_cases import Config

MEAN = 0.3
TRAINED: Config = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
KARRAS = TRAINED | {"use_karras_sigmas": True}
EVEN = TRAINED | {"use_exponential_sigmas": True, "lower_order_final": False}  # in λ
END: Config = {"final_sigmas_type": "sigma_min"}
EDM: Config = {"sigma_min": 0.05, "sigma_max": 10.0, "sigma_schedule": "exponential"}


class Level(NamedTuple):
    """The sample is α·x₀ + σ·ε."""

    alpha: float
    sigma: float

    @property
    def deviation(self) -> float:
        return math.hypot(self.alpha, self.sigma)

    def exact(self) -> Tensor:
        """The point one standard deviation from the mean."""
        return torch.full((1, 1, 1, 1), self.alpha * MEAN + self.deviation, dtype=torch.float64)

    def predicted(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The best x₀ and ε for a sample."""
        away = (x - self.alpha * MEAN) / self.deviation**2
        return MEAN + self.alpha * away, self.sigma * away


def level(scheduler: Any, timestep: Tensor) -> Level:
    """What the model is called for, as the public tables and calls tell it."""
    name, t = type(scheduler).__name__, float(timestep)
    if name.startswith("FlowMatch"):
        return Level(1 - t / 1000, t / 1000)
    if name.startswith("IPNDM"):
        return Level(math.cos(t * math.pi / 2), math.sin(t * math.pi / 2))
    if name.startswith("EDM"):
        return Level(1, math.exp(4 * t))
    if name.startswith(("DDIM", "KerasCV", "PNDM")):
        alpha_bar = scheduler.alphas_cumprod.double()[int(t)].item()
        return Level(alpha_bar**0.5, (1 - alpha_bar) ** 0.5)
    scale = float(scheduler.scale_model_input(torch.ones((), dtype=torch.float64), timestep))
    if scale == 1:  # variance preserving
        ratio = scheduler.sigmas[scheduler.step_index or 0].item()
        return Level(1 / math.hypot(1, ratio), ratio / math.hypot(1, ratio))
    return Level(1, (1 / scale**2 - 1) ** 0.5)


def output(scheduler: Any, x: Tensor, at: Level) -> Tensor:
    """A perfect model's output, in the form in which the scheduler expects it."""
    name, (x0, eps) = type(scheduler).__name__, at.predicted(x)
    if name.startswith("EDM"):  # Karras et al., table 1
        data = scheduler.config.sigma_data
        return (
            (x0 - data**2 / (at.sigma**2 + data**2) * x)
            * math.hypot(at.sigma, data)
            / (at.sigma * data)
        )
    if name.startswith("FlowMatch"):
        return eps - x0
    return at.alpha * eps - at.sigma * x0 if name.startswith("IPNDM") else eps


def error(name: str, config: Config, steps: int, warm_up: int = 0) -> float:
    """Of a run after three quarters of its calls, since last steps are often of lower order.

    So are first ones: the sample is exact until after `warm_up` of them.
    """
    scheduler = getattr(schedulers, name)(**config)
    scheduler.set_timesteps(steps)
    last = round((len(scheduler.timesteps) - 1) * 3 / 4)
    sample = torch.empty(0)
    for i, t in enumerate(scheduler.timesteps[:last]):
        at = level(scheduler, t)
        sample = at.exact() if i <= warm_up else sample
        sample = scheduler.step(output(scheduler, sample, at), t, sample)[0]
    return float((sample - level(scheduler, scheduler.timesteps[last]).exact()).abs())


class Case(NamedTuple):
    """A solver, what it promises, and the numbers of steps that show it: the second one's are half
    as long."""

    name: str
    config: Config
    order: int
    warm_up: int = 0
    steps: tuple[int, int] | None = None

    def __str__(self) -> str:
        usual = KARRAS | EVEN | END | EDM | {"tau_func": None}
        words = [str(value) for key, value in self.config.items() if key not in usual]
        return "-".join([self.name.removesuffix("Scheduler"), *words, f"order {self.order}"])


USUAL = {1: (193, 385), 2: (49, 97), 3: (49, 97), 4: (49, 97)}  # order -> numbers of steps
COARSE = (17, 33)  # where shorter steps would be lost in the rounding of float32 tables


def cases() -> Iterator[Case]:
    """What papers and their authors' code promise."""
    yield Case("DDIMScheduler", TRAINED | {"clip_sample": False}, 1, steps=(100, 200))
    for generation in ("0.7", "0.8"):
        yield Case("KerasCVScheduler", {"generation": generation}, 1, steps=(100, 200))
    for skip in (
        False,
        True,
    ):  # of second order by Liu et al., section 3.3, though it extrapolates with four values
        yield Case("PNDMScheduler", TRAINED | {"skip_prk_steps": skip}, 2, steps=(50, 100))
    yield Case("IPNDMScheduler", {}, 2, 3, (200, 400))  # likewise
    yield Case("EulerDiscreteScheduler", KARRAS, 1)
    yield Case("HeunDiscreteScheduler", KARRAS, 2)
    yield Case("KDPM2DiscreteScheduler", KARRAS, 2)
    yield Case("LMSDiscreteScheduler", KARRAS, 4, 3)
    yield Case("EDMEulerScheduler", EDM, 1)
    yield Case("FlowMatchEulerDiscreteScheduler", {}, 1)
    yield Case("FlowMatchHeunDiscreteScheduler", {}, 2)
    for order, solver in itertools.product((1, 2, 3), ("midpoint", "heun")):
        multistep = min(
            order, 2
        )  # the third-order formula takes half of the second difference, as its authors' code
        config: Config = {"lower_order_final": False, "solver_order": order, "solver_type": solver}
        yield Case("EDMDPMSolverMultistepScheduler", EDM | config, multistep, order - 1)
        for algorithm in ("dpmsolver", "dpmsolver++"):
            config |= EVEN | END | {"algorithm_type": algorithm}
            yield Case("DPMSolverMultistepScheduler", config.copy(), multistep, order - 1)
            yield Case("DPMSolverSinglestepScheduler", config.copy(), order)
    for order in (1, 2, 3):
        steps = COARSE if order == 3 else None
        yield Case(
            "DEISMultistepScheduler", EVEN | {"solver_order": order}, order, order - 1, steps
        )
        for solver, images in itertools.product(("bh1", "bh2"), (True, False)):
            config = (
                EVEN | END | {"solver_order": order, "solver_type": solver, "predict_x0": images}
            )
            predictor = config | {"disable_corrector": range(500)}
            yield Case("UniPCMultistepScheduler", predictor, order, order - 1, steps)
            yield Case(
                "UniPCMultistepScheduler", config, order + 1, order, steps
            )  # Zhao et al., UniPC, theorem 3.1
    for orders, kind in itertools.product(
        ((1, 1), (1, 2), (2, 2), (2, 3), (3, 3), (3, 4)), ("data_prediction", "noise_prediction")
    ):
        config = {
            "predictor_order": orders[0],
            "corrector_order": orders[1],
            "algorithm_type": kind,
        }
        config |= EVEN | {"tau_func": lambda t: 0}
        steps = {3: COARSE, 4: (9, 17)}.get(orders[1])
        yield Case("SASolverScheduler", config, orders[1], orders[1] - 1, steps)


@pytest.mark.parametrize("case", list(cases()), ids=str)
def test_halving_the_steps_divides_the_error_as_the_paper_says(case: Case) -> None:
    coarse, fine = (
        error(case.name, case.config, n, case.warm_up) for n in case.steps or USUAL[case.order]
    )
    assert math.log2(coarse / fine) > case.order - 0.5


def test_no_deterministic_solver_is_left_out() -> None:
    stochastic = {"DDPM", "EulerAncestralDiscrete", "KDPM2AncestralDiscrete", "DPMSolverSDE"}
    stochastic |= {"CosineDPMSolverMultistep"}
    distilled = {"LCM", "TCD", "CMStochasticIterative", "FlowMatchLCM"}
    backwards = {"DDIMInverse", "DPMSolverMultistepInverse"}
    tested = {case.name.removesuffix("Scheduler") for case in cases()}
    every = {name.removesuffix("Scheduler") for name in schedulers.SCHEDULERS}
    assert every == tested | stochastic | distilled | backwards
