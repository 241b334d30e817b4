"""`weightport convert`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ..io import dtypes
from . import without_blas
from .choices import COMPONENTS, FAMILIES, LAYOUTS
from .terminal import print_result, progress_bar

if TYPE_CHECKING:
    from ..api import Conversion


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add the parser."""
    parser = commands.add_parser(
        "convert",
        parents=[common],
        help="KerasCV files or original checkpoints -> a diffusers repo, or back",
        description=(
            "Convert KerasCV files or original checkpoints into a diffusers repo, or a repo into"
            " either."
        ),
    )
    option = parser.add_argument
    option(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help="Keras file or folder, .ckpt, .safetensors, or diffusers repo",
    )
    option(
        "-o",
        "--output",
        required=True,
        help="the repo, .safetensors (--to ldm), .weights.h5 or .h5 (--to kerascv)",
    )
    option(
        "--base",
        help=(
            "fills in what the sources lack: a repo, a folder such as ~/.keras/models, or a Hub id"
        ),
    )
    option(
        "--to",
        choices=LAYOUTS,
        default="diffusers",
        help="the layout to write (default: diffusers)",
    )
    option("--family", choices=FAMILIES, help="where the tensors leave a choice")
    option("--component", choices=COMPONENTS, help="convert only this one")
    option(
        "--vae", metavar="FILE", help="bake in the VAE of this file, in place of the sources' own"
    )
    option(
        "--dtype",
        choices=[dtypes.KEEP, *dtypes.CHOICES],
        default="keep",
        help="default: keep",
    )
    option("--variant", help="part of the weights' file names, such as fp16")
    option("--max-shard-size", default="10GB", metavar="SIZE", help="default: 10GB")
    option(
        "--text-activation",
        choices=["tanh", "erf"],
        default="tanh",
        help="SD 2.x: tanh is keras-cv from 0.6.4 on",
    )
    option(
        "--placeholder-token",
        action="append",
        default=[],
        metavar="TOKEN",
        help="name of an added token row; repeat in order",
    )
    option(
        "--ema",
        action="store_true",
        help="take the moving average of an original checkpoint's UNet",
    )
    option("--prediction-type", choices=["epsilon", "v_prediction"], help="of the UNet")
    option(
        "--image-size",
        type=int,
        metavar="PIXELS",
        help="for the configs (default: the file's or family's)",
    )
    option(
        "--no-residue",
        action="store_false",
        dest="residue",
        help="write no residue file, and look for none",
    )
    option("--lora-alpha", type=float, metavar="ALPHA", help="merge LoRA factors with this alpha")
    option("--no-hash", action="store_false", dest="hashes", help="leave sha256 out of the report")
    option(
        "--no-sync",
        action="store_false",
        dest="sync",
        help="do not wait until the output has reached the disk",
    )
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
    option("--allow-nan", action="store_true", help="write NaN and Inf instead of refusing them")
    option("--overwrite", action="store_true", help="replace an earlier output")
    option("--dry-run", action="store_true", help="check and plan only")
    option("-q", "--quiet", action="store_true", help="print errors only")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    without_blas()
    from ..api import convert

    names = [
        "base",
        "to",
        "family",
        "component",
        "vae",
        "dtype",
        "variant",
        "max_shard_size",
        "text_activation",
        "lora_alpha",
        "ema",
        "prediction_type",
        "image_size",
        "residue",
        "hashes",
        "sync",
        "license",
        "base_model",
        "allow_nan",
        "overwrite",
        "dry_run",
    ]
    with progress_bar(arguments.quiet) as progress:
        conversion = convert(
            arguments.sources,
            arguments.output,
            placeholder_tokens=arguments.placeholder_token,
            progress=progress,
            **{name: getattr(arguments, name) for name in names},
        )
    print_result(_summary(conversion), _conversion_lines(conversion), arguments)
    return 0


def _summary(conversion: Conversion) -> dict[str, Any]:
    return {
        "family": conversion.family,
        "components": {name: len(c.tensors) for name, c in conversion.components.items()},
        "output": str(conversion.output) if conversion.output else None,
        "lacks": conversion.lacks,
        "notes": conversion.notes,
        "regenerated": conversion.report.get("regenerated", {}),
        "files": conversion.report.get("files", {}),
    }


def _conversion_lines(conversion: Conversion) -> Iterator[str]:
    for name, component in conversion.components.items():
        for part in component.parts:
            source = part.checkpoint
            of_which = f" ({part.part})" if part.part != name else ""
            yield (
                f"{name:<13} {len(source.tensors):>5} tensors{of_which} from {source.path},"
                f" {source.format}"
            )
    yield from (f"note: {note}" for note in conversion.notes)
    yield from (f"lacks: {gap}" for gap in conversion.lacks)
    yield (
        f"wrote {conversion.output}"
        if conversion.output
        else "dry run: everything fits, nothing was written"
    )
