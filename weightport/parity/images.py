"""End to end: the source's own pipeline and ours, from the same token ids and noise."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from ..differences import Array
from ..mappings.families import Family
from .bench import Bench
from .frameworks import OURS
from .inputs import largest_side, pipeline_inputs
from .measure import measure
from .pairs import Pair
from .result import Images

NAME = "pipeline"
STEPS = 5
GUIDANCE_SCALE = 7.5
# Guidance multiplies the rounding of the denoiser by 14, and every step builds on the last.
TOLERANCE = 3e-5


def compare_images(bench: Bench, pairs: Sequence[Pair]) -> Images | None:
    """Run both pipelines; None if the sources do not make one."""
    parts = {pair.call: pair for pair in pairs if pair.call in pair.framework.draws}
    if not parts or parts.keys() < set(next(iter(parts.values())).framework.draws):
        return None
    denoiser = next(pair for pair in parts.values() if pair.is_denoiser)
    framework = denoiser.framework
    family = denoiser.family
    side = -(-bench.latent_side // framework.multiple) * framework.multiple
    side = largest_side(denoiser.config, side)
    vocabulary = parts["embed"].config["vocab_size"]
    channels = denoiser.config["in_channels"]
    bench.give(NAME, pipeline_inputs(vocabulary, channels, side))
    common: dict[str, Any] = {
        "name": NAME,
        "call": "draw",
        "watch": {},
        "steps": STEPS,
        "guidance_scale": GUIDANCE_SCALE,
        "family": family.name,
        "image_size": family.latent_scale * side,
    }
    step = partial(bench.progress, 1, 3)
    theirs = {**common, "parts": {call: pair.their_check(side) for call, pair in parts.items()}}
    title = f"{framework.title}, {NAME}"
    bench.run(framework.name, title, [theirs], False, step)
    expected, expected_uint8 = bench.outputs(title, NAME)
    versions = bench.reports[title]["versions"]
    package, version = next(entry for entry in versions.items() if entry[0] != "python")
    common |= {
        "repo": str(denoiser.repo),
        "without": _optional(family),
        "sampler": framework.sampler,
        "version": version,
        "rounds": framework.rounds,
        "arguments": framework.arguments,
    }
    found = []
    for semantics in (framework.maths, "diffusers"):
        label = f"weightport, pipeline, {semantics} semantics"
        bench.run(OURS, label, [{**common, "semantics": semantics}], False, step)
        found.append(bench.outputs(label, NAME))
    (matched, pixels), (diffusers, diffusers_pixels) = found
    distance = np.abs(pixels.astype(int) - expected_uint8)
    return Images(
        steps=STEPS,
        sampler=f"{package} {version}",
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


def _optional(family: Family) -> list[str]:
    """The components that a pipeline of the family may do without, and that no source has."""
    tokenizers = family.tokenizers.items()
    return [
        *family.optional,
        *(name for name, tokenizer in tokenizers if tokenizer.encoder in family.optional),
        *(name for name, entry in family.index.items() if entry == []),
    ]


def _picture(images: Array) -> Array:
    """The first of (b, 3, h, w) as (h, w, 3)."""
    return np.ascontiguousarray(images[0].transpose(1, 2, 0))


def _magnified(difference: Array) -> Array:
    """A difference of images in [0, 1], 100 times as large, around grey."""
    return np.clip(127.5 + 100 * 255 * difference, 0, 255).astype(np.uint8)
