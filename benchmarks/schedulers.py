"""Seconds that a scheduler spends on a step, beside diffusers.

There is no model; samples are 1x4x64x64 in float32.

    python benchmarks/schedulers.py [--steps 20] [--repeats 15]

A step is one `scale_model_input` and one `step`; the begin of a run is its `set_timesteps`. Both
sides take turns, and the fastest of the runs counts. Prints a table in Markdown, and the schedulers
whose steps are slower than diffusers'.
"""

import argparse
import inspect
import time
from collections.abc import Iterable

import diffusers
import torch

from weightport.runtime.schedulers import SCHEDULERS

OPTIONS = {"DPMSolverSDEScheduler": {"noise_sampler_seed": 0}}


def run(scheduler: object, steps: int) -> tuple[float, float]:
    """Microseconds of `set_timesteps`, and of a step."""
    sample = torch.ones(1, 4, 64, 64)
    output = torch.full((1, 4, 64, 64), 0.5)
    options = {}
    if "generator" in inspect.signature(scheduler.step).parameters:
        options["generator"] = torch.Generator().manual_seed(0)
    scale = getattr(scheduler, "scale_model_input", lambda sample, timestep: sample)
    begin = time.perf_counter()
    scheduler.set_timesteps(steps)
    ready = time.perf_counter()
    for timestep in scheduler.timesteps:
        scale(sample, timestep)
        scheduler.step(output, timestep, sample, **options)
    end = time.perf_counter()
    return 1e6 * (ready - begin), 1e6 * (end - ready) / len(scheduler.timesteps)


def fastest(turns: Iterable[tuple[float, float]]) -> tuple[float, float]:
    """The shortest begin, and the shortest step."""
    begins, steps = zip(*turns, strict=True)
    return min(begins), min(steps)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    diffusers.logging.set_verbosity_error()
    slower = []
    print("| scheduler | a step, μs | diffusers | ratio | begin of a run, μs | diffusers |")
    print("|---|---:|---:|---:|---:|---:|")
    for name, kind in SCHEDULERS.items():
        if not hasattr(diffusers, name):
            continue
        options = OPTIONS.get(name, {})
        ours = kind(**options)
        theirs = getattr(diffusers, name)(**options)
        turns = [
            (run(ours, arguments.steps), run(theirs, arguments.steps))
            for _ in range(arguments.repeats)
        ]
        begin, step = fastest(mine for mine, _ in turns)
        their_begin, their_step = fastest(other for _, other in turns)
        ratio = step / their_step
        if ratio > 1:
            slower.append(name)
        print(
            f"| {name.removesuffix('Scheduler')} | {step:.0f} | {their_step:.0f} | {ratio:.2f}"
            f" | {begin:.0f} | {their_begin:.0f} |",
            flush=True,
        )
    print(f"\nSlower than diffusers: {', '.join(slower) or 'none'}")


if __name__ == "__main__":
    main()
