"""What type checkers see of the functions, models and schedulers; see `cases_pipelines.py`."""

from __future__ import annotations

from typing import reveal_type

import torch

import weightport
from weightport import DDIMScheduler, UNet2DConditionModel


def functions() -> None:
    reveal_type(weightport.convert(["a"], "out"))  # Conversion
    reveal_type(weightport.inspect("a.h5"))  # Inspection
    reveal_type(weightport.diff("a", "b"))  # Comparison
    weightport.convert(["a.h5"], "out", dtype=16)  # error: Argument "dtype"
    weightport.convert(["a"], "out", dtpye="float16")  # error: Unexpected keyword argument "dtpye"


def schedulers(x: torch.Tensor) -> None:
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(10)
    reveal_type(scheduler.timesteps)  # Tensor
    scheduler.set_timesteps("many")  # error: Argument 1 to "set_timesteps"


def models(unet: UNet2DConditionModel) -> None:
    reveal_type(unet.dtype)  # dtype
