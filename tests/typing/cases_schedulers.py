"""What type checkers see of the schedulers; see `cases_pipelines.py`."""

from __future__ import annotations

from typing import reveal_type

import torch

from weightport import DDIMScheduler, DPMSolverMultistepScheduler, LCMScheduler
from weightport.runtime.schedulers import SCHEDULERS, EulerDiscreteScheduler
from weightport.runtime.schedulers.names import named_scheduler


def made() -> None:
    reveal_type(DDIMScheduler(500, beta_schedule="scaled_linear"))  # DDIMScheduler
    reveal_type(DDIMScheduler.from_config({}))  # DDIMScheduler
    reveal_type(EulerDiscreteScheduler.from_pretrained("a"))  # EulerDiscreteScheduler
    reveal_type(SCHEDULERS["LCMScheduler"])  # type[Scheduler]
    reveal_type(named_scheduler("euler", {}))  # Scheduler
    DDIMScheduler(beta_strat=0.1)  # error: Unexpected keyword argument "beta_strat"
    DDIMScheduler(prediction_type="noise")  # error: Argument "prediction_type"
    DPMSolverMultistepScheduler(solver_order=4)  # error: Argument "solver_order"


def run(x: torch.Tensor) -> None:
    euler = EulerDiscreteScheduler(use_karras_sigmas=True)
    euler.set_timesteps(20, "cpu")
    reveal_type(euler.sigmas)  # Tensor
    reveal_type(euler.init_noise_sigma)  # Tensor
    reveal_type(euler.scale_model_input(x, 999))  # Tensor
    reveal_type(euler.step(x, 999, x, s_churn=1.0))  # SchedulerOutput
    reveal_type(euler.step(x, 999, x).prev_sample)  # Tensor
    reveal_type(LCMScheduler().step(x, 999, x))  # LCMSchedulerOutput
    reveal_type(euler.add_noise(x, x, torch.tensor([999])))  # Tensor
    euler.step(x, 999, x, eta=0.5)  # error: Unexpected keyword argument "eta"
