"""The `weightport` command: arguments in, one line of error or a short report out.

Results go to stdout, everything else to stderr. Exit status: 0 done, 1 failed, 2 wrong usage, 130
interrupted.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Iterable, Sequence
from importlib import import_module
from itertools import takewhile
from typing import Any, NoReturn

from .io.collector import collector_patient

COMMANDS = {
    "convert": "KerasCV files or original checkpoints -> a diffusers repo, or back",
    "batch": "many conversions, on this machine or a Dask cluster; goes on where it stopped",
    "inspect": "what a file holds and what would become of it",
    "diff": "compare two checkpoints in any two layouts",
    "generate": "make images with a diffusers repo",
    "compare-schedulers": "speed and quality of schedulers on one model",
    "parity": "run a converted repo and the framework it came from on the same inputs",
    "push": "upload a converted repo to the Hugging Face Hub",
    "app": "a page in the browser for all of this",
}
"""Command -> what it is for. Its module in `commands/` is imported when it is typed."""


class _Parser(argparse.ArgumentParser):
    """argparse without abbreviations, with errors in one line and a hint for a misspelt word."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(allow_abbrev=False, **arguments)
        self._unknown: list[str] = []

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Refuse unknown options here, where it is known which ones there are."""
        typed = list(takewhile(_is_option, args) if self._subparsers else args)
        if "--" in typed:  # what follows is no option
            typed = typed[: typed.index("--")]
        self._unknown = [word for word in filter(_is_option, typed) if not self._knows(word)]
        found, rest = super().parse_known_args(args, namespace)
        if rest:
            self.error(f"unrecognized arguments: {' '.join(rest)}")
        return found, rest

    def _knows(self, option: str) -> bool:
        return option.partition("=")[0] in self._option_string_actions

    def error(self, message: str) -> NoReturn:
        """End with one line. Whatever else is wrong, an option that does not exist comes first."""
        from .errors import printable

        hint = ""
        if self._unknown:
            typed = self._unknown[0]
            hint = _hint(typed.partition("=")[0], self._option_string_actions)
            message = f"unrecognized arguments: {typed}"
        self.exit(2, f"error: {printable(message, limit=500)}{hint}\n")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            error.message += _hint(str(value), map(str, action.choices or ()))
            raise


def _is_option(word: str) -> bool:
    """Whether argparse takes a word for a long option, known or not."""
    return word.startswith("--") and len(word) > 2 and " " not in word


def _hint(typed: str, known: Iterable[str]) -> str:
    import difflib  # few words are misspelt

    close = difflib.get_close_matches(typed, list(known), 1)
    return f"; did you mean `{close[0]}`?" if close else ""


class _Version(argparse.Action):
    """Prints the version; only then is it looked up."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object, **__: object) -> NoReturn:
        from . import __version__

        print(f"weightport {__version__}")
        parser.exit(0)


@collector_patient()
def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    words = sys.argv[1:] if argv is None else list(argv)
    arguments = _parser(words).parse_args(words or ["--help"])
    signal.signal(signal.SIGTERM, _terminate)
    try:
        status = int(arguments.run(arguments))
        sys.stdout.flush()  # what goes wrong with the last lines goes wrong here
        return status
    except KeyboardInterrupt:
        print("interrupted; nothing was left behind", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # the reader of the pipe is gone; Python would complain once more at exit
        sys.stderr.close()
        return 1
    except Exception as error:
        if arguments.debug:
            raise
        from .errors import one_line
        from .hub.secrets import hide

        print(f"error: {hide(one_line(error))}", file=sys.stderr)
        return 1


def _terminate(signum: int, frame: object) -> NoReturn:
    raise SystemExit(128 + signum)


def _parser(typed: Sequence[str] | None = None) -> argparse.ArgumentParser:
    """The parser of all commands.

    Args:
        typed: the words of the command line; commands that are not among them have no arguments.
    """
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    common.add_argument("--json", action="store_true", help="print the result as JSON")
    parser = _Parser(
        prog="weightport", description="Convert Stable Diffusion checkpoints, exactly and offline."
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version")
    commands: Any = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=_Parser)
    for name, purpose in COMMANDS.items():
        command = commands.add_parser(name, parents=[common], help=purpose)
        if typed is None or name in typed:
            module = import_module(f".commands.{name.replace('-', '_')}", __package__)
            module.add(command)
    return parser
