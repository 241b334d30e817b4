"""`weightport generate`."""

from __future__ import annotations

import argparse
import json
import secrets
import sys
import warnings
from dataclasses import asdict, fields, replace
from pathlib import Path

from ..io import dtypes
from ..recipe import Maker, Recipe, read_recipe, write_image
from .terminal import print_lines
from .values import natural, positive, size


def add(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes to its parser."""
    parser.description = (
        "Make images with a diffusers repo. The PNG holds its settings: --from makes it again."
    )
    option = parser.add_argument
    option("repo", nargs="?", metavar="REPO", help="a folder or a Hub id")
    option("prompt", nargs="?", metavar="PROMPT", help="what to draw")
    option(
        "--from",
        dest="source",
        type=Path,
        metavar="PNG",
        help="take the settings from it; options override them",
    )
    option("--revision", help="branch, tag or commit of a Hub repo")
    option(
        "--scheduler", metavar="NAME", help="such as ddim or dpm++2m-karras (default: the repo's)"
    )
    option("--steps", type=positive, help="default: the pipeline's, most often 50")
    option(
        "--seed", type=natural, help="of the first image, the next has the next (default: random)"
    )
    option(
        "--guidance",
        type=float,
        metavar="SCALE",
        help="weight of the prompt (default: the pipeline's)",
    )
    option("--negative", metavar="PROMPT", help="what not to draw")
    option("--size", type=size, metavar="WxH", help="in pixels (default: the repo's)")
    option(
        "--image",
        type=_absolute,
        metavar="FILE",
        help="change this image; with --controlnet, follow it",
    )
    option("--mask", type=_absolute, metavar="FILE", help="paint where it is white")
    option("--strength", type=float, help="how much of the image to replace, from 0 to 1")
    option("--controlnet", metavar="REPO", help="a folder or a Hub id")
    option(
        "--lora",
        action="append",
        metavar="FILE[@STRENGTH]",
        help="use an adapter: FILE, FILE@0.8, FILE@unet=0.8; repeat for several",
    )
    option(
        "--embedding",
        action="append",
        metavar="FILE",
        help="teach the words of a textual inversion; repeat for several",
    )
    option("--dtype", choices=dtypes.CHOICES, help="to compute in (default: float32)")
    option("--device", help="default: cuda if there is one, else cpu")
    option(
        "-n", "--number", type=positive, default=1, metavar="N", help="images to make (default: 1)"
    )
    option(
        "-o",
        "--output",
        type=Path,
        default=Path("image.png"),
        metavar="PNG",
        help="default: image.png",
    )
    option("--overwrite", action="store_true", help="replace an earlier output")
    option("-q", "--quiet", action="store_true", help="print errors only")
    parser.set_defaults(run=run, usage_error=parser.error)


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    from ..errors import ConversionError

    recipe = _recipe(arguments)
    paths = _paths(arguments.output, arguments.number)
    for path in paths:
        if path.exists() and not arguments.overwrite:
            raise ConversionError(f"{path}: exists already; give another --output, or --overwrite")
        if not path.parent.is_dir():
            raise ConversionError(f"{path.parent}: there is no such folder")
    made = []
    with warnings.catch_warnings():
        warnings.showwarning = _show
        try:
            maker = Maker(recipe, arguments.quiet)
            if recipe.torch not in (None, maker.recipe.torch):
                warnings.warn(
                    f"made with torch {recipe.torch}, now with {maker.recipe.torch}: bits may"
                    " differ",
                    stacklevel=1,
                )
            for seed, path in enumerate(paths, recipe.seed):
                image, used = maker.make(seed)
                write_image(image, used, path, arguments.overwrite)
                made.append({"path": str(path), **asdict(used)})
                if not (arguments.quiet or arguments.json):
                    print_lines([f"wrote {path} (seed {seed}, {image.width}x{image.height})"])
        except ImportError as error:
            raise ConversionError(
                f"{error.name} is not installed: pip install 'weightport[torch]'"
            ) from error
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise ConversionError(str(error)) from error
        except OSError as error:
            raise error if error.filename else ConversionError(str(error)) from error
    if arguments.json:
        print(json.dumps(made, indent=2))
    return 0


def _recipe(arguments: argparse.Namespace) -> Recipe:
    """What the PNG says, then what the options say."""
    names = {field.name for field in fields(Recipe)}
    given = {
        name: value
        for name, value in vars(arguments).items()
        if name in names and value is not None
    }
    for name in ("repo", "controlnet"):
        if name in given and Path(given[name]).expanduser().is_dir():
            given[name] = _absolute(given[name])
    if "lora" in given:
        given["lora"] = tuple(map(_absolute_lora, given["lora"]))
    if "embedding" in given:
        given["embedding"] = tuple(map(_absolute, given["embedding"]))
    if arguments.source:
        old = read_recipe(arguments.source)
        digests = (old.sha256 or {}).items()
        kept = {name: one for name, one in digests if name.partition(" ")[0] not in given}
        return replace(old, sha256=kept or None, **given)
    if "prompt" not in given:
        arguments.usage_error("the following arguments are required: REPO, PROMPT (or --from PNG)")
    if "device" not in given:
        given["device"] = _device()
    return Recipe(**{"seed": secrets.randbelow(2**32), **given})


def _device() -> str:
    try:
        import torch
    except ImportError:
        return "cpu"
    return "cuda" if torch.cuda.is_available() else "cpu"


def _paths(output: Path, number: int) -> list[Path]:
    """image.png, or image-1.png, image-2.png, …"""
    if output.suffix.lower() != ".png":
        output = output.with_name(f"{output.name}.png")
    return (
        [output]
        if number == 1
        else [output.with_stem(f"{output.stem}-{i}") for i in range(1, number + 1)]
    )


def _show(message: Warning | str, *_: object, **__: object) -> None:
    print(f"warning: {str(message).splitlines()[0]}", file=sys.stderr)


def _absolute_lora(text: str) -> str:
    """The same with an absolute path before the strength."""
    from ..converters.baking import parse_lora  # numpy, which the command line does without

    path, _ = parse_lora(text)
    return f"{_absolute(path)}{text.removeprefix(path)}"


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().absolute())
