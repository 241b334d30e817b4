"""The `weightport` command: arguments in, one line of error or a short report out.

Results go to stdout, everything else to stderr. Exit status: 0 done, 1 failed, 2 wrong usage, 130
interrupted.
"""

from __future__ import annotations

import argparse
import difflib
import re
import signal
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from .commands import compare_schedulers, convert, diff, generate, inspect, parity, push


class _Parser(argparse.ArgumentParser):
    """argparse without abbreviations, with "did you mean" and errors in one line."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(allow_abbrev=False, **arguments)

    def error(self, message: str) -> NoReturn:
        from .errors import printable

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
        # the reader of the pipe is gone; Python would complain once more at exit
        sys.stderr.close()
        return 1
    except Exception as error:
        if arguments.debug:
            raise
        print(f"error: {_one_line(error)}", file=sys.stderr)
        return 1


def _terminate(signum: int, frame: object) -> NoReturn:
    raise SystemExit(128 + signum)


def _one_line(error: Exception) -> str:
    from .errors import ConversionError, printable

    if isinstance(error, ConversionError):
        return printable(error, limit=2000)
    if isinstance(error, OSError) and error.filename:
        return f"{printable(error.filename)}: {error.strerror}"
    return f"{printable(error)} ({type(error).__name__}; run with --debug for the details)"


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    common.add_argument("--json", action="store_true", help="print the result as JSON")
    parser = _Parser(
        prog="weightport", description="Convert Stable Diffusion checkpoints, exactly and offline."
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=_Parser)
    for command in (convert, inspect, diff, generate, compare_schedulers, parity, push):
        command.add(commands, common)
    return parser
