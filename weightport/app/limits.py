"""How much a visitor may use."""

from __future__ import annotations

from dataclasses import dataclass

_GB = 1_000_000_000


@dataclass(frozen=True)
class Limits:
    """What one visitor, and all together, may use.

    Attributes:
        file_bytes: of one upload.
        session_bytes: of everything that one session keeps: uploads, downloads and results.
        seconds: of one job.
        waiting: jobs that may wait for their turn.
        idle_seconds: after which a session is forgotten whose page says nothing any more.
        pixels: of a side of an image.
        images: of one comparison of schedulers, its references included.
    """

    file_bytes: int = 8 * _GB
    session_bytes: int = 30 * _GB
    seconds: int = 3600
    waiting: int = 20
    idle_seconds: int = 3600
    pixels: int = 1024
    images: int = 200

    def said(self) -> str:
        """The limits in a sentence."""
        return (
            f"A file may have {self.file_bytes // _GB} GB, all that you keep here"
            f" {self.session_bytes // _GB} GB, and a job may take {self.seconds // 60} minutes."
        )


AT_HOME = Limits(file_bytes=100 * _GB, session_bytes=1000 * _GB, seconds=24 * 3600)
"""Of a page that only this machine's user sees."""

FOR_STRANGERS = Limits()
"""Of a page that others see."""
