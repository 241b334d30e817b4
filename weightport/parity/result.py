"""What a parity run finds: plain data, for the report and for JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from .layers import Fault, Layer
from .measure import Error
from .weights import Weights


@dataclass(frozen=True)
class Check:
    """One model, run by both sides.

    Attributes:
        name: `text_encoder`, `unet`, `controlnet`, or a half of the VAE, `decoder` or
            `image_encoder`.
        against: the runner of the other side: `kerascv`, `ldm`, `openclip` or `diffusers`.
        source: the name of the file or folder that it read.
        weights: of the source against the repo; None where both sides read the repo.
        matched: the error with the source's maths in our runtime.
        as_diffusers: the error as diffusers runs the same weights; None where that is the same.
        layers: errors by module, if they were recorded; `diffusers_layers` those as diffusers runs
            it.
        fault: where it goes wrong, if it does and one module is to blame.
    """

    name: str
    component: str
    against: str
    source: str
    weights: Weights | None
    tolerance: float
    matched: Error
    as_diffusers: Error | None
    layers: tuple[Layer, ...] = ()
    diffusers_layers: tuple[Layer, ...] = ()
    fault: Fault | None = None

    @property
    def passed(self) -> bool:
        """Whether the weights are those of the source and the outputs agree."""
        return not self.has_wrong_weights and self.matched.relative_l2 <= self.tolerance

    @property
    def has_wrong_weights(self) -> bool:
        """Whether the repo does not give the source's weights back."""
        return bool(self.weights and self.weights.wrong)

    @property
    def verdict(self) -> str:
        """In a few words."""
        if self.passed:
            return "pass"
        return "FAIL: wrong weights" if self.has_wrong_weights else "FAIL: different maths"


@dataclass(frozen=True)
class Images:
    """Both pipelines from the same token ids and noise to an image.

    Attributes:
        matched: the error of the image's values in [0, 1], with the source's maths in our runtime.
        differing: share of the image's uint8 values that are not the same.
        levels: by how much at most, of 255.
        pictures: title -> uint8 (h, w, 3).
    """

    steps: int
    sampler: str
    tolerance: float
    matched: Error
    as_diffusers: Error
    differing: float
    levels: int
    pictures: Mapping[str, np.ndarray[Any, Any]] = field(repr=False, compare=False)

    @property
    def passed(self) -> bool:
        """Whether the images agree."""
        return self.matched.relative_l2 <= self.tolerance

    @property
    def verdict(self) -> str:
        """In a word."""
        return "pass" if self.passed else "FAIL"

    @property
    def summary(self) -> str:
        """What was run, and how far the images are apart in what one sees of them."""
        return (
            f"{self.steps} steps of the sampler of {self.sampler} from the same token ids and"
            f" noise: {self.differing:.2%} of the image's values differ, by {self.levels} of 255"
            " at most"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data, without the pictures."""
        return {**asdict(replace(self, pictures={})), "passed": self.passed}


@dataclass(frozen=True)
class File:
    """A file that was read.

    The name is relative to the folder of what the user named: it is for others to see.
    """

    name: str
    sha256: str


@dataclass(frozen=True)
class Parity:
    """The answer of `weightport.parity`.

    Attributes:
        repo: the name of its folder.
        images: of the pipelines; None where the sources do not make one of KerasCV.
        environment: machine, versions, seconds and peak memory of each process.
        files: of sources and repo.
    """

    repo: str
    family: str
    dtype: str
    checks: tuple[Check, ...]
    images: Images | None
    environment: Mapping[str, Any]
    files: tuple[File, ...]

    @property
    def passed(self) -> bool:
        """Whether every check passed, and the images agree."""
        return all(check.passed for check in self.checks) and (
            self.images is None or self.images.passed
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        checks = [{**asdict(check), "passed": check.passed} for check in self.checks]
        images = self.images and self.images.to_dict()
        return {
            **asdict(replace(self, images=None)),
            "passed": self.passed,
            "checks": checks,
            "images": images,
        }
