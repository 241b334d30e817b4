"""What the UNet of a single file predicts, and for which images, decided by evidence: no weight
states it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...errors import ConversionError
from ...mappings.families import families
from ...mappings.layouts import layouts
from ..checkpoint import Array, Checkpoint

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
FINAL_ALPHA, CONFIGS = "final_alpha_cumprod", "configs"
MARKERS = ("v_pred", "ztsnr", FINAL_ALPHA, CONFIGS)
# training steps of Stability's own SD 2.x files
_STEPS = {
    "875000": "epsilon",
    "220000": "epsilon",
    "110000": "v_prediction",
    "140000": "v_prediction",
}


@dataclass(frozen=True)
class Prediction:
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
        """A stock config, of the scheduler or the VAE, with what the file says; another scheduler's
        is its own."""
        said = {
            key.removeprefix(f"{name}."): value
            for key, value in self.configs.items()
            if key.startswith(f"{name}.")
        }
        return ({} if "_class_name" in said else dict(stock)) | said

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
    """Whether it is one file, in which alone is evidence; a repo has a scheduler, KerasCV always
    the same."""
    return layouts()[checkpoint.layout].scheduler is None and checkpoint.path.is_file()


def prediction(family: str, checkpoint: Checkpoint, asked: str | None) -> Prediction | None:
    """Decide from markers in the file, its metadata and its training step; `asked` overrides what
    is predicted.

    None where nothing is to be decided: the scheduler is known and nothing is asked for.

    Raises:
        ConversionError: an SD 2.x UNet without any evidence: both kinds exist, and a wrong guess
            gives noise.
    """
    alone = stands_alone(checkpoint)
    if asked is None and not alone:
        return None
    metadata = checkpoint.metadata if alone else {}
    zero = (
        "ztsnr" in metadata
        or abs(float(metadata.get(FINAL_ALPHA, 1))) < 1e-6
        or metadata.get("ss_zero_terminal_snr", "").lower() == "true"
    )
    configs = json.loads(metadata.get(CONFIGS, "{}"))
    kind, evidence = (
        (asked, f"--prediction-type {asked}") if asked else _kind(family, checkpoint, zero, configs)
    )
    if "scheduler._class_name" not in configs:
        stock = families()[family].scheduler
        configs = {
            key: value
            for key, value in configs.items()
            if stock.get(key.partition(".")[2]) != value
        }
    return Prediction(kind, zero, evidence, configs)


def _kind(
    family: str, checkpoint: Checkpoint, zero: bool, configs: Mapping[str, Any]
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
    if zero:
        return "v_prediction", "the schedule ends at zero signal, where epsilon says nothing"
    if family == "sd2":
        if kind := _STEPS.get(metadata.get("global_step", "")):
            return kind, f"global_step {metadata['global_step']} is that of Stability's own file"
        raise ConversionError(
            f"{checkpoint.path}: nothing in the file says what this SD 2.x UNet predicts; say"
            " --prediction-type epsilon (512-pixel models) or v_prediction (768-pixel models)"
        )
    return families()[family].scheduler["prediction_type"], "no marker says otherwise"


def is_marker(value: object) -> bool:
    """Whether a value in `[edm]` of `mappings/facts/ldm.toml` is the name of a tensor."""
    return isinstance(value, str) and value.startswith("edm_")


def betas_config(kept: Array) -> dict[str, Any]:
    """What a scheduler's config says of a noise schedule, `alphas_cumprod` in float64.

    Linear in the betas or in their roots, as schedules of known models are; of any other, every
    beta.
    """
    betas = 1 - kept / np.append(1.0, kept[:-1])
    start, end = (float(f"{beta:.4g}") for beta in (betas[0], betas[-1]))
    for name in ("scaled_linear", "linear"):
        config = {
            "beta_schedule": name,
            "beta_start": start,
            "beta_end": end,
            "num_train_timesteps": len(kept),
        }
        if np.allclose(np.cumprod(1 - training_betas(config)), kept, rtol=2e-3, atol=1e-6):
            return config
    return {"trained_betas": betas.tolist()}


def training_betas(config: Mapping[str, Any]) -> Array:
    """The share of noise that each training step adds, as a scheduler's config says.

    Raises:
        KeyError: the config has a schedule of another kind.
    """
    if config.get("trained_betas"):
        return np.array(config["trained_betas"])
    power = {"linear": 1.0, "scaled_linear": 0.5}[config["beta_schedule"]]
    ends = config["beta_start"] ** power, config["beta_end"] ** power
    betas: Array = np.linspace(*ends, config["num_train_timesteps"]) ** (1 / power)
    return betas


def image_size(metadata: Mapping[str, str]) -> tuple[int, str] | None:
    """The side of the images that a model was made for, in pixels (the longer one), and why; None
    if nothing says."""
    for name in ("modelspec.resolution", "ss_resolution"):
        sides = [int(side) for side in re.findall(r"\d+", metadata.get(name, "")[:40])]
        if sides and all(64 <= side <= 8192 and side % 8 == 0 for side in sides):
            return max(sides), f"metadata `{name}`: {metadata[name]}"
    return None
