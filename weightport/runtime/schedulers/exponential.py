"""Exponential integrators in λ = log(α/σ): DPM-Solver and its relatives, which solve the linear part exactly.

The sample is variance preserving, α² + σ² = 1; but for flows, α + σ = 1. `sigmas` holds σ/α (flows: σ).

DPM-Solver: Lu et al., A Fast ODE Solver for Diffusion Probabilistic Model Sampling; DPM-Solver++: Lu et al., Fast
Solver for Guided Sampling of Diffusion Probabilistic Models.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from itertools import combinations
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import base
from .base import Draw, Numbers, Options, Timestep, combine, to_image, to_noise
from .brownian import BrownianNoise
from .karras import DENSER, EDM, EDM_CHOICES, Choices, Preconditioned, SigmaSolver
from .spacing import Array, flow_shifted, spaced, stretched, time_shifted, timestep_of

FLOW: Options = {"use_flow_sigmas": False, "flow_shift": 1.0}
SHIFT: Options = {"use_dynamic_shifting": False, "time_shift_type": "exponential"}
MULTISTEP: Options = DENSER | base.THRESHOLDING | FLOW | SHIFT | {"solver_order": 2, "lower_order_final": True}
PREDICTIONS: Choices = {"prediction_type": ("epsilon", "sample", "v_prediction", "flow_prediction")}
SHORT_RUN = 15  # steps; the last ones of shorter runs are of lower order, which is more stable
Rows = list[tuple[float, ...]]


class Levels(NamedTuple):
    """α, σ and λ of every timestep of a run, and of its end, float32."""

    alpha: Tensor
    sigma: Tensor
    lam: Tensor


class ExponentialSolver(SigmaSolver):
    """A scheduler whose steps are rows of coefficients, for x, the noise, and the outputs, newest first."""

    choices = PREDICTIONS
    timestep_dtype: ClassVar[Any] = np.int64
    backwards: ClassVar[bool] = False  # whether runs go towards noise

    @property
    def init_noise_sigma(self) -> float:
        """1: the sample is variance preserving."""
        return 1.0

    def _plan(self, steps: int, timesteps: Numbers | None, sigmas: Numbers | None) -> tuple[Array, Array]:
        t, levels = self._grid(steps, timesteps)
        return self._calls(t, levels, self._end(levels))

    def _end(self, sigmas: Array) -> float:
        return float(self._trained[0]) if self.config.final_sigmas_type == "sigma_min" else 0.0

    def _grid(self, steps: int, timesteps: Numbers | None) -> tuple[Array, Array]:
        respace, table, logs = self._respacing, self._trained, self._log_trained
        lu = self._own("use_lu_lambdas")
        if timesteps is not None and (respace or lu):
            raise ValueError("timesteps cannot be given where the config asks for a spacing of sigmas")
        if respace or lu:
            if respace:
                high, low = self._own("sigma_max"), self._own("sigma_min")
                high, low = table[-1].item() if high is None else high, table[0].item() if low is None else low
                sigmas = respace(low, high, steps) if self.backwards else respace(high, low, steps)
            else:  # evenly spaced in λ; Lu et al., DPM-Solver, section 3.4
                high, low = logs[-1].item(), logs[0].item()
                sigmas = np.exp(high + np.linspace(0, 1, steps) * (low - high))
            t = timestep_of(sigmas, logs)
            return t.round() if self._rounds else t, sigmas
        if self._own("use_flow_sigmas"):
            shift = self.config.flow_shift if self._mu is None else math.exp(self._mu)
            sigmas = flow_shifted(1 - np.linspace(1, 1 / len(self), steps + 1), shift)[::-1][:-1]
            return sigmas * len(self), sigmas
        t = self._whole_timesteps(steps) if timesteps is None else np.asarray(timesteps)
        return t, self._interpolated(t)

    @property
    def _rounds(self) -> bool:
        """Whether timesteps of spaced σ are rounded, not cut off."""
        return bool(self.config.use_karras_sigmas)

    def _last_timestep(self) -> int:
        """Timesteps in use: `lambda_min_clipped` leaves out the noisiest."""
        clip = self._own("lambda_min_clipped")
        return len(self) - (0 if clip is None else int(np.searchsorted(-self._log_trained[::-1], clip)))

    def _whole_timesteps(self, steps: int) -> Array:
        spacing, offset = self._own("timestep_spacing") or "linspace", self._own("steps_offset") or 0
        return spaced(spacing, steps, len(self), offset, spare=1, last=self._last_timestep()).round()

    def _begin(self, timesteps: Array, sigmas: Array, device: Any = None) -> None:
        super()._begin(timesteps, sigmas, device)
        alpha, sigma = self._split(self.sigmas)
        self._table = Levels(alpha, sigma, alpha.log() - sigma.log())
        self._shares = list(zip(alpha.tolist(), sigma.tolist(), strict=True))
        self._outputs: list[Tensor] = []
        self._rows_of = cache(self._rows)

    def _split(self, sigmas: Tensor) -> tuple[Tensor, Tensor]:
        """α and σ of noise-to-signal ratios, or of a flow's σ."""
        if self._own("use_flow_sigmas"):
            return 1 - sigmas, sigmas
        alpha = 1 / (sigmas**2 + 1).sqrt()
        return alpha, sigmas * alpha

    def scale_model_input(self, sample: Tensor, timestep: Timestep | None = None) -> Tensor:
        """The sample as it is: its variance is 1."""
        return sample

    def _noised(self, x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        alpha, sigma = self._split(sigma)
        return x0 * alpha + noise * sigma

    def _converted(self, i: int, x: Tensor, output: Tensor, *, image: bool) -> Tensor:
        """What the model says as x₀, or as ε."""
        kind, (alpha, sigma) = self.config.prediction_type, self._shares[i]
        if kind == "epsilon" and self._own("variance_type") in ("learned", "learned_range"):
            output = output[:, :3]  # the rest is the variance
        if kind == "flow_prediction":
            sigma = self._levels[i]
        if image or self._own("thresholding"):
            x0 = self._limit(to_image(kind, x, output, alpha, sigma))
            return x0 if image else to_noise("sample", x, x0, alpha, sigma)
        return to_noise(kind, x, output, alpha, sigma)

    def _rows(self, order: int) -> Rows:
        """The coefficients of every step of the run, at this order."""
        raise NotImplementedError

    def _taken(self, row: tuple[float, ...], x: Tensor, noise: Tensor | None = None) -> Tensor:
        a, c, *b = row
        return combine(a, x, *zip(b, self._outputs, strict=False), (c, noise))

    def _push(self, output: Tensor, keep: int) -> None:
        self._outputs = [output, *self._outputs[: keep - 1]]

    def _order_at(self, i: int, force: bool = False) -> int:
        """The order of step i: no more than there are outputs, and less at the end of short runs."""
        config, left = self.config, len(self.timesteps) - 1 - i
        short = config.lower_order_final and len(self.timesteps) < SHORT_RUN
        if left == 0 and (short or force):
            return 1
        return min(2 if left == 1 and short else config.solver_order, len(self._outputs))


def as_rows(h: Tensor, *tables: Tensor) -> Rows:
    """Tables of coefficients as a row a step; a step of no length, h = 0, leaves the sample as it is."""
    first, *rest = tables
    tables = (first.masked_fill(h == 0, 1.0), *(table.masked_fill(h == 0, 0.0) for table in rest))
    return list(zip(*(table.tolist() for table in tables), strict=True))


class Integrals(NamedTuple):
    """Coefficients of a DPM-Solver step for the sample, the noise, and the output's value and first two derivatives.

    `half` is the coefficient of the first derivative in midpoint methods of order 2.
    """

    sample: Tensor
    noise: Tensor
    value: Tensor
    half: Tensor
    first: Tensor
    second: Tensor


def integrals(algorithm: str, levels: Levels, start: Tensor, end: Tensor) -> Integrals:
    """The exponentially weighted integrals over steps from the levels `start` to the levels `end`.

    DPM-Solver: appendix B; DPM-Solver++: appendix A; their SDE versions: DPM-Solver++, section 5.
    """
    alpha, sigma, h = levels.alpha[end], levels.sigma[end], levels.lam[end] - levels.lam[start]
    a = alpha / levels.alpha[start] if algorithm in ("dpmsolver", "sde-dpmsolver") else sigma / levels.sigma[start]
    match algorithm:
        case "dpmsolver++":
            e = torch.exp(-h) - 1.0
            second = -alpha * ((e + h) / h**2 - 0.5)
            return Integrals(a, torch.zeros_like(h), -alpha * e, -0.5 * (alpha * e), alpha * (e / h + 1.0), second)
        case "sde-dpmsolver++":
            e = 1.0 - torch.exp(-2.0 * h)
            first, second = alpha * (e / (-2.0 * h) + 1.0), alpha * ((e - 2.0 * h) / (2.0 * h) ** 2 - 0.5)
            noise = sigma * e.clamp(min=0).sqrt()
            return Integrals(a * torch.exp(-h), noise, alpha * e, 0.5 * (alpha * e), first, second)
    e, times = torch.exp(h) - 1.0, 1.0 if algorithm == "dpmsolver" else 2.0
    first, second = -times * (sigma * (e / h - 1.0)), -times * (sigma * ((e - h) / h**2 - 0.5))
    noise = (times - 1) * sigma * (torch.exp(2 * h) - 1.0).clamp(min=0).sqrt()
    return Integrals(a, noise, -times * (sigma * e), -0.5 * times * (sigma * e), first, second)


MULTISTEP_DPM: Options = {"algorithm_type": "dpmsolver++", "solver_type": "midpoint"}
DPM: Options = MULTISTEP_DPM | {
    "final_sigmas_type": "zero",
    "lambda_min_clipped": -math.inf,
    "variance_type": None,
}
DPM_CHOICES: Choices = {
    "solver_order": (2, 1, 3),
    "algorithm_type": ("dpmsolver++", "sde-dpmsolver++", "dpmsolver", "sde-dpmsolver"),
    "solver_type": ("midpoint", "heun"),
}


class DPMSolver(ExponentialSolver):
    """What the multistep and the singlestep solver share."""

    takes: ClassVar[tuple[str, ...]] = ("timesteps",)
    choices: ClassVar[Choices] = PREDICTIONS | DPM_CHOICES | {"final_sigmas_type": ("zero", "sigma_min")}
    aliases: ClassVar[dict[str, dict[str, str]]] = {
        "algorithm_type": {"deis": "dpmsolver++"},
        "solver_type": dict.fromkeys(("logrho", "bh1", "bh2"), "midpoint"),
    }

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        name, config = type(self).__name__, self.config
        if not self._images and self._own("final_sigmas_type") == "zero":
            raise ValueError(f"{name}: {config.algorithm_type} cannot end at zero; set final_sigmas_type to sigma_min")

    @property
    def _images(self) -> bool:
        return bool(self.config.algorithm_type.endswith("++"))

    def _noise_of(self, draw: Draw) -> Tensor | None:
        return draw(self._outputs[0]) if self.config.algorithm_type.startswith("sde") else None


class DPMSolverMultistepScheduler(DPMSolver):
    """DPM-Solver and DPM-Solver++ on the outputs of the last steps, and their SDE versions."""

    clips_alpha_bar = True
    defaults = MULTISTEP | DPM | {"euler_at_final": False, "use_lu_lambdas": False, "rescale_betas_zero_snr": False}

    @property
    def _rounds(self) -> bool:
        spaced = self.config.use_karras_sigmas or self._own("use_lu_lambdas")
        return bool(spaced) and self.config.beta_schedule != "squaredcos_cap_v2"

    def _solve(self, i: int, x: Tensor, output: Tensor, draw: Draw) -> tuple[Tensor, None]:
        self._push(self._converted(i, x, output, image=self._images), self.config.solver_order)
        noise = self._noise_of(draw)
        order = self._order_at(i, self.config.euler_at_final or self._own("final_sigmas_type") == "zero")
        return self._taken(self._rows_of(order)[i], x, noise), None

    def _noise_of(self, draw: Draw) -> Tensor | None:
        stochastic = self.config.algorithm_type.startswith("sde")
        return draw(self._outputs[0], torch.float32) if stochastic else None

    def _rows(self, order: int) -> Rows:
        return multistep_rows(self.config.algorithm_type, self.config.solver_type, self._table, order)


def multistep_rows(algorithm: str, solver: str, table: Levels, order: int) -> Rows:
    """Derivatives are differences of the outputs of the last steps (DPM-Solver++, algorithm 2 and appendix B)."""
    now, h = torch.arange(len(table.lam) - 1), table.lam.diff()
    k = integrals(algorithm, table, now, now + 1)
    if order == 1:
        return as_rows(h, k.sample, k.noise, k.value)
    r0 = h.roll(1) / h
    if order == 2:
        slope = (k.half if solver == "midpoint" else k.first) / r0
        return as_rows(h, k.sample, k.noise, k.value + slope, -slope)
    r1 = h.roll(2) / h
    near = (k.first * (1 + r0 / (r0 + r1)) + k.second / (r0 + r1)) / r0  # of the newest difference m₀ - m₁
    far = -(k.first * r0 + k.second) / (r0 + r1) / r1  # of the one before, m₁ - m₂
    return as_rows(h, k.sample, k.noise, k.value + near, far - near, -far)


class DPMSolverMultistepInverseScheduler(DPMSolverMultistepScheduler):
    """DPM-Solver backwards, from an image to the noise that it is made of."""

    clips_alpha_bar, backwards = False, True
    takes = ()
    defaults: ClassVar[Options] = {
        key: value
        for key, value in (MULTISTEP | DPM | {"euler_at_final": False}).items()
        if key != "final_sigmas_type" and key not in SHIFT
    }
    choices: ClassVar[Choices] = PREDICTIONS | DPM_CHOICES

    def _whole_timesteps(self, steps: int) -> Array:
        spacing, offset, last = self.config.timestep_spacing, self.config.steps_offset, self._last_timestep()
        if spacing == "trailing":
            return super()._whole_timesteps(steps)[::-1]
        return spaced(spacing, steps + 1, len(self), offset, last=last).round()[:0:-1]

    def _end(self, sigmas: Array) -> float:
        plain = self._respacing is None and not self.config.use_flow_sigmas
        return float(self._trained[self._last_timestep() - 1] if plain else sigmas[-1])

    def _calls(self, timesteps: Array, sigmas: Array, end: float) -> tuple[Array, Array]:
        t, sigmas = super()._calls(timesteps, sigmas, end)
        return t[np.sort(np.unique(t, return_index=True)[1])], sigmas


class DPMSolverSinglestepScheduler(DPMSolver):
    """DPM-Solver and DPM-Solver++ in blocks of up to three steps, each from the start of its block."""

    defaults: ClassVar[Options] = {
        key: value for key, value in (MULTISTEP | DPM | {"lower_order_final": False}).items() if key not in base.SPACING
    }
    choices: ClassVar[Choices] = DPMSolver.choices | {"algorithm_type": ("dpmsolver++", "sde-dpmsolver++", "dpmsolver")}

    def _begin(self, timesteps: Array, sigmas: Array, device: Any = None) -> None:
        super()._begin(timesteps, sigmas, device)
        n, order, zero = len(timesteps), self.config.solver_order, self.config.final_sigmas_type == "zero"
        if self.num_inference_steps and (n % order or zero):
            self.config["lower_order_final"] = True
        self._orders = [1 + i % order for i in range(n)]
        if self.config.lower_order_final and n % order == 0:
            self._orders[-order:] = {1: [1], 2: [1, 1], 3: [1, 2, 1]}[order]
        if zero:
            self._orders[-1] = 1

    def _solve(self, i: int, x: Tensor, output: Tensor, draw: Draw) -> tuple[Tensor, None]:
        self._push(self._converted(i, x, output, image=self._images), self.config.solver_order)
        order = min(self._orders[i], len(self._outputs))
        if order == 1:
            self._start = x
        return self._taken(self._rows_of(order)[i], self._start, self._noise_of(draw)), None

    def _rows(self, order: int) -> Rows:
        now, lam, midpoint = (
            torch.arange(len(self._table.lam) - 1),
            self._table.lam,
            self.config.solver_type == "midpoint",
        )
        start = (now - order + 1).clamp(min=0)
        k, h = integrals(self.config.algorithm_type, self._table, start, now + 1), lam[now + 1] - lam[start]
        if order == 1:
            return as_rows(h, k.sample, k.noise, k.value)
        r0 = (lam[now] - lam[start]) / h
        if order == 2:
            slope = (k.half if midpoint else k.first) / r0
            return as_rows(h, k.sample, k.noise, slope, k.value - slope)
        r1 = (lam[start + 1] - lam[start]) / h
        if midpoint:  # the slope to the newest output alone
            return as_rows(h, k.sample, k.noise, k.first / r0, torch.zeros_like(h), k.value - k.first / r0)
        newest = (2 * k.second - k.first * r1) / (r0 - r1) / r0
        inner = (k.first * r0 - 2 * k.second) / (r0 - r1) / r1
        return as_rows(h, k.sample, k.noise, newest, inner, k.value - newest - inner)


class EDMDPMSolverMultistepScheduler(Preconditioned, DPMSolverMultistepScheduler):
    """DPM-Solver++ for preconditioned models; the sample is x₀ + σ·ε."""

    takes = ()
    defaults = (
        EDM
        | base.THRESHOLDING
        | MULTISTEP_DPM
        | {"solver_order": 2, "lower_order_final": True, "euler_at_final": False}
    )
    choices: ClassVar[Choices] = EDM_CHOICES | DPM_CHOICES | {"algorithm_type": ("dpmsolver++", "sde-dpmsolver++")}
    timestep_dtype = np.float32

    def _split(self, sigmas: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(sigmas), sigmas

    def _converted(self, i: int, x: Tensor, output: Tensor, *, image: bool) -> Tensor:
        return self._image(x, output, self._levels[i])


class CosineDPMSolverMultistepScheduler(EDMDPMSolverMultistepScheduler):
    """SDE-DPM-Solver++ for models that are told the angle of σ (Evans et al., Stable Audio Open)."""

    defaults: ClassVar[Options] = EDM | {
        "sigma_min": 0.3,
        "sigma_max": 500,
        "sigma_data": 1.0,
        "sigma_schedule": "exponential",
        "prediction_type": "v_prediction",
        "solver_order": 2,
        "solver_type": "midpoint",
        "lower_order_final": True,
        "euler_at_final": False,
    }
    choices: ClassVar[Choices] = EDM_CHOICES | {"solver_order": (2, 1), "solver_type": ("midpoint", "heun")}
    _images = True

    def _condition(self, sigmas: Tensor) -> Tensor:
        return sigmas.atan() / math.pi * 2

    def _begin(self, timesteps: Array, sigmas: Array, device: Any = None) -> None:
        super()._begin(timesteps, sigmas, device)
        self._path: BrownianNoise | None = None

    def step(  # type: ignore[override]
        self,
        model_output: Tensor,
        timestep: Timestep,
        sample: Tensor,
        generator: base.Generator = None,
        return_dict: bool = True,
    ) -> Any:
        """Go to the next timestep; the noise is a Brownian path, and `generator` only says its seed."""
        if self._path is None:
            several = isinstance(generator, list)
            seeds = [one.initial_seed() for one in (generator if isinstance(generator, list) else [generator]) if one]
            seed = seeds if several else seeds[0] if seeds else None
            self._path = BrownianNoise(model_output, self.config.sigma_min, self.config.sigma_max, seed)
        i = self._here(timestep)
        return super().step(model_output, timestep, sample, variance_noise=self._path(*self._levels[i : i + 2]))

    def _rows(self, order: int) -> Rows:
        return multistep_rows("sde-dpmsolver++", self.config.solver_type, self._table, order)

    def _noise_of(self, draw: Draw) -> Tensor | None:
        return draw()


class DEISMultistepScheduler(ExponentialSolver):
    """DEIS: ε is a polynomial in log(σ/α) through the last outputs (Zhang and Chen, Fast Sampling, section 3)."""

    defaults = MULTISTEP | {"algorithm_type": "deis", "solver_type": "logrho"}
    choices: ClassVar[Choices] = PREDICTIONS | {
        "solver_order": (2, 1, 3),
        "algorithm_type": ("deis",),
        "solver_type": ("logrho",),
    }
    aliases: ClassVar[dict[str, dict[str, str]]] = {
        "algorithm_type": dict.fromkeys(DPM_CHOICES["algorithm_type"], "deis"),
        "solver_type": dict.fromkeys(("midpoint", "heun", "bh1", "bh2"), "logrho"),
    }

    def _end(self, sigmas: Array) -> float:
        plain = self._respacing is None and not self.config.use_flow_sigmas
        return float(self._trained[0] if plain else sigmas[-1])

    def _solve(self, i: int, x: Tensor, output: Tensor, draw: Draw) -> tuple[Tensor, None]:
        alpha, sigma = self._shares[i]
        eps = to_noise("sample", x, self._converted(i, x, output, image=True), alpha, sigma)
        self._push(eps, self.config.solver_order)
        return self._taken(self._rows_of(self._order_at(i))[i], x) * self._shares[i + 1][0], None

    def _rows(self, order: int) -> Rows:
        """The coefficients for x/α."""
        alpha, sigma, lam = self._table
        h, start, zero = lam.diff(), 1 / alpha[:-1], torch.zeros(len(lam) - 1)
        if order == 1:
            return as_rows(torch.ones_like(h), start, zero, -sigma[1:] * (torch.exp(h) - 1.0) / alpha[1:])
        rho = (sigma / alpha).numpy()
        past = [np.roll(rho[:-1], k) for k in range(order)]
        weights = []
        with np.errstate(all="ignore"):
            for k in range(order):
                nodes = past[k:] + past[:k]
                integral = _log_line if order == 2 else _log_parabola
                weights.append(torch.from_numpy(integral(rho[1:], *nodes) - integral(past[0], *nodes)))
        return as_rows(torch.ones_like(h), start, zero, *weights)


def _log_line(t: Array, b: Array, c: Array) -> Array:
    """∫ of the line in log t that is 1 at b and 0 at c."""
    return np.asarray(t * (-np.log(c) + np.log(t) - 1) / (np.log(b) - np.log(c)))


def _log_parabola(t: Array, b: Array, c: Array, d: Array) -> Array:
    """∫ of the parabola in log t that is 1 at b and 0 at c and d."""
    log_t, log_c, log_d = np.log(t), np.log(c), np.log(d)
    area = t * (log_c * (log_d - log_t + 1) - log_d * log_t + log_d + log_t**2 - 2 * log_t + 2)
    return np.asarray(area / ((np.log(b) - log_c) * (np.log(b) - log_d)))


class UniPCMultistepScheduler(ExponentialSolver):
    """A predictor, and a corrector that needs no further model call (Zhao et al., UniPC, algorithms 5 to 8)."""

    clips_alpha_bar = True
    takes = ("sigmas",)
    defaults = MULTISTEP | {
        "predict_x0": True,
        "solver_type": "bh2",
        "disable_corrector": [],
        "solver_p": None,
        "final_sigmas_type": "zero",
        "rescale_betas_zero_snr": False,
        "sigma_min": None,
        "sigma_max": None,
        "shift_terminal": None,
    }
    choices: ClassVar[Choices] = PREDICTIONS | {
        "solver_type": ("bh2", "bh1"),
        "solver_p": (None,),
        "final_sigmas_type": ("zero", "sigma_min"),
    }
    aliases: ClassVar[dict[str, dict[str, str]]] = {"solver_type": dict.fromkeys(("midpoint", "heun", "logrho"), "bh2")}

    def _begin(self, timesteps: Array, sigmas: Array, device: Any = None) -> None:
        super()._begin(timesteps, sigmas, device)
        self._before: Tensor | None = None
        self._order = 1
        self._pairs_of = cache(self._pairs)

    def _end(self, sigmas: Array) -> float:
        plain = self._respacing is None and not self.config.use_flow_sigmas
        low = self._trained[0] if plain else sigmas[-1]
        return float(low) if self.config.final_sigmas_type == "sigma_min" else 0.0

    def _solve(self, i: int, x: Tensor, output: Tensor, draw: Draw) -> tuple[Tensor, None]:
        config, newest = self.config, self._converted(i, x, output, image=self.config.predict_x0)
        if i > 0 and i - 1 not in config.disable_corrector and self._before is not None:
            (weight, *row) = self._pairs_of(self._order)[1][i - 1]
            x = combine(1, self._taken(tuple(row), self._before), (weight, newest))
        most = min(config.solver_order, len(self.timesteps) - i) if config.lower_order_final else config.solver_order
        self._order = min(most, len(self._outputs) + 1)
        self._push(newest, config.solver_order)
        self._before = x
        return self._taken(self._pairs_of(self._order)[0][i], x), None

    def _pairs(self, order: int) -> tuple[Rows, Rows]:
        """The rows of the predictor; and of the corrector, the weight of its new output before them."""
        alpha, sigma, lam = self._table
        h, images = lam.diff(), self.config.predict_x0
        hh = -h if images else h
        e, clean = torch.expm1(hh), sigma[1:] == 0
        ratios, one = [], torch.ones_like(h)
        for k in range(1, order):
            r = (lam[:-1].roll(k) - lam[:-1]) / h
            ratios.append(torch.where(clean | (h == 0) | (torch.arange(len(h)) < k), -k * one, r))
        phi, factorial, step = e / hh - 1, 1, hh if self.config.solver_type == "bh1" else e
        powers, values = [], []
        for k in range(order):
            powers.append(torch.stack([*ratios, one], 1) ** k)
            values.append(phi * factorial / step)
            factorial *= k + 2
            phi = phi / hh - 1 / factorial
        matrix, vector = torch.stack(powers, 1), torch.stack(values, 1)
        corrector = torch.linalg.solve(matrix, vector) if order > 1 else 0.5 * one[:, None]
        predictor = torch.linalg.solve(matrix[:, :-1, :-1], vector[:, :-1]) if order > 2 else 0.5 * one[:, None]
        scale = -(alpha if images else sigma)[1:]
        a = sigma[1:] / sigma[:-1] if images else alpha[1:] / alpha[:-1]
        to_clean = (
            torch.zeros_like(h) if images else alpha[1:] / alpha[:-1]
        )  # at σ = 0 the step ends at x₀, whatever the order
        first = torch.where(clean, one if images else -to_clean * sigma[:-1], scale * e)

        def rows(rhos: Tensor) -> list[Tensor]:
            weights = [(scale * step * rhos[:, k] / r).masked_fill(clean, 0.0) for k, r in enumerate(ratios)]
            return [torch.where(clean, to_clean, a), torch.zeros_like(h), first - sum(weights), *weights]

        new = (scale * step * corrector[:, -1]).masked_fill(clean | (h == 0), 0.0)
        correct = rows(corrector)
        correct[2] = correct[2] - new
        corrected = [(w, *row) for w, row in zip(new.tolist(), as_rows(h, *correct), strict=True)]
        return as_rows(h, *rows(predictor)), corrected

    def _plan(self, steps: int, timesteps: Numbers | None, sigmas: Numbers | None) -> tuple[Array, Array]:
        config = self.config
        if not config.use_flow_sigmas or config.use_exponential_sigmas or config.use_beta_sigmas:
            if sigmas is not None:
                raise ValueError("sigmas can be given only where the config asks for a flow")
            return super()._plan(steps, timesteps, None)
        if config.use_karras_sigmas:
            levels = self._grid(steps, timesteps)[1]
            levels = levels / (levels + 1)
        else:
            levels = np.linspace(1, 1 / len(self), steps + 1)[:-1] if sigmas is None else np.array(sigmas, float)
            if config.use_dynamic_shifting:
                levels = time_shifted(levels, self._mu, config.time_shift_type)
            else:
                levels = flow_shifted(levels, config.flow_shift)
            levels = stretched(levels, config.shift_terminal) if config.shift_terminal else levels
            levels[0] -= 1e-6 if abs(levels[0] - 1) < 1e-6 else 0  # λ stays finite
        return self._calls(levels * len(self), levels, self._end(levels))


class SASolverScheduler(ExponentialSolver):
    """Stochastic Adams: predictor and corrector with noise of strength τ(t) (Xue et al., SA-Solver, algorithm 1)."""

    defaults: ClassVar[Options] = (
        DENSER
        | base.THRESHOLDING
        | FLOW
        | {
            "predictor_order": 2,
            "corrector_order": 2,
            "tau_func": None,
            "algorithm_type": "data_prediction",
            "lower_order_final": True,
            "lambda_min_clipped": -math.inf,
            "variance_type": None,
        }
    )
    choices: ClassVar[Choices] = PREDICTIONS | {"algorithm_type": ("data_prediction", "noise_prediction")}
    _end = DEISMultistepScheduler._end

    def _begin(self, timesteps: Array, sigmas: Array, device: Any = None) -> None:
        super()._begin(timesteps, sigmas, device)
        self._before: Tensor | None = None
        self._tau: Callable[[float], float] = self.config.tau_func or (lambda t: 1 if 200 <= t <= 800 else 0)
        self._corrector_order, self._noise = 1, torch.empty(0)
        self._taus = [self._tau(t) for t in self.timesteps.tolist()]
        self._table_of = cache(self._adams)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noisy samples as they are in training at `timesteps` (b,)."""
        return base.Scheduler.add_noise(self, original_samples, noise, timesteps)

    def _solve(self, i: int, x: Tensor, output: Tensor, draw: Draw) -> tuple[Tensor, None]:
        config, keep = self.config, max(self.config.predictor_order, self.config.corrector_order - 1)
        newest, history = self._converted(i, x, output, image=self._images), self._outputs
        if i > 0 and self._before is not None:
            self._outputs = [newest, *history]
            x = self._taken(
                self._table_of(self._corrector_order, self._taus[i - 1], 1)[i - 1], self._before, self._noise
            )
            self._outputs = history
        left, known = len(self.timesteps) - i, len(history)
        limits = (left, left + 1) if config.lower_order_final else (config.predictor_order, config.corrector_order)
        order = min(config.predictor_order, limits[0], known + 1)
        self._corrector_order = min(config.corrector_order, limits[1], known + 2)
        self._push(newest, keep)
        self._before, self._noise = x, draw(newest)
        return self._taken(self._table_of(order, self._taus[i], 0)[i], x, self._noise), None

    @property
    def _images(self) -> bool:
        return bool(self.config.algorithm_type == "data_prediction")

    def _adams(self, order: int, tau: float, ahead: int) -> Rows:
        """Coefficients of all steps; the newest output is at the start of the step, or `ahead` = 1 at its end."""
        (alpha, sigma, lam), c = self._table, 1 + tau**2
        start, end, h = lam[:-1], lam[1:], lam.diff()
        nodes = [lam.roll(k - ahead)[: len(h)] for k in range(order)]
        weights = []
        for node in range(order):  # ∫ of its Lagrange polynomial, power by power
            others = nodes[:node] + nodes[node + 1 :]
            scale = math.prod((nodes[node] - other for other in others), start=torch.ones_like(h))
            total = torch.zeros_like(h)
            for power in range(order):
                minors = sum(math.prod(chosen) for chosen in combinations(others, power))
                total = total + (-1) ** power * minors / scale * self._moment(order - 1 - power, start, end, c)
            weights.append(total)
        if self._images and order == 2:  # what makes the method exact for slow change of the slope, as its authors do
            rest = h * c - 1 + torch.exp(c * -h)
            if ahead:
                bend = torch.exp(c * end) * (h / 2 - rest / (c**2 * h))
            else:
                bend = torch.exp(c * end) * (h**2 / 2 - rest / c**2) / (start - nodes[1])
            weights = [weights[0] + bend, weights[1] - bend]
        if self._images:
            decay, noise = torch.exp(-(tau**2) * h), sigma[1:] * torch.sqrt(1 - torch.exp(-2 * tau**2 * h))
            scale, a = c * sigma[1:] * torch.exp(-(tau**2) * end), decay * (sigma[1:] / sigma[:-1])
        else:
            noise = tau * sigma[1:] * torch.sqrt(torch.exp(2 * h) - 1)
            scale, a = -c * alpha[1:], alpha[1:] / alpha[:-1]
        return as_rows(h, a, noise, *(scale * weight for weight in weights))

    def _moment(self, k: int, start: Tensor, end: Tensor, c: float) -> Tensor:
        """∫ λᵏ·exp(cλ) dλ over the step for images, ∫ λᵏ·exp(-λ) dλ for noise."""

        def polynomial(y: Tensor, sign: int) -> Tensor:
            terms = [sign ** (k - p) * (math.factorial(k) // math.factorial(p)) * y**p for p in range(k, -1, -1)]
            total: Tensor = sum(terms[1:], start=terms[0])
            return total

        if self._images:
            start, end = c * start, c * end
            inner = polynomial(end, -1) - polynomial(start, -1) * torch.exp(-(end - start))
            return torch.exp(end) * inner / float(c ** (k + 1))
        return torch.exp(-end) * (polynomial(start, 1) * torch.exp(end - start) - polynomial(end, 1))
