"""`AutoPipelineFor...`: the class for a task, from a repository or a pipeline; configs of 2022 in
pipelines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

import weightport
from weightport import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    AutoPipelineForText2Image,
    ControlNetModel,
    DiffusionPipeline,
)
from weightport.mappings.facts import facts
from weightport.runtime.registry import PIPELINES

from .test_base import UNET, copy, dtypes, edit_index, repo  # noqa: F401

TASKS = {
    "Text2Image": AutoPipelineForText2Image,
    "Image2Image": AutoPipelineForImage2Image,
    "Inpainting": AutoPipelineForInpainting,
}
SOURCES = [
    "StableDiffusion",
    "StableDiffusionXL",
    "LatentConsistencyModel",
    "StableDiffusionControlNet",
]


def outcome(call: Any) -> Any:
    """The name of what a call returns, None if it raises ValueError."""
    try:
        return call().__name__
    except ValueError:
        return None


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("family", [*SOURCES, "StableDiffusionXLControlNet"])
@pytest.mark.parametrize("ending", ["Pipeline", "Img2ImgPipeline", "InpaintPipeline"])
def test_the_same_class_as_diffusers(family: str, ending: str, task: str) -> None:
    from diffusers.pipelines import auto_pipeline

    mapping = getattr(
        auto_pipeline, f"AUTO_{task.upper()}_PIPELINES_MAPPING".replace("INPAINTING", "INPAINT")
    )
    for name in (family + ending,):
        theirs = outcome(lambda name=name: auto_pipeline._get_task_class(mapping, name))
        assert outcome(lambda name=name: TASKS[task]._find(name, {})) == theirs


def test_model_cards_know_what_images_each_pipeline_needs() -> None:
    needed = {}
    for name in PIPELINES:
        kind = getattr(weightport, name)
        led = [] if kind.control_argument is None else [kind.control_argument]
        needed[name] = [*kind.start.needs, *led]
    known = facts("card")["images"]
    assert {name: known.get(name, []) for name in PIPELINES} == needed


def test_none_in_place_of_a_controlnet_is_no_reason_to_warn(repo: Path, recwarn: Any) -> None:  # noqa: F811
    parts = weightport.StableDiffusionPipeline.from_pretrained(repo, safety_checker=None).components
    net = {key: value for key, value in UNET.items() if key != "up_block_types"}
    pipe = weightport.StableDiffusionControlNetPipeline(
        **parts, controlnet=ControlNetModel.from_config(net)
    )
    recwarn.clear()
    found = AutoPipelineForText2Image.from_pipe(pipe, controlnet=None)
    assert type(found) is weightport.StableDiffusionPipeline
    assert not [str(one.message) for one in recwarn if "takes no" in str(one.message)]


def test_from_a_repository(repo: Path) -> None:  # noqa: F811
    pipe = AutoPipelineForText2Image.from_pretrained(repo, safety_checker=None, dtype=torch.float16)
    assert type(pipe) is weightport.StableDiffusionPipeline
    assert type(DiffusionPipeline.from_pretrained(repo)) is weightport.StableDiffusionPipeline
    assert type(weightport.StableDiffusionImg2ImgPipeline.from_pretrained(repo)).__name__.endswith(
        "Img2ImgPipeline"
    )
    before = dtypes(pipe)
    for kind, name in (
        (AutoPipelineForImage2Image, "Img2Img"),
        (AutoPipelineForInpainting, "Inpaint"),
    ):
        assert type(kind.from_pretrained(repo)).__name__ == f"StableDiffusion{name}Pipeline"
        other = kind.from_pipe(pipe)
        assert type(other).__name__ == f"StableDiffusion{name}Pipeline"
        assert other.unet is pipe.unet
        assert type(AutoPipelineForText2Image.from_pipe(other)) is type(pipe)
    assert dtypes(pipe) == before
    net = ControlNetModel.from_config(
        {key: UNET[key] for key in UNET if key not in ("up_block_types", "sample_size")}
    )
    controlled = AutoPipelineForText2Image.from_pipe(pipe, controlnet=net)
    assert type(controlled) is weightport.StableDiffusionControlNetPipeline
    assert controlled.controlnet is net
    assert type(AutoPipelineForText2Image.from_pretrained(repo, controlnet=net)) is type(controlled)
    assert type(AutoPipelineForText2Image.from_pipe(controlled, controlnet=None)) is type(pipe)


def test_no_pipeline_for_the_task(copy: Path) -> None:  # noqa: F811
    edit_index(copy, _class_name="StableDiffusionUpscalePipeline")
    with pytest.raises(ValueError, match=r"no pipeline for inpainting that takes what .*Upscale"):
        AutoPipelineForInpainting.from_pretrained(copy)


@pytest.mark.parametrize(
    "name", ["Pipeline", "Img2ImgPipeline", "InpaintPipeline", "InstructPix2PixPipeline"]
)
def test_old_configs_are_corrected_as_in_diffusers(copy: Path, name: str) -> None:  # noqa: F811
    (copy / "scheduler" / "scheduler_config.json").write_text(
        '{"_class_name": "PNDMScheduler", "steps_offset": 0, "clip_sample": true, "skip_prk_steps":'
        " false}"
    )
    config = (copy / "unet" / "config.json").read_text()
    (copy / "unet" / "config.json").write_text(
        config.replace('"sample_size": 64', '"sample_size": 32').replace("0.35.0", "0.8.0")
    )
    edit_index(copy, _diffusers_version="0.8.0")  # diffusers' inpainting raises KeyError without
    kind = f"StableDiffusion{name}"
    ours = getattr(weightport, kind).from_pretrained(copy, safety_checker=None)
    theirs = getattr(diffusers, kind).from_pretrained(copy, safety_checker=None)
    for key in ("steps_offset", "clip_sample", "skip_prk_steps"):
        assert ours.scheduler.config.get(key) == theirs.scheduler.config.get(key), key
    assert ours.unet.config.sample_size == theirs.unet.config.sample_size
