"""The noise of DPMSolverSDE and CosineDPMSolver: a path of Brownian motion over σ."""

from __future__ import annotations

import itertools
import math
import sys
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from weightport.runtime import schedulers
from weightport.runtime.schedulers.brownian import BrownianNoise

pytestmark = pytest.mark.filterwarnings("error")  # torchsde warns of σ outside of its path
HIGH, LOW = 14.6, 0.03
LEVELS = (14.6, 9.0, 5.0, 4.2, 1.0, 0.3, 0.03)


@pytest.fixture(params=["own", "torchsde"])
def source(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where the path comes from."""
    if request.param == "own":
        monkeypatch.setitem(sys.modules, "torchsde", None)  # any import of it fails
    else:
        pytest.importorskip("torchsde")
    return str(request.param)


def path(seed: Any = 0, size: int = 40_000) -> BrownianNoise:
    return BrownianNoise(torch.zeros(2, size // 2), LOW, HIGH, seed)


def moved(noise: BrownianNoise, start: float, end: float) -> Tensor:
    """W(start) - W(end)."""
    return noise(start, end).double() * (start - end) ** 0.5


@pytest.mark.usefixtures("source")
def test_steps_are_standard_normal_and_independent() -> None:
    noise = path()
    steps = torch.stack([noise(a, b).flatten() for a, b in itertools.pairwise(LEVELS)])
    count = steps.shape[1]
    assert (steps.mean(1).abs() < 5 / count**0.5).all()
    assert ((steps @ steps.T / count - torch.eye(len(steps))).abs() < 5 * (2 / count) ** 0.5).all()
    fourth = (steps**4).mean(1)
    assert ((fourth - 3).abs() < 5 * (96 / count) ** 0.5).all()


@pytest.mark.usefixtures("source")
def test_steps_add_up() -> None:
    noise = path(size=64)
    for start, middle, end in zip(LEVELS, LEVELS[1:], LEVELS[2:], strict=False):
        parts = moved(noise, start, middle) + moved(noise, middle, end)
        torch.testing.assert_close(moved(noise, start, end), parts, rtol=0, atol=1e-5)


@pytest.mark.usefixtures("source")
def test_a_step_that_is_asked_for_again_is_the_same() -> None:
    noise, longer = path(size=64), path(size=64)
    first = [noise(HIGH, 5.0), noise(HIGH, 1.0), noise(5.0, 1.0)]
    assert all(
        torch.equal(a, b)
        for a, b in zip(first, [noise(HIGH, 5.0), noise(HIGH, 1.0), noise(5.0, 1.0)], strict=True)
    )
    again = [longer(HIGH, 5.0), longer(5.0, 1.0), longer(HIGH, 1.0)]
    assert all(
        torch.equal(a, b) for a, b in zip(first, [again[0], again[2], again[1]], strict=True)
    )
    assert not noise(1.0, 1.0).any()


@pytest.mark.usefixtures("source")
def test_the_seed_says_the_path() -> None:
    def walk(seed: Any) -> Tensor:
        noise = path(seed, size=64)
        return torch.stack([noise(a, b) for a, b in itertools.pairwise(LEVELS)])

    assert torch.equal(walk(3), walk(3))
    assert not torch.equal(walk(3), walk(4))
    torch.manual_seed(7)
    first = walk(None)
    torch.manual_seed(7)
    assert torch.equal(walk(None), first)


@pytest.mark.usefixtures("source")
def test_every_image_can_have_a_seed() -> None:
    together = BrownianNoise(torch.zeros(2, 4, 5), LOW, HIGH, [3, 4])(HIGH, 2.0)
    for image, seed in zip(together, (3, 4), strict=True):
        assert torch.equal(image, BrownianNoise(torch.zeros(4, 5), LOW, HIGH, seed)(HIGH, 2.0))


@pytest.mark.parametrize("seed", [5, [5, 6]], ids=["one", "each"])
def test_the_path_of_torchsde_is_that_of_diffusers(seed: Any) -> None:
    pytest.importorskip("torchsde")
    reference = pytest.importorskip(
        "diffusers.schedulers.scheduling_dpmsolver_sde"
    ).BrownianTreeNoiseSampler
    like = torch.zeros(2, 4, 8, 8)
    ours, theirs = BrownianNoise(like, LOW, HIGH, seed), reference(like, LOW, HIGH, seed)
    warnings.simplefilter("ignore")  # diffusers rounds the ends of the path
    for start, middle, end in zip(LEVELS, LEVELS[1:], LEVELS[2:], strict=False):
        for to in (middle, end):
            torch.testing.assert_close(
                ours(start, to), theirs(torch.tensor(start), torch.tensor(to)), rtol=1e-6, atol=0
            )


SOLVERS: dict[str, tuple[str, dict[str, Any]]] = {
    "DPMSolverSDE": ("DPMSolverSDEScheduler", {"use_karras_sigmas": True, "noise_sampler_seed": 1}),
    "CosineDPMSolver": (
        "CosineDPMSolverMultistepScheduler",
        {"sigma_max": 80, "prediction_type": "epsilon"},
    ),
}


@pytest.mark.usefixtures("source")
@pytest.mark.parametrize("solver", SOLVERS)
def test_samples_are_distributed_like_the_data(solver: str) -> None:
    """With the best prediction for data of N(0.3, 1), solvers of the SDE end with samples of N(0.3,
    1)."""
    name, config = SOLVERS[solver]
    scheduler: Any = getattr(schedulers, name)(**config)
    scheduler.set_timesteps(40)
    sample = (
        torch.randn(1, 4, 80, 80, generator=torch.Generator().manual_seed(0))
        * scheduler.init_noise_sigma
    )
    options = {} if "SDE" in name else {"generator": torch.Generator().manual_seed(1)}
    for t in scheduler.timesteps:
        scale = float(scheduler.scale_model_input(torch.ones(()), t))
        sigma = math.sqrt(1 / scale**2 - 1)  # both models are told a sample of variance 1
        x0 = (sample + 0.3 * sigma**2) / (1 + sigma**2)
        output = (sample - x0) / sigma
        if "Cosine" in name:  # Karras et al., table 1, with σ_data = 1
            output = (x0 - sample / (sigma**2 + 1)) * math.hypot(sigma, 1) / sigma
        sample = scheduler.step(output, t, sample, **options)[0]
    assert abs(sample.mean() - 0.3) < 0.04
    assert abs(sample.std() - 1) < 0.04
