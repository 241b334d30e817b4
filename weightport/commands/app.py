"""`weightport app`."""

from __future__ import annotations

import argparse

from .values import port


def add(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes to its parser."""
    parser.description = (
        "Serve a page for the browser: inspect, convert, compare and try models. Only this machine"
        " reaches it unless --host is given; then it reads no path of this machine, keeps each"
        " visitor's files apart, and limits them."
    )
    option = parser.add_argument
    option("--host", default="127.0.0.1", help="the address to listen at (default: 127.0.0.1)")
    option("--port", type=port, help="default: the first free one from 7860 on")
    option("--no-browser", action="store_false", dest="browser", help="do not open the browser")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command until it is interrupted; returns the exit status."""
    from ..app.server import serve

    serve(arguments.host, arguments.port, arguments.browser)
    return 0
