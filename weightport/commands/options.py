"""Options of a command, made from the fields of a dataclass that describes them."""

from __future__ import annotations

import argparse
from typing import Any

from ..converters.settings import Option, options


def add_options(parser: argparse.ArgumentParser, kind: type) -> None:
    """Add an option for each field of a dataclass that describes one."""
    for name, option in options(kind).items():
        _add(parser, name, option)


def given(arguments: argparse.Namespace, kind: type) -> dict[str, Any]:
    """The values of the fields, as they were typed."""
    return {name: getattr(arguments, name) for name in options(kind)}


def _add(parser: argparse.ArgumentParser, name: str, option: Option) -> None:
    flag = option.flag or f"--{name.replace('_', '-')}"
    if option.typed is False:
        parser.add_argument(flag, dest=name, action="store_true", help=option.help)
    elif option.typed is True:
        flag = option.flag or f"--no-{name.replace('_', '-')}"
        parser.add_argument(flag, dest=name, action="store_false", help=option.help)
    elif isinstance(option.typed, tuple) and option.parse is str:
        parser.add_argument(
            flag, dest=name, action="append", default=[], metavar=option.metavar, help=option.help
        )
    else:
        shown = "" if option.typed in (None, ()) else f" (default: {option.typed})"
        parser.add_argument(
            flag,
            dest=name,
            type=option.parse,
            choices=option.choices or None,
            default=option.typed,
            metavar=option.metavar,
            help=f"{option.help}{shown}",
        )
