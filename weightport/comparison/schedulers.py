"""Schedulers side by side on one model: speed, and distance to the exact solution.

Every run starts from the same noise, so that all deterministic schedulers approach one image, the
solution of the probability flow ODE (Song et al. 2021, https://arxiv.org/abs/2011.13456); what is
left between them is error. For that they all begin at the last training timestep, whatever
timesteps the repo asks for: those of `leading` runs begin the earlier the fewer they are (Lin et
al. 2023, https://arxiv.org/abs/2305.08891), and lead to different images. Stochastic schedulers
solve another equation: their distance says how far they wander, not how wrong they are.

Each run is kept in the output folder as it ends, so that an interrupted comparison goes on where it
stopped.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..io import atomic
from ..io.documents import read_json
from ..runtime.schedulers.names import is_of_flow, named_scheduler
from .metrics import Metric, psnr, rmse

REFERENCE = "dpm++2m"  # of second order, and without error of its own when the steps are many
SCHEDULERS = (
    "ddim",
    "pndm",
    "lms",
    "euler",
    "heun",
    "kdpm2",
    "deis",
    "dpm++2m",
    "dpm++2m-karras",
    "unipc",
    "euler-a",
)
OF_FLOWS = ("euler", "heun", "deis", "dpm++2m", "unipc")  # those of them that solve flows


@dataclass(frozen=True)
class Experiment:
    """What all runs of a comparison share.

    Attributes:
        size: (width, height) in pixels; None is the model's own.
        reference_steps: steps of the reference, which is run once more with half as many to see how
            exact it is.
    """

    prompts: tuple[str, ...]
    schedulers: tuple[str, ...] = SCHEDULERS
    steps: tuple[int, ...] = (5, 10, 20, 50)
    seed: int = 0
    size: tuple[int, int] | None = None
    guidance_scale: float = 7.5
    reference_steps: int = 200


@dataclass(frozen=True)
class Run:
    """One image.

    Attributes:
        seconds: of sampling and decoding.
        model_calls: how often the denoiser ran; both halves of a guided batch count as one.
        rmse: root mean square error of the latents against the reference.
        psnr: of the image against the reference's, in dB.
        scores: what installed metrics say, by name.
        image: its file, relative to the output folder.
    """

    prompt: str
    scheduler: str
    steps: int
    stochastic: bool
    seconds: float
    model_calls: int
    rmse: float
    psnr: float
    scores: dict[str, float]
    image: str

    def to_dict(self) -> dict[str, Any]:
        """Plain data; the PSNR of equal images, which is infinite, is None."""
        return {**asdict(self), "psnr": self.psnr if math.isfinite(self.psnr) else None}


@dataclass(frozen=True)
class Sample:
    """What a scheduler made: latents (1, c, h, w), the image, and what it cost."""

    latents: Tensor
    image: Image.Image
    seconds: float
    model_calls: int


@dataclass(frozen=True)
class SchedulerComparison:
    """The outcome.

    Attributes:
        references: prompt -> image file.
        uncertainty: prompt -> latent RMSE between the reference and the same solver with half as
            many steps.
    """

    model: str
    experiment: Experiment
    runs: list[Run]
    references: dict[str, str]
    uncertainty: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """The content of `results.json`."""
        return {
            "model": self.model,
            "experiment": asdict(self.experiment),
            "references": self.references,
            "uncertainty": self.uncertainty,
            "runs": [run.to_dict() for run in self.runs],
        }


def compare(
    pipe: Any,
    experiment: Experiment,
    output: Path,
    metrics: Sequence[Metric] = (),
    progress: Callable[[int, int], None] = lambda count, total: None,
) -> SchedulerComparison:
    """Run every scheduler with every number of steps on every prompt.

    Finished runs are taken from `output`.

    Args:
        pipe: a text-to-image pipeline.
        progress: called with (images just made, images in all).

    Raises:
        ValueError: an unknown scheduler, or one that cannot serve the model.
    """
    if experiment.schedulers == SCHEDULERS and is_of_flow(pipe.scheduler.config):
        experiment = replace(experiment, schedulers=OF_FLOWS)
    stochastic = _stochastic(pipe, experiment)  # refuses before the long work
    session = Session(pipe, experiment, output)
    jobs = list(itertools.product(experiment.prompts, experiment.schedulers, experiment.steps))
    total = len(jobs) + 2 * len(experiment.prompts)
    references = dict[str, Sample]()
    uncertainty = dict[str, float]()
    for prompt in experiment.prompts:
        half = session.sample(prompt, REFERENCE, experiment.reference_steps // 2)
        whole = session.sample(prompt, REFERENCE, experiment.reference_steps)
        references[prompt] = whole
        uncertainty[prompt] = rmse(half.latents, whole.latents)
        progress(2, total)
    runs = []
    for prompt, scheduler, steps in jobs:
        sample = session.sample(prompt, scheduler, steps)
        reference = references[prompt]
        run = Run(
            prompt=prompt,
            scheduler=scheduler,
            steps=steps,
            stochastic=stochastic[scheduler],
            seconds=sample.seconds,
            model_calls=sample.model_calls,
            rmse=rmse(sample.latents, reference.latents),
            psnr=psnr(sample.image, reference.image),
            scores={
                metric.name: metric(sample.image, reference.image, prompt) for metric in metrics
            },
            image=session.image_name(prompt, scheduler, steps),
        )
        runs.append(run)
        progress(1, total)
    images = {
        prompt: session.image_name(prompt, REFERENCE, experiment.reference_steps)
        for prompt in experiment.prompts
    }
    return SchedulerComparison(pipe.name_or_path, experiment, runs, images, uncertainty)


def _stochastic(pipe: Any, experiment: Experiment) -> dict[str, bool]:
    """Which schedulers are; all of them exist and can serve the model."""
    config = _from_noise(pipe.scheduler.config)
    return {name: named_scheduler(name, config).stochastic for name in experiment.schedulers}


class Session:
    """Samples a pipeline, and remembers in a folder what it sampled before.

    That is what has the same experiment and the same weights.
    """

    def __init__(self, pipe: Any, experiment: Experiment, output: Path) -> None:
        self.pipe = pipe
        self.experiment = experiment
        self.folder = output / "runs"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.own = pipe.scheduler
        self.warm = False
        shared = [
            experiment.seed,
            experiment.size,
            experiment.guidance_scale,
            str(pipe.dtype),
            _fingerprint(pipe),
        ]
        self.shared = json.dumps(shared)

    def image_name(self, prompt: str, scheduler: str, steps: int) -> str:
        """The image file of a run, relative to the output folder."""
        return f"runs/{self._stem(prompt, scheduler, steps)}.png"

    def sample(self, prompt: str, scheduler: str, steps: int) -> Sample:
        """The sample, made now or earlier."""
        path = self.folder / f"{self._stem(prompt, scheduler, steps)}.json"
        if not path.is_file():
            self._keep(path, self._make(prompt, scheduler, steps))
        kept = read_json(path, "sample")
        with Image.open(path.with_suffix(".png")) as image:
            image.load()
        latents = load_file(path.with_suffix(".safetensors"))["latents"]
        return Sample(latents, image, kept["seconds"], kept["model_calls"])

    def _stem(self, prompt: str, scheduler: str, steps: int) -> str:
        run = f"{self.shared} {scheduler} {steps} {prompt}"
        digest = hashlib.sha256(run.encode()).hexdigest()
        return f"{scheduler}-{steps}-{digest[:12]}"

    def _keep(self, path: Path, sample: Sample) -> None:
        """Write the three files of a sample; the last to appear says that it is whole."""
        with atomic.merged(self.folder, last=path.name) as staging:
            beside = staging / path.name
            latents = sample.latents.contiguous()
            save_file({"latents": latents}, beside.with_suffix(".safetensors"))
            sample.image.save(beside.with_suffix(".png"), "PNG")
            facts = {"seconds": sample.seconds, "model_calls": sample.model_calls}
            beside.write_text(json.dumps(facts), encoding="utf-8")

    @torch.inference_mode()
    def _make(self, prompt: str, scheduler: str, steps: int) -> Sample:
        if not self.warm:  # whoever is first pays for allocations and kernels
            self.warm = True
            self._sample(prompt, REFERENCE, 1)
        return self._sample(prompt, scheduler, steps)

    def _sample(self, prompt: str, scheduler: str, steps: int) -> Sample:
        pipe = self.pipe
        last = list[Tensor]()
        calls = 0

        def count(*_: Any) -> None:
            nonlocal calls
            calls += 1

        def keep(
            pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor]
        ) -> dict[str, Tensor]:
            last[:] = [tensors["latents"]]
            return {}

        width, height = self.experiment.size or (None, None)
        pipe.scheduler = named_scheduler(scheduler, _from_noise(self.own.config))
        counting = pipe.denoiser.register_forward_pre_hook(count)
        start = time.perf_counter()
        try:
            (image,) = pipe(
                prompt,
                width=width,
                height=height,
                num_inference_steps=steps,
                guidance_scale=self.experiment.guidance_scale,
                generator=torch.Generator().manual_seed(self.experiment.seed),
                callback_on_step_end=keep,
            ).images
        finally:
            counting.remove()
            pipe.scheduler = self.own
        seconds = time.perf_counter() - start
        return Sample(last[0].float().cpu(), image, seconds, calls)


def _from_noise(config: Mapping[str, Any]) -> dict[str, Any]:
    """A scheduler's config with timesteps that begin at the last one of training.

    They do so however few they are.
    """
    unset = {*config.get("_use_default_values", ()), "_use_default_values"}
    given = {key: value for key, value in config.items() if key not in unset}
    return {**given, "timestep_spacing": "trailing"}


def _fingerprint(pipe: Any) -> str:
    """A digest of the models' configs and of the first numbers of every tensor."""
    digest = hashlib.sha256()
    for name, module in sorted(pipe.components.items()):
        if isinstance(module, nn.Module):
            config: Any = module.config
            digest.update(f"{name} {json.dumps(config, default=str, sort_keys=True)}".encode())
            for key, tensor in module.state_dict().items():
                head = tensor.flatten()[:16].double().cpu().numpy()
                digest.update(f"{key} {tuple(tensor.shape)} {tensor.dtype}".encode())
                digest.update(head.tobytes())
    return digest.hexdigest()


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Which points no other one beats in both numbers, smaller being better.

    They are in the order of the first number.
    """
    front = []
    best = math.inf
    for index in sorted(range(len(points)), key=lambda i: points[i]):
        if points[index][1] < best:
            front.append(index)
            best = points[index][1]
    return front
