"""`AutoPipelineForText2Image` and its siblings: the pipeline for a task, from what a repository or
a pipeline is."""

from __future__ import annotations

import re
from typing import Any, ClassVar

from ...hub.download import HubOptions
from ..loading.source import StrPath, open_source, split_options
from ..registry import PIPELINES, public_class
from .base import INDEX, DiffusionPipeline


class AutoPipeline:
    """The base of the three classes; `task` is what their pipelines do, `ending` how their names
    end."""

    task: ClassVar[str]
    ending: ClassVar[str]

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: StrPath, **options: Any
    ) -> DiffusionPipeline:
        """The pipeline for the task; with `controlnet=` one that uses it. See
        `DiffusionPipeline.from_pretrained`.

        Raises:
            ValueError: the repository is of no family that has a pipeline for the task.
        """
        source = open_source(pretrained_model_name_or_path, **split_options(options, HubOptions)[0])
        kind = cls._find(str(source.json(INDEX).get("_class_name")), options)
        return kind.from_pretrained(source, **options)

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **options: Any) -> DiffusionPipeline:
        """The pipeline for the task, with the components of another. See
        `DiffusionPipeline.from_pipe`.

        Raises:
            ValueError: the pipeline is of no family that has one for the task.
        """
        return cls._find(type(pipeline).__name__, options).from_pipe(pipeline, **options)

    @classmethod
    def _find(cls, name: str, options: dict[str, Any]) -> type[DiffusionPipeline]:
        """The class for the task, of the family that a pipeline belongs to; `controlnet` given or
        None changes it."""
        family = re.sub("(Img2Img|Inpaint)?Pipeline$", "", name)
        if "controlnet" in options:
            family = family.removesuffix("ControlNet") + (
                "ControlNet" if options["controlnet"] is not None else ""
            )
        # a family has image-to-image; a single pipeline, such as the one that enlarges images, is
        # none
        if not {name, f"{family}Img2ImgPipeline", family + cls.ending} <= {*PIPELINES}:
            raise ValueError(f"there is no pipeline for {cls.task} that takes what {name} has")
        return public_class(family + cls.ending)


class AutoPipelineForText2Image(AutoPipeline):
    """A pipeline that makes images of text."""

    task, ending = "text-to-image", "Pipeline"


class AutoPipelineForImage2Image(AutoPipeline):
    """A pipeline that changes an image as a text says."""

    task, ending = "image-to-image", "Img2ImgPipeline"


class AutoPipelineForInpainting(AutoPipeline):
    """A pipeline that fills a part of an image as a text says."""

    task, ending = "inpainting", "InpaintPipeline"
