"""What came of a job."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ..errors import printable

_LONGEST = 10_000  # characters of a text

CONVERTED = "converted"
DONE = "done before"
PLANNED = "planned"
INSPECTED = "inspected"
SAME = "same"
DIFFERENT = "different"
FAILED = "failed"
BUSY = "busy"  # another batch is at it

BAD = (FAILED, DIFFERENT)


@dataclass(frozen=True)
class Outcome:
    """What came of a job.

    Attributes:
        name: the job's.
        status: one of the words of this module.
        output: path of the result in the folder of results.
        error: why it failed, in a line.
        family: of the model, in words.
        parts: what the sources hold, a line each.
        becomes: what is written, in words.
        read: bytes of the sources.
        written: bytes of the result.
        seconds: that it took.
        notes: what the user should know.
        lacks: what the result lacks.
        reports: title -> path of a page or file in the folder of results.
        parity: whether it passed; None where it was not run.
        pushed: address of the commit or the pull request.
        may_pass: whether what went wrong may be gone at a second try.
        found: what inspecting or comparing gave.
    """

    name: str
    status: str
    sources: tuple[str, ...] = ()
    output: str | None = None
    error: str | None = None
    family: str | None = None
    parts: tuple[str, ...] = ()
    becomes: str | None = None
    read: int | None = None
    written: int | None = None
    seconds: float = 0.0
    notes: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()
    reports: Mapping[str, str] = field(default_factory=dict)
    parity: bool | None = None
    pushed: str | None = None
    may_pass: bool = False
    found: Mapping[str, Any] | None = None

    @property
    def is_bad(self) -> bool:
        """Whether the batch has failed with it."""
        return self.status in BAD

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON; names that are no text are escaped."""
        plain: dict[str, Any] = _text(asdict(self))
        return plain

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Outcome:
        """The outcome that plain data describe."""
        lists = {name: tuple(value) for name, value in fields.items() if isinstance(value, list)}
        return cls(**{**fields, **lists})


def _text(value: Any) -> Any:
    if isinstance(value, str):
        return printable(value, _LONGEST)
    if isinstance(value, Mapping):
        return {_text(key): _text(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_text(item) for item in value]
    return value
