"""Callbacks that pipelines call after every step, as diffusers has them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from .runtime.loading.config import Config

__all__ = [
    "MultiPipelineCallbacks",
    "PipelineCallback",
    "SDCFGCutoffCallback",
    "SDXLCFGCutoffCallback",
    "SDXLControlnetCFGCutoffCallback",
]

Tensors = dict[str, Any]


class PipelineCallback:
    """The base of callbacks that do something at one step.

    A subclass says in `tensor_inputs` which tensors of the run it needs, and in `callback_fn` what
    it does to them.

    Args:
        cutoff_step_ratio: when: at this share of the steps.
        cutoff_step_index: or at this step.

    Raises:
        ValueError: not exactly one of both is given, or the ratio is not from 0 to 1.
    """

    tensor_inputs: ClassVar[Sequence[str]]

    def __init__(
        self, cutoff_step_ratio: float | None = 1.0, cutoff_step_index: int | None = None
    ) -> None:
        if (cutoff_step_ratio is None) == (cutoff_step_index is None):
            raise ValueError(
                "give one of cutoff_step_ratio and cutoff_step_index, and None for the other"
            )
        if cutoff_step_ratio is not None and not 0 <= cutoff_step_ratio <= 1:
            raise ValueError(f"cutoff_step_ratio = {cutoff_step_ratio} must be between 0 and 1")
        self.config = Config(
            cutoff_step_ratio=cutoff_step_ratio, cutoff_step_index=cutoff_step_index
        )

    def callback_fn(
        self, pipeline: Any, step_index: int, timestep: Any, callback_kwargs: Tensors
    ) -> Tensors:
        """The tensors to go on with."""
        raise NotImplementedError(f"{type(self).__name__} has no callback_fn")

    def __call__(
        self, pipeline: Any, step_index: int, timestep: Any, callback_kwargs: Tensors
    ) -> Tensors:
        """After a step."""
        return self.callback_fn(pipeline, step_index, timestep, callback_kwargs)


class MultiPipelineCallbacks:
    """Several callbacks, one after another."""

    def __init__(self, callbacks: Sequence[PipelineCallback]) -> None:
        self.callbacks = list(callbacks)

    @property
    def tensor_inputs(self) -> list[str]:
        """What any of them needs."""
        return [name for callback in self.callbacks for name in callback.tensor_inputs]

    def __call__(
        self, pipeline: Any, step_index: int, timestep: Any, callback_kwargs: Tensors
    ) -> Tensors:
        """After a step."""
        for callback in self.callbacks:
            callback_kwargs = callback(pipeline, step_index, timestep, callback_kwargs)
        return callback_kwargs


class SDCFGCutoffCallback(PipelineCallback):
    """Ends guidance at a step, of an image of Stable Diffusion 1 or 2."""

    tensor_inputs: ClassVar[Sequence[str]] = ("prompt_embeds",)

    def callback_fn(
        self, pipeline: Any, step_index: int, timestep: Any, callback_kwargs: Tensors
    ) -> Tensors:
        """Keep the conditions of the prompt alone; those of the negative one come first."""
        at = self.config.cutoff_step_index
        if at is None:
            at = int(pipeline.num_timesteps * self.config.cutoff_step_ratio)
        if step_index == at:
            pipeline._guidance_scale = 0.0
            for name in self.tensor_inputs:
                callback_kwargs[name] = callback_kwargs[name][-1:]
        return callback_kwargs


class SDXLCFGCutoffCallback(SDCFGCutoffCallback):
    """Ends guidance at a step, of an image of SDXL."""

    tensor_inputs: ClassVar[Sequence[str]] = ("prompt_embeds", "add_text_embeds", "add_time_ids")


class SDXLControlnetCFGCutoffCallback(SDCFGCutoffCallback):
    """Ends guidance at a step, of an image of SDXL with a ControlNet."""

    tensor_inputs: ClassVar[Sequence[str]] = (
        "prompt_embeds",
        "add_text_embeds",
        "add_time_ids",
        "image",
    )
