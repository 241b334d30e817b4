"""The `scheduler_config.json`: which options a scheduler has, and what passes on when one is
swapped for another."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from typing import Any, ClassVar, Self

from ..loading.config import Config, HasConfig
from ..loading.source import Place

Options = dict[str, Any]


def options(*groups: Options, without: Collection[str] = (), **own: Any) -> Options:
    """The options of these groups, but for some, and others; later ones take precedence."""
    return {
        key: value for group in groups for key, value in group.items() if key not in without
    } | own


BETAS = options(beta_start=0.0001, beta_end=0.02, beta_schedule="linear", trained_betas=None)
TRAINING = options(BETAS, num_train_timesteps=1000, prediction_type="epsilon")
STABLE_DIFFUSION = options(TRAINING, beta_start=0.00085, beta_end=0.012)
SPACING = options(timestep_spacing="linspace", steps_offset=0)
LEADING = options(SPACING, timestep_spacing="leading")
RESPACING = options(use_karras_sigmas=False, use_exponential_sigmas=False, use_beta_sigmas=False)
THRESHOLDING = options(thresholding=False, dynamic_thresholding_ratio=0.995, sample_max_value=1.0)
CLIPPING = options(clip_sample=True, clip_sample_range=1.0)
ENDS = options(set_alpha_to_one=True, rescale_betas_zero_snr=False)
FLOW = options(use_flow_sigmas=False, flow_shift=1.0)
SHIFT = options(use_dynamic_shifting=False, time_shift_type="exponential")
SIGMAS = options(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5, rho=7.0)
EDM = options(
    SIGMAS,
    sigma_schedule="karras",
    final_sigmas_type="zero",
    num_train_timesteps=1000,
    prediction_type="epsilon",
)

VE = ("epsilon", "v_prediction")
VP = ("epsilon", "sample", "v_prediction")
FLOWS = (*VP, "flow_prediction")
VARIANCES = (
    "fixed_small",
    "fixed_small_log",
    "fixed_large",
    "fixed_large_log",
    "learned",
    "learned_range",
)
CHOICES = options(  # the values that options can take, in whichever scheduler
    variance_type=(None, *VARIANCES),
    interpolation_type=("linear", "log_linear"),
    timestep_type=("discrete", "continuous"),
    final_sigmas_type=("zero", "sigma_min"),
    sigma_schedule=("karras", "exponential"),
    time_shift_type=("exponential", "linear"),
)
FILE = "scheduler_config.json"
NAMES = (
    "DDIM DDPM PNDM LMSDiscrete EulerDiscrete HeunDiscrete EulerAncestralDiscrete"
    " DPMSolverMultistep DPMSolverSinglestep KDPM2Discrete KDPM2AncestralDiscrete DEISMultistep"
    " UniPCMultistep DPMSolverSDE EDMEuler"
)
COMPATIBLE = tuple(f"{name}Scheduler" for name in NAMES.split())  # with one another; in this order


class Configured(HasConfig):
    """Something made from a `scheduler_config.json`.

    Attributes:
        config: the options complete with defaults, and, hidden, those of other schedulers that a
            file or a swap brought, so that swapping back restores them. `_use_default_values` names
            those that nobody has set: a swap drops them, and the next scheduler takes its own
            defaults.
        library: the library that `model_index.json` says it is of.
        defaults: the options of the class.
        predicts: the values that `prediction_type` can have.
        choices: the values that other options can take, where they are not those of `CHOICES`.
        aliases: values of other schedulers' options, and what they mean here.
        has_compatibles: whether `COMPATIBLE` schedulers take its config.
    """

    config_name: ClassVar[str] = FILE
    library: ClassVar[str] = "diffusers"
    defaults: ClassVar[Options] = {}
    predicts: ClassVar[tuple[str, ...]] = VE
    choices: ClassVar[Options] = {}
    aliases: ClassVar[Options] = {}
    has_compatibles: ClassVar[bool] = True
    config: Config

    def __init__(self, **options: Any) -> None:
        """Make one.

        Raises:
            TypeError: an option that the scheduler does not have.
            ValueError: a value that it cannot serve.
        """
        name = type(self).__name__
        if unknown := sorted(options.keys() - self.defaults.keys()):
            raise TypeError(f"{name} has no option {', '.join(unknown)}")
        unset = [key for key in self.defaults if key not in options]
        meant = {
            key: self.aliases[key].get(value, value)
            for key, value in options.items()
            if key in self.aliases
        }
        self.config = Config({**self.defaults, **options, **meant, "_use_default_values": unset})
        for key, allowed in (CHOICES | {"prediction_type": self.predicts} | self.choices).items():
            if key in self.defaults and self.config[key] not in allowed:
                raise ValueError(
                    f"{name}: {key} = {self.config[key]!r} must be"
                    f" {' or '.join(map(repr, allowed))}"
                )

    def _own(self, key: str) -> Any:
        """The value of an option, None if the class does not have it: another scheduler's may be in
        the config."""
        return self.config[key] if key in self.defaults else None

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **options: Any) -> Self:
        """A scheduler with the config of another one, or of a file; `options` take precedence.

        Keys that no scheduler knows, and options that this one does not have, warn by name.
        """
        unset = ("_use_default_values", *config.get("_use_default_values", ()))
        given = {key: value for key, value in config.items() if key not in unset}
        unknown = [key for key in given if not key.startswith("_") and key not in _all_options()]
        if ignored := unknown + [key for key in options if key not in cls.defaults]:
            warnings.warn(f"{cls.__name__} has no use for {', '.join(ignored)}", stacklevel=2)
        own = {key: value for key, value in (given | options).items() if key in cls.defaults}
        hidden = {key: value for key, value in given.items() if key not in own}
        scheduler = cls(**own)
        hidden |= {"_class_name": cls.__name__} if "_class_name" in hidden else {}
        scheduler.config = Config({**scheduler.config, **hidden})
        return scheduler

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Place, **given: Any) -> Self:
        """The config in a folder or on the Hub, of any class; `given` are options, or
        `PlaceOptions`."""
        config, options = cls.load_config(
            pretrained_model_name_or_path, return_unused_kwargs=True, **given
        )
        return cls.from_config(config, **options)

    save_pretrained = HasConfig.save_config

    def _saved_config(self) -> Options:
        saved = super()._saved_config()
        if callables := [key for key, value in saved.items() if callable(value)]:
            raise ValueError(f"{callables[0]} is a function, which a JSON file cannot hold")
        return saved

    @property
    def compatibles(self) -> list[type[Configured]]:
        """The classes that `from_config` can swap to, in a fixed order."""
        from . import SCHEDULERS

        names = COMPATIBLE if self.has_compatibles else ()
        return [
            *(SCHEDULERS[name] for name in names),
            *([] if type(self).__name__ in names else [type(self)]),
        ]

    def __repr__(self) -> str:
        return f"{type(self).__name__} {self._saved_config()}"


def _all_options() -> set[str]:
    from . import SCHEDULERS

    return {key for scheduler in SCHEDULERS.values() for key in scheduler.defaults}
