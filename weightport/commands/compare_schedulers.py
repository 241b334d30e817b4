"""`weightport compare-schedulers`."""

from __future__ import annotations

import argparse

from ..io import dtypes
from .terminal import print_result, progress_bar
from .values import names, natural, numbers, positive, size


def add(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes to its parser."""
    parser.description = (
        "Draw prompts with several schedulers and numbers of steps from the same noise, and"
        " report time, model calls and the distance to a converged reference. An interrupted"
        " run goes on where it stopped."
    )
    option = parser.add_argument
    option("repo", metavar="REPO", help="a diffusers repo, or a Hub id")
    option("-p", "--prompt", action="append", required=True, help="what to draw; repeat for more")
    option(
        "-o",
        "--output",
        required=True,
        metavar="FOLDER",
        help="gets report.html, results.json and results.csv",
    )
    option(
        "--schedulers",
        type=names,
        metavar="A,B,...",
        help="short names or class names (default: the usual ones)",
    )
    option(
        "--steps", type=numbers, metavar="N,M,...", help="numbers of steps (default: 5,10,20,50)"
    )
    option("--seed", type=natural, default=0, help="of the noise (default: 0)")
    option("--size", type=size, metavar="WxH", help="in pixels (default: the model's)")
    option("--guidance", type=float, default=7.5, help="guidance scale (default: 7.5)")
    option(
        "--reference-steps",
        type=positive,
        default=200,
        metavar="N",
        help="steps of the reference (default: 200)",
    )
    option("--dtype", choices=dtypes.CHOICES, default="float32", help="default: float32")
    option("--device", default="cpu", help="default: cpu")
    option("-q", "--quiet", action="store_true", help="print errors only")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    from ..api import compare_schedulers
    from ..comparison.report import describe

    chosen = {
        name: getattr(arguments, name)
        for name in ("schedulers", "steps")
        if getattr(arguments, name)
    }
    with progress_bar(arguments.quiet, unit=" images") as progress:
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
    lines = [*describe(comparison, notes), f"wrote {arguments.output}/report.html"]
    print_result(comparison.to_dict, lines, arguments)
    return 0
