"""Xue et al., SA-Solver: Stochastic Adams Solver for Fast Sampling of Diffusion Models."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from itertools import combinations
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..loading.options import configured
from .base import Device
from .config import FlowPrediction, Variance
from .exponential import ExponentialSolver, Rows, as_rows
from .samples import Draw, combine
from .spacing import Array, Numbers

FACTORS = (  # of the antiderivative of λᵏ·exp(λ), divided by exp(λ)
    (1,),
    (1, -1),
    (1, -2, 2),
    (1, -3, 6, -6),
)


def middle_of_training(t: float) -> float:
    """The authors' τ(t)."""
    return 1 if 200 <= t <= 800 else 0


class SASolverScheduler(ExponentialSolver):
    """Stochastic Adams: predictor and corrector with noise of strength τ(t) (algorithm 1)."""

    names: ClassVar = {"sa-solver": {}}
    stochastic = True

    @configured
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Numbers | None = None,
        predictor_order: int = 2,
        corrector_order: int = 2,
        prediction_type: FlowPrediction = "epsilon",
        tau_func: Callable[[float], float] | None = None,
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        algorithm_type: Literal["data_prediction", "noise_prediction"] = "data_prediction",
        lower_order_final: bool = True,
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

    @property
    def _images(self) -> bool:
        return bool(self.config.algorithm_type == "data_prediction")

    def _end(self, sigmas: Array) -> float:
        return self._lowest(sigmas)

    def _shares(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        return self._training_shares(timesteps, like)

    def _begin(self, timesteps: Array, sigmas: Array, device: Device = None) -> None:
        super()._begin(timesteps, sigmas, device)
        tau = self.config.tau_func or middle_of_training
        self._taus: list[float] = [tau(t) for t in self.timesteps.tolist()]
        self._noise = torch.empty(0)
        self._order = 1  # of the correction in the next step
        self._rows_of = cache(self._rows)

    def _solve(self, i: int, x: Tensor, output: Tensor, draw: Draw) -> tuple[Tensor, None]:
        config = self.config
        newest = self._converted(i, x, output)
        known = [newest, *self._history]
        if i > 0 and self._start is not None:
            corrector = self._rows_of(self._order, self._taus[i - 1], 1)
            x = self._moved(corrector[i - 1], self._start, known)
        left = len(self.timesteps)
        if config.lower_order_final:
            left -= i
        order = min(config.predictor_order, left, len(known))
        self._order = min(config.corrector_order, left + 1, len(known) + 1)
        self._history = known[: max(config.predictor_order, config.corrector_order - 1)]
        self._start = x
        self._noise = draw(newest)
        predictor = self._rows_of(order, self._taus[i], 0)
        return self._moved(predictor[i], x, self._history), None

    def _moved(self, row: tuple[float, ...], x: Tensor, outputs: list[Tensor]) -> Tensor:
        """The sample after a step from x, with a row of `_rows`."""
        a, c, *b = row
        change = combine(0, x, *zip(b, outputs, strict=False))
        return combine(a, x, (1, change), (c, self._noise))

    def _rows(self, order: int, tau: float = 0.0, ahead: int = 0) -> Rows:
        """Coefficients of all steps; the newest output is at the start of the step, or `ahead` = 1
        at its end."""
        alpha, sigma, lam = self._noise_levels
        c = 1 + tau**2
        start = lam[:-1]
        end = lam[1:]
        h = lam.diff()
        nodes = [lam.roll(k - ahead)[: len(h)] for k in range(order)]
        moments = [moment(k, start, end, c if self._images else -1.0) for k in range(order)]
        weights = [polynomial_weight(k, nodes, moments) for k in range(order)]
        if self._images and order == 2:
            # what makes the method exact for slow change of the slope, as its authors do
            rest = h * c - 1 + torch.exp(c * -h)
            part: Tensor
            apart: Tensor | float
            if ahead:
                part = h / 2 - rest / (c**2 * h)
                apart = 1
            else:
                part = h**2 / 2 - rest / c**2
                apart = start - nodes[1]
            bend = torch.exp(c * end) * part / apart
            weights = [weights[0] + bend, weights[1] - bend]
        if self._images:
            decay = torch.exp(-(tau**2) * h)
            noise = sigma[1:] * torch.sqrt(1 - torch.exp(-2 * tau**2 * h))
            scale = c * sigma[1:] * torch.exp(-(tau**2) * end)
            a = decay * (sigma[1:] / sigma[:-1])
        else:
            noise = tau * sigma[1:] * torch.sqrt(torch.exp(2 * h) - 1)
            scale = -c * alpha[1:]
            a = alpha[1:] / alpha[:-1]
        return as_rows(a, noise, *(scale * weight for weight in weights))


def polynomial_weight(k: int, nodes: list[Tensor], moments: list[Tensor]) -> Tensor:
    """∫ of the Lagrange polynomial of node k, power by power."""
    node = nodes[k]
    others = nodes[:k] + nodes[k + 1 :]
    scale = math.prod((node - other for other in others), start=torch.ones_like(node))
    minors = [sum(map(math.prod, combinations(others, p))) for p in range(len(nodes))]
    terms = [(-1) ** p * minor / scale * moments[-1 - p] for p, minor in enumerate(minors)]
    return torch.as_tensor(sum(terms))


def moment(k: int, start: Tensor, end: Tensor, c: float) -> Tensor:
    """∫ λᵏ·exp(cλ) dλ over steps, k <= 3."""
    start = c * start
    end = c * end
    decay = torch.exp(-(end - start))
    inner = antiderivative(k, end) - antiderivative(k, start) * decay
    return torch.exp(end) * inner / c ** (k + 1)


def antiderivative(k: int, y: Tensor) -> Tensor:
    """Of yᵏ·exp(y), divided by exp(y)."""
    first, *rest = [factor * y ** (k - p) for p, factor in enumerate(FACTORS[k])]
    return sum(rest, start=first)
