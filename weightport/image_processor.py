"""What images go through, where scripts look for it."""

from .runtime.images import VaeImageProcessor

__all__ = ["VaeImageProcessor"]
