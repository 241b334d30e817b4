"""What all schedulers share. A run visits timesteps t₀ > t₁ > …; a step goes from one to the next.

Notation: x = α·x₀ + σ·ε is the noisy sample, x₀ the image, ε the noise. α and σ here are the
*variance preserving* ones, α² + σ² = 1, but for flows, α + σ = 1. Solvers are linear: what a step
returns is a·x + Σ bₖ·mₖ + c·noise, where the mₖ are the model's outputs, turned into x₀ or ε, and
the coefficients are known before the first step.

A solver is a class that says which timesteps and σ a run visits, in `_plan`, and what a step does,
in `_solve`.

Coefficients are computed in float32, elementwise over whole tables, and outputs that lie close
together are subtracted before they are weighted: where differences cancel, rounding is up to 1e-3
of a step, and float32 in this order is what everybody's images were made with. Samples of 16 bits
are computed with in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .brownian import BrownianNoise
from .config import RESPACING, Configured, options
from .noise import TINY_ALPHA_BAR, make_betas, zero_terminal_snr
from .spacing import Array, beta, exponential, karras, lambdas

TINY = 1e-6  # instead of dividing by zero
Generator = torch.Generator | list[torch.Generator] | None
Timestep = Tensor | float
Draw = Callable[..., Tensor]  # the noise of a step, like the output or what is given
Numbers = Sequence[float] | Array | Tensor
Plan = tuple[Array, Array]  # the timesteps of a run, and its σ with the end
RESPACINGS = options(
    use_karras_sigmas=karras,
    use_exponential_sigmas=exponential,
    use_beta_sigmas=beta,
    use_lu_lambdas=lambdas,
)


class SchedulerOutput(NamedTuple):
    """The sample at the next timestep, and where known the image that the model sees in this
    one."""

    prev_sample: Tensor
    pred_original_sample: Tensor | None = None


def combine(a: float, x: Tensor, *terms: tuple[float, Tensor | None]) -> Tensor:
    """a·x + Σ b·m, products rounded before they are added. A coefficient of 0 leaves out its
    tensor, NaN or not."""
    total = None if a == 0 else x if a == 1 else x * a
    for b, m in terms:
        if b and m is not None:
            total = m * b if total is None else total + m * b
    return torch.zeros_like(x) if total is None else total


def widened(sample: Tensor) -> Tensor:
    """`sample`, in float32 if it had less."""
    return sample if sample.dtype is torch.float64 else sample.float()


def draw_noise(like: Tensor, generator: Generator, dtype: torch.dtype) -> Tensor:
    """Standard normal noise in the shape of `like`, drawn where the generator is; of several, each
    draws a sample."""
    if isinstance(generator, list) and len(generator) > 1:
        return torch.cat(
            [draw_noise(like[i : i + 1], one, dtype) for i, one in enumerate(generator)]
        )
    one = generator[0] if isinstance(generator, list) else generator
    return torch.randn(like.shape, generator=one, device=(one or like).device, dtype=dtype).to(
        like.device
    )


def beside(values: Tensor, like: Tensor) -> Tensor:
    """(b,) in a shape that multiplies samples."""
    return values.to(like.device).view(-1, *[1] * (like.ndim - 1))


class Scheduler(Configured):
    """The base of the schedulers.

    Attributes:
        order: model calls a step.
        output: the class of what `step` returns.
        takes: which of `timesteps` and `sigmas` a run can be made of.
        clips_alpha_bar: whether σ must stay finite at a terminal SNR of zero.
        timesteps: what the model is called with, in the order of the calls.
        sigmas: σ of every model call, and the end, where steps depend on σ.
        alphas_cumprod: ᾱ of every training timestep, float32 on the CPU.
        num_inference_steps: as given to `set_timesteps`; None before.
        step_index: the number of the next step; None before the first one.
        begin_index: where the run begins, as said by `set_begin_index`.
    """

    order: ClassVar[int] = 1
    output: ClassVar[Any] = SchedulerOutput
    takes: ClassVar[tuple[str, ...]] = ()
    clips_alpha_bar: ClassVar[bool] = False

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        if sum(bool(self._own(name)) for name in RESPACING) > 1:
            raise ValueError(
                f"{type(self).__name__}: only one of {', '.join(RESPACING)} can be set"
            )
        self.num_inference_steps: int | None = None
        self._mu: float | None = None
        if "beta_start" in self.defaults:
            self._set_training_noise()
        self._begin(*self._training_run())

    def _set_training_noise(self) -> None:
        zero_snr = bool(self._own("rescale_betas_zero_snr"))
        betas = make_betas(self.config)
        self.betas = zero_terminal_snr(betas) if zero_snr else betas
        self.alphas = 1 - self.betas
        self.alphas_cumprod = self.alphas.cumprod(0)
        if zero_snr and self.clips_alpha_bar:
            self.alphas_cumprod[-1] = TINY_ALPHA_BAR

    def _training_run(self) -> Plan:
        """The run that a scheduler has before `set_timesteps`."""
        return self._plan(len(self), None, None)

    @property
    def _respacing(self) -> Callable[[float, float, int], Array] | None:
        """How the config wants σ to be spaced, where not as the timesteps are."""
        return next((place for name, place in RESPACINGS.items() if self._own(name)), None)

    @property
    def init_noise_sigma(self) -> float:
        """The standard deviation of the sample that a run starts with."""
        return 1.0

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Numbers | None = None,
        sigmas: Numbers | None = None,
        mu: float | None = None,
    ) -> None:
        """Begin a run.

        Args:
            num_inference_steps: how many steps, or one of the next two.
            device: for `timesteps`.
            timesteps: what to call the model with.
            sigmas: the noise levels, the end among them.
            mu: how far to shift a flow, with `use_dynamic_shifting`.

        Raises:
            ValueError: not exactly one of the first three is given, or the scheduler does not take
                it.
        """
        given = {
            "num_inference_steps": num_inference_steps,
            "timesteps": timesteps,
            "sigmas": sigmas,
        }
        chosen = [key for key, value in given.items() if value is not None]
        if len(chosen) != 1:
            raise ValueError("give one of num_inference_steps, timesteps and sigmas")
        if chosen[0] not in ("num_inference_steps", *self.takes):
            raise ValueError(f"{type(self).__name__} does not take {chosen[0]}")
        self._mu = mu
        steps = num_inference_steps or len(timesteps if sigmas is None else sigmas)  # type: ignore[arg-type]
        self.num_inference_steps = steps
        self._begin(*self._plan(steps, timesteps, sigmas), device)

    def _plan(self, steps: int, timesteps: Numbers | None, sigmas: Numbers | None) -> Plan:
        """The run of so many steps, or with these timesteps or σ."""
        raise NotImplementedError

    def _descending(self, timesteps: Numbers) -> Array:
        """Timesteps that somebody has chosen.

        Raises:
            ValueError: they are not training timesteps in descending order.
        """
        t = np.asarray(timesteps, np.int64)
        if (np.diff(t) >= 0).any() or t[0] >= len(self):
            raise ValueError(f"timesteps must descend, from less than {len(self)}")
        return t

    def _begin(
        self, timesteps: Array, sigmas: Array, device: str | torch.device | None = None
    ) -> None:
        """Take these timesteps and σ, and forget the run before."""
        self.timesteps = torch.from_numpy(np.ascontiguousarray(timesteps)).to(device)
        self.sigmas = torch.from_numpy(np.asarray(sigmas, np.float32))
        self._levels: list[float] = self.sigmas.tolist()
        self.step_index: int | None = None
        self.begin_index: int | None = None
        self._history: list[Tensor] = []  # what the model said in the last steps, newest first
        self._start: Tensor | None = None  # the sample that a step of several calls began with
        self._path: BrownianNoise | None = None  # of solvers whose noise is one path

    def step(
        self,
        model_output: Tensor,
        timestep: Timestep,
        sample: Tensor,
        generator: Generator = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Go to the next timestep.

        Args:
            model_output: what the model predicts, as `prediction_type` says.
            timestep: the one that the model was called with.
            sample: what it was called for, before `scale_model_input`.
            generator: draws the noise of solvers that add some.
            variance_noise: the noise, instead of drawing it.
            return_dict: of no effect, the result is a tuple with names.
        """

        def draw(like: Tensor = model_output, dtype: torch.dtype | None = None) -> Tensor:
            noise = variance_noise
            return (
                draw_noise(like, generator, dtype or model_output.dtype) if noise is None else noise
            )

        self._generator = generator
        if self.num_inference_steps is None:
            raise ValueError("call set_timesteps before the first step")
        x, x0 = self._solve(self._next(timestep), widened(sample), widened(model_output), draw)
        dtype = model_output.dtype
        return self.output(x.to(dtype), None if x0 is None else x0.to(dtype))

    def _solve(self, i: int, x: Tensor, output: Tensor, draw: Draw) -> tuple[Tensor, Tensor | None]:
        """The sample after step i, and x₀ where the solver has it."""
        raise NotImplementedError

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Begin the run at this step, not where the first timestep is found."""
        self.begin_index = begin_index

    def index_for_timestep(self, timestep: Timestep) -> int:
        """The position of a timestep in `timesteps`; of two equal ones the second, so that img2img
        skips no noise.

        Raises:
            ValueError: it is not there.
        """
        matches = (self.timesteps == timestep).nonzero().flatten().tolist()
        if not matches:
            raise ValueError(
                f"{float(timestep)} is not one of the scheduler's timesteps; pass values of"
                " `timesteps`"
            )
        return int(matches[1 if len(matches) > 1 else 0])

    def _here(self, timestep: Timestep) -> int:
        """The number of the step that `timestep` belongs to."""
        if self.step_index is None:
            self.step_index = (
                self.index_for_timestep(timestep) if self.begin_index is None else self.begin_index
            )
        return self.step_index

    def _next(self, timestep: Timestep) -> int:
        """As `_here`, and the step is taken."""
        i = self._here(timestep)
        self.step_index = i + 1
        return i

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
            bound = beside(bound.clamp(min=1, max=self.config.sample_max_value), x0)
            return x0.clamp(-bound, bound) / bound
        if self._own("clip_sample"):
            return x0.clamp(-self.config.clip_sample_range, self.config.clip_sample_range)
        return x0

    def _shares(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """α and σ of training timesteps (b,), to multiply samples with."""
        alpha_bar = beside(self.alphas_cumprod[timesteps.long().cpu()], like)
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()

    def _sigma_at(self, timesteps: Tensor, like: Tensor) -> Tensor:
        """σ of the run at its `timesteps` (b,), or at the step that it begins with, to multiply
        samples with."""
        if self.begin_index is None:
            indices = [self.index_for_timestep(t) for t in timesteps]
        else:
            indices = [self.begin_index if self.step_index is None else self.step_index] * len(
                timesteps
            )
        return beside(self.sigmas[indices], like)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noisy samples as they are at `timesteps` (b,)."""
        alpha, sigma = self._shares(timesteps, original_samples)
        return (alpha * original_samples + sigma * noise).to(original_samples.dtype)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """v = α·ε - σ·x₀ at training timesteps (b,) (Salimans and Ho, Progressive Distillation,
        appendix D)."""
        alpha, sigma = self._shares(timesteps, sample)
        return (alpha * noise - sigma * sample).to(sample.dtype)

    def __len__(self) -> int:
        return int(self.config.num_train_timesteps)


def to_image(prediction_type: str, x: Tensor, output: Tensor, alpha: float, sigma: float) -> Tensor:
    """x₀ of a sample. Where nothing of the image is left in it, α = 0, a tiny share of one stands
    in."""
    if prediction_type == "sample":
        return output
    if prediction_type == "v_prediction":
        return combine(alpha, x, (-sigma, output))
    x0 = combine(1, x, (-sigma, output))
    return x0 if prediction_type == "flow_prediction" else x0 / (alpha or TINY)


def to_noise(prediction_type: str, x: Tensor, output: Tensor, alpha: float, sigma: float) -> Tensor:
    """ε of a sample; likewise where there is no noise in it, σ = 0."""
    if prediction_type == "epsilon":
        return output
    if prediction_type == "sample":
        return combine(1, x, (-alpha, output)) / (sigma or TINY)
    return combine(sigma if prediction_type == "v_prediction" else 1, x, (alpha, output))
