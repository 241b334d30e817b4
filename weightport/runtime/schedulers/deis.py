"""DEIS: Zhang and Chen, Fast Sampling of Diffusion Models with Exponential Integrator."""

from __future__ import annotations

from functools import cache
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from ..loading.options import configured
from .base import Device, noiseless_step
from .config import FlowPrediction, TimeShift
from .exponential import SHORT_RUN, ExponentialSolver, Orders, Rows, as_rows
from .samples import Draw, combine, to_noise
from .spacing import Array, Numbers


class DEISMultistepScheduler(ExponentialSolver):
    """DEIS: ε is a polynomial in log(σ/α) through the last outputs (section 3)."""

    names: ClassVar = {"deis": {}}
    compatible = True
    aliases: ClassVar = {
        "algorithm_type": dict.fromkeys(
            ("dpmsolver++", "sde-dpmsolver++", "dpmsolver", "sde-dpmsolver"), "deis"
        ),
        "solver_type": dict.fromkeys(("midpoint", "heun", "bh1", "bh2"), "logrho"),
    }

    step = noiseless_step  # type: ignore[assignment]

    @configured
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Numbers | None = None,
        solver_order: Literal[2, 1, 3] = 2,
        prediction_type: FlowPrediction = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        algorithm_type: Literal["deis"] = "deis",
        solver_type: Literal["logrho"] = "logrho",
        lower_order_final: bool = True,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        use_flow_sigmas: bool = False,
        flow_shift: float = 1.0,
        timestep_spacing: str = "linspace",
        steps_offset: int = 0,
        use_dynamic_shifting: bool = False,
        time_shift_type: TimeShift = "exponential",
    ) -> None:
        self._prepare()

    def _end(self, sigmas: Array) -> float:
        return self._lowest(sigmas)

    def _begin(self, timesteps: Array, sigmas: Array, device: Device = None) -> None:
        super()._begin(timesteps, sigmas, device)
        steps = len(timesteps)
        short = self.config.lower_order_final and steps < SHORT_RUN
        self._orders = Orders(self.config.solver_order, steps, short, first_at_end=False)
        self._rows_of = cache(self._rows)

    def _solve(self, i: int, x: Tensor, output: Tensor, draw: Draw) -> tuple[Tensor, None]:
        alpha, sigma = self._parts[i]
        alpha_to, _ = self._parts[i + 1]
        eps = to_noise("sample", x, self._converted(i, x, output), alpha, sigma)
        self._history = [eps, *self._history[: self.config.solver_order - 1]]
        order = self._orders.at(i, len(self._history))
        terms = zip(self._rows_of(order)[i], self._history, strict=False)
        if order == 1:
            return combine(alpha_to / alpha, x, *terms), None
        return combine(1, x / alpha, *terms) * alpha_to, None

    def _rows(self, order: int) -> Rows:
        """The coefficients of the outputs; from the second order on, relative to α."""
        alpha, sigma, lam = self._noise_levels
        if order == 1:
            return as_rows(-sigma[1:] * (torch.exp(lam.diff()) - 1.0))
        rho = (sigma / alpha).numpy()
        past = [np.roll(rho[:-1], k) for k in range(order)]
        integral = log_line if order == 2 else log_parabola
        weights = []
        with np.errstate(all="ignore"):
            for k in range(order):
                nodes = past[k:] + past[:k]
                weights.append(integral(rho[1:], *nodes) - integral(past[0], *nodes))
        return as_rows(*map(torch.from_numpy, weights))


def log_line(t: Array, b: Array, c: Array) -> Array:
    """∫ of the line in log t that is 1 at b and 0 at c."""
    area = t * (-np.log(c) + np.log(t) - 1)
    return np.asarray(area / (np.log(b) - np.log(c)))


def log_parabola(t: Array, b: Array, c: Array, d: Array) -> Array:
    """∫ of the parabola in log t that is 1 at b and 0 at c and d."""
    log_t = np.log(t)
    log_b = np.log(b)
    log_c = np.log(c)
    log_d = np.log(d)
    area = t * (log_c * (log_d - log_t + 1) - log_d * log_t + log_d + log_t**2 - 2 * log_t + 2)
    return np.asarray(area / ((log_b - log_c) * (log_b - log_d)))
