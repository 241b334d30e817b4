"""KerasCV's own sampler, the loop in its `StableDiffusion.generate_image`."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from . import base
from .base import Draw, Options, combine, to_image
from .diffusion import Choices, DiscreteSolver
from .spacing import Array


class KerasCVScheduler(DiscreteSolver):
    """DDIM steps between the timesteps of KerasCV, in its order of operations.

    `generation` says which: `"0.7"`, of keras-cv until 0.7.2, visits 1, 1+k, 1+2k, … with k = ⌊1000/steps⌋, which can
    be more timesteps than steps; `"0.8"`, from 0.8.2 on, visits evenly spaced ones from 0 to 999. The last step ends at
    the image.
    """

    has_compatibles = False
    defaults: ClassVar[Options] = base.TRAINING | {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "generation": "0.7",
    }
    choices: ClassVar[Choices] = DiscreteSolver.choices | {"generation": ("0.7", "0.8")}

    def _spaced(self, steps: int) -> Array:
        total = len(self)
        if self.config.generation == "0.7":
            t = np.arange(1, total, total // steps)
        else:
            t = (np.arange(steps) * ((total - 1) / max(steps - 1, 1))).round().astype(np.int64)
        self._following = dict(zip(t[::-1].tolist(), [*t[:-1][::-1].tolist(), -1], strict=True))
        return t[::-1]

    def _solve(self, i: int, x: Tensor, output: Tensor, draw: Draw) -> tuple[Tensor, Any]:
        now, to = float(self._alpha_bar(i)), float(self._alpha_bar(self._following[i]))
        x0 = to_image(self.config.prediction_type, x, output, now**0.5, (1 - now) ** 0.5)
        return combine((1 - to) ** 0.5, self._noise(x, output, now), (to**0.5, x0)), x0
