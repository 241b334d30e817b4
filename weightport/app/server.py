"""Serves the page, until it is told to stop."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any, NoReturn

from .desk import Desk
from .limits import AT_HOME, FOR_STRANGERS
from .sessions import Sessions

_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_EVERY = 60  # seconds between two looks for visits that ended
_STYLE = Path(__file__).with_name("style.css")


def serve(host: str = "127.0.0.1", port: int | None = None, browser: bool = False) -> None:
    """Serve the page until the process is interrupted.

    Args:
        host: the address to listen at; one that others reach makes the page one for strangers.
        port: by default the first free one from 7860 on.
        browser: open the page in the user's browser.

    Raises:
        ConversionError: Gradio is not installed.
        OSError: the port is taken.
    """
    on_space = "SPACE_ID" in os.environ
    public = on_space or host not in _LOOPBACK
    limits = FOR_STRANGERS if public else AT_HOME
    sessions = Sessions(limits)
    desk = Desk(sessions, limits, public, logs_in=on_space and "OAUTH_CLIENT_ID" in os.environ)
    signal.signal(signal.SIGTERM, _stop)
    try:
        page = _started(desk, host, port, browser)
        print(f"weightport runs at {page.local_url} until you press Ctrl-C", flush=True)
        while True:
            time.sleep(_EVERY)
            sessions.expire()
    finally:
        sessions.close_all()


def _stop(signum: int, frame: object) -> NoReturn:
    raise SystemExit(128 + signum)


def _started(desk: Desk, host: str, port: int | None, browser: bool) -> Any:
    """The page, served by threads of this process."""
    os.environ["GRADIO_TEMP_DIR"] = str(desk.sessions.arrivals)
    os.environ["NO_PROXY"] = ",".join(filter(None, [os.environ.get("NO_PROXY"), *_LOOPBACK]))
    from starlette.middleware import Middleware

    from .framework import drawing, gr
    from .gate import Gate
    from .page import build

    fonts = ["system-ui", "sans-serif"]
    mono = ["ui-monospace", "monospace"]
    gate = Middleware(
        Gate,
        sessions=desk.sessions,
        limits=desk.limits,
        public=desk.public,
    )
    with drawing():
        page = build(desk)
    page.launch(
        server_name=host,
        server_port=port,
        inbrowser=browser,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        ssr_mode=False,
        mcp_server=False,
        enable_monitoring=False,
        run_history=False,
        pwa=False,
        footer_links=[],
        max_file_size=desk.limits.file_bytes,
        app_kwargs={"middleware": [gate], "docs_url": None, "redoc_url": None},
        theme=gr.themes.Default(font=fonts, font_mono=mono),
        css_paths=[_STYLE],
    )
    return page
