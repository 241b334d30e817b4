"""What all schedulers share. A run visits timesteps t₀ > t₁ > …; a step goes from one to the next.

Notation: x = α·x₀ + σ·ε is the noisy sample, x₀ the image, ε the noise. α and σ here are the
*variance preserving* ones, α² + σ² = 1, but for flows, α + σ = 1. Solvers are linear: what a step
returns is a·x + Σ bₖ·mₖ + c·noise, where the mₖ are the model's outputs, turned into x₀ or ε, and
the coefficients are known before the first step.

A scheduler is a class that says what its options are, in `__init__`, which timesteps and σ a run
visits, in `_visits`, and what a step does, in `_solve`. Its base says in which form samples are:
`DiscreteSolver`, `SigmaSolver`, `Preconditioned`, `ExponentialSolver` or `FlowSolver`; what several
of them do alike is a function, or an object that they hold.

Coefficients are computed in float32, elementwise over whole tables, and outputs that lie close
together are subtracted before they are weighted: where differences cancel, rounding is up to 1e-3
of a step, and float32 in this order is what everybody's images were made with. Samples of 16 bits
are computed with in float32.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from ...hub.mixin import PushToHub
from ..loading.config import Config, HasConfig, check_kinds, described_by
from ..loading.options import Options, choices_of, defaults_of
from ..loading.source import Place, PlaceOptions, open_source, split_options
from ..outputs import Output
from .brownian import BrownianNoise
from .config import FILE, RESPACING, check
from .noise import TINY_ALPHA_BAR, make_betas, zero_terminal_snr
from .samples import Draw, Generator, beside, draw_noise, widened
from .spacing import Array, Numbers, TrainedLevels, beta, exponential, karras, lambdas

Device = str | torch.device | None
Timestep = Tensor | float
Visits = tuple[Array, Array]  # the timesteps of a run, and its σ with the end
RESPACINGS: dict[str, Callable[[float, float, int], Array]] = {
    "use_karras_sigmas": karras,
    "use_exponential_sigmas": exponential,
    "use_beta_sigmas": beta,
    "use_lu_lambdas": lambdas,
}


@dataclass(eq=False)
class SchedulerOutput(Output):
    """The sample at the next timestep, and where known the image that the model sees in this
    one."""

    prev_sample: Tensor
    pred_original_sample: Tensor | None = None


def stray(timestep: Timestep) -> ValueError:
    """The error of a timestep that is not in the run."""
    return ValueError(
        f"{float(timestep)} is not one of the scheduler's timesteps; pass values of `timesteps`"
    )


class Scheduler(HasConfig, PushToHub):
    """The base of the schedulers, which are made from a `scheduler_config.json`.

    Attributes:
        known: our schedulers by name; a class is added when it is defined.
        library: the library that `model_index.json` says it is of.
        defaults: the options of the class.
        aliases: values of other schedulers' options, and what they mean here.
        names: what people call it, and the options that they mean by that.
        compatible: whether those that have compatible schedulers can be swapped for it.
        has_compatibles: whether these take its config.
        ignored: options of others that are taken with a warning, and have no effect.
        steps_untimed: whether steps may go over the training timesteps, without `set_timesteps`.
        widens_outputs: whether steps compute with outputs of 16 bits in float32, as with samples.
        strays_end: whether a timestep that is not in the run means its last step.
        stochastic: whether a run adds noise, so that it does not follow the probability flow ODE.
        order: model calls a step.
        takes: which of `timesteps` and `sigmas` a run can be made of.
        clips_alpha_bar: whether σ must stay finite at a terminal SNR of zero.
        config: the options complete with defaults, and, hidden, those of other schedulers that a
            file or a swap brought, so that swapping back restores them. `_use_default_values` names
            those that nobody has set: a swap drops them, and the next scheduler takes its own
            defaults.
        timesteps: what the model is called with, in the order of the calls.
        sigmas: σ of every model call, and the end, where steps depend on σ.
        alphas_cumprod: ᾱ of every training timestep, float32 on the CPU.
        num_inference_steps: as given to `set_timesteps`; None before.
    """

    known: ClassVar[dict[str, type[Scheduler]]] = {}
    config_name: ClassVar[str] = FILE
    library: ClassVar[str] = "diffusers"
    defaults: ClassVar[Options] = {}
    aliases: ClassVar[dict[str, Options]] = {}
    names: ClassVar[dict[str, Options]] = {}
    compatible: ClassVar[bool] = False
    has_compatibles: ClassVar[bool] = True
    ignored: ClassVar[tuple[str, ...]] = ()
    steps_untimed: ClassVar[bool] = False
    widens_outputs: ClassVar[bool] = True
    strays_end: ClassVar[bool] = False
    stochastic: bool = False
    order: ClassVar[int] = 1
    takes: ClassVar[tuple[str, ...]] = ()
    clips_alpha_bar: ClassVar[bool] = False
    config: Config

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if cls.__module__.rpartition(".")[0] != __package__:
            return  # somebody's own
        if "__init__" in vars(cls):
            cls.defaults = defaults_of(vars(cls)["__init__"])
        if cls.__name__.endswith("Scheduler"):
            cls.known[cls.__name__] = cls

    def __init__(self, **options: Any) -> None:
        raise NotImplementedError(f"{type(self).__name__} is not a scheduler, but a base of some")

    def _configure(self, options: Options, init: Callable[..., None]) -> None:
        """Make the config from the options that are given to `init`."""
        meant = {
            key: meanings[options[key]]
            for key, meanings in self.aliases.items()
            if options.get(key) in meanings
        }
        unset = [key for key in self.defaults if key not in options]
        private = {"_use_default_values": unset} if unset else {}
        self.config = Config({**self.defaults, **options, **meant, **private})
        check(type(self).__name__, self.config, choices_of(init))

    def _prepare(self) -> None:
        """Do what the config asks for, up to the first run."""
        if sum(bool(self._own(name)) for name in RESPACING) > 1:
            raise ValueError(
                f"{type(self).__name__}: only one of {', '.join(RESPACING)} can be set"
            )
        self.num_inference_steps: int | None = None
        self._mu: float | None = None
        if "beta_start" in self.defaults:
            self._set_training_noise()
        self._begin(*self._training_run())

    def _own(self, key: str) -> Any:
        """The value of an option, None if the class does not have it: another scheduler's may be in
        the config."""
        return self.config[key] if key in self.defaults else None

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **options: Any) -> Self:
        """A scheduler with the config of another one, or of a file; `options` take precedence.

        Keys that no scheduler knows, and options that this one does not have, warn by name.
        """
        unset = config.get("_use_default_values", ())
        given = {
            key: value
            for key, value in config.items()
            if key not in unset and not key.startswith("_")
        }
        of_any = {key for scheduler in Scheduler.known.values() for key in scheduler.defaults}
        ignored = [key for key in given if key not in of_any]
        ignored += [key for key in options if key not in cls.defaults]
        if ignored:
            warnings.warn(f"{cls.__name__} has no use for {', '.join(ignored)}", stacklevel=2)
        own = {key: value for key, value in (given | options).items() if key in cls.defaults}
        hidden = {key: value for key, value in given.items() if key not in own}
        scheduler = cls(**own)
        scheduler.config = Config({**scheduler.config, **hidden})
        return scheduler

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Place, **given: Any) -> Self:
        """The config in a folder or on the Hub, of any class; `given` are options, or
        `PlaceOptions`."""
        place, options = split_options(given, PlaceOptions)
        source = open_source(pretrained_model_name_or_path, **place)
        config = source.json(cls.config_name)
        with described_by(f"{source.name}/{cls.config_name}"):
            check_kinds(cls.__name__, config, cls.defaults)
            return cls.from_config(config, **options)

    save_pretrained = HasConfig.save_config

    def _saved_config(self) -> Options:
        saved = super()._saved_config()
        if self._own("trained_betas") is not None:
            saved["trained_betas"] = np.asarray(self.config.trained_betas).tolist()
        if callables := [key for key, value in saved.items() if callable(value)]:
            raise ValueError(f"{callables[0]} is a function, which a JSON file cannot hold")
        return saved

    @property
    def compatibles(self) -> list[type[Scheduler]]:
        """The classes that `from_config` can swap to, by name, and this one."""
        known = sorted(self.known.items()) if self.has_compatibles else []
        swaps = [scheduler for _, scheduler in known if scheduler.compatible]
        return swaps if type(self) in swaps else [*swaps, type(self)]

    def __repr__(self) -> str:
        return f"{type(self).__name__} {self._saved_config()}"

    def __len__(self) -> int:
        return int(self.config.num_train_timesteps)

    def _set_training_noise(self) -> None:
        zero_snr = bool(self._own("rescale_betas_zero_snr"))
        betas = make_betas(self.config)
        self.betas = zero_terminal_snr(betas) if zero_snr else betas
        self.alphas = 1 - self.betas
        self.alphas_cumprod = self.alphas.cumprod(0)
        if zero_snr and self.clips_alpha_bar:
            self.alphas_cumprod[-1] = TINY_ALPHA_BAR

    def _training_run(self) -> Visits:
        """The run that a scheduler has before `set_timesteps`."""
        return self._visits(len(self), None, None)

    @property
    def init_noise_sigma(self) -> float | Tensor:
        """The standard deviation of the sample that a run starts with."""
        return 1.0

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Device = None,
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
        points = timesteps if sigmas is None else sigmas
        steps = num_inference_steps or len(points)  # type: ignore[arg-type]
        self._mu = mu
        self.num_inference_steps = steps
        self._begin(*self._visits(steps, timesteps, sigmas), device)

    def _visits(self, steps: int, timesteps: Numbers | None, sigmas: Numbers | None) -> Visits:
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

    @property
    def _respacing(self) -> Callable[[float, float, int], Array] | None:
        """How the config wants σ to be spaced, where not as the timesteps are."""
        return next((place for name, place in RESPACINGS.items() if self._own(name)), None)

    def _respaced(
        self,
        trained: TrainedLevels,
        steps: int,
        timesteps: Numbers | None,
        ends: tuple[float, float],
        rounds: bool,
    ) -> Visits:
        """Timesteps and σ, without the end, where the config asks for a spacing of σ.

        Args:
            trained: σ of training.
            steps: how many.
            timesteps: what somebody has chosen, which is refused.
            ends: the first and the last σ, where the config has no others.
            rounds: whether timesteps are rounded.
        """
        assert self._respacing
        if timesteps is not None:
            raise ValueError(
                "timesteps cannot be given where the config asks for a spacing of sigmas"
            )
        high, low = ends
        if self._own("sigma_max") is not None:
            high = self.config.sigma_max
        if self._own("sigma_min") is not None:
            low = self.config.sigma_min
        sigmas = self._respacing(high, low, steps)
        t = trained.timesteps_of(sigmas)
        return t.round() if rounds else t, sigmas

    def _begin(self, timesteps: Array, sigmas: Array, device: Device = None) -> None:
        """Take these timesteps and σ, and forget the run before."""
        self.timesteps = torch.from_numpy(np.array(timesteps)).to(device)
        self.sigmas = torch.from_numpy(np.asarray(sigmas, np.float32))
        self._levels: list[float] = self.sigmas.tolist()
        self._step_index: int | None = None
        self._begin_index: int | None = None
        self._history: list[Tensor] = []  # what the model said in the last steps, newest first
        self._start: Tensor | None = None  # the sample that a step of several calls began with
        self._path: BrownianNoise | None = None  # of solvers whose noise is one path

    def step(
        self,
        model_output: Tensor,
        timestep: Timestep,
        sample: Tensor,
        generator: Generator = None,
        return_dict: bool = True,
    ) -> SchedulerOutput:
        """Go to the next timestep.

        Args:
            model_output: what the model predicts, as `prediction_type` says.
            timestep: the one that the model was called with.
            sample: what it was called for, before `scale_model_input`.
            generator: draws the noise of solvers that add some.
            return_dict: False returns a plain tuple.
        """
        parts = self._step(model_output, timestep, sample, generator)
        return SchedulerOutput.asked(return_dict, *parts)

    def _step(
        self,
        model_output: Tensor,
        timestep: Timestep,
        sample: Tensor,
        generator: Generator = None,
        variance_noise: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The next sample, and x₀ where the solver has it, in the dtype of the output."""

        def draw(like: Tensor = model_output, dtype: torch.dtype | None = None) -> Tensor:
            if variance_noise is not None:
                return variance_noise
            return draw_noise(like, generator, dtype or model_output.dtype)

        self._generator = generator
        if self.num_inference_steps is None and not self.steps_untimed:
            raise ValueError("call set_timesteps before the first step")
        output = widened(model_output) if self.widens_outputs else model_output
        x, x0 = self._solve(self._next(timestep), widened(sample), output, draw)
        dtype = model_output.dtype
        return x.to(dtype), None if x0 is None else x0.to(dtype)

    def _solve(self, i: int, x: Tensor, output: Tensor, draw: Draw) -> tuple[Tensor, Tensor | None]:
        """The sample after step i, and x₀ where the solver has it."""
        raise NotImplementedError

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
        """The position of a timestep in `timesteps`; of two equal ones the second, so that img2img
        skips no noise.

        Raises:
            ValueError: it is not there, and that does not mean the last step.
        """
        matches = (self.timesteps == timestep).nonzero().flatten().tolist()
        if not matches and self.strays_end:
            return len(self.timesteps) - 1
        if not matches:
            raise stray(timestep)
        return int(matches[1 if len(matches) > 1 else 0])

    def _here(self, timestep: Timestep) -> int:
        """The number of the step that `timestep` belongs to."""
        if self._step_index is None:
            self._step_index = self._begin_index
        if self._step_index is None:
            self._step_index = self.index_for_timestep(timestep)
        return self._step_index

    def _count(self, timestep: Timestep) -> int:
        """As `_here`, and the step is taken."""
        i = self._here(timestep)
        self._step_index = i + 1
        return i

    def _next(self, timestep: Timestep) -> int:
        """What `_solve` is told of the step: its number."""
        return self._count(timestep)

    def scale_model_input(
        self, sample: Tensor, timestep: Timestep | None = None, *_: Any, **__: Any
    ) -> Tensor:
        """What the model is to see of the sample: here all of it, whatever is said of the step."""
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

    def _training_shares(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """α and σ of training timesteps (b,), to multiply samples with."""
        alpha_bar = beside(self.alphas_cumprod[timesteps.long().cpu()], like)
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()

    def _shares(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """The shares of image and noise in samples at `timesteps` (b,), to multiply them with."""
        return self._training_shares(timesteps, like)

    def _sigma_at(self, timesteps: Tensor, like: Tensor) -> Tensor:
        """σ of the run at its `timesteps` (b,), or at the step that it begins with, to multiply
        samples with."""
        if self.begin_index is None:
            indices = [self.index_for_timestep(t) for t in timesteps]
        else:
            step = self.begin_index if self.step_index is None else self.step_index
            indices = [step] * len(timesteps)
        return beside(self.sigmas[indices], like)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noisy samples as they are at `timesteps` (b,), or where steps depend on σ, at the step
        that the run begins with."""
        alpha, sigma = self._shares(timesteps, original_samples)
        return (alpha * original_samples + sigma * noise).to(original_samples.dtype)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """v = α·ε - σ·x₀ at training timesteps (b,) (Salimans and Ho, Progressive Distillation,
        appendix D)."""
        alpha, sigma = self._training_shares(timesteps, sample)
        return (alpha * noise - sigma * sample).to(sample.dtype)


def noiseless_step(
    self: Scheduler,
    model_output: Tensor,
    timestep: Timestep,
    sample: Tensor,
    return_dict: bool = True,
) -> SchedulerOutput:
    """Go to the next timestep: the `step` of solvers that draw no noise."""
    parts = self._step(model_output, timestep, sample)
    return SchedulerOutput.asked(return_dict, *parts)


def noisy_step(
    self: Scheduler,
    model_output: Tensor,
    timestep: Timestep,
    sample: Tensor,
    generator: Generator = None,
    variance_noise: Tensor | None = None,
    return_dict: bool = True,
) -> SchedulerOutput:
    """Go to the next timestep, with noise of the generator or the one that is given."""
    parts = self._step(model_output, timestep, sample, generator, variance_noise)
    return SchedulerOutput.asked(return_dict, *parts)
