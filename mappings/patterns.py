"""Many patterns of names, looked for in many names."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Names:
    """Names of tensors in which patterns with `*` are looked for, in time that is linear in both.

    A pattern is tried on single names only where its longest piece without `*` is in any of them.
    """

    names: Collection[str]

    def matching(self, pattern: str) -> list[str]:
        """The names that fit a pattern, in their order."""
        literal = max(re.split(r"\*|\?|\[.*?\]", pattern), key=len)
        return fnmatch.filter(self.names, pattern) if literal in self._text else []

    @cached_property
    def _text(self) -> str:
        return "\n".join(self.names)
