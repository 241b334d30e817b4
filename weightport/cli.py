"""The `weightport` command: arguments in, one line of error or a short report out.

Results go to stdout, everything else to stderr. Exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import json
import re
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from .api import Conversion, Inspection


class _Parser(argparse.ArgumentParser):
    """argparse without abbreviations, with "did you mean" and errors in one line."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(allow_abbrev=False, **arguments)

    def error(self, message: str) -> NoReturn:
        from .converters.errors import printable

        known = self._known()
        words = [word for word in re.findall(r"[\w-]+", message) if word not in known]
        close = next((c for word in words for c in difflib.get_close_matches(word, known, 1)), None)
        hint = f"; did you mean `{close}`?" if close else ""
        self.exit(2, f"error: {printable(message, limit=500)}{hint}\n")

    def _known(self) -> list[str]:
        """Every option and choice, those of the commands too."""
        known = []
        for action in self._actions:
            known += [*action.option_strings, *map(str, action.choices or ())]
            if isinstance(action, argparse._SubParsersAction):
                known += [word for command in action.choices.values() for word in command._known()]
        return known


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    arguments = _parser().parse_args(argv)
    signal.signal(signal.SIGTERM, _terminate)
    try:
        status = int(arguments.run(arguments))
        sys.stdout.flush()  # what goes wrong with the last lines goes wrong here
        return status
    except KeyboardInterrupt:
        print("interrupted; nothing was left behind", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()  # the reader of the pipe is gone; Python would complain once more at exit
        return 1
    except Exception as error:
        if arguments.debug:
            raise
        print(f"error: {_one_line(error)}", file=sys.stderr)
        return 1


def _terminate(signum: int, frame: object) -> NoReturn:
    raise SystemExit(128 + signum)


def _one_line(error: Exception) -> str:
    from .converters.errors import ConversionError, printable

    if isinstance(error, ConversionError):
        return printable(error, limit=2000)
    if isinstance(error, OSError) and error.filename:
        return f"{printable(error.filename)}: {error.strerror}"
    return f"{printable(error)} ({type(error).__name__}; run with --debug for the details)"


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    common.add_argument("--json", action="store_true", help="print the result as JSON")
    parser = _Parser(prog="weightport", description="Convert Stable Diffusion checkpoints, exactly and offline.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=_Parser)
    _add_convert(commands, common)
    _add_inspect(commands, common)
    _add_diff(commands, common)
    return parser


_FAMILIES = ("sd1", "sd2", "sdxl", "sdxl_refiner", "upscaler")
_COMPONENTS = ("unet", "text_encoder", "text_encoder_2", "vae", "decoder", "image_encoder", "controlnet")


# --- convert ----------------------------------------------------------------------------------------------------------


def _add_convert(commands: Any, common: argparse.ArgumentParser) -> None:
    parser = commands.add_parser(
        "convert",
        parents=[common],
        help="KerasCV files or original checkpoints -> a diffusers repo, or back",
        description="Convert KerasCV files or original checkpoints into a diffusers repo, or a repo into either.",
    )
    add = parser.add_argument
    add("sources", nargs="+", metavar="SOURCE", help="Keras file or folder, .ckpt, .safetensors, or diffusers repo")
    add("-o", "--output", required=True, help="the repo, .safetensors (--to ldm), .weights.h5 or .h5 (--to kerascv)")
    add("--base", help="fills in what the sources lack: a repo, a folder such as ~/.keras/models, or a Hub id")
    add(
        "--to",
        choices=["diffusers", "kerascv", "ldm"],
        default="diffusers",
        help="the layout to write (default: diffusers)",
    )
    add("--family", choices=_FAMILIES, help="where the tensors leave a choice")
    add("--component", choices=_COMPONENTS, help="convert only this one")
    add("--vae", metavar="FILE", help="bake in the VAE of this file, in place of the sources' own")
    add("--dtype", choices=["keep", "float32", "float16", "bfloat16"], default="keep", help="default: keep")
    add("--variant", help="part of the weights' file names, such as fp16")
    add("--max-shard-size", default="10GB", metavar="SIZE", help="default: 10GB")
    add("--text-activation", choices=["tanh", "erf"], default="tanh", help="SD 2.x: tanh is keras-cv from 0.6.4 on")
    add(
        "--placeholder-token",
        action="append",
        default=[],
        metavar="TOKEN",
        help="name of an added token row; repeat in order",
    )
    add("--ema", action="store_true", help="take the moving average of an original checkpoint's UNet")
    add("--prediction-type", choices=["epsilon", "v_prediction"], help="of an original checkpoint's UNet")
    add("--image-size", type=int, metavar="PIXELS", help="for the configs (default: the family's)")
    add("--no-residue", action="store_false", dest="residue", help="write no residue file, and look for none")
    add("--lora-alpha", type=float, metavar="ALPHA", help="merge LoRA factors with this alpha")
    add("--allow-nan", action="store_true", help="write NaN and Inf instead of refusing them")
    add("--overwrite", action="store_true", help="replace an earlier output")
    add("--dry-run", action="store_true", help="check and plan only")
    add("-q", "--quiet", action="store_true", help="print errors only")
    parser.set_defaults(run=_convert)


def _convert(arguments: argparse.Namespace) -> int:
    from .api import convert

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
        "allow_nan",
        "overwrite",
        "dry_run",
    ]
    with _progress(arguments.quiet) as progress:
        conversion = convert(
            arguments.sources,
            arguments.output,
            placeholder_tokens=arguments.placeholder_token,
            progress=progress,
            **{name: getattr(arguments, name) for name in names},
        )
    if arguments.json:
        print(json.dumps(_summary(conversion), indent=2))
    elif not arguments.quiet:
        _print_lines(_conversion_lines(conversion))
    return 0


@contextlib.contextmanager
def _progress(quiet: bool) -> Iterator[Any]:
    """A bar on a terminal, nothing in a pipe; the callback takes (bytes just written, bytes in all)."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from tqdm import tqdm

    with tqdm(unit="B", unit_scale=True, leave=False, delay=0.5) as bar:

        def step(nbytes: int, total: int) -> None:
            bar.total = total
            bar.update(nbytes)

        yield step


def _summary(conversion: Conversion) -> dict[str, Any]:
    return {
        "family": conversion.family,
        "components": {name: len(c.tensors) for name, c in conversion.components.items()},
        "output": str(conversion.output) if conversion.output else None,
        "lacks": conversion.lacks,
        "notes": conversion.notes,
        "files": conversion.report.get("files", {}),
    }


def _conversion_lines(conversion: Conversion) -> Iterator[str]:
    for name, component in conversion.components.items():
        for part in component.parts:
            source = part.checkpoint
            of_which = f" ({part.part})" if part.part != name else ""
            yield f"{name:<13} {len(source.tensors):>5} tensors{of_which} from {source.path}, {source.format}"
    yield from (f"note: {note}" for note in conversion.notes)
    yield from (f"lacks: {gap}" for gap in conversion.lacks)
    yield f"wrote {conversion.output}" if conversion.output else "dry run: everything fits, nothing was written"


# --- inspect ----------------------------------------------------------------------------------------------------------


def _add_inspect(commands: Any, common: argparse.ArgumentParser) -> None:
    parser = commands.add_parser(
        "inspect",
        parents=[common],
        help="what a file holds and what would become of it",
        description="Say what a checkpoint holds, from its headers alone.",
    )
    parser.add_argument("file", metavar="FILE", help="Keras file, TensorFlow or SavedModel folder, or diffusers repo")
    parser.set_defaults(run=_inspect)


def _inspect(arguments: argparse.Namespace) -> int:
    from .api import inspect

    inspection = inspect(arguments.file)
    if arguments.json:
        print(json.dumps(inspection.to_dict(), indent=2))
    else:
        _print_lines(_inspection_lines(inspection))
    return 0


# --- diff -------------------------------------------------------------------------------------------------------------


def _add_diff(commands: Any, common: argparse.ArgumentParser) -> None:
    parser = commands.add_parser(
        "diff",
        parents=[common],
        help="compare two checkpoints in any two layouts",
        description="Compare two checkpoints in canonical form, tensor by tensor. Exit status 1 if they differ.",
    )
    parser.add_argument("a", metavar="A", help="Keras file or folder, .ckpt, .safetensors, or diffusers repo")
    parser.add_argument("b", metavar="B", help="another one, in any layout")
    parser.add_argument("--family", choices=_FAMILIES, help="where the tensors leave a choice")
    parser.add_argument("--ema", action="store_true", help="compare the moving averages of original checkpoints")
    parser.set_defaults(run=_diff)


def _diff(arguments: argparse.Namespace) -> int:
    from .api import diff
    from .converters.compare import describe

    with _progress(quiet=False) as progress:
        found = diff(arguments.a, arguments.b, family=arguments.family, ema=arguments.ema, progress=progress)
    if arguments.json:
        print(json.dumps(found.to_dict(), indent=2))
    else:
        _print_lines(describe(found))
    return 1 if found.differences or found.families[0] != found.families[1] else 0


def _inspection_lines(inspection: Inspection) -> Iterator[str]:
    yield inspection.path
    for part in inspection.parts:
        mixed = len(part.dtypes) > 1
        dtypes = ", ".join(f"{dtype} ({count})" if mixed else dtype for dtype, count in part.dtypes.items())
        yield ""
        yield f"{part.root or part.part}: {part.count} tensors, {_size(part.nbytes)}, {dtypes}"
        yield f"  format      {part.format}"
        yield f"  part        {part.part}{' of ' + ' or '.join(part.families) if part.families else ''}"
        yield from (f"  {'because' if index == 0 else '':<11} {fact}" for index, fact in enumerate(part.evidence))
        yield f"  becomes     {part.becomes}"
        yield from (f"  skipped     {count} tensors: {reason}" for reason, count in part.skipped.items())
        for title, keys in (("missing", part.missing), ("unexpected", part.unexpected)):
            yield from (f"  {title:<11} {key}" for key in _some(keys))
        for pattern, count, dtype, nbytes in part.tensors:
            yield f"    {count:>4} x {pattern}  {dtype}  {_size(nbytes)}"


def _some(keys: Sequence[str], limit: int = 20) -> list[str]:
    from .converters.collapse import collapse

    patterns = [f"{pattern} ({len(group)})" if len(group) > 1 else pattern for pattern, group in collapse(keys)]
    return patterns if len(patterns) <= limit else [*patterns[:limit], f"... and {len(patterns) - limit} more patterns"]


def _print_lines(lines: Iterable[str]) -> None:
    """Print lines in which names of files and tensors cannot control the terminal."""
    from .converters.errors import printable

    for line in lines:
        print(printable(line, limit=10_000))


def _size(nbytes: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= scale:
            return f"{nbytes / scale:.2f} {unit}"
    return f"{nbytes} B"
