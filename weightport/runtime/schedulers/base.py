"""What all schedulers share. A run visits timesteps t₀ > t₁ > …; a step goes from one to the next.

Notation: x = α·x₀ + σ·ε is the noisy sample, x₀ the image, ε the noise. α and σ here are the *variance preserving*
ones, α² + σ² = 1, but for flows, α + σ = 1. Solvers are linear: what a step returns is a·x + Σ bₖ·mₖ + c·noise, where
the mₖ are the model's outputs, turned into x₀ or ε, and the coefficients are known before the first step.

Coefficients are computed in float32, elementwise over whole tables: rounding differs between precisions by up to
1e-3 where differences of logarithms cancel, and float32 is what everybody's images were made with. Samples of 16 bits
are computed with in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from .config import Configured
from .noise import TINY_ALPHA_BAR, make_betas, zero_terminal_snr
from .spacing import Array, beta, exponential, karras

TINY = 1e-6  # instead of dividing by zero
Generator = torch.Generator | list[torch.Generator] | None
Timestep = Tensor | float

TRAINING: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
}
SPACING: dict[str, Any] = {"timestep_spacing": "linspace", "steps_offset": 0}
RESPACINGS = {"use_karras_sigmas": karras, "use_exponential_sigmas": exponential, "use_beta_sigmas": beta}
RESPACING: dict[str, Any] = dict.fromkeys(RESPACINGS, False)
THRESHOLDING: dict[str, Any] = {"thresholding": False, "dynamic_thresholding_ratio": 0.995, "sample_max_value": 1.0}
CLIPPING: dict[str, Any] = {"clip_sample": True, "clip_sample_range": 1.0}


class SchedulerOutput(NamedTuple):
    """The sample at the next timestep, and where known the image that the model sees in this one."""

    prev_sample: Tensor
    pred_original_sample: Tensor | None = None


def combine(a: float, x: Tensor, *terms: tuple[float, Tensor | None]) -> Tensor:
    """a·x + Σ b·m. A coefficient of 0 makes its tensor irrelevant, whatever is in it."""
    total = None if a == 0 else x if a == 1 else x * a
    for b, m in terms:
        if b and m is not None:
            total = m * b if total is None else torch.add(total, m, alpha=b)
    return torch.zeros_like(x) if total is None else total


def widened(sample: Tensor) -> Tensor:
    """`sample`, in float32 if it had less."""
    return sample if sample.dtype is torch.float64 else sample.float()


def draw_noise(like: Tensor, generator: Generator, dtype: torch.dtype | None = None) -> Tensor:
    """Standard normal noise in the shape of `like`, drawn where the generator is; of several, each draws a sample."""
    dtype = dtype or like.dtype
    if isinstance(generator, list):
        rows = [draw_noise(like[i : i + 1], one, dtype) for i, one in enumerate(generator)]
        return torch.cat(rows) if len(rows) > 1 else draw_noise(like, generator[0], dtype)
    device = generator.device if generator else like.device
    return torch.randn(like.shape, generator=generator, device=device, dtype=dtype).to(like.device)


class Scheduler(Configured):
    """The base of the schedulers.

    Attributes:
        order: model calls a step.
        timesteps: what the model is called with, in the order of the calls.
        alphas_cumprod: ᾱ of every training timestep, float32 on the CPU.
        num_inference_steps: as given to `set_timesteps`; None before.
    """

    order: ClassVar[int] = 1
    clips_alpha_bar: ClassVar[bool] = False  # whether σ must stay finite at a terminal SNR of zero
    timesteps: Tensor
    sigmas: Tensor

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        if sum(bool(self._own(name)) for name in RESPACINGS) > 1:
            raise ValueError(f"{type(self).__name__}: only one of {', '.join(RESPACINGS)} can be set")
        self.num_inference_steps: int | None = None
        self._set_training_noise()
        self._restart()

    def _set_training_noise(self) -> None:
        zero_snr = bool(self._own("rescale_betas_zero_snr"))
        betas = make_betas(self.config)
        self.betas = zero_terminal_snr(betas) if zero_snr else betas
        self.alphas = 1 - self.betas
        self.alphas_cumprod = self.alphas.cumprod(0)
        if zero_snr and self.clips_alpha_bar:
            self.alphas_cumprod[-1] = TINY_ALPHA_BAR

    def _own(self, key: str) -> Any:
        """The value of an option, None if the class does not have it: another scheduler's may be in the config."""
        return self.config[key] if key in self.defaults else None

    @property
    def _respacing(self) -> Callable[[float, float, int], Array] | None:
        """How the config wants σ to be spaced, where not as the timesteps are."""
        chosen = [place for name, place in RESPACINGS.items() if self._own(name)]
        return chosen[0] if chosen else None

    @property
    def init_noise_sigma(self) -> float:
        """The standard deviation of the sample that a run starts with."""
        return 1.0

    # The position in the run.

    def _restart(self) -> None:
        self._step_index: int | None = None
        self._begin_index: int | None = None

    @property
    def step_index(self) -> int | None:
        """The number of the next step; None before the first one."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """Where the run begins, as said by `set_begin_index`."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Begin the run at this step, not where the first timestep is found."""
        self._begin_index = begin_index

    def index_for_timestep(self, timestep: Timestep) -> int:
        """The position of a timestep in `timesteps`; of two equal ones the second, so that img2img skips no noise.

        Raises:
            ValueError: it is not there.
        """
        matches = (self.timesteps == timestep).nonzero().flatten().tolist()
        if not matches:
            raise ValueError(f"{float(timestep)} is not one of the scheduler's timesteps; pass values of `timesteps`")
        return int(matches[1 if len(matches) > 1 else 0])

    def _here(self, timestep: Timestep) -> int:
        """The number of the step that `timestep` belongs to."""
        if self._step_index is None:
            self._step_index = self.index_for_timestep(timestep) if self._begin_index is None else self._begin_index
        return self._step_index

    def _next(self, timestep: Timestep) -> int:
        """As `_here`, and the step is taken."""
        if self.num_inference_steps is None:
            raise ValueError("call set_timesteps before the first step")
        i = self._here(timestep)
        self._step_index = i + 1
        return i

    # The sample.

    def scale_model_input(self, sample: Tensor, timestep: Timestep | None = None) -> Tensor:
        """What the model is to see of the sample: here, all of it."""
        return sample

    def _limit(self, x0: Tensor) -> Tensor:
        """x₀ inside the range that the config asks for.

        Dynamic thresholding: Saharia et al., Photorealistic Text-to-Image Diffusion, section 2.3.
        """
        if self._own("thresholding"):
            flat = widened(x0).abs().flatten(1)
            bound = torch.quantile(flat, self.config.dynamic_thresholding_ratio, dim=1)
            bound = bound.clamp(min=1, max=self.config.sample_max_value).view(-1, *[1] * (x0.ndim - 1))
            return x0.clamp(-bound, bound) / bound
        if self._own("clip_sample"):
            return x0.clamp(-self.config.clip_sample_range, self.config.clip_sample_range)
        return x0

    def _noise_share(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """α and σ of training timesteps, to multiply samples with."""
        alpha_bar = self.alphas_cumprod.to(like.device)[timesteps.to(like.device, torch.int64)]
        alpha_bar = alpha_bar.view(-1, *[1] * (like.ndim - 1))
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noisy samples as they are at `timesteps` (b,)."""
        alpha, sigma = self._noise_share(timesteps, original_samples)
        return (alpha * original_samples + sigma * noise).to(original_samples.dtype)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """v = α·ε - σ·x₀ at training timesteps (b,) (Salimans and Ho, Progressive Distillation, appendix D)."""
        alpha, sigma = self._noise_share(timesteps, sample)
        return (alpha * noise - sigma * sample).to(sample.dtype)

    def __len__(self) -> int:
        return int(self.config.num_train_timesteps)


def to_image(prediction_type: str, x: Tensor, output: Tensor, alpha: float, sigma: float) -> Tensor:
    """x₀ of a sample. Where nothing of the image is left in it, α = 0, a tiny share of one stands in."""
    match prediction_type:
        case "epsilon":
            return combine(1, x, (-sigma, output)) / (alpha or TINY)
        case "v_prediction":
            return combine(alpha, x, (-sigma, output))
        case "flow_prediction":
            return combine(1, x, (-sigma, output))
    return widened(output)


def to_noise(prediction_type: str, x: Tensor, output: Tensor, alpha: float, sigma: float) -> Tensor:
    """ε of a sample; likewise where there is no noise in it, σ = 0."""
    match prediction_type:
        case "epsilon":
            return widened(output)
        case "v_prediction":
            return combine(sigma, x, (alpha, output))
        case "flow_prediction":
            return combine(1, x, (alpha, output))
    return combine(1, x, (-alpha, output)) / (sigma or TINY)
