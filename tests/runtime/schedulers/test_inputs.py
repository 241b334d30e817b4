"""What runs are given, beside the config: the same as in diffusers for the same inputs."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

from weightport.runtime import schedulers

from ...support.scheduler_cases import CASES, Config

pytestmark = pytest.mark.filterwarnings("ignore")
diffusers.logging.set_verbosity_error()

STEPS = 8
LIMIT = 1e-5  # relative, in float32
USUAL: dict[str, Config] = {  # options without which a run cannot be compared
    "DDIMScheduler": {"clip_sample": False},
    "DPMSolverSDEScheduler": {"noise_sampler_seed": 5},
    "PNDMScheduler": {"skip_prk_steps": True},
}
FLOW: Config = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
SHIFTED: Config = {"use_dynamic_shifting": True}
Inputs = dict[str, Any]


def both(name: str, config: Config) -> tuple[Any, Any]:
    """Our scheduler and diffusers'."""
    config = USUAL.get(name, {}) | config
    return getattr(schedulers, name)(**config), getattr(diffusers, name)(**config)


def takes(name: str, method: str, argument: str) -> bool:
    """Whether a method of diffusers' class has an argument."""
    return argument in inspect.signature(getattr(getattr(diffusers, name), method)).parameters


def model(x: Tensor, timestep: Tensor) -> Tensor:
    """Something smooth, not linear, and bounded."""
    return (0.9 * torch.tanh(0.7 * x + 0.1 * x.roll(1, -1)) + 1e-4 * float(timestep)).to(x.dtype)


def begun(scheduler: Any, inputs: Inputs) -> Any:
    """The scheduler at the beginning of a run."""
    scheduler.set_timesteps(**inputs)
    return scheduler


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


def stepped(
    scheduler: Any, start: int = 0, dtype: torch.dtype = torch.float32, **options: Any
) -> list[Tensor]:
    """The sample after every step of a run that starts with the timestep number `start`."""
    sample = (random(3, 4, 6, 6) * float(getattr(scheduler, "init_noise_sigma", 1))).to(dtype)
    if "generator" in inspect.signature(scheduler.step).parameters:
        options = {"generator": torch.Generator().manual_seed(1)} | options
    samples = []
    for t in scheduler.timesteps[start:]:
        seen = (
            scheduler.scale_model_input(sample, t)
            if hasattr(scheduler, "scale_model_input")
            else sample
        )
        sample = scheduler.step(model(seen, t), t, sample, **options)[0]
        samples.append(sample)
    return samples


def assert_close(found: list[Tensor], expected: list[Tensor], limit: float = LIMIT) -> None:
    assert len(found) == len(expected)
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert a.dtype == b.dtype
        error = float((a.double() - b.double()).abs().max() / b.abs().max())
        assert error <= limit, f"step {i}"


TIMESTEPS = [999, 850, 640, 400, 251, 90, 11]
SIGMAS = [14.6, 6.47, 3.86, 2.0, 1.08, 0.58, 0.28, 0.0]
GIVEN: list[tuple[str, Config, Inputs]] = [
    *(
        (name, config, {"timesteps": TIMESTEPS})
        for name in (
            "DDPMScheduler",
            "DPMSolverMultistepScheduler",
            "DPMSolverSinglestepScheduler",
            "EulerDiscreteScheduler",
            "HeunDiscreteScheduler",
            "LCMScheduler",
            "TCDScheduler",
        )
        for config in ({}, {"beta_schedule": "scaled_linear", "prediction_type": "v_prediction"})
    ),
    ("CMStochasticIterativeScheduler", {}, {"timesteps": [39, 30, 17, 5, 1]}),
    ("EulerDiscreteScheduler", {}, {"sigmas": SIGMAS}),
    ("EulerDiscreteScheduler", {"use_karras_sigmas": True}, {"sigmas": SIGMAS}),
    ("EulerDiscreteScheduler", {"prediction_type": "v_prediction"}, {"sigmas": SIGMAS}),
    *(
        (
            "EDMEulerScheduler",
            {"sigma_schedule": kind},
            {"sigmas": torch.tensor([0.0, 0.1, 0.35, 0.7, 1.0])},
        )
        for kind in ("karras", "exponential")
    ),
    *(
        (name, config, inputs)
        for name in ("FlowMatchEulerDiscreteScheduler", "FlowMatchLCMScheduler")
        for config in (
            {},
            {"shift": 3.0},
            {"shift": 3.0, "shift_terminal": 0.1},
            {"use_karras_sigmas": True},
        )
        for inputs in (
            {"sigmas": [1.0, 0.8, 0.55, 0.3, 0.1]},
            {"timesteps": [1000.0, 800.0, 550.0, 300.0, 100.0]},
        )
    ),
    *(
        (name, {"use_dynamic_shifting": True, "time_shift_type": kind}, {"mu": 0.9} | inputs)
        for name in ("FlowMatchEulerDiscreteScheduler", "FlowMatchLCMScheduler")
        for kind in ("exponential", "linear")
        for inputs in ({"num_inference_steps": STEPS}, {"sigmas": [1.0, 0.8, 0.55, 0.3, 0.1]})
    ),
    *(
        (name, FLOW | SHIFTED, {"num_inference_steps": STEPS, "mu": mu})
        for name in (
            "DPMSolverMultistepScheduler",
            "DPMSolverSinglestepScheduler",
            "DEISMultistepScheduler",
        )
        for mu in (0.4, 1.1)
    ),
    *(
        (
            "UniPCMultistepScheduler",
            FLOW | SHIFTED | {"time_shift_type": kind},
            {"mu": 0.9} | inputs,
        )
        for kind in ("exponential", "linear")
        for inputs in (
            {"num_inference_steps": STEPS},
            {"sigmas": np.array([0.99, 0.8, 0.55, 0.3, 0.1])},
        )
    ),
    ("UniPCMultistepScheduler", FLOW, {"sigmas": np.array([1.0, 0.8, 0.55, 0.3, 0.1])}),
    *(
        (name, {}, {"num_inference_steps": 4} | inputs)
        for name in ("LCMScheduler", "TCDScheduler")
        for inputs in (
            {"original_inference_steps": 20},
            {"strength": 0.5},
            {"original_inference_steps": 100},
        )
    ),
]


def words(value: Any) -> str:
    if isinstance(value, dict):
        return "-".join(f"{key}={words(item)}" for key, item in value.items())
    return (
        str(len(value))
        if isinstance(value, list | Tensor | np.ndarray)
        else str(value).removesuffix("Scheduler")
    )


@pytest.mark.parametrize(("name", "config", "inputs"), GIVEN, ids=words)
def test_timesteps_sigmas_and_shifts_that_are_given(
    name: str, config: Config, inputs: Inputs
) -> None:
    ours, theirs = (begun(one, inputs) for one in both(name, config))
    assert ours.timesteps.tolist() == theirs.timesteps.tolist()
    assert_close(stepped(ours), stepped(theirs))


REFUSED: list[tuple[str, Config, Inputs]] = [
    ("EulerDiscreteScheduler", {"use_karras_sigmas": True}, {"timesteps": TIMESTEPS}),
    ("DPMSolverMultistepScheduler", {"use_lu_lambdas": True}, {"timesteps": TIMESTEPS}),
    ("DDPMScheduler", {}, {"timesteps": TIMESTEPS[::-1]}),
    ("DDPMScheduler", {}, {"timesteps": [1000, 5]}),
    ("DDPMScheduler", {}, {"timesteps": TIMESTEPS, "num_inference_steps": 7}),
    ("EulerDiscreteScheduler", {}, {"timesteps": TIMESTEPS, "sigmas": SIGMAS}),
    ("LCMScheduler", {}, {"timesteps": TIMESTEPS[::-1]}),
    ("LCMScheduler", {}, {"num_inference_steps": 51}),
    ("FlowMatchEulerDiscreteScheduler", SHIFTED, {"num_inference_steps": 5}),
]


@pytest.mark.parametrize(("name", "config", "inputs"), REFUSED, ids=words)
def test_inputs_that_make_no_sense_are_refused(name: str, config: Config, inputs: Inputs) -> None:
    for one in both(name, config):
        with pytest.raises(ValueError, match=r"\w"):
            one.set_timesteps(**inputs)


@pytest.mark.parametrize("said", [True, False], ids=["begin_index", "found"])
@pytest.mark.parametrize("name", CASES)
def test_runs_that_begin_later(name: str, said: bool) -> None:
    ours, theirs = (begun(one, {"num_inference_steps": STEPS}) for one in both(name, {}))
    start = 3 * ours.order
    for one in (ours, theirs):
        if said and hasattr(one, "set_begin_index"):
            one.set_begin_index(start)
    if hasattr(theirs, "add_noise"):
        at = theirs.timesteps[start : start + 1].repeat(3)
        noisy = [
            one.add_noise(random(3, 4, 6, 6), random(3, 4, 6, 6, seed=1), at)
            for one in (ours, theirs)
        ]
        assert_close(noisy[:1], noisy[1:])
    assert_close(stepped(ours, start), stepped(theirs, start))


PIXELS, NOISE = random(3, 4, 6, 6), random(3, 4, 6, 6, seed=1)
TRAINED = torch.tensor([3, 500, 900])
MIRRORED = (
    "DEISMultistep",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestep",
    "UniPC",
)  # see docs/schedulers.md


def having(method: str) -> list[str]:
    """The classes that have a method in diffusers."""
    return [name for name in CASES if hasattr(getattr(diffusers, name), method)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", having("add_noise"))
def test_noise_is_added_to_batches(name: str, dtype: torch.dtype) -> None:
    ours, theirs = (begun(one, {"num_inference_steps": STEPS}) for one in both(name, {}))
    at, limit = theirs.timesteps[[1, 4, 6]], LIMIT if dtype == torch.float32 else 2e-3
    at = at.long() if name == "SASolverScheduler" else at
    found, expected = (
        one.add_noise(PIXELS.to(dtype), NOISE.to(dtype), at) for one in (ours, theirs)
    )
    assert_close([found], [expected], limit)


@pytest.mark.parametrize(
    "name", [n for n in having("add_noise") if not n.startswith(("CM", "Cosine", "EDM"))]
)
def test_noise_is_added_as_in_training_before_a_run(name: str) -> None:
    ours, theirs = both(name, {})
    if name.startswith(MIRRORED):
        theirs = diffusers.DDPMScheduler()
    found, expected = (one.add_noise(PIXELS, NOISE, TRAINED) for one in (ours, theirs))
    assert_close([found], [expected])


@pytest.mark.parametrize("name", having("scale_noise"))
def test_flows_add_noise(name: str) -> None:
    for chosen in (
        ([1], [4]) if "Heun" in name else ([1], [0, 4, 6])
    ):  # one for all, or one for each
        ours, theirs = (
            begun(one, {"num_inference_steps": STEPS}) for one in both(name, {"shift": 3.0})
        )
        at = theirs.timesteps[chosen]
        found, expected = (one.scale_noise(PIXELS, at, NOISE) for one in (ours, theirs))
        assert_close([found], [expected])


@pytest.mark.parametrize("name", having("get_velocity"))
def test_velocities_of_batches(name: str) -> None:
    ours, theirs = both(name, {})
    if name == "EulerDiscreteScheduler":  # see docs/schedulers.md
        theirs = diffusers.DDPMScheduler()
    found, expected = (one.get_velocity(PIXELS, NOISE, TRAINED) for one in (ours, theirs))
    assert_close([found], [expected])


NOISY = (
    "CM",
    "Cosine",
    "DDPM",
    "DPMSolverSDE",
    "EulerAncestral",
    "FlowMatchLCM",
    "KDPM2A",
    "LCM",
    "SASolver",
    "TCD",
)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_samples_of_16_bits(name: str, dtype: torch.dtype) -> None:
    """Steps give what diffusers gives in float32, rounded; noisy ones what it gives for the same
    noise of 16 bits."""
    ours, theirs = (begun(one, {"num_inference_steps": STEPS}) for one in both(name, {}))
    noisy = name.startswith(NOISY)
    limit = (8 if noisy else 1) * torch.finfo(dtype).eps
    wide = dtype if noisy else torch.float32
    generator, same = generators(1)[0], generators(1)[0]
    sample = (PIXELS * float(getattr(theirs, "init_noise_sigma", 1))).to(dtype)
    for t in theirs.timesteps:
        if hasattr(theirs, "scale_model_input"):
            found = ours.scale_model_input(sample, t)
            expected = theirs.scale_model_input(sample.to(wide), t).to(dtype)
            assert_close([found], [expected], limit)
        output = model(sample, t)
        found = ours.step(
            output, t, sample, **({"generator": generator} if noisy and "SDE" not in name else {})
        )[0]
        options = {"generator": same} if takes(name, "step", "generator") and noisy else {}
        expected = theirs.step(output.to(wide), t, sample.to(wide), **options)[0].to(dtype)
        assert_close([found], [expected], limit)
        sample = expected


@pytest.mark.parametrize("name", [name for name in CASES if takes(name, "step", "generator")])
def test_a_generator_for_every_image(name: str) -> None:
    ours, theirs = (begun(one, {"num_inference_steps": STEPS}) for one in both(name, {}))
    together = stepped(ours, generator=generators(3))
    assert_close(together, stepped(theirs, generator=generators(3)))


CHURN = {"s_churn": 6.0, "s_tmin": 0.3, "s_tmax": 12.0, "s_noise": 1.01}
STEP_OPTIONS: list[tuple[str, Config, Inputs]] = [
    *(
        (name, {}, CHURN)
        for name in (
            "EulerDiscreteScheduler",
            "EDMEulerScheduler",
            "FlowMatchHeunDiscreteScheduler",
        )
    ),
    ("EulerDiscreteScheduler", {"prediction_type": "v_prediction"}, CHURN | {"s_churn": 50.0}),
    ("EDMEulerScheduler", {"prediction_type": "v_prediction"}, CHURN | {"s_tmax": float("inf")}),
    *(
        (
            "DDIMScheduler",
            {"clip_sample": clip, "prediction_type": kind},
            {"eta": eta, "use_clipped_model_output": clipped},
        )
        for clip in (True, False)
        for kind in ("epsilon", "v_prediction", "sample")
        for eta in (0.0, 0.4, 1.0)
        for clipped in (True, False)
    ),
    ("DDIMScheduler", {}, {"eta": 0.7, "variance_noise": NOISE, "generator": None}),
    *(
        (
            "DPMSolverMultistepScheduler",
            {"algorithm_type": kind, "final_sigmas_type": "sigma_min"},
            {"variance_noise": NOISE},
        )
        for kind in ("sde-dpmsolver", "sde-dpmsolver++")
    ),
    *(("TCDScheduler", {}, {"eta": eta}) for eta in (0.0, 0.3, 1.0)),
    ("DPMSolverSDEScheduler", {}, {"s_noise": 0.7}),
    *(("LMSDiscreteScheduler", {}, {"order": order}) for order in (1, 2, 3)),
]


@pytest.mark.parametrize(("name", "config", "options"), STEP_OPTIONS, ids=words)
def test_options_of_steps(name: str, config: Config, options: Inputs) -> None:
    ours, theirs = (begun(one, {"num_inference_steps": STEPS}) for one in both(name, config))
    assert_close(stepped(ours, **options), stepped(theirs, **options))


def test_seeds_of_a_brownian_path_for_every_image() -> None:
    ours, theirs = (
        begun(one, {"num_inference_steps": STEPS})
        for one in both("DPMSolverSDEScheduler", {"noise_sampler_seed": [3, 4, 5]})
    )
    assert_close(stepped(ours), stepped(theirs))
