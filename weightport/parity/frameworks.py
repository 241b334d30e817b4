"""The programs that a repo is compared with, each started by a script in `runners/`."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from ..errors import ConversionError
from ..mappings.facts import facts

OURS = "weightport"  # our own runtime


@dataclass(frozen=True)
class Framework:
    """A program, as `mappings/facts/parity.toml` describes it."""

    name: str
    title: str
    extra: str
    maths: str
    differs: Mapping[str, str] = field(default_factory=dict)
    draws: Sequence[str] = ()
    sampler: str = ""
    multiple: int = 1
    rounds: bool = False
    arguments: Mapping[str, Any] = field(default_factory=dict)
    needs: str | None = None
    renames: bool = False

    def runs_under(self, python: str) -> bool:
        """Whether an interpreter has what the program needs.

        A module that is installed may still not fit what else is there, so it is imported.
        """
        if self.needs is None:
            return True
        command = [python, "-c", f"import {self.needs}"]
        try:
            return subprocess.run(command, capture_output=True, check=False).returncode == 0
        except OSError:
            return False

    def semantics(self, check: str) -> tuple[str, ...]:
        """Whose maths our runtime follows: first this one's, then diffusers' if that may differ."""
        return (self.maths, "diffusers") if check in self.differs else (self.maths,)


@cache
def frameworks() -> dict[str, Framework]:
    """Every program by name. Treat as read-only."""
    entries = facts("parity")["frameworks"].items()
    return {name: Framework(name, **entry) for name, entry in entries}


def framework_of(layout: str, family: str, class_name: str, check: str, python: str) -> Framework:
    """The program that runs a check of a source.

    Args:
        layout: the source's.
        class_name: of the model.
        python: the interpreter that the program would run under.

    Raises:
        ConversionError: there is none.
    """
    for source in facts("parity")["sources"]:
        takes = "checks" not in source or check in source["checks"].get(family, ())
        lacks = class_name in source.get("lacks", ())
        if source["layout"] == layout and takes and not lacks:
            found = frameworks()[source["framework"]]
            if found.runs_under(python):
                return found
    raise ConversionError(
        f"{check}: no program is known that runs a file of {class_name} with {layout}'s names;"
        " --against diffusers compares the repository itself"
    )


def call_of(check: str, class_name: str) -> str:
    """How the model of a check is called: `embed`, `denoise`, `control`, `flow`, `decode` ...

    mappings/facts/parity.toml has them all.

    Raises:
        ConversionError: our runtime has no such model.
    """
    calls: dict[str, str] = facts("parity")["calls"]
    found = calls.get(check) or calls.get(class_name)
    if found is None:
        raise ConversionError(
            f"{check}: the runtime has no {class_name}, so nothing can be compared;"
            " --component names another part"
        )
    return found
