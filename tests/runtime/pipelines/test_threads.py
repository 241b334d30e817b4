"""One pipeline in several threads at once: every image is the one that it is alone."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import pytest
import torch

from ...support import pipeline_pairs as pairs

FIRST = {"prompt": "a cat", "num_inference_steps": 4, "guidance_scale": 3.0, "seed": 1}
SECOND = {
    "prompt": ["dogs", "a fox"],
    "num_inference_steps": 7,
    "guidance_scale": 9.0,
    "guidance_rescale": 0.5,
    "height": 40,
    "seed": 2,
}
UNGUIDED = {"prompt": "a fox", "num_inference_steps": 5, "guidance_scale": 1.0, "seed": 3}


@pytest.fixture(autouse=True)
def one_thread_each() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pipeline(scheduler: str = "DDIMScheduler", unet: str = "sd", *, foreign: bool = False) -> Any:
    name = "StableDiffusionXLPipeline" if unet == "xl" else "StableDiffusionPipeline"
    theirs, ours = pairs.build(name, unet)
    schedulers = pairs.schedulers(scheduler)
    ours.scheduler = copy.deepcopy(schedulers[0 if foreign else 1])
    del theirs
    return ours


def draw(pipe: Any, job: dict[str, Any], barrier: Barrier | None = None) -> Any:
    """The result of a call; with a barrier its first four steps alternate with those of others."""

    def meet(seen: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        assert seen is pipe
        assert seen.guidance_scale == seen._guidance_scale == job["guidance_scale"]
        assert seen.guidance_rescale == job.get("guidance_rescale", 0.0)
        assert seen.num_timesteps == len(seen.scheduler.timesteps)
        assert seen.scheduler.timesteps[step] == timestep
        if barrier is not None and step < 4:
            barrier.wait(60)
        return {}

    options = {"output_type": "latent", "callback_on_step_end": meet, **job}
    generator = torch.Generator().manual_seed(options.pop("seed"))
    return pipe(**options, generator=generator).images


def together(pipe: Any, *jobs: dict[str, Any]) -> list[Any]:
    barrier = Barrier(len(jobs))
    with ThreadPoolExecutor(len(jobs)) as threads:
        return list(threads.map(lambda job: draw(pipe, job, barrier), jobs))


@pytest.mark.parametrize(
    ("scheduler", "foreign"),
    [
        ("PNDMScheduler", False),
        ("DPMSolverMultistepScheduler", False),
        ("UniPCMultistepScheduler", False),
        ("HeunDiscreteScheduler", False),
        ("PNDMScheduler", True),
        ("UniPCMultistepScheduler", True),
    ],
)
def test_threads_draw_what_they_draw_alone(scheduler: str, foreign: bool) -> None:
    pipe = pipeline(scheduler, foreign=foreign)
    jobs = (FIRST, SECOND, UNGUIDED)
    alone = [draw(pipe, job) for job in jobs]
    for mine, before in zip(together(pipe, *jobs), alone, strict=True):
        assert torch.equal(mine, before)


def test_a_vae_that_is_widened_serves_one_thread_at_a_time() -> None:
    pipe = pipeline(unet="xl")
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        setattr(pipe, part, copy.deepcopy(getattr(pipe, part)).half())
    jobs = [{**job, "output_type": "pt"} for job in (FIRST, {**FIRST, "prompt": "a fox"})]
    alone = [draw(pipe, job) for job in jobs]
    for mine, before in zip(together(pipe, *jobs), alone, strict=True):
        assert torch.equal(mine, before)
    assert pipe.vae.dtype is torch.float16


def test_a_callback_turns_and_stops_its_own_run_only() -> None:
    pipe = pipeline()
    seen: dict[str, list[float]] = {"a": [], "b": []}
    barrier = Barrier(2)

    def run(name: str) -> None:
        def turn(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            seen[name].append(pipe.guidance_scale)
            if step < 3:
                barrier.wait(60)
            if name == "a":
                pipe._guidance_scale = 5.0 + step
                pipe._interrupt = step == 2
            assert pipe.interrupt == (name == "a" and step == 2)
            return {}

        pipe("a cat", num_inference_steps=5, output_type="latent", callback_on_step_end=turn)

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(run, seen))
    assert seen == {"a": [7.5, 5.0, 6.0], "b": [7.5] * 5}


def test_another_thread_stops_a_run() -> None:
    pipe = pipeline()
    steps: list[int] = []
    barrier = Barrier(2)

    def wait(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        steps.append(step)
        barrier.wait(60)
        barrier.wait(60)
        return {}

    with ThreadPoolExecutor(1) as elsewhere:
        options = {"num_inference_steps": 9, "output_type": "latent"}
        image = elsewhere.submit(pipe, "a cat", **options, callback_on_step_end=wait)
        barrier.wait(60)
        pipe._interrupt = True
        barrier.wait(60)
        image.result()
    assert steps == [0]
    assert len(pipe("a cat", **options).images) == 1, "the next run goes on to its end"
    assert not pipe.interrupt


def test_a_callback_may_draw_with_its_own_pipeline() -> None:
    pipe = pipeline("PNDMScheduler")
    expected = [draw(pipe, job) for job in (FIRST, SECOND)]
    inner: list[Any] = []

    def draw_another(seen: Any, step: int, timestep: Any, tensors: Any) -> dict[str, Any]:
        if step == 1:
            inner.append(draw(seen, SECOND))
        assert seen.guidance_scale == FIRST["guidance_scale"]
        return {}

    outer = draw(pipe, {**FIRST, "callback_on_step_end": draw_another})
    assert torch.equal(outer, expected[0])
    assert torch.equal(inner[0], expected[1])


def test_the_scheduler_shows_the_last_run_and_has_not_stepped() -> None:
    pipe = pipeline("DPMSolverMultistepScheduler")
    scheduler = pipe.scheduler
    draw(pipe, SECOND)
    assert pipe.scheduler is scheduler
    assert len(scheduler.timesteps) == pipe.num_timesteps == 7
    assert scheduler.step_index is None
    assert pipe.guidance_scale == 9.0
