"""`AutoPipelineForText2Image` and its siblings: the pipeline for a task, from what a repository or
a pipeline is."""

from __future__ import annotations

from typing import Any, ClassVar

from ...hub.download import HubOptions
from ..loading.source import StrPath, open_source, split_options
from ..registry import PIPELINES, public_class
from ..sampling.starts import Task
from .base import INDEX, DiffusionPipeline
from .latent import LatentDiffusionPipeline


class AutoPipeline:
    """The base of the three classes; `task` is what their pipelines do."""

    task: ClassVar[Task]

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
        known: dict[str, type[LatentDiffusionPipeline]]
        known = {one: public_class(one) for one in PIPELINES}
        own = known.get(name)
        if own is not None and own.family:
            is_led = own.control_argument is not None
            if "controlnet" in options:
                is_led = options["controlnet"] is not None
            for kind in known.values():
                fits = kind.family == own.family and kind.start.task == cls.task
                if fits and is_led == (kind.control_argument is not None):
                    return kind
        raise ValueError(f"there is no pipeline for {cls.task} that takes what {name} has")


class AutoPipelineForText2Image(AutoPipeline):
    """A pipeline that makes images of text."""

    task = "text-to-image"


class AutoPipelineForImage2Image(AutoPipeline):
    """A pipeline that changes an image as a text says."""

    task = "image-to-image"


class AutoPipelineForInpainting(AutoPipeline):
    """A pipeline that fills a part of an image as a text says."""

    task = "inpainting"
