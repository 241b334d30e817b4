"""Exponential integrators in λ = log(α/σ): DPM-Solver and its relatives, which solve the linear
part exactly.

The sample is variance preserving, α² + σ² = 1; but for flows, α + σ = 1. `sigmas` holds σ/α (flows:
σ).

DPM-Solver: Lu et al., A Fast ODE Solver for Diffusion Probabilistic Model Sampling; DPM-Solver++:
Lu et al., Fast Solver for Guided Sampling of Diffusion Probabilistic Models.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from itertools import combinations, pairwise
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ..loading.config import Config
from .base import Draw, Numbers, Plan, Scheduler, Timestep, combine, to_image, to_noise
from .brownian import BrownianNoise
from .config import EDM, FLOW, FLOWS, SHIFT, SPACING, THRESHOLDING, VE, options
from .sigmas import Preconditioned, SigmaSolver
from .spacing import Array, flow_shifted, shifted, spaced

MULTISTEP = options(
    SigmaSolver.defaults, THRESHOLDING, FLOW, SHIFT, solver_order=2, lower_order_final=True
)
SHORT_RUN = 15  # steps; the last ones of shorter runs are of lower order, which is more stable
ALGORITHMS = ("dpmsolver++", "sde-dpmsolver++", "dpmsolver", "sde-dpmsolver")
ON_NOISE = ("dpmsolver", "sde-dpmsolver", "noise_prediction")
Rows = list[tuple[float, ...]]


def as_rows(*tables: Tensor) -> Rows:
    """Tables of coefficients as a row a step; what a step of no length divides by zero plays no
    part in it."""
    return [tuple(row) for row in torch.stack(tables, 1).nan_to_num(0.0, 0.0, 0.0).tolist()]


class ExponentialSolver(SigmaSolver):
    """A scheduler whose steps are rows of coefficients: for x, the noise, and what is known of the
    outputs."""

    predicts: ClassVar[tuple[str, ...]] = FLOWS
    timestep_dtype: ClassVar[Any] = np.int64
    rounds_karras = True

    @property
    def init_noise_sigma(self) -> float:
        """1: the sample is variance preserving."""
        return 1.0

    def _grid(self, steps: int, timesteps: Numbers | None) -> Plan:
        if self._own("use_flow_sigmas") and not self._respacing:
            shift = self.config.flow_shift if self._mu is None else math.exp(self._mu)
            sigmas = flow_shifted(1 - np.linspace(1, 1 / len(self), steps + 1), shift)[::-1][:-1]
            return sigmas * len(self), sigmas
        return super()._grid(steps, timesteps)

    def _range(self, sigmas: Array) -> tuple[float, float]:
        return self._trained[-1].item(), self._trained[0].item()

    @property
    def _plain(self) -> bool:
        """Whether σ are those of the timesteps."""
        return self._respacing is None and not self._own("use_flow_sigmas")

    def _last_timestep(self) -> int:
        """Timesteps in use: `lambda_min_clipped` leaves out the noisiest."""
        clip = self._own("lambda_min_clipped")
        return len(self) - (
            0 if clip is None else int(np.searchsorted(-self._log_trained[::-1], clip))
        )

    def _spaced(self, steps: int) -> Array:
        spacing, offset = (
            self._own("timestep_spacing") or "linspace",
            self._own("steps_offset") or 0,
        )
        return spaced(
            spacing, steps, len(self), offset, spare=1, last=self._last_timestep()
        ).round()

    def _begin(self, timesteps: Array, sigmas: Array, device: Any = None) -> None:
        super()._begin(timesteps, sigmas, device)
        self._alpha, self._sigma = self._split(self.sigmas)
        self._lambda = self._alpha.log() - self._sigma.log()
        self._parts = list(zip(self._alpha.tolist(), self._sigma.tolist(), strict=True))
        algorithm = self._own("algorithm_type")
        self._images = (
            algorithm not in ON_NOISE and self._own("predict_x0") is not False
        )  # or ε are kept of outputs
        self._stochastic = algorithm in (
            None,
            "sde-dpmsolver",
            "sde-dpmsolver++",
        )  # None: CosineDPMSolver
        self._order = 1
        self._rows_of = cache(self._rows)

    def _split(self, sigmas: Tensor) -> tuple[Tensor, Tensor]:
        if self._own("use_flow_sigmas"):
            return 1 - sigmas, sigmas
        alpha = 1 / (sigmas**2 + 1).sqrt()
        return alpha, sigmas * alpha

    def scale_model_input(self, sample: Tensor, timestep: Timestep | None = None) -> Tensor:
        """The sample as it is: its variance is 1."""
        return sample

    def _converted(self, i: int, x: Tensor, output: Tensor) -> Tensor:
        """What the model says as x₀, or as ε."""
        kind, (alpha, sigma) = self.config.prediction_type, self._parts[i]
        if kind == "epsilon" and self._own("variance_type") in ("learned", "learned_range"):
            output = output[:, :3]  # the rest is the variance
        if self._images or self._own("thresholding"):
            x0 = self._limit(
                to_image(
                    kind, x, output, alpha, self._levels[i] if kind == "flow_prediction" else sigma
                )
            )
            return x0 if self._images else to_noise("sample", x, x0, alpha, sigma)
        return to_noise(kind, x, output, alpha, sigma)

    def _push(self, output: Tensor) -> None:
        self._history = [output, *self._history[: self.config.solver_order - 1]]

    def _order_at(self, i: int) -> int:
        """The order of step i: no more than there are outputs, and less at the end of short runs,
        or at σ = 0."""
        config, left = self.config, len(self.timesteps) - 1 - i
        short = config.lower_order_final and len(self.timesteps) < SHORT_RUN
        if left == 0 and (
            short or self._own("euler_at_final") or self._own("final_sigmas_type") == "zero"
        ):
            return 1
        return min(2 if left == 1 and short else config.solver_order, len(self._history))

    def _rows(self, order: int) -> Rows:
        """The coefficients of every step of the run, at this order."""
        raise NotImplementedError


class DPMSolver(ExponentialSolver):
    """What the multistep and the singlestep solver share."""

    takes: ClassVar[tuple[str, ...]] = ("timesteps",)
    noise_dtype: ClassVar[torch.dtype | None] = None  # that of the model
    in_blocks: ClassVar[bool] = False  # whether steps go on from the last one of first order
    defaults = options(
        options(
            MULTISTEP,
            algorithm_type="dpmsolver++",
            solver_type="midpoint",
            final_sigmas_type="zero",
        ),
        options(variance_type=None, lambda_min_clipped=-math.inf),
    )
    choices = options(
        solver_order=(2, 1, 3), algorithm_type=ALGORITHMS, solver_type=("midpoint", "heun")
    )
    aliases = options(
        algorithm_type={"deis": "dpmsolver++"},
        solver_type=dict.fromkeys(("logrho", "bh1", "bh2"), "midpoint"),
    )

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        if not self._images and self._own("final_sigmas_type") == "zero":
            name, algorithm = type(self).__name__, self.config.algorithm_type
            raise ValueError(
                f"{name}: {algorithm} cannot end at zero; set final_sigmas_type to sigma_min"
            )

    def _solve(self, i: int, x: Tensor, output: Tensor, draw: Draw) -> tuple[Tensor, None]:
        self._push(self._converted(i, x, output))
        order = self._order_at(i)
        if order == 1 or self._start is None or not self.in_blocks:
            self._start = x
        noise = self._noise(i, draw) if self._stochastic else None
        a, c, value, first, second, *ratios = self._rows_of(order)[i]
        known = self._derivatives(self._history[:order], *ratios)
        return combine(
            a, self._start, *zip((value, first, second), known, strict=False), (c, noise)
        ), None

    def _noise(self, i: int, draw: Draw) -> Tensor:
        return draw(self._history[0], self.noise_dtype)

    def _rows(self, order: int) -> Rows:
        """Integrals over the steps with exponential weights, of x, the noise, the output and its
        derivatives in λ.

        DPM-Solver: appendix B; DPM-Solver++: appendix A; their SDE versions: DPM-Solver++, section
        5. The second derivative of SDE-DPM-Solver++ has its constant, a half, with the sign that is
           in use, not the one that follows.
        """
        start, *ratios = self._block(order)
        alpha, sigma, h = self._alpha[1:], self._sigma[1:], self._lambda[1:] - self._lambda[start]
        if self._images:
            z, scale, a = -h, alpha, sigma / self._sigma[start]
        else:
            z, scale, a = h, sigma, alpha / self._alpha[start]
        noise, half = 0 * h, 0.5
        if self._stochastic:
            noise = sigma * (torch.exp(2 * z) - 1.0).abs().sqrt()
            z, a, half = (2 * z, a * torch.exp(-h), -half) if self._images else (z, a, half)
            scale = scale if self._images else 2 * scale
        e = torch.exp(z) - 1.0
        value, first, second = -scale * e, -scale * (e / z - 1.0), -scale * ((e - z) / z**2 - half)
        if order == 2 and self.config.solver_type == "midpoint":
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


class DPMSolverMultistepScheduler(DPMSolver):
    """DPM-Solver and DPM-Solver++ on the outputs of the last steps, and their SDE versions."""

    clips_alpha_bar = True
    noise_dtype = torch.float32
    defaults = options(
        DPMSolver.defaults, euler_at_final=False, use_lu_lambdas=False, rescale_betas_zero_snr=False
    )

    def _rounds(self) -> bool:
        spaced = super()._rounds() or bool(self._own("use_lu_lambdas"))
        return spaced and bool(self.config.beta_schedule != "squaredcos_cap_v2")

    def _block(self, order: int) -> tuple[Tensor, ...]:
        h = self._lambda.diff()
        r0, r1 = h.roll(1) / h, h.roll(2) / h
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


class DPMSolverMultistepInverseScheduler(DPMSolverMultistepScheduler):
    """DPM-Solver backwards, from an image to the noise that it is made of."""

    clips_alpha_bar = False
    takes = ()
    defaults = options(
        DPMSolver.defaults, without=("final_sigmas_type", *SHIFT), euler_at_final=False
    )

    def _spaced(self, steps: int) -> Array:
        spacing, offset, last = (
            self.config.timestep_spacing,
            self.config.steps_offset,
            self._last_timestep(),
        )
        if spacing == "trailing":
            return super()._spaced(steps)[::-1]
        return spaced(spacing, steps + 1, len(self), offset, last=last).round()[:0:-1]

    def _range(self, sigmas: Array) -> tuple[float, float]:
        return super()._range(sigmas)[::-1]

    def _end(self, sigmas: Array) -> float:
        return float(self._trained[self._last_timestep() - 1] if self._plain else sigmas[-1])

    def _calls(self, timesteps: Array, sigmas: Array, end: float) -> Plan:
        t, sigmas = super()._calls(timesteps, sigmas, end)
        return t[np.sort(np.unique(t, return_index=True)[1])], sigmas


class DPMSolverSinglestepScheduler(DPMSolver):
    """DPM-Solver and DPM-Solver++ in blocks of up to three steps, each from the start of its
    block."""

    in_blocks = True
    defaults = options(DPMSolver.defaults, without=SPACING, lower_order_final=False)
    choices = options(
        DPMSolver.choices, algorithm_type=("dpmsolver++", "sde-dpmsolver++", "dpmsolver")
    )

    def _begin(self, timesteps: Array, sigmas: Array, device: Any = None) -> None:
        super()._begin(timesteps, sigmas, device)
        n, order, zero = (
            len(timesteps),
            self.config.solver_order,
            self.config.final_sigmas_type == "zero",
        )
        if self.num_inference_steps and (n % order or zero):
            self.config = Config({**self.config, "lower_order_final": True})
        self._orders = [1 + i % order for i in range(n)]
        if self.config.lower_order_final and n % order == 0:
            self._orders[-order:] = {1: [1], 2: [1, 1], 3: [1, 2, 1]}[order]
        if zero:
            self._orders[-1] = 1

    def _order_at(self, i: int) -> int:
        return min(int(self._orders[i]), len(self._history))

    def _block(self, order: int) -> tuple[Tensor, ...]:
        lam, now = self._lambda, torch.arange(len(self._lambda) - 1)
        start = (now - order + 1).clamp(min=0)
        h = lam[now + 1] - lam[start]
        r0, r1 = (lam[now] - lam[start]) / h, (lam[start + 1] - lam[start]) / h
        return start, 1 / r0, 1 / r1, r0, r1, r0 - r1

    def _derivatives(self, outputs: list[Tensor], *ratios: float) -> list[Tensor]:
        """By differences from the output at the start of the block; midpoint methods use the newest
        alone."""
        *later, first = outputs
        *inverse, r0, r1, apart = ratios
        slopes = [(output - first) * r for output, r in zip(later, inverse, strict=False)]
        if len(slopes) < 2 or self.config.solver_type == "midpoint":
            return [first, *slopes[:1]]
        newest, inner = slopes
        return [first, (r0 * inner - r1 * newest) / apart, 2 * (newest - inner) / apart]


class EDMDPMSolverMultistepScheduler(Preconditioned, DPMSolverMultistepScheduler):
    """DPM-Solver++ for preconditioned models; the sample is x₀ + σ·ε."""

    takes = ()
    defaults = options(
        options(EDM, THRESHOLDING, algorithm_type="dpmsolver++", solver_type="midpoint"),
        options(solver_order=2, lower_order_final=True, euler_at_final=False),
    )
    choices = options(DPMSolver.choices, algorithm_type=("dpmsolver++", "sde-dpmsolver++"))
    timestep_dtype = np.float32
    _split = SigmaSolver._split

    def _converted(self, i: int, x: Tensor, output: Tensor) -> Tensor:
        return self._image(x, output, self._levels[i])


class CosineDPMSolverMultistepScheduler(EDMDPMSolverMultistepScheduler):
    """SDE-DPM-Solver++ for models that are told the angle of σ (Evans et al., Stable Audio
    Open)."""

    predicts = VE
    defaults = options(
        options(
            EDM,
            sigma_min=0.3,
            sigma_max=500,
            sigma_data=1.0,
            sigma_schedule="exponential",
            solver_order=2,
        ),
        options(
            prediction_type="v_prediction",
            solver_type="midpoint",
            lower_order_final=True,
            euler_at_final=False,
        ),
    )
    choices = options(DPMSolver.choices, solver_order=(2, 1))

    def _condition(self, sigmas: Tensor) -> Tensor:
        return sigmas.atan() / math.pi * 2

    def _noise(self, i: int, draw: Draw) -> Tensor:
        """A Brownian path; the generators only say its seed."""
        if self._path is None:
            config, given = self.config, self._generator
            seeds = [
                one.initial_seed() for one in (given if isinstance(given, list) else [given]) if one
            ]
            seed = seeds if isinstance(given, list) else seeds[0] if seeds else None
            self._path = BrownianNoise(self._history[0], config.sigma_min, config.sigma_max, seed)
        return self._path(*self._levels[i : i + 2])


class DEISMultistepScheduler(ExponentialSolver):
    """DEIS: ε is a polynomial in log(σ/α) through the last outputs (Zhang and Chen, Fast Sampling,
    section 3)."""

    defaults = options(MULTISTEP, algorithm_type="deis", solver_type="logrho")
    choices = options(solver_order=(2, 1, 3), algorithm_type=("deis",), solver_type=("logrho",))
    aliases = options(
        algorithm_type=dict.fromkeys(ALGORITHMS, "deis"),
        solver_type=dict.fromkeys(("midpoint", "heun", "bh1", "bh2"), "logrho"),
    )

    def _end(self, sigmas: Array) -> float:
        return float(self._trained[0] if self._plain else sigmas[-1])

    def _solve(self, i: int, x: Tensor, output: Tensor, draw: Draw) -> tuple[Tensor, None]:
        (alpha, sigma), (alpha_to, _) = self._parts[i : i + 2]
        self._push(to_noise("sample", x, self._converted(i, x, output), alpha, sigma))
        order = self._order_at(i)
        terms = zip(self._rows_of(order)[i], self._history, strict=False)
        if order == 1:
            return combine(alpha_to / alpha, x, *terms), None
        return combine(1, x / alpha, *terms) * alpha_to, None

    def _rows(self, order: int) -> Rows:
        """The coefficients of the outputs; from the second order on, relative to α."""
        if order == 1:
            return as_rows(-self._sigma[1:] * (torch.exp(self._lambda.diff()) - 1.0))
        rho = (self._sigma / self._alpha).numpy()
        past = [np.roll(rho[:-1], k) for k in range(order)]
        integral = _log_line if order == 2 else _log_parabola
        with np.errstate(all="ignore"):
            nodes = [past[k:] + past[:k] for k in range(order)]
            weights = [integral(rho[1:], *node) - integral(past[0], *node) for node in nodes]
        return as_rows(*map(torch.from_numpy, weights))


def _log_line(t: Array, b: Array, c: Array) -> Array:
    """∫ of the line in log t that is 1 at b and 0 at c."""
    return np.asarray(t * (-np.log(c) + np.log(t) - 1) / (np.log(b) - np.log(c)))


def _log_parabola(t: Array, b: Array, c: Array, d: Array) -> Array:
    """∫ of the parabola in log t that is 1 at b and 0 at c and d."""
    log_t, log_b, log_c, log_d = map(np.log, (t, b, c, d))
    area = t * (log_c * (log_d - log_t + 1) - log_d * log_t + log_d + log_t**2 - 2 * log_t + 2)
    return np.asarray(area / ((log_b - log_c) * (log_b - log_d)))


class UniPCMultistepScheduler(ExponentialSolver):
    """A predictor, and a corrector that needs no further model call (Zhao et al., UniPC, algorithms
    5 to 8)."""

    clips_alpha_bar = True
    takes = ("sigmas",)
    defaults = options(
        options(
            MULTISTEP,
            predict_x0=True,
            solver_type="bh2",
            disable_corrector=[],
            solver_p=None,
            sigma_min=None,
        ),
        options(
            final_sigmas_type="zero",
            rescale_betas_zero_snr=False,
            sigma_max=None,
            shift_terminal=None,
        ),
    )
    choices = options(solver_type=("bh2", "bh1"), solver_p=(None,))
    aliases = options(solver_type=dict.fromkeys(("midpoint", "heun", "logrho"), "bh2"))

    def _end(self, sigmas: Array) -> float:
        low = self._trained[0] if self._plain else sigmas[-1]
        return float(low) if self.config.final_sigmas_type == "sigma_min" else 0.0

    def _solve(self, i: int, x: Tensor, output: Tensor, draw: Draw) -> tuple[Tensor, None]:
        config, newest = self.config, self._converted(i, x, output)
        if i > 0 and i - 1 not in config.disable_corrector and self._start is not None:
            known = [*self._history[: self._order], newest]
            x = self._moved(self._rows_of(self._order, True)[i - 1], self._start, known)
        most = (
            min(config.solver_order, len(self.timesteps) - i)
            if config.lower_order_final
            else config.solver_order
        )
        self._push(newest)
        self._start, self._order = x, min(most, len(self._history))
        return self._moved(self._rows_of(self._order)[i], x, self._history[: self._order]), None

    def _moved(self, row: tuple[float, ...], x: Tensor, outputs: list[Tensor]) -> Tensor:
        (a, value, scale, *rest), (first, *others) = row, outputs
        slopes = [
            (output - first) / r for output, r in zip(others, rest[: len(others)], strict=True)
        ]
        mean = combine(0, x, *zip(rest[len(others) :], slopes, strict=True))
        return combine(a, x, (value, first), (scale, mean))

    def _rows(self, order: int, corrects: bool = False) -> Rows:
        """The coefficients for x, the output at the start of the step, and the mean of the slopes
        to other outputs.

        These are older ones, newest first, and for the corrector the one at the end of the step.
        After the coefficients come the distances to these outputs, in lengths of the step, and the
        shares of their slopes.
        """
        alpha, sigma, lam = self._alpha, self._sigma, self._lambda
        h, images, one = lam.diff(), self._images, torch.ones(len(self.timesteps))
        hh = -h if images else h
        e, still = (
            torch.expm1(hh),
            (h == 0) | (sigma[1:] == 0),
        )  # no slope where a step has no length, or ends at x₀
        nodes = []
        for k in range(1, order):
            known = torch.arange(len(h)) >= k
            nodes.append(torch.where(known & ~still, (lam[:-1].roll(k) - lam[:-1]) / h, -k * one))
        nodes += [one] if corrects else []
        scale, stride = (
            (alpha if images else sigma)[1:],
            hh if self.config.solver_type == "bh1" else e,
        )
        phi, factorial, values = e / hh - 1, 1, []
        for k in range(len(nodes)):
            values.append(phi * factorial / stride)
            factorial *= k + 2
            phi = phi / hh - 1 / factorial
        shares = [0.5 * one for _ in nodes]
        if len(nodes) > 1:
            powers = [torch.stack(nodes, 1) ** k for k in range(len(nodes))]
            shares = list(torch.linalg.solve(torch.stack(powers, 1), torch.stack(values, 1)).T)
        weight = (-scale * stride).masked_fill(still, 0.0)
        if images:
            return as_rows(sigma[1:] / sigma[:-1], -scale * e, weight, *nodes, *shares)
        a = alpha[1:] / alpha[:-1]
        return as_rows(
            a, torch.where(sigma[1:] == 0, -a * sigma[:-1], -scale * e), weight, *nodes, *shares
        )

    def _plan(self, steps: int, timesteps: Numbers | None, sigmas: Numbers | None) -> Plan:
        config = self.config
        if not config.use_flow_sigmas or config.use_exponential_sigmas or config.use_beta_sigmas:
            if sigmas is not None:
                raise ValueError("sigmas can be given only where the config asks for a flow")
            return super()._plan(steps, timesteps, None)
        if config.use_karras_sigmas:
            levels = self._grid(steps, timesteps)[1]
            levels = levels / (levels + 1)
        else:
            levels = (
                np.linspace(1, 1 / len(self), steps + 1)[:-1]
                if sigmas is None
                else np.array(sigmas, float)
            )
            levels = shifted(levels, config, config.flow_shift, self._mu)
            levels[0] -= 1e-6 if abs(levels[0] - 1) < 1e-6 else 0  # λ stays finite
        return self._calls(levels * len(self), levels, self._end(levels))


FACTORS = (
    (1,),
    (1, -1),
    (1, -2, 2),
    (1, -3, 6, -6),
)  # of the antiderivative of λᵏ·exp(λ), divided by exp(λ)


class SASolverScheduler(ExponentialSolver):
    """Stochastic Adams: predictor and corrector with noise of strength τ(t) (Xue et al., SA-Solver,
    algorithm 1)."""

    defaults = options(
        options(
            SigmaSolver.defaults,
            THRESHOLDING,
            FLOW,
            predictor_order=2,
            corrector_order=2,
            tau_func=None,
        ),
        options(algorithm_type="data_prediction", lower_order_final=True),
        options(lambda_min_clipped=-math.inf, variance_type=None),
    )
    choices = options(algorithm_type=("data_prediction", "noise_prediction"))
    _end = DEISMultistepScheduler._end

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noisy samples as they are in training at `timesteps` (b,)."""
        return Scheduler.add_noise(self, original_samples, noise, timesteps)

    def _begin(self, timesteps: Array, sigmas: Array, device: Any = None) -> None:
        super()._begin(timesteps, sigmas, device)
        tau: Callable[[float], float] = self.config.tau_func or (
            lambda t: 1 if 200 <= t <= 800 else 0
        )
        self._taus = [tau(t) for t in self.timesteps.tolist()]
        self._noise = torch.empty(0)

    def _solve(self, i: int, x: Tensor, output: Tensor, draw: Draw) -> tuple[Tensor, None]:
        config, newest = self.config, self._converted(i, x, output)
        known = [newest, *self._history]
        if i > 0 and self._start is not None:
            x = self._moved(
                self._rows_of(self._order, self._taus[i - 1], 1)[i - 1], self._start, known
            )
        left = len(self.timesteps) - i if config.lower_order_final else len(self.timesteps)
        order = min(config.predictor_order, left, len(known))
        self._order = min(
            config.corrector_order, left + 1, len(known) + 1
        )  # of the correction in the next step
        self._history = known[: max(config.predictor_order, config.corrector_order - 1)]
        self._start, self._noise = x, draw(newest)
        return self._moved(self._rows_of(order, self._taus[i], 0)[i], x, self._history), None

    def _moved(self, row: tuple[float, ...], x: Tensor, outputs: list[Tensor]) -> Tensor:
        a, c, *b = row
        return combine(a, x, (1, combine(0, x, *zip(b, outputs, strict=False))), (c, self._noise))

    def _rows(self, order: int, tau: float = 0.0, ahead: int = 0) -> Rows:
        """Coefficients of all steps; the newest output is at the start of the step, or `ahead` = 1
        at its end."""
        alpha, sigma, lam, c = self._alpha, self._sigma, self._lambda, 1 + tau**2
        start, end, h = lam[:-1], lam[1:], lam.diff()
        nodes = [lam.roll(k - ahead)[: len(h)] for k in range(order)]
        moments = [_moment(k, start, end, c if self._images else -1.0) for k in range(order)]
        weights = []
        for k, node in enumerate(nodes):  # ∫ of its Lagrange polynomial, power by power
            others = nodes[:k] + nodes[k + 1 :]
            scale = math.prod((node - other for other in others), start=torch.ones_like(h))
            minors = [sum(map(math.prod, combinations(others, p))) for p in range(order)]
            weights.append(
                sum((-1) ** p * minor / scale * moments[-1 - p] for p, minor in enumerate(minors))
            )
        if (
            self._images and order == 2
        ):  # what makes the method exact for slow change of the slope, as its authors do
            rest = h * c - 1 + torch.exp(c * -h)
            part, apart = (
                (h / 2 - rest / (c**2 * h), 1)
                if ahead
                else (h**2 / 2 - rest / c**2, start - nodes[1])
            )
            bend = torch.exp(c * end) * part / apart
            weights = [weights[0] + bend, weights[1] - bend]
        if self._images:
            decay, noise = (
                torch.exp(-(tau**2) * h),
                sigma[1:] * torch.sqrt(1 - torch.exp(-2 * tau**2 * h)),
            )
            scale, a = c * sigma[1:] * torch.exp(-(tau**2) * end), decay * (sigma[1:] / sigma[:-1])
        else:
            noise = tau * sigma[1:] * torch.sqrt(torch.exp(2 * h) - 1)
            scale, a = -c * alpha[1:], alpha[1:] / alpha[:-1]
        return as_rows(a, noise, *(scale * weight for weight in weights))


def _moment(k: int, start: Tensor, end: Tensor, c: float) -> Tensor:
    """∫ λᵏ·exp(cλ) dλ over steps, k <= 3."""

    def polynomial(y: Tensor) -> Any:
        first, *rest = (factor * y ** (k - p) for p, factor in enumerate(FACTORS[k]))
        return sum(rest, start=first)

    start, end = c * start, c * end
    inner: Tensor = polynomial(end) - polynomial(start) * torch.exp(-(end - start))
    return torch.exp(end) * inner / c ** (k + 1)
