"""`weightport push`."""

from __future__ import annotations

import argparse
import dataclasses
import sys

from .terminal import print_result, progress_bar


def add(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes to its parser."""
    parser.description = (
        "Upload a converted repo to the Hub in one commit, after checking every file. The token"
        " is that of HF_TOKEN or `hf auth login`."
    )
    option = parser.add_argument
    option("repo", metavar="REPO", help="what `weightport convert` wrote, or a LoRA or embedding")
    option("repo_id", metavar="ORG/NAME", help="the repo on the Hub; made if it is not there")
    option("--private", action="store_true", default=None, help="if it is made, make it private")
    option("--revision", metavar="BRANCH", help="default: main; made if it is not there")
    option("--create-pr", action="store_true", help="open a pull request instead")
    option("-m", "--message", help="of the commit")
    option(
        "--license",
        metavar="ID",
        help="for the model card, as the Hub names it: creativeml-openrail-m, mit, ...",
    )
    option(
        "--base-model",
        metavar="HUB_ID",
        help="for the model card: what the model was fine-tuned from",
    )
    option(
        "--allow-unverified",
        action="store_true",
        help="push although `weightport parity` has not passed",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    from ..push import has_license, push

    names = [
        "private",
        "revision",
        "create_pr",
        "message",
        "license",
        "base_model",
        "allow_unverified",
    ]
    options = {name: getattr(arguments, name) for name in names}
    if (
        not arguments.license
        and sys.stdin.isatty()
        and sys.stderr.isatty()
        and not has_license(arguments.repo)
    ):
        print(
            "License of the model, as the Hub names it (creativeml-openrail-m, mit, ...): ",
            end="",
            file=sys.stderr,
        )
        options["license"] = input() or None
    with progress_bar(quiet=False) as progress:
        pushed = push(arguments.repo, arguments.repo_id, progress=progress, **options)
    print(
        *(f"warning: {warning}\n" for warning in pushed.warnings), sep="", end="", file=sys.stderr
    )
    lines = [f"pushed {len(pushed.files)} files: {pushed.url}"]
    print_result(lambda: dataclasses.asdict(pushed), lines, arguments)
    return 0
