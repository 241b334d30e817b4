"""What the UNet of a single file predicts, and for which images, decided by evidence: no weight states it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from ..mappings.families import families
from .checkpoint import Checkpoint
from .errors import ConversionError

PREDICTION_TYPES = ("epsilon", "v_prediction")
# `modelspec.prediction_type` of https://github.com/Stability-AI/ModelSpec, and kohya's metadata
_SPOKEN = {"epsilon": "epsilon", "eps": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction"}
# what stands in the metadata for tensors of a file: markers by their own names, the last value of `alphas_cumprod`
FINAL_ALPHA = "final_alpha_cumprod"
MARKERS = ("v_pred", "ztsnr", FINAL_ALPHA)
# training steps of Stability's own SD 2.x files
_STEPS = {"875000": "epsilon", "220000": "epsilon", "110000": "v_prediction", "140000": "v_prediction"}


@dataclass(frozen=True)
class Prediction:
    """What the UNet predicts, whether the schedule ends at zero signal-to-noise ratio, and why we think so."""

    kind: str
    zero_snr: bool
    evidence: str


def stands_alone(checkpoint: Checkpoint) -> bool:
    """Whether it is one file, in which alone is evidence; a repo has a scheduler, KerasCV always the same."""
    return checkpoint.layout != "kerascv" and checkpoint.path.is_file()


def prediction(family: str, metadata: Mapping[str, str], asked: str | None, where: object) -> Prediction:
    """Decide from markers in the file, its metadata and its training step; `asked` overrides all of them.

    Raises:
        ConversionError: an SD 2.x UNet without any evidence: both kinds exist, and a wrong guess gives noise.
    """
    zero = (
        "ztsnr" in metadata
        or abs(float(metadata.get(FINAL_ALPHA, 1))) < 1e-6
        or metadata.get("ss_zero_terminal_snr", "").lower() == "true"
    )
    if asked is not None:
        return Prediction(asked, zero, f"--prediction-type {asked}")
    if "v_pred" in metadata:
        return Prediction("v_prediction", zero, "the marker `v_pred`")
    for name in ("modelspec.prediction_type", "prediction_type"):
        kind = _SPOKEN.get(metadata.get(name, "").lower())
        if kind:
            return Prediction(kind, zero, f"metadata `{name}`: {metadata[name]}")
    if metadata.get("ss_v_parameterization", "").lower() == "true":
        return Prediction("v_prediction", zero, "metadata `ss_v_parameterization`")
    if zero:
        return Prediction("v_prediction", zero, "the schedule ends at zero signal, where epsilon says nothing")
    if family == "sd2":
        kind = _STEPS.get(metadata.get("global_step", ""))
        if kind:
            return Prediction(kind, zero, f"global_step {metadata['global_step']} is that of Stability's own file")
        raise ConversionError(
            f"{where}: nothing in the file says what this SD 2.x UNet predicts; say --prediction-type epsilon "
            "(512-pixel models) or v_prediction (768-pixel models)"
        )
    kind = families()[family].scheduler["prediction_type"]
    return Prediction(kind, zero, "no marker says otherwise")


def image_size(metadata: Mapping[str, str]) -> tuple[int, str] | None:
    """The side of the images that a model was made for, in pixels (the longer one), and why; None if nothing says."""
    for name in ("modelspec.resolution", "ss_resolution"):
        sides = [int(side) for side in re.findall(r"\d+", metadata.get(name, "")[:40])]
        if sides and all(64 <= side <= 8192 and side % 8 == 0 for side in sides):
            return max(sides), f"metadata `{name}`: {metadata[name]}"
    return None
