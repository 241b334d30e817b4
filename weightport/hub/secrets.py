"""Tokens, taken out of every text that is printed, logged or written."""

from __future__ import annotations

import os
import re
from urllib.parse import quote

HIDDEN = "[token]"
_SHORTEST = 4  # characters of what is taken for a token
_FORMS = re.compile(
    r"\bhf_[A-Za-z0-9]{20,}|(?<=\bBearer )[^\s\"',;]+|(?<=://)[^/@\s]+:[^/@\s]+(?=@)"
)
_known: set[str] = set()


def remember(token: object) -> None:
    """Hide a token from now on."""
    if isinstance(token, str) and len(token.strip()) >= _SHORTEST:
        _known.add(token.strip())


def hide(text: str) -> str:
    """Text without tokens: those of this process, and what looks like one."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        remember(os.environ.get(name))
    for token in sorted(_known, key=len, reverse=True):
        for form in (token, quote(token, safe="")):
            text = text.replace(form, HIDDEN)
    return _FORMS.sub(HIDDEN, text)
