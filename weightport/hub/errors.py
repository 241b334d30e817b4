"""What the Hub and its client say, in our words: one line, and what to do."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from ..errors import printable
from .secrets import hide

_PASSING = (408, 425, 429)  # statuses: a timeout, too early, too many requests
_CLIENTS = ("httpcore", "httpx", "requests", "urllib3")


@contextlib.contextmanager
def silent_in_a_pipe() -> Iterator[None]:
    """The client's progress bars are for a terminal, and what it logs is said in our words."""
    import huggingface_hub.utils

    utils: Any = huggingface_hub.utils
    hidden, verbosity = utils.are_progress_bars_disabled(), utils.logging.get_verbosity()
    if not sys.stderr.isatty():
        utils.disable_progress_bars()
    utils.logging.set_verbosity_error()
    try:
        yield
    finally:
        utils.logging.set_verbosity(verbosity)
        if not hidden:
            utils.enable_progress_bars()


def explain(error: Exception) -> str:
    """What an error of the Hub or its client means and what to do, in one line without secrets."""
    return hide(_explained(error))


def may_pass(error: BaseException | None) -> bool:
    """Whether an error comes from a connection or a busy server, so that a second try may do."""
    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status is not None:
            return status in _PASSING or status >= 500
        if isinstance(error, ConnectionError | TimeoutError) or _is_of_client(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _is_of_client(error: BaseException) -> bool:
    """Whether an error is one of the libraries that speak HTTP."""
    return type(error).__module__.partition(".")[0] in _CLIENTS


def _explained(error: Exception) -> str:
    from huggingface_hub import errors

    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    if isinstance(error, errors.LocalEntryNotFoundError):
        offline = "the Hub may not be asked, because HF_HUB_OFFLINE is set"
        cause = error.__cause__
        return (
            "not downloaded before, and"
            f" {_explained(cause) if isinstance(cause, Exception) else offline}"
        )
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "the Hub may not be asked, because HF_HUB_OFFLINE is set"
    if isinstance(error, errors.GatedRepoError):
        return (
            "gated; ask for access on its page at the Hub, and give the token of that account"
            " (HF_TOKEN)"
        )
    if status == 401:
        return (
            "the Hub does not know you, or there is no such repo; set HF_TOKEN or run `hf auth"
            " login`"
        )
    if status == 403:
        return (
            f"not allowed ({_said(error)}); use a token with write access, or open a pull request"
            " with create_pr"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return "there is no such branch, tag or commit"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "there is no such repo, or this token may not see it; check the name and HF_TOKEN"
    if status == 429:
        return "the Hub asks to wait (429, too many requests); run it again later"
    if status is not None and status >= 500:
        return f"the Hub has a problem ({status}); nothing was changed, run it again later"
    if status is not None or isinstance(error, ValueError):
        return _said(error)
    if type(error) is OSError:  # a body of the wrong size, or a full disk
        return f"{str(error).splitlines()[0]}; nothing of it was kept, run it again"
    cause = error.__cause__ or error
    if isinstance(cause, Exception) and cause is not error:
        return f"{_said(error)} {_explained(cause)}"
    return (
        f"the connection failed ({type(error).__name__}); nothing was changed, run it again to"
        " go on"
    )


def _said(error: Exception) -> str:
    """What the Hub said, or the client."""
    words = getattr(error, "server_message", None) or str(error) or type(error).__name__
    return printable(hide(" ".join(words.split())), 300)
