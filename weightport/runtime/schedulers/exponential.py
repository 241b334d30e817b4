"""Exponential integrators in λ = log(α/σ): DPM-Solver and its relatives, which solve the linear part exactly.

The sample is variance preserving, α² + σ² = 1; but for flows, α + σ = 1. `sigmas` holds σ/α (flows: σ).

DPM-Solver: Lu et al., A Fast ODE Solver for Diffusion Probabilistic Model Sampling; DPM-Solver++: Lu et al., Fast
Solver for Guided Sampling of Diffusion Probabilistic Models.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .base import (
    RESPACING,
    SPACING,
    THRESHOLDING,
    TRAINING,
    Generator,
    SchedulerOutput,
    Timestep,
    combine,
    draw_noise,
    to_image,
    to_noise,
    widened,
)
from .karras import Device, SigmaScheduler
from .spacing import Array, flow_shifted, spaced, timestep_of

FLOW: dict[str, Any] = {
    "use_flow_sigmas": False,
    "flow_shift": 1.0,
    "use_dynamic_shifting": False,
    "time_shift_type": "exponential",
}
MULTISTEP: dict[str, Any] = (
    TRAINING | SPACING | RESPACING | THRESHOLDING | FLOW | {"solver_order": 2, "lower_order_final": True}
)
PREDICTIONS: dict[str, tuple[Any, ...]] = {"prediction_type": ("epsilon", "sample", "v_prediction", "flow_prediction")}
SHORT_RUN = 15  # steps; the last ones of shorter runs are of lower order, which is more stable


class Levels(NamedTuple):
    """α, σ and λ of every timestep of a run, and of its end, float32."""

    alpha: Tensor
    sigma: Tensor
    lam: Tensor


class ExponentialScheduler(SigmaScheduler):
    """A scheduler whose steps are rows of coefficients, for (x, noise, m₀, m₁, …), m₀ being the newest output."""

    choices = PREDICTIONS

    @property
    def init_noise_sigma(self) -> float:
        """1: the sample is variance preserving."""
        return 1.0

    def set_timesteps(self, num_inference_steps: int, device: Device = None, mu: float | None = None) -> None:
        """Begin a run of so many steps; `mu` is the logarithm of a flow's shift, for `use_dynamic_shifting`."""
        self._shift_by(mu)
        self._start(num_inference_steps, device)

    def _shift_by(self, mu: float | None) -> None:
        if mu is not None:
            self.config["flow_shift"] = math.exp(mu)

    def _start(self, steps: int, device: Device, timesteps: Sequence[float] | None = None) -> None:
        t, sigmas = self._grid(steps, timesteps)
        self._begin(t, sigmas, self._end(sigmas), device)

    def _grid(self, steps: int, timesteps: Sequence[float] | None = None) -> tuple[Array, Array]:
        respace, table, logs = self._respacing, self._trained, self._log_trained
        if timesteps is not None and (respace or self._own("use_lu_lambdas")):
            raise ValueError("timesteps cannot be given where the config asks for a spacing of sigmas")
        if respace:
            sigmas = respace(table[-1].item(), table[0].item(), steps)
            t = timestep_of(sigmas, logs)
            return (t.round() if self.config.use_karras_sigmas and self._rounds else t), sigmas
        if self._own("use_lu_lambdas"):  # evenly spaced in λ; Lu et al., DPM-Solver, section 3.4
            high, low = logs[-1].item(), logs[0].item()
            sigmas = np.exp(high + np.linspace(0, 1, steps) * (low - high))
            t = timestep_of(sigmas, logs)
            return (t.round() if self._rounds else t), sigmas
        if self._own("use_flow_sigmas"):
            sigmas = flow_shifted(1 - np.linspace(1, 1 / len(self), steps + 1), self.config.flow_shift)[::-1][:-1]
            return sigmas * len(self), sigmas
        t = self._whole_timesteps(steps) if timesteps is None else np.asarray(timesteps)
        return t, self._interpolated(t)

    @property
    def _rounds(self) -> bool:
        return True

    def _whole_timesteps(self, steps: int) -> Array:
        last = len(self)
        if self._own("lambda_min_clipped") is not None:  # leave out the noisiest timesteps
            lam = -np.log(self._trained)
            last -= int(np.searchsorted(lam[::-1], self.config.lambda_min_clipped))
        config = self.config
        return spaced(config.timestep_spacing, steps, len(self), config.steps_offset, spare=1, last=last).round()

    def _end(self, sigmas: Array) -> float:
        return float(self._trained[0]) if self.config.final_sigmas_type == "sigma_min" else 0.0

    def _begin(self, timesteps: Array, sigmas: Array, end: float = 0.0, device: Device = None) -> None:
        super()._begin(timesteps, sigmas, end, device)
        self.timesteps = torch.from_numpy(timesteps.astype(np.int64)).to(device)
        alpha, sigma = self._split(self.sigmas)
        self._table = Levels(alpha, sigma, alpha.log() - sigma.log())
        self._levels_vp = list(zip(alpha.tolist(), sigma.tolist(), strict=True))
        self._outputs: list[Tensor] = []
        self._row = cache(self._rows)

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
        return alpha * x0 + sigma * noise

    def _output(self, i: int, x: Tensor, output: Tensor, *, image: bool) -> Tensor:
        """What the model says as x₀, or as ε."""
        kind, (alpha, sigma) = self.config.prediction_type, self._levels_vp[i]
        if kind == "epsilon" and self._own("variance_type") in ("learned", "learned_range"):
            output = output[:, :3]  # the rest is the variance
        if kind == "flow_prediction":
            sigma = self._levels[i]
        if image or self._own("thresholding"):
            x0 = self._limit(to_image(kind, x, output, alpha, sigma))
            return x0 if image else to_noise("sample", x, x0, alpha, sigma)
        return to_noise(kind, x, output, alpha, sigma)

    def _rows(self, order: int) -> list[tuple[float, ...]]:
        """The coefficients of every step of the run, at this order."""
        raise NotImplementedError

    def _push(self, output: Tensor, keep: int) -> None:
        self._outputs = [output, *self._outputs[: keep - 1]]

    def _short(self) -> bool:
        return bool(self.config.lower_order_final) and len(self.timesteps) < SHORT_RUN


def rows_of(h: Tensor, a: Tensor, noise: Tensor, *outputs: Tensor) -> list[tuple[float, ...]]:
    """Tables of coefficients as a row a step; a step of no length, h = 0, leaves the sample as it is."""
    still = h == 0
    tables = [a.masked_fill(still, 1.0), *(table.masked_fill(still, 0.0) for table in (noise, *outputs))]
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

    DPM-Solver: appendix B; DPM-Solver++: appendix A; their SDE versions: DPM-Solver++, section 5 and eq. 18 to 20.
    """
    (alpha_s, alpha), (sigma_s, sigma) = (
        levels.alpha[torch.stack([start, end])],
        levels.sigma[torch.stack([start, end])],
    )
    h = levels.lam[end] - levels.lam[start]
    zero = torch.zeros_like(h)
    match algorithm:
        case "dpmsolver++":
            e = torch.exp(-h) - 1.0
            first, second = alpha * (e / h + 1.0), -alpha * ((e + h) / h**2 - 0.5)
            return Integrals(sigma / sigma_s, zero, -alpha * e, -0.5 * (alpha * e), first, second)
        case "dpmsolver":
            e = torch.exp(h) - 1.0
            first, second = -sigma * (e / h - 1.0), -sigma * ((e - h) / h**2 - 0.5)
            return Integrals(alpha / alpha_s, zero, -sigma * e, -0.5 * (sigma * e), first, second)
        case "sde-dpmsolver++":
            e = 1.0 - torch.exp(-2.0 * h)
            first, second = alpha * (e / (-2.0 * h) + 1.0), alpha * ((e - 2.0 * h) / (2.0 * h) ** 2 - 0.5)
            decay = sigma / sigma_s * torch.exp(-h)
            return Integrals(decay, sigma * torch.sqrt(e), alpha * e, 0.5 * (alpha * e), first, second)
        case _:  # sde-dpmsolver
            e = torch.exp(h) - 1.0
            first = -2.0 * (sigma * (e / h - 1.0))
            noise = sigma * torch.sqrt(torch.exp(2 * h) - 1.0)
            return Integrals(
                alpha / alpha_s, noise, -2.0 * (sigma * e), -(sigma * e), first, torch.full_like(h, math.nan)
            )


DPM: dict[str, Any] = {
    "algorithm_type": "dpmsolver++",
    "solver_type": "midpoint",
    "final_sigmas_type": "zero",
    "lambda_min_clipped": -math.inf,
    "variance_type": None,
}
DPM_CHOICES: dict[str, tuple[Any, ...]] = PREDICTIONS | {
    "solver_order": (2, 1, 3),
    "algorithm_type": ("dpmsolver++", "sde-dpmsolver++", "dpmsolver", "sde-dpmsolver"),
    "solver_type": ("midpoint", "heun"),
    "final_sigmas_type": ("zero", "sigma_min"),
}
DPM_ALIASES = {
    "algorithm_type": {"deis": "dpmsolver++"},
    "solver_type": dict.fromkeys(("logrho", "bh1", "bh2"), "midpoint"),
}


class DPMSolver(ExponentialScheduler):
    """What the multistep and the singlestep solver share: options, and their checks."""

    choices = DPM_CHOICES
    aliases = DPM_ALIASES

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        name, config = type(self).__name__, self.config
        if not config.algorithm_type.endswith("++") and config.final_sigmas_type == "zero":
            raise ValueError(f"{name}: {config.algorithm_type} cannot end at zero; set final_sigmas_type to sigma_min")
        if config.algorithm_type == "sde-dpmsolver" and config.solver_order == 3:
            raise ValueError(f"{name}: sde-dpmsolver has no third order")

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Device = None,
        mu: float | None = None,
        timesteps: Sequence[int] | None = None,
    ) -> None:
        """Begin a run of so many steps, or of these timesteps; `mu` is the logarithm of a flow's shift.

        Raises:
            ValueError: not exactly one of both is given, or the config does not go with `timesteps`.
        """
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError("give either num_inference_steps or timesteps")
        self._shift_by(mu)
        self._start(len(timesteps) if timesteps is not None else int(num_inference_steps or 0), device, timesteps)

    @property
    def _rounds(self) -> bool:
        return bool(self.config.beta_schedule != "squaredcos_cap_v2")

    @property
    def _images(self) -> bool:
        return bool(self.config.algorithm_type.endswith("++"))

    @property
    def _stochastic(self) -> bool:
        return bool(self.config.algorithm_type.startswith("sde"))


class DPMSolverMultistepScheduler(DPMSolver):
    """DPM-Solver and DPM-Solver++ on the outputs of the last steps, and their SDE versions."""

    clips_alpha_bar = True
    defaults = MULTISTEP | DPM | {"euler_at_final": False, "use_lu_lambdas": False, "rescale_betas_zero_snr": False}

    def step(
        self,
        model_output: Tensor,
        timestep: Timestep,
        sample: Tensor,
        generator: Generator = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput:
        """Go to the next timestep.

        Args:
            model_output: what the model predicts, as `prediction_type` says.
            timestep: the one that the model was called with.
            sample: what it was called for.
            generator: draws the noise of the SDE.
            variance_noise: the noise, instead of drawing it.
            return_dict: of no effect, the result is a tuple with names.
        """
        i, x = self._next(timestep), widened(sample)
        self._push(self._output(i, x, model_output, image=self._images), self.config.solver_order)
        noise = variance_noise
        if self._stochastic and noise is None:
            noise = draw_noise(self._outputs[0], generator, torch.float32)
        a, c, *b = self._row(self._order_at(i))[i]
        x = combine(a, x, *zip(b, self._outputs, strict=False), (c, noise))
        return SchedulerOutput(x.to(model_output.dtype))

    def _order_at(self, i: int) -> int:
        config, left = self.config, len(self.timesteps) - 1 - i
        if left == 0 and (config.euler_at_final or config.final_sigmas_type == "zero" or self._short()):
            return 1
        most = 2 if left == 1 and self._short() else config.solver_order
        return min(most, len(self._outputs))

    def _rows(self, order: int) -> list[tuple[float, ...]]:
        now = torch.arange(len(self._levels) - 1)
        k = integrals(self.config.algorithm_type, self._table, now, now + 1)
        h = self._table.lam.diff()
        if order == 1:
            return rows_of(h, k.sample, k.noise, k.value)
        r0 = h.roll(1) / h
        if order == 2:
            slope = (k.half if self.config.solver_type == "midpoint" else k.first) / r0
            return rows_of(h, k.sample, k.noise, k.value + slope, -slope)
        r1 = h.roll(2) / h
        near = (k.first * (1 + r0 / (r0 + r1)) + k.second / (r0 + r1)) / r0  # of the newest difference m₀ - m₁
        far = -(k.first * r0 + k.second) / (r0 + r1) / r1  # of the one before, m₁ - m₂
        return rows_of(h, k.sample, k.noise, k.value + near, far - near, -far)
