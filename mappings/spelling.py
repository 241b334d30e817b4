"""Names of a layout that writes no dots."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from .errors import MappingError


class Spelling(NamedTuple):
    """How a layout that writes no dots spells a path: `lora_unet_`, then segments joined by `_`."""

    prefix: str
    join: str

    @classmethod
    def parse(cls, table: str, section: Mapping[str, Any]) -> Spelling:
        """Read the section `[spelling]` of a table.

        Raises:
            MappingError: it holds something else than text for `prefix` and `join`.
        """
        if section.keys() - {"prefix", "join"} or "join" not in section:
            raise MappingError(f"{table}: [spelling] holds `join` and perhaps `prefix`")
        if not all(isinstance(value, str) for value in section.values()):
            raise MappingError(f"{table}: [spelling] holds text")
        return cls(section.get("prefix", ""), section["join"])

    def spell(self, path: str) -> str:
        """The name of a dotted path."""
        return self.prefix + path.replace(".", self.join)
