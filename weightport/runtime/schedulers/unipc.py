"""UniPC: Zhao et al., UniPC: A Unified Predictor-Corrector Framework for Fast Sampling of Diffusion
Models."""

from __future__ import annotations

from collections.abc import Collection
from functools import cache
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from ..loading.options import configured
from .base import Device, Visits, noiseless_step
from .config import Ends, FlowPrediction, TimeShift
from .exponential import ExponentialSolver, Rows, as_rows
from .samples import Draw, combine
from .spacing import Array, Numbers, shifted


class UniPCMultistepScheduler(ExponentialSolver):
    """A predictor, and a corrector that needs no further model call (algorithms 5 to 8)."""

    names: ClassVar = {"unipc": {}}
    compatible = True
    clips_alpha_bar = True
    takes = ("sigmas",)
    aliases: ClassVar = {"solver_type": dict.fromkeys(("midpoint", "heun", "logrho"), "bh2")}

    step = noiseless_step  # type: ignore[assignment]

    @configured
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Numbers | None = None,
        solver_order: int = 2,
        prediction_type: FlowPrediction = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        predict_x0: bool = True,
        solver_type: Literal["bh2", "bh1"] = "bh2",
        lower_order_final: bool = True,
        disable_corrector: Collection[int] = [],
        solver_p: Literal[None] = None,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        use_flow_sigmas: bool = False,
        flow_shift: float = 1.0,
        timestep_spacing: str = "linspace",
        steps_offset: int = 0,
        final_sigmas_type: Ends = "zero",
        rescale_betas_zero_snr: bool = False,
        use_dynamic_shifting: bool = False,
        time_shift_type: TimeShift = "exponential",
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        shift_terminal: float | None = None,
    ) -> None:
        self._prepare()

    @property
    def _images(self) -> bool:
        return self.config.predict_x0 is not False

    def _end(self, sigmas: Array) -> float:
        return self._lowest(sigmas) if self.config.final_sigmas_type == "sigma_min" else 0.0

    def _visits(self, steps: int, timesteps: Numbers | None, sigmas: Numbers | None) -> Visits:
        config = self.config
        if not config.use_flow_sigmas or config.use_exponential_sigmas or config.use_beta_sigmas:
            if sigmas is not None:
                raise ValueError("sigmas can be given only where the config asks for a flow")
            return super()._visits(steps, timesteps, None)
        if config.use_karras_sigmas:
            levels = self._grid(steps, timesteps)[1]
            levels = levels / (levels + 1)
        else:
            if sigmas is None:
                levels = np.linspace(1, 1 / len(self), steps + 1)[:-1]
            else:
                levels = np.array(sigmas, float)
            levels = shifted(levels, config, config.flow_shift, self._mu)
            if abs(levels[0] - 1) < 1e-6:
                levels[0] -= 1e-6  # λ stays finite
        return self._calls(levels * len(self), levels, self._end(levels))

    def _begin(self, timesteps: Array, sigmas: Array, device: Device = None) -> None:
        super()._begin(timesteps, sigmas, device)
        self._order = 1  # of the step before
        self._rows_of = cache(self._rows)

    def _solve(self, i: int, x: Tensor, output: Tensor, draw: Draw) -> tuple[Tensor, None]:
        newest = self._converted(i, x, output)
        corrects = i > 0 and i - 1 not in self.config.disable_corrector
        if corrects and self._start is not None:
            known = [*self._history[: self._order], newest]
            x = self._moved(self._rows_of(self._order, True)[i - 1], self._start, known)
        most = self.config.solver_order
        self._history = [newest, *self._history[: most - 1]]
        if self.config.lower_order_final:
            most = min(most, len(self.timesteps) - i)
        self._start = x
        self._order = min(most, len(self._history))
        return self._moved(self._rows_of(self._order)[i], x, self._history[: self._order]), None

    def _moved(self, row: tuple[float, ...], x: Tensor, outputs: list[Tensor]) -> Tensor:
        """The sample after a step from x, with a row of `_rows`."""
        a, value, scale, *rest = row
        first, *others = outputs
        distances = rest[: len(others)]
        shares = rest[len(others) :]
        slopes = [(output - first) / r for output, r in zip(others, distances, strict=True)]
        mean = combine(0, x, *zip(shares, slopes, strict=True))
        return combine(a, x, (value, first), (scale, mean))

    def _rows(self, order: int, corrects: bool = False) -> Rows:
        """The coefficients for x, the output at the start of the step, and the mean of the slopes
        to other outputs.

        These are older ones, newest first, and for the corrector the one at the end of the step.
        After the coefficients come the distances to these outputs, in lengths of the step, and the
        shares of their slopes.
        """
        alpha, sigma, lam = self._noise_levels
        images = self._images
        h = lam.diff()
        hh = -h if images else h
        e = torch.expm1(hh)
        one = torch.ones(len(self.timesteps))
        # no slope where a step has no length, or ends at x₀
        still = (h == 0) | (sigma[1:] == 0)
        nodes = []
        for k in range(1, order):
            known = torch.arange(len(h)) >= k
            distance = (lam[:-1].roll(k) - lam[:-1]) / h
            nodes.append(torch.where(known & ~still, distance, -k * one))
        if corrects:
            nodes.append(one)
        scale = (alpha if images else sigma)[1:]
        stride = hh if self.config.solver_type == "bh1" else e
        weight = (-scale * stride).masked_fill(still, 0.0)
        shares = slope_shares(nodes, hh, e, stride)
        value = -scale * e
        if images:
            a = sigma[1:] / sigma[:-1]
        else:
            a = alpha[1:] / alpha[:-1]
            value = torch.where(sigma[1:] == 0, -a * sigma[:-1], value)
        return as_rows(a, value, weight, *nodes, *shares)


def slope_shares(nodes: list[Tensor], hh: Tensor, e: Tensor, stride: Tensor) -> list[Tensor]:
    """The shares of the slopes to the outputs at `nodes` in the mean slope of every step (theorem
    3.1)."""
    if len(nodes) < 2:
        return [torch.full_like(node, 0.5) for node in nodes]
    phi = e / hh - 1
    factorial = 1
    values = []
    for k in range(len(nodes)):
        values.append(phi * factorial / stride)
        factorial *= k + 2
        phi = phi / hh - 1 / factorial
    powers = [torch.stack(nodes, 1) ** k for k in range(len(nodes))]
    return list(torch.linalg.solve(torch.stack(powers, 1), torch.stack(values, 1)).T)
