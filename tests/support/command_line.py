"""The command line as text: every option of every command with its default, sorted.

python -m tests.support.command_line > tests/golden/command_line.txt
"""

from __future__ import annotations

import argparse

from weightport.cli import _parser


def lines() -> list[str]:
    """One line an option."""
    parser = _parser()
    found = [_line("weightport", action) for action in parser._actions]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, command in action.choices.items():
                found += [_line(f"weightport {name}", one) for one in command._actions]
    return sorted(found)


def _line(command: str, action: argparse.Action) -> str:
    """A command, the names of an option or the place of an argument, its choices and its default."""
    names = ", ".join(action.option_strings) or action.metavar or action.dest
    choices = "" if not action.choices else f" {{{','.join(map(str, action.choices))}}}"
    default = "" if action.default in (None, argparse.SUPPRESS) else f" = {action.default!r}"
    return f"{command} {names}{choices}{default}"


if __name__ == "__main__":
    print(*lines(), sep="\n")
