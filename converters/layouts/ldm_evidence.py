"""What the UNet of a single file predicts, and for which images.

No weight states it: evidence decides.
"""

from __future__ import annotations

import itertools
import json
import operator
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ...errors import ConversionError
from ...mappings.facts import facts
from ...mappings.families import families
from ...mappings.layouts import layouts
from ...noise_schedule import even_betas
from ..checkpoint import Checkpoint

if TYPE_CHECKING:
    from ...io.arrays import Array

# `modelspec.prediction_type` of https://github.com/Stability-AI/ModelSpec, and kohya's metadata
_SPOKEN = {
    "epsilon": "epsilon",
    "eps": "epsilon",
    "v": "v_prediction",
    "v_prediction": "v_prediction",
}
# what stands in the metadata for tensors of a file: markers by their own names, the last value of
# `alphas_cumprod`, and as JSON what the values of others say for the configs:
# `scheduler.beta_start`, `vae.latents_mean`
FINAL_ALPHA = "final_alpha_cumprod"
CONFIGS = "configs"
MARKERS = ("v_pred", "ztsnr", FINAL_ALPHA, CONFIGS)
_LONGEST_SIZE = 40  # characters read of a size


class Prediction(NamedTuple):
    """What the UNet predicts, and of which schedule.

    Attributes:
        kind: `epsilon` or `v_prediction`.
        zero_snr: whether the schedule ends at zero signal-to-noise ratio.
        evidence: why we think so.
        configs: what else the file says for configs, where it differs from the family's:
            `scheduler.beta_start`.
    """

    kind: str
    zero_snr: bool
    evidence: str
    configs: Mapping[str, Any]

    @property
    def told(self) -> str:
        """What the file says for configs, in words."""
        return ", ".join(
            key if isinstance(value, list) else f"{key} {value}"
            for key, value in self.configs.items()
        )

    def config(self, name: str, stock: Mapping[str, Any]) -> dict[str, Any]:
        """A stock config, of the scheduler or the VAE, with what the file says.

        Another scheduler's config is its own.
        """
        front = f"{name}."
        said = {
            key.removeprefix(front): value
            for key, value in self.configs.items()
            if key.startswith(front)
        }
        if "_class_name" in said:
            return said
        return {**stock, **said}

    def scheduler(self, stock: Mapping[str, Any]) -> dict[str, Any]:
        """The config of the UNet's scheduler."""
        config = self.config("scheduler", stock) | {"prediction_type": self.kind}
        if self.zero_snr:
            if config["_class_name"] == "PNDMScheduler":  # which cannot rescale its betas
                config["_class_name"] = "DDIMScheduler"
                del config["skip_prk_steps"]
            config |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        return config


def stands_alone(checkpoint: Checkpoint) -> bool:
    """Whether it is one file, in which alone is evidence.

    A repo has a scheduler, and so have layouts of which all models have the same.
    """
    return layouts()[checkpoint.layout].scheduler is None and checkpoint.path.is_file()


def prediction(family: str, checkpoint: Checkpoint, asked: str | None) -> Prediction | None:
    """Decide from markers in the file, its metadata and its training step.

    None where nothing is to be decided: the scheduler is known and nothing is asked for.

    Args:
        asked: overrides what is predicted.

    Raises:
        ConversionError: an SD 2.x UNet without any evidence: both kinds exist, and a wrong guess
            gives noise.
    """
    alone = stands_alone(checkpoint)
    if "prediction_type" not in families()[family].scheduler:  # it matches a flow
        if asked:
            title = families()[family].title
            raise ConversionError(f"--prediction-type {asked}: models of {title} predict a flow")
        return None
    if asked is None and not alone:
        return None
    metadata = checkpoint.metadata if alone else {}
    zero_snr = _ends_at_zero(metadata)
    configs = json.loads(metadata.get(CONFIGS, "{}"))
    if asked:
        kind = asked
        evidence = f"--prediction-type {asked}"
    else:
        kind, evidence = _kind(family, checkpoint, zero_snr, configs)
    if "scheduler._class_name" not in configs:
        configs = _unlike(families()[family].scheduler, configs)
    return Prediction(kind, zero_snr, evidence, configs)


def _ends_at_zero(metadata: Mapping[str, str]) -> bool:
    """Whether the schedule ends at zero signal-to-noise ratio."""
    return (
        "ztsnr" in metadata
        or abs(float(metadata.get(FINAL_ALPHA, 1))) < 1e-6
        or metadata.get("ss_zero_terminal_snr", "").lower() == "true"
    )


def _unlike(stock: Mapping[str, Any], configs: Mapping[str, Any]) -> dict[str, Any]:
    """What a file says of its scheduler, less what the stock one says as well."""
    return {
        key: value for key, value in configs.items() if stock.get(key.partition(".")[2]) != value
    }


def _kind(
    family: str, checkpoint: Checkpoint, zero_snr: bool, configs: Mapping[str, Any]
) -> tuple[str, str]:
    """What the UNet predicts, and why we think so."""
    metadata = checkpoint.metadata
    if "v_pred" in metadata:
        return "v_prediction", "the marker `v_pred`"
    if kind := configs.get("scheduler.prediction_type"):
        return kind, f"the markers of an {configs['scheduler._class_name']}"
    for name in ("modelspec.prediction_type", "prediction_type"):
        if kind := _SPOKEN.get(metadata.get(name, "").lower()):
            return kind, f"metadata `{name}`: {metadata[name]}"
    if metadata.get("ss_v_parameterization", "").lower() == "true":
        return "v_prediction", "metadata `ss_v_parameterization`"
    if zero_snr:
        return "v_prediction", "the schedule ends at zero signal, where epsilon says nothing"
    both = facts("ldm")["both_kinds"].get(family)
    if both is None:
        return families()[family].scheduler["prediction_type"], "no marker says otherwise"
    if kind := both["training_steps"].get(metadata.get("global_step", "")):
        return kind, f"global_step {metadata['global_step']} is that of Stability's own file"
    raise ConversionError(
        f"{checkpoint.path}: nothing in the file says what this {both['title']} UNet predicts; say"
        f" --prediction-type {both['advice']}"
    )


def is_marker(value: object) -> bool:
    """Whether a value in `[edm]` of `mappings/facts/ldm.toml` is the name of a tensor."""
    return isinstance(value, str) and value.startswith("edm_")


def betas_config(kept: Sequence[float]) -> dict[str, Any]:
    """What a scheduler's config says of a noise schedule, `alphas_cumprod`.

    Linear in the betas or in their roots, as schedules of known models are; of any other, every
    beta.
    """
    betas = [1 - now / before for now, before in zip(kept, (1.0, *kept[:-1]), strict=True)]
    for name in ("scaled_linear", "linear"):
        config = {
            "beta_schedule": name,
            "beta_start": float(f"{betas[0]:.4g}"),
            "beta_end": float(f"{betas[-1]:.4g}"),
            "num_train_timesteps": len(kept),
        }
        known = itertools.accumulate((1 - beta for beta in _even_betas(config)), operator.mul)
        if all(abs(one - two) <= 1e-6 + 2e-3 * two for one, two in zip(known, kept, strict=True)):
            return config
    return {"trained_betas": betas}


def _even_betas(config: Mapping[str, Any]) -> list[float]:
    """What `training_betas` gives, but for rounding; without NumPy, for who only looks."""
    power = 2 if config["beta_schedule"] == "scaled_linear" else 1
    first = config["beta_start"] ** (1 / power)
    last = config["beta_end"] ** (1 / power)
    steps = config["num_train_timesteps"]
    return [(first + (last - first) * step / (steps - 1)) ** power for step in range(steps)]


def training_betas(config: Mapping[str, Any]) -> Array:
    """The share of noise that each training step adds, as a scheduler's config says.

    Raises:
        KeyError: the config has a schedule of another kind.
    """
    import numpy as np

    if config.get("trained_betas"):
        return np.array(config["trained_betas"])
    return even_betas(
        config["beta_schedule"],
        config["beta_start"],
        config["beta_end"],
        config["num_train_timesteps"],
        np.linspace,
    )


def image_size(metadata: Mapping[str, str]) -> tuple[int, str] | None:
    """The side of the images that a model was made for, in pixels (the longer one), and why.

    None if nothing says.
    """
    for name in ("modelspec.resolution", "ss_resolution"):
        stated = metadata.get(name, "")[:_LONGEST_SIZE]
        sides = [int(side) for side in re.findall(r"\d+", stated)]
        if sides and all(_is_side(side) for side in sides):
            return max(sides), f"metadata `{name}`: {metadata[name]}"
    return None


def _is_side(side: int) -> bool:
    return 64 <= side <= 8192 and side % 8 == 0
