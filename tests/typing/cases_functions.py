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


def made() -> None:
    UNet2DConditionModel(16, cross_attention_dim=32, block_out_channels=(32, 64))
    UNet2DConditionModel(act_fn="gelu")  # error: Argument "act_fn"
    UNet2DConditionModel(cross_attenion_dim=32)  # error: Unexpected keyword argument
    reveal_type(UNet2DConditionModel.from_single_file("a.ckpt"))  # UNet2DConditionModel


def models(unet: UNet2DConditionModel) -> None:
    reveal_type(unet.dtype)  # dtype
