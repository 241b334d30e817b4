"""`weightport compare-schedulers`."""

from __future__ import annotations

import argparse
import json
from typing import Any

from .terminal import print_lines, progress_bar


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add the parser."""
    parser = commands.add_parser(
        "compare-schedulers",
        parents=[common],
        help="speed and quality of schedulers on one model",
        description="Draw prompts with several schedulers and numbers of steps from the same noise, and report time, "
        "model calls and the distance to a converged reference. An interrupted run goes on where it stopped.",
    )
    option = parser.add_argument
    option("repo", metavar="REPO", help="a diffusers repo, or a Hub id")
    option("-p", "--prompt", action="append", required=True, help="what to draw; repeat for more")
    option("-o", "--output", required=True, metavar="FOLDER", help="gets report.html, results.json and results.csv")
    option("--schedulers", type=_names, metavar="A,B,...", help="short names or class names (default: the usual ones)")
    option("--steps", type=_numbers, metavar="N,M,...", help="numbers of steps (default: 5,10,20,50)")
    option("--seed", type=int, default=0, help="of the noise (default: 0)")
    option("--size", type=_size, metavar="WxH", help="in pixels (default: the model's)")
    option("--guidance", type=float, default=7.5, help="guidance scale (default: 7.5)")
    option("--reference-steps", type=int, default=200, metavar="N", help="steps of the reference (default: 200)")
    option("--dtype", choices=["float32", "float16", "bfloat16"], default="float32", help="default: float32")
    option("--device", default="cpu", help="default: cpu")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    from ..api import compare_schedulers
    from ..scheduler_report import describe

    chosen = {name: getattr(arguments, name) for name in ("schedulers", "steps") if getattr(arguments, name)}
    with progress_bar(quiet=False, unit="image") as progress:
        comparison, notes = compare_schedulers(
            arguments.repo,
            arguments.prompt,
            arguments.output,
            seed=arguments.seed,
            size=arguments.size,
            guidance_scale=arguments.guidance,
            reference_steps=arguments.reference_steps,
            dtype=arguments.dtype,
            device=arguments.device,
            progress=progress,
            **chosen,
        )
    if arguments.json:
        print(json.dumps(comparison.to_dict(), indent=2))
    else:
        print_lines([*describe(comparison, notes), f"wrote {arguments.output}/report.html"])
    return 0


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _numbers(text: str) -> tuple[int, ...]:
    numbers = tuple(int(part) for part in text.split(","))
    if min(numbers) < 1:
        raise argparse.ArgumentTypeError("must be positive")
    return numbers


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    return int(width), int(height)
