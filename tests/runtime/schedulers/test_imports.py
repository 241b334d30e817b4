"""The schedulers need nothing but torch and numpy: where diffusers asks for scipy, ours compute."""

from __future__ import annotations

import pytest

from ...support.forks import run_python

RUN = """
import sys
assert "scipy" not in sys.modules
sys.modules.update(scipy=None, torchsde=None)  # any import of them fails
import torch, weightport
scheduler = weightport.{name}({options})
scheduler.set_timesteps(5)
sample = torch.full((1, 4, 8, 8), scheduler.init_noise_sigma)
for t in scheduler.timesteps:
    sample = scheduler.step(scheduler.scale_model_input(sample, t) * 0.5, t, sample).prev_sample
assert sample.isfinite().all()
print("done")
"""


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("LMSDiscreteScheduler", ""),
        ("LMSDiscreteScheduler", "use_beta_sigmas=True"),
        ("EulerDiscreteScheduler", "use_beta_sigmas=True"),
        ("DPMSolverMultistepScheduler", "use_beta_sigmas=True"),
        ("UniPCMultistepScheduler", "use_beta_sigmas=True"),
        ("DPMSolverSDEScheduler", ""),
    ],
)
def test_no_scheduler_needs_scipy(name: str, options: str) -> None:
    """Upstream, LMS integrates by scipy, and beta sigmas take scipy.stats: both are an ImportError
    without it."""
    ended = run_python(RUN.format(name=name, options=options))
    assert (ended.out, ended.status) == ("done\n", 0), ended.err
