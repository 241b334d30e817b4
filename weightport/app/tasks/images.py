"""Images of a prompt, and the settings in them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ...errors import ConversionError, printable
from ..report import Report
from . import Arguments
from .archives import opened

_SHOWN = ("prompt", "negative", "scheduler", "steps", "seed", "guidance", "size")
"""Settings that the page shows, and takes of a PNG."""


def generate(arguments: Arguments, report: Report) -> dict[str, Any]:
    """Make one image, with its settings in it."""
    from ...recipe import Recipe, write_image

    with explained():
        repo, revision = _repo(arguments["repo"])
        recipe = Recipe(repo, revision=revision, device=device(), **arguments["recipe"])
        image, used = _made(recipe, report)
    # where the server keeps an upload is nobody's business
    named = used if revision or repo == arguments["repo"] else replace(used, repo=arguments["name"])
    place = Path(arguments["folder"], f"{arguments['name']}.png")
    write_image(image, named, place)
    return {"image": str(place), "settings": _settings(named)}


def settings(arguments: Arguments, report: Report) -> dict[str, Any]:
    """The settings in a PNG."""
    from ...recipe import read_recipe

    return {"settings": _settings(read_recipe(Path(arguments["source"])))}


def _made(recipe: Any, report: Report) -> tuple[Any, Any]:
    import inspect

    from ...recipe import Maker

    maker = Maker(recipe, quiet=True)
    steps = recipe.steps or 50

    def step(pipe: Any, index: int, timestep: Any, state: dict[str, Any]) -> dict[str, Any]:
        report.progress(1, max(steps, index + 1))
        return state

    if "callback_on_step_end" in inspect.signature(type(maker.pipe).__call__).parameters:
        maker.arguments["callback_on_step_end"] = step
    return maker.make(recipe.seed)


def _settings(recipe: Any) -> dict[str, Any]:
    """What the page shows of a recipe."""
    content = asdict(recipe)
    shown = {name: content[name] for name in _SHOWN if content[name] is not None}
    return {
        name: printable(value, 2000) if isinstance(value, str) else value
        for name, value in shown.items()
    }


def _repo(source: str) -> tuple[str, str | None]:
    """A repository as the runtime names it, and its revision."""
    from ...pull import Reference

    reference = Reference.parse(source) if source.startswith("hub:") else None
    if reference is None:
        return str(Path(opened(source)).absolute()), None
    if reference.path:
        raise ConversionError(f"{reference}: name the repository, not a file in it")
    return reference.repo_id, reference.revision


def device() -> str:
    """Where to compute."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """What the runtime raises, as errors that a user can act on."""
    try:
        yield
    except ImportError as error:
        raise ConversionError(
            f'{error.name} is not installed; run `pip install "weightport[torch]"`'
        ) from error
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ConversionError(str(error)) from error
    except OSError as error:
        raise error if error.filename else ConversionError(str(error)) from error
