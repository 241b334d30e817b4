"""What both pipelines are to draw: an image from the same token ids and noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .frameworks import Framework
from .inputs import Arrays, largest_side, pipeline_inputs
from .pairs import Pair

NAME = "pipeline"
STEPS = 5
GUIDANCE_SCALE = 7.5


@dataclass(frozen=True)
class Drawing:
    """An image that both sides draw.

    Attributes:
        parts: the models, by how they are called.
        side: of the latents.
    """

    denoiser: Pair
    parts: Mapping[str, Pair]
    side: int

    @property
    def framework(self) -> Framework:
        """The source's program."""
        return self.denoiser.framework

    @property
    def semantics(self) -> tuple[str, str]:
        """Whose maths our runtime follows, in turn."""
        return (self.framework.maths, "diffusers")

    def inputs(self) -> Arrays:
        """Token ids and noise."""
        vocabulary = self.parts["embed"].config["vocab_size"]
        return pipeline_inputs(vocabulary, self.denoiser.config["in_channels"], self.side)

    def their_check(self) -> dict[str, Any]:
        """What the runner of the other side needs to know."""
        parts = {call: pair.their_check(self.side) for call, pair in self.parts.items()}
        return {**self._common(), "parts": parts}

    def our_check(self, semantics: str, version: str) -> dict[str, Any]:
        """What our runner needs to know.

        Args:
            version: of the source's program, whose sampler is followed.
        """
        return {
            **self._common(),
            "repo": str(self.denoiser.repo),
            "without": self._optional(),
            "sampler": self.framework.sampler,
            "version": version,
            "rounds": self.framework.rounds,
            "arguments": self.framework.arguments,
            "semantics": semantics,
        }

    def _common(self) -> dict[str, Any]:
        family = self.denoiser.family
        return {
            "name": NAME,
            "call": "draw",
            "watch": {},
            "steps": STEPS,
            "guidance_scale": GUIDANCE_SCALE,
            "family": family.name,
            "image_size": family.latent_scale * self.side,
        }

    def _optional(self) -> list[str]:
        """The components that a pipeline of the family may do without, and that no source has."""
        family = self.denoiser.family
        tokenizers = family.tokenizers.items()
        return [
            *family.optional,
            *(name for name, tokenizer in tokenizers if tokenizer.encoder in family.optional),
            *(name for name, entry in family.index.items() if entry == []),
        ]


def drawing_of(pairs: Sequence[Pair], latent_side: int) -> Drawing | None:
    """What the pairs can draw; None if the sources do not make a pipeline."""
    parts = {pair.call: pair for pair in pairs if pair.call in pair.framework.draws}
    if not parts or parts.keys() < set(next(iter(parts.values())).framework.draws):
        return None
    denoiser = next(pair for pair in parts.values() if pair.is_denoiser)
    multiple = denoiser.framework.multiple
    side = -(-latent_side // multiple) * multiple
    return Drawing(denoiser, parts, largest_side(denoiser.config, side))
