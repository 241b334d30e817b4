"""The state of a run, and what comes of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from ..images import Box
from ..models.controlnet import ControlNetModel
from ..outputs import Output
from .arguments import Arguments, Size
from .guidance import Guide
from .noise import Noise
from .schedule import Scheduler

SPELT = {"pooled_prompt_embeds": "add_text_embeds"}  # what callbacks ask for -> its name here


@dataclass
class Conditions:
    """What the model sees beside the latents, `branches * batch` rows: those of the negative prompt
    come first.

    Attributes:
        prompt_embeds: (rows, tokens, d).
        negative_prompt_embeds: (batch, tokens, d), for callbacks.
        add_text_embeds: the pooled ones, (rows, d); flows' pipelines say `pooled_prompt_embeds`.
        negative_pooled_prompt_embeds: (batch, d), for callbacks.
        add_time_ids: SDXL's sizes and scores.
        w_embedding: the guidance scale, where it is a condition.
        class_labels: how noisy the small image is that is enlarged.
        places: where the patches are that Flux sees, (patches, 3).
    """

    prompt_embeds: Tensor
    negative_prompt_embeds: Tensor | None
    add_text_embeds: Tensor | None
    negative_pooled_prompt_embeds: Tensor | None
    add_time_ids: Tensor | None = None
    w_embedding: Tensor | None = None
    class_labels: Tensor | None = None
    places: Tensor | None = None

    def added(self) -> dict[str, Tensor] | None:
        """What SDXL's models have beside the prompt."""
        if self.add_text_embeds is None or self.add_time_ids is None:
            return None
        return {"text_embeds": self.add_text_embeds, "time_ids": self.add_time_ids}


@dataclass
class Beside:
    """What belongs to the image that a run begins with.

    Attributes:
        small_image: the image that is enlarged.
        image_latents: the image that is edited.
        depth_mask: its depth.
        mask: 1 where to paint.
        masked_image_latents: the image where it is not painted.
        clean: latents of the image that a UNet of 4 channels keeps outside the mask.
        noise: what was added to them.
        pixels: that image, (1, 3, h, w), for a VAE whose decoder takes it.
        pixel_mask: (1, 1, h, w), 1 where to paint, for the same.
        reference: an image that Flux Kontext sees, (b, patches, c).
        crop: the box of the image that is painted, where it is not all of it.
    """

    small_image: Tensor | None = None
    image_latents: Tensor | None = None
    depth_mask: Tensor | None = None
    mask: Tensor | None = None
    masked_image_latents: Tensor | None = None
    clean: Tensor | None = None
    noise: Tensor | None = None
    pixels: Tensor | None = None
    pixel_mask: Tensor | None = None
    reference: Tensor | None = None
    crop: Box | None = None

    def channels(self) -> list[Tensor]:
        """What the model sees as further channels."""
        seen = [self.small_image, self.image_latents, self.depth_mask]
        if self.clean is None:
            seen += [self.mask, self.masked_image_latents]
        return [one for one in seen if one is not None]


class Window(NamedTuple):
    """How strongly a ControlNet acts, and from which fraction of the run to which."""

    weight: float
    start: float
    end: float


@dataclass
class Leading:
    """ControlNets at work.

    Attributes:
        argument: the name of the call's argument that brought the images.
        nets: the models.
        images: what each follows, a row for each row of the model's batch.
        windows: one for each.
        guesses: whether they act on the prompted half only.
    """

    argument: str
    nets: list[ControlNetModel]
    images: list[Tensor]
    windows: list[Window]
    guesses: bool


@dataclass
class Run:
    """The state of one run; no other run sees it.

    Attributes:
        arguments: of the call.
        batch: images to make.
        size: their height and width in pixels.
        scheduler: of this run alone.
        timesteps: what it visits.
        noise: where random numbers come from.
        guide: guidance, and what callbacks turn.
        conditions: what the model sees beside the latents.
        latents: of the present step.
        denoised: the image in them, where a scheduler tells.
        beside: what belongs to the image that the run begins with.
        leading: ControlNets at work.
    """

    arguments: Arguments
    batch: int
    size: Size
    scheduler: Scheduler
    timesteps: Tensor
    noise: Noise
    guide: Guide
    conditions: Conditions
    latents: Tensor = field(init=False)
    denoised: Tensor | None = None
    beside: Beside = field(default_factory=Beside)
    leading: Leading | None = None

    @property
    def device(self) -> torch.device:
        """Where latents are."""
        return self.noise.device

    @property
    def dtype(self) -> torch.dtype:
        """What latents are computed in."""
        return self.noise.dtype

    def tensor(self, name: str) -> Any:
        """What a callback asks for by a name; the images of several ControlNets are a list."""
        if self.leading is not None and name == self.leading.argument:
            images = self.leading.images
            return images if len(images) > 1 else images[0]
        name = SPELT.get(name, name)
        return getattr(self._part(name), name)

    def replace(self, name: str, value: Any) -> None:
        """Go on with what a callback returned."""
        if self.leading is not None and name == self.leading.argument:
            self.leading.images = list(value) if isinstance(value, (list, tuple)) else [value]
        else:
            name = SPELT.get(name, name)
            setattr(self._part(name), name, value)

    def _part(self, name: str) -> Any:
        """The part of the run that has a tensor of this name."""
        return next(part for part in (self.conditions, self.beside, self) if name in vars(part))


class Images(NamedTuple):
    """What a run made: images in the form that was asked for, and whether the safety checker
    objects to each; None without one."""

    images: Any
    flagged: list[bool] | None


@dataclass(eq=False)
class StableDiffusionPipelineOutput(Output):
    """What a pipeline returns: the images, and for each whether the safety checker objects to
    it."""

    images: Any
    nsfw_content_detected: list[bool] | None = None

    @classmethod
    def of(cls, made: Images, return_dict: bool) -> Self:
        """What a run made; with `return_dict=False` a plain tuple of both fields, None or not,
        which type checkers do not see."""
        return cls(*made) if return_dict else tuple(made)  # type: ignore[return-value]


@dataclass(eq=False)
class ImagesOutput(Output):
    """What a pipeline without a safety checker returns."""

    images: Any

    @classmethod
    def of(cls, made: Images, return_dict: bool) -> Self:
        """What a run made; with `return_dict=False` a plain tuple, which type checkers do not
        see."""
        return cls.asked(return_dict, made.images)


class StableDiffusionXLPipelineOutput(ImagesOutput):
    """What an SDXL pipeline returns."""


class StableDiffusion3PipelineOutput(ImagesOutput):
    """What a pipeline of SD 3 returns."""


class FluxPipelineOutput(ImagesOutput):
    """What a pipeline of Flux returns."""
