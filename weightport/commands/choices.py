"""What several commands offer as choices."""

from ..mappings.families import NAMES as FAMILIES
from ..mappings.families import component_names, halves

COMPONENTS = (*component_names(), *halves())

__all__ = ["COMPONENTS", "FAMILIES"]
