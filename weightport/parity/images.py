"""End to end: KerasCV's `generate_image` and our pipeline, from the same token ids and noise."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from ..differences import Array
from .bench import Bench
from .inputs import pipeline_inputs
from .measure import measure
from .pairs import Pair
from .result import Images

PARTS = ("text_encoder", "unet", "decoder")
STEPS, GUIDANCE_SCALE = 5, 7.5
TOLERANCE = (
    3e-5  # guidance multiplies the rounding of the UNet by 14, and every step builds on the last
)
THEIRS = "KerasCV, generate_image"


def compare_images(bench: Bench, pairs: Sequence[Pair]) -> Images | None:
    """Run both pipelines; None if KerasCV's files do not make one."""
    parts = {pair.name: pair for pair in pairs if pair.against == "kerascv" and pair.name in PARTS}
    if len(parts) < len(PARTS):
        return None
    side = -(-bench.latent_side // 16) * 16  # KerasCV makes sizes multiples of 128 pixels
    encoder, unet = parts["text_encoder"].config, parts["unet"].config
    bench.give("pipeline", pipeline_inputs(encoder["vocab_size"], unet["in_channels"], side))
    common: dict[str, Any] = {
        "name": "pipeline",
        "watch": {},
        "steps": STEPS,
        "guidance_scale": GUIDANCE_SCALE,
    }
    common |= {"family": parts["unet"].family.name, "image_size": 8 * side}
    step = partial(bench.progress, 1, 3)
    theirs = common | {"parts": {name: pair.their_check(side) for name, pair in parts.items()}}
    bench.run("kerascv", THEIRS, [theirs], False, step)
    expected, expected_uint8 = bench.outputs(THEIRS, "pipeline")
    version = bench.reports[THEIRS]["versions"]["keras-cv"]
    common |= {"generation": _generation(version), "repo": str(parts["unet"].repo)}
    found = []
    for semantics in ("kerascv", "diffusers"):
        label = f"weightport, pipeline, {semantics} semantics"
        bench.run("weightport", label, [common | {"semantics": semantics}], False, step)
        found.append(bench.outputs(label, "pipeline"))
    (matched, pixels), (diffusers, diffusers_pixels) = found
    distance = np.abs(pixels.astype(int) - expected_uint8)
    return Images(
        steps=STEPS,
        sampler=f"keras-cv {version}",
        tolerance=TOLERANCE,
        matched=measure([matched], [expected]),
        as_diffusers=measure([diffusers], [expected]),
        differing=float((distance > 0).mean()),
        levels=int(distance.max()),
        pictures={
            "KerasCV": _picture(expected_uint8),
            "weightport, KerasCV's maths": _picture(pixels),
            "difference, 100 times": _picture(_magnified(matched - expected)),
            "weightport, as diffusers runs it": _picture(diffusers_pixels),
            "its difference, 100 times": _picture(_magnified(diffusers - expected)),
        },
    )


def _generation(version: str) -> str:
    """Which sampler a version of keras-cv has, as `KerasCVScheduler` calls it."""
    return "0.7" if tuple(map(int, version.split(".")[:2])) < (0, 8) else "0.8"


def _picture(images: Array) -> Array:
    """The first of (b, 3, h, w) as (h, w, 3)."""
    return np.ascontiguousarray(images[0].transpose(1, 2, 0))


def _magnified(difference: Array) -> Array:
    """A difference of images in [0, 1], 100 times as large, around grey."""
    return np.clip(127.5 + 100 * 255 * difference, 0, 255).astype(np.uint8)
