"""DPM-Solver: Lu et al., A Fast ODE Solver for Diffusion Probabilistic Model Sampling.

DPM-Solver++: Lu et al., Fast Solver for Guided Sampling of Diffusion Probabilistic Models."""

from __future__ import annotations

import math
from functools import cache
from itertools import pairwise
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from ..loading.config import Config
from ..loading.options import Options, configured
from .base import Device, Visits, noisy_step
from .brownian import BrownianNoise
from .config import Ends, EpsilonOrV, FlowPrediction, Spread, TimeShift, Variance
from .edm import Preconditioned
from .exponential import SHORT_RUN, ExponentialSolver, Levels, Orders, Rows, as_rows, levels_of
from .samples import Draw, combine
from .spacing import Array, Numbers, spaced

ON_IMAGES = ("dpmsolver++", "sde-dpmsolver++")
STOCHASTIC = ("sde-dpmsolver", "sde-dpmsolver++")
ALIASES: dict[str, Options] = {
    "algorithm_type": {"deis": "dpmsolver++"},
    "solver_type": dict.fromkeys(("logrho", "bh1", "bh2"), "midpoint"),
}

Algorithm = Literal["dpmsolver++", "sde-dpmsolver++", "dpmsolver", "sde-dpmsolver"]
Kind = Literal["midpoint", "heun"]
Order = Literal[2, 1, 3]


class Integrals:
    """The coefficients of the steps of a run: integrals with exponential weights.

    Attributes:
        levels: α, σ and λ of the run.
        images: whether the outputs are x₀, or ε.
        stochastic: whether the steps are those of an SDE.
        midpoint: whether methods of second order are those of the midpoint.
    """

    def __init__(self, levels: Levels, algorithm: str, solver_type: str) -> None:
        self.levels = levels
        self.images = algorithm in ON_IMAGES
        self.stochastic = algorithm in STOCHASTIC
        self.midpoint = solver_type == "midpoint"
        self.rows = cache(self._rows)

    def _rows(self, order: int) -> Rows:
        """Integrals over the steps, of x, the noise, the output and its derivatives in λ.

        DPM-Solver: appendix B; DPM-Solver++: appendix A; their SDE versions: DPM-Solver++, section
        5. The second derivative of SDE-DPM-Solver++ has its constant, a half, with the sign that is
           in use, not the one that follows.
        """
        start, *ratios = self._block(order)
        alpha = self.levels.alpha[1:]
        sigma = self.levels.sigma[1:]
        h = self.levels.lam[1:] - self.levels.lam[start]
        if self.images:
            z = -h
            scale = alpha
            a = sigma / self.levels.sigma[start]
        else:
            z = h
            scale = sigma
            a = alpha / self.levels.alpha[start]
        noise = 0 * h
        half = 0.5
        if self.stochastic:
            noise = sigma * (torch.exp(2 * z) - 1.0).abs().sqrt()
            if self.images:
                z = 2 * z
                a = a * torch.exp(-h)
                half = -half
            else:
                scale = 2 * scale
        e = torch.exp(z) - 1.0
        value = -scale * e
        first = -scale * (e / z - 1.0)
        second = -scale * ((e - z) / z**2 - half)
        if order == 2 and self.midpoint:
            first = 0.5 * value
        return as_rows(a, noise, value, first, second, *ratios)

    def _block(self, order: int) -> tuple[Tensor, ...]:
        """Where the integrals of every step begin, and what `_derivatives` needs to know of the
        distances in λ."""
        raise NotImplementedError

    def _derivatives(self, outputs: list[Tensor], *ratios: float) -> list[Tensor]:
        """The output where the integrals begin, and its derivatives in λ there, times powers of the
        step's length."""
        raise NotImplementedError

    def moved(self, i: int, x: Tensor, outputs: list[Tensor], noise: Tensor | None) -> Tensor:
        """The sample after step i, from the one that its integrals begin with; its order is the
        number of `outputs`, newest first."""
        a, c, value, first, second, *ratios = self.rows(len(outputs))[i]
        known = self._derivatives(outputs, *ratios)
        return combine(a, x, *zip((value, first, second), known, strict=False), (c, noise))


class Multistep(Integrals):
    """On the outputs of the last steps."""

    def _block(self, order: int) -> tuple[Tensor, ...]:
        h = self.levels.lam.diff()
        r0 = h.roll(1) / h
        r1 = h.roll(2) / h
        return torch.arange(len(h)), 1 / r0, 1 / r1, r0 / (r0 + r1), 1 / (r0 + r1)

    def _derivatives(self, outputs: list[Tensor], *ratios: float) -> list[Tensor]:
        """By differences of the last outputs (DPM-Solver++, algorithm 2 and appendix B).

        The second one lacks a factor of 2, as in the authors' code: the third order converges as
        the second.
        """
        *inverse, share, curve = ratios
        slopes = [
            (new - old) * r for (new, old), r in zip(pairwise(outputs), inverse, strict=False)
        ]
        if len(slopes) < 2:
            return [outputs[0], *slopes]
        bend = slopes[0] - slopes[1]
        return [outputs[0], slopes[0] + share * bend, curve * bend]


class Singlestep(Integrals):
    """In blocks of up to three steps, each from the start of its block."""

    def _block(self, order: int) -> tuple[Tensor, ...]:
        lam = self.levels.lam
        now = torch.arange(len(lam) - 1)
        start = (now - order + 1).clamp(min=0)
        h = lam[now + 1] - lam[start]
        r0 = (lam[now] - lam[start]) / h
        r1 = (lam[start + 1] - lam[start]) / h
        return start, 1 / r0, 1 / r1, r0, r1, r0 - r1

    def _derivatives(self, outputs: list[Tensor], *ratios: float) -> list[Tensor]:
        """By differences from the output at the start of the block; midpoint methods use the newest
        alone."""
        *later, first = outputs
        *inverse, r0, r1, apart = ratios
        slopes = [(output - first) * r for output, r in zip(later, inverse, strict=False)]
        if len(slopes) < 2 or self.midpoint:
            return [first, *slopes[:1]]
        newest, inner = slopes
        slope = (r0 * inner - r1 * newest) / apart
        bend = 2 * (newest - inner) / apart
        return [first, slope, bend]


class MultistepRun:
    """A run of multistep steps, with the outputs that it keeps, newest first."""

    def __init__(self, integrals: Multistep, orders: Orders) -> None:
        self.stochastic = integrals.stochastic
        self._integrals = integrals
        self._orders = orders
        self._outputs: list[Tensor] = []

    def step(self, i: int, x: Tensor, output: Tensor, noise: Tensor | None) -> Tensor:
        """The sample after step i, in which the model says `output`."""
        self._outputs = [output, *self._outputs[: self._orders.most - 1]]
        order = self._orders.at(i, len(self._outputs))
        return self._integrals.moved(i, x, self._outputs[:order], noise)


def multistep_run(
    levels: Levels, steps: int, config: Config, algorithm: str, *, first_at_end: bool
) -> MultistepRun:
    """A run of so many steps, as a config describes it; the last one is of first order if the
    config says so or `first_at_end`."""
    short = config.lower_order_final and steps < SHORT_RUN
    orders = Orders(config.solver_order, steps, short, config.euler_at_final or first_at_end)
    return MultistepRun(Multistep(levels, algorithm, config.solver_type), orders)


def refuse_endless(name: str, config: Config) -> None:
    """Raise a ValueError if the algorithm cannot end where the config wants it to."""
    if config.algorithm_type not in ON_IMAGES and config.final_sigmas_type == "zero":
        raise ValueError(
            f"{name}: {config.algorithm_type} cannot end at zero; set final_sigmas_type to"
            " sigma_min"
        )


class DPMSolverMultistepScheduler(ExponentialSolver):
    """DPM-Solver and DPM-Solver++ on the outputs of the last steps, and their SDE versions."""

    names: ClassVar = {
        "dpm++2m": {},
        "dpm++2m-karras": {"use_karras_sigmas": True},
        "dpm++2m-sde": {"algorithm_type": "sde-dpmsolver++"},
    }
    compatible = True
    clips_alpha_bar = True
    takes = ("timesteps",)
    aliases: ClassVar = ALIASES

    @configured
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Numbers | None = None,
        solver_order: Order = 2,
        prediction_type: FlowPrediction = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        algorithm_type: Algorithm = "dpmsolver++",
        solver_type: Kind = "midpoint",
        lower_order_final: bool = True,
        euler_at_final: bool = False,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        use_lu_lambdas: bool = False,
        use_flow_sigmas: bool = False,
        flow_shift: float = 1.0,
        final_sigmas_type: Ends = "zero",
        lambda_min_clipped: float = -math.inf,
        variance_type: Variance = None,
        timestep_spacing: str = "linspace",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
        use_dynamic_shifting: bool = False,
        time_shift_type: TimeShift = "exponential",
    ) -> None:
        self._prepare()
        refuse_endless(type(self).__name__, self.config)
        self.stochastic = self.config.algorithm_type in STOCHASTIC

    step = noisy_step  # type: ignore[assignment]

    def _rounds(self) -> bool:
        rounds = self.config.use_karras_sigmas or self.config.use_lu_lambdas
        return bool(rounds and self.config.beta_schedule != "squaredcos_cap_v2")

    @property
    def _images(self) -> bool:
        return self.config.algorithm_type in ON_IMAGES

    def _begin(self, timesteps: Array, sigmas: Array, device: Device = None) -> None:
        super()._begin(timesteps, sigmas, device)
        algorithm = self.config.algorithm_type
        to_zero = self.config.final_sigmas_type == "zero"
        self._run = multistep_run(
            self._noise_levels, len(timesteps), self.config, algorithm, first_at_end=to_zero
        )

    def _solve(self, i: int, x: Tensor, output: Tensor, draw: Draw) -> tuple[Tensor, None]:
        known = self._converted(i, x, output)
        noise = draw(known, torch.float32) if self._run.stochastic else None
        return self._run.step(i, x, known, noise), None


class DPMSolverMultistepInverseScheduler(ExponentialSolver):
    """DPM-Solver backwards, from an image to the noise that it is made of."""

    aliases: ClassVar = ALIASES

    @configured
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Numbers | None = None,
        solver_order: Order = 2,
        prediction_type: FlowPrediction = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        algorithm_type: Algorithm = "dpmsolver++",
        solver_type: Kind = "midpoint",
        lower_order_final: bool = True,
        euler_at_final: bool = False,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        use_flow_sigmas: bool = False,
        flow_shift: float = 1.0,
        lambda_min_clipped: float = -math.inf,
        variance_type: Variance = None,
        timestep_spacing: str = "linspace",
        steps_offset: int = 0,
    ) -> None:
        self._prepare()
        self.stochastic = self.config.algorithm_type in STOCHASTIC

    step = noisy_step  # type: ignore[assignment]

    def _rounds(self) -> bool:
        cosine = self.config.beta_schedule == "squaredcos_cap_v2"
        return bool(self.config.use_karras_sigmas and not cosine)

    @property
    def _images(self) -> bool:
        return self.config.algorithm_type in ON_IMAGES

    def _spaced(self, steps: int) -> Array:
        spacing = self.config.timestep_spacing
        if spacing == "trailing":
            return super()._spaced(steps)[::-1]
        offset = self.config.steps_offset
        last = self._last_timestep()
        return spaced(spacing, steps + 1, len(self), offset, last=last).round()[:0:-1]

    def _range(self) -> tuple[float, float]:
        high, low = super()._range()
        return low, high

    def _end(self, sigmas: Array) -> float:
        highest = self._trained.sigmas[self._last_timestep() - 1]
        return float(highest if self._plain else sigmas[-1])

    def _calls(self, timesteps: Array, sigmas: Array, end: float) -> Visits:
        t, sigmas = super()._calls(timesteps, sigmas, end)
        first_places = np.unique(t, return_index=True)[1]
        return t[np.sort(first_places)], sigmas

    def _begin(self, timesteps: Array, sigmas: Array, device: Device = None) -> None:
        super()._begin(timesteps, sigmas, device)
        algorithm = self.config.algorithm_type
        self._run = multistep_run(
            self._noise_levels, len(timesteps), self.config, algorithm, first_at_end=False
        )

    def _solve(self, i: int, x: Tensor, output: Tensor, draw: Draw) -> tuple[Tensor, None]:
        known = self._converted(i, x, output)
        noise = draw(known, torch.float32) if self._run.stochastic else None
        return self._run.step(i, x, known, noise), None


class DPMSolverSinglestepScheduler(ExponentialSolver):
    """DPM-Solver and DPM-Solver++ in blocks of up to three steps, each from the start of its
    block."""

    names: ClassVar = {"dpm++2s": {}}
    compatible = True
    takes = ("timesteps",)
    aliases: ClassVar = ALIASES

    @configured
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Numbers | None = None,
        solver_order: Order = 2,
        prediction_type: FlowPrediction = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        algorithm_type: Literal["dpmsolver++", "sde-dpmsolver++", "dpmsolver"] = "dpmsolver++",
        solver_type: Kind = "midpoint",
        lower_order_final: bool = False,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        use_flow_sigmas: bool = False,
        flow_shift: float = 1.0,
        final_sigmas_type: Ends = "zero",
        lambda_min_clipped: float = -math.inf,
        variance_type: Variance = None,
        use_dynamic_shifting: bool = False,
        time_shift_type: TimeShift = "exponential",
    ) -> None:
        self._prepare()
        refuse_endless(type(self).__name__, self.config)
        self.stochastic = self.config.algorithm_type in STOCHASTIC

    @property
    def _images(self) -> bool:
        return self.config.algorithm_type in ON_IMAGES

    def _begin(self, timesteps: Array, sigmas: Array, device: Device = None) -> None:
        super()._begin(timesteps, sigmas, device)
        algorithm = self.config.algorithm_type
        self._integrals = Singlestep(self._noise_levels, algorithm, self.config.solver_type)
        steps = len(timesteps)
        most = self.config.solver_order
        to_zero = self.config.final_sigmas_type == "zero"
        if self.num_inference_steps and (steps % most or to_zero):
            self.config = Config({**self.config, "lower_order_final": True})
        self._orders = [1 + i % most for i in range(steps)]
        if self.config.lower_order_final and steps % most == 0:
            self._orders[-most:] = {1: [1], 2: [1, 1], 3: [1, 2, 1]}[most]
        if to_zero:
            self._orders[-1] = 1

    def _solve(self, i: int, x: Tensor, output: Tensor, draw: Draw) -> tuple[Tensor, None]:
        known = self._converted(i, x, output)
        self._history = [known, *self._history[: self.config.solver_order - 1]]
        order = min(self._orders[i], len(self._history))
        if order == 1 or self._start is None:
            self._start = x
        noise = draw(known) if self._integrals.stochastic else None
        return self._integrals.moved(i, self._start, self._history[:order], noise), None


class EDMDPMSolverMultistepScheduler(Preconditioned):
    """DPM-Solver++ for preconditioned models; the sample is x₀ + σ·ε."""

    strays_end = True

    aliases: ClassVar = ALIASES

    @configured
    def __init__(
        self,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        sigma_data: float = 0.5,
        sigma_schedule: Spread = "karras",
        num_train_timesteps: int = 1000,
        prediction_type: EpsilonOrV = "epsilon",
        rho: float = 7.0,
        solver_order: Order = 2,
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        algorithm_type: Literal["dpmsolver++", "sde-dpmsolver++"] = "dpmsolver++",
        solver_type: Kind = "midpoint",
        lower_order_final: bool = True,
        euler_at_final: bool = False,
        final_sigmas_type: Ends = "zero",
    ) -> None:
        self._prepare()
        self.stochastic = self.config.algorithm_type in STOCHASTIC

    def _begin(self, timesteps: Array, sigmas: Array, device: Device = None) -> None:
        super()._begin(timesteps, sigmas, device)
        levels = levels_of(torch.ones_like(self.sigmas), self.sigmas)
        algorithm = self.config.algorithm_type
        to_zero = self.config.final_sigmas_type == "zero"
        self._run = multistep_run(
            levels, len(timesteps), self.config, algorithm, first_at_end=to_zero
        )

    def _solve(self, i: int, x: Tensor, output: Tensor, draw: Draw) -> tuple[Tensor, None]:
        x0 = self._image(x, output, self._levels[i])
        noise = draw(x0, torch.float32) if self._run.stochastic else None
        return self._run.step(i, x, x0, noise), None


class CosineDPMSolverMultistepScheduler(Preconditioned):
    """SDE-DPM-Solver++ for models that are told the angle of σ (Evans et al., Stable Audio
    Open)."""

    stochastic = True
    strays_end = True
    aliases: ClassVar = ALIASES

    @configured
    def __init__(
        self,
        sigma_min: float = 0.3,
        sigma_max: float = 500,
        sigma_data: float = 1.0,
        sigma_schedule: Spread = "exponential",
        num_train_timesteps: int = 1000,
        solver_order: Literal[2, 1] = 2,
        prediction_type: EpsilonOrV = "v_prediction",
        rho: float = 7.0,
        solver_type: Kind = "midpoint",
        lower_order_final: bool = True,
        euler_at_final: bool = False,
        final_sigmas_type: Ends = "zero",
    ) -> None:
        self._prepare()

    def _condition(self, sigmas: Tensor) -> Tensor:
        return sigmas.atan() / math.pi * 2

    def _begin(self, timesteps: Array, sigmas: Array, device: Device = None) -> None:
        super()._begin(timesteps, sigmas, device)
        levels = levels_of(torch.ones_like(self.sigmas), self.sigmas)
        to_zero = self.config.final_sigmas_type == "zero"
        self._run = multistep_run(
            levels, len(timesteps), self.config, "sde-dpmsolver++", first_at_end=to_zero
        )

    def _solve(self, i: int, x: Tensor, output: Tensor, draw: Draw) -> tuple[Tensor, None]:
        x0 = self._image(x, output, self._levels[i])
        if self._path is None:
            low = self.config.sigma_min
            self._path = BrownianNoise(x0, low, self.config.sigma_max, self._seed())
        noise = self._path(self._levels[i], self._levels[i + 1])
        return self._run.step(i, x, x0, noise), None

    def _seed(self) -> int | list[int] | None:
        """Of the Brownian path; all that the generators say."""
        given = self._generator
        if isinstance(given, list):
            return [one.initial_seed() for one in given]
        return given.initial_seed() if given else None
