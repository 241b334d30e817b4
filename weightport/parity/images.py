"""End to end: the source's own pipeline and ours, from the same token ids and noise."""

from __future__ import annotations

import numpy as np

from ..differences import Array
from .bench import Bench, our_label
from .drawing import NAME, STEPS, Drawing
from .measure import measure
from .result import Images

# Guidance multiplies the rounding of the denoiser by 14, and every step builds on the last.
TOLERANCE = 3e-5


def compare_images(bench: Bench, drawing: Drawing) -> Images:
    """The verdict, from what both pipelines drew."""
    framework = drawing.framework
    expected, expected_uint8 = bench.outputs(framework.name, NAME)
    found = [bench.outputs(our_label(semantics), NAME) for semantics in drawing.semantics]
    (matched, pixels), (diffusers, diffusers_pixels) = found
    distance = np.abs(pixels.astype(int) - expected_uint8)
    return Images(
        steps=STEPS,
        sampler=" ".join(bench.version(framework)),
        tolerance=TOLERANCE,
        matched=measure([matched], [expected]),
        as_diffusers=measure([diffusers], [expected]),
        differing=float((distance > 0).mean()),
        levels=int(distance.max()),
        pictures={
            framework.title: _picture(expected_uint8),
            f"weightport, {framework.title}'s maths": _picture(pixels),
            "difference, 100 times": _picture(_magnified(matched - expected)),
            "weightport, as diffusers runs it": _picture(diffusers_pixels),
            "its difference, 100 times": _picture(_magnified(diffusers - expected)),
        },
    )


def _picture(images: Array) -> Array:
    """The first of (b, 3, h, w) as (h, w, 3)."""
    return np.ascontiguousarray(images[0].transpose(1, 2, 0))


def _magnified(difference: Array) -> Array:
    """A difference of images in [0, 1], 100 times as large, around grey."""
    return np.clip(127.5 + 100 * 255 * difference, 0, 255).astype(np.uint8)
