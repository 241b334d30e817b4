"""Seconds that a scheduler spends on a step, beside diffusers: no model, float32 samples of 1x4x64x64.

    python benchmarks/schedulers.py [--steps 20] [--repeats 15]

One run is `set_timesteps` and all its `scale_model_input` and `step` calls; both sides take turns, the fastest of the
runs counts. Prints a table in Markdown.
"""

import argparse
import inspect
import time

import diffusers
import torch

from weightport.runtime.schedulers import SCHEDULERS

OPTIONS = {"DPMSolverSDEScheduler": {"noise_sampler_seed": 0}}


def run(scheduler: object, steps: int) -> float:
    """Microseconds a model call of one run."""
    sample, output = torch.ones(1, 4, 64, 64), torch.full((1, 4, 64, 64), 0.5)
    options = {}
    if "generator" in inspect.signature(scheduler.step).parameters:
        options["generator"] = torch.Generator().manual_seed(0)
    begin = time.perf_counter()
    scheduler.set_timesteps(steps)
    for timestep in scheduler.timesteps:
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(sample, timestep)
        scheduler.step(output, timestep, sample, **options)
    return 1e6 * (time.perf_counter() - begin) / len(scheduler.timesteps)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    diffusers.logging.set_verbosity_error()
    print("| scheduler | weightport, µs a step | diffusers, µs a step | ratio |\n|---|---:|---:|---:|")
    for name, kind in SCHEDULERS.items():
        if not hasattr(diffusers, name):
            continue
        ours, theirs = (one(**OPTIONS.get(name, {})) for one in (kind, getattr(diffusers, name)))
        times = [(run(ours, arguments.steps), run(theirs, arguments.steps)) for _ in range(arguments.repeats)]
        a, b = (min(column) for column in zip(*times, strict=True))
        print(f"| {name.removesuffix('Scheduler')} | {a:.0f} | {b:.0f} | {a / b:.2f} |", flush=True)


if __name__ == "__main__":
    main()
