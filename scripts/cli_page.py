#!/usr/bin/env python
"""Print the command line as a page in Markdown: every command with its arguments and options."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from weightport import cli

INTRODUCTION = """\
# Command line

Results go to stdout, everything else to stderr. Exit status: 0 done, 1 failed, 2 wrong usage, 130
interrupted. Errors are one line; `--debug` shows where they come from.
"""


def main() -> None:
    """Print the page."""
    print(page())


def page() -> str:
    """The whole page."""
    parts = [INTRODUCTION]
    for parser in _commands(cli._parser()):
        parts.append(f"## {parser.prog}\n")
        parts.append(f"{parser.description}\n")
        parts.append(_usage(parser))
        parts += _table(parser)
    return "\n".join(parts)


def _commands(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield from action.choices.values()


def _usage(parser: argparse.ArgumentParser) -> str:
    """How a command is called: what it needs, and that there is more."""
    words = [parser.prog]
    for action in parser._actions:
        if action.option_strings and action.required:
            words.append(f"{action.option_strings[0]} {_value(action)}")
        elif not action.option_strings:
            words.append(_value(action))
    return f"```text\n{' '.join(words)} [options]\n```\n"


def _table(parser: argparse.ArgumentParser) -> list[str]:
    """A row for each argument and option, but `--help`; what is required comes first."""
    shown = [action for action in parser._actions if "--help" not in action.option_strings]
    shown.sort(key=lambda action: (bool(action.option_strings), not action.required))
    rows = [f"| {_name(action)} | {_help(action)} |" for action in shown]
    return ["| argument | |", "| --- | --- |", *rows, ""]


def _name(action: argparse.Action) -> str:
    """The spellings of an option and its value, or the name of an argument."""
    if not action.option_strings:
        return f"`{_value(action)}`"
    spelled = "`, `".join(action.option_strings)
    value = f" {_value(action)}" if action.nargs != 0 else ""
    return f"`{spelled}{value}`"


def _value(action: argparse.Action) -> str:
    """What stands for a value: a name, or the choices; `...` where there may be several."""
    name = action.metavar or action.dest.upper()
    if action.choices is not None and action.metavar is None:
        name = "|".join(map(str, action.choices))
    if action.nargs == "?":
        return f"[{name}]"
    return f"{name}..." if action.nargs in {"+", "*"} else str(name)


def _help(action: argparse.Action) -> str:
    text = (action.help or "") % {**vars(action), "prog": "weightport"}
    return text.replace("|", "\\|")


if __name__ == "__main__":
    main()
