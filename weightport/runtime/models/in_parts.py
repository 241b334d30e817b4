"""What autoencoders have in common that can take images in parts."""

from __future__ import annotations


class InParts:
    """Slicing and tiling, which an autoencoder looks at when it encodes and decodes."""

    use_tiling = False
    use_slicing = False

    def enable_tiling(self, use_tiling: bool = True) -> None:
        """Take large images in overlapping tiles.

        That takes less memory, and gives a slightly different result.
        """
        self.use_tiling = use_tiling

    def disable_tiling(self) -> None:
        """Take images whole."""
        self.use_tiling = False

    def enable_slicing(self) -> None:
        """Take the images of a batch one at a time."""
        self.use_slicing = True

    def disable_slicing(self) -> None:
        """Take the images of a batch at once."""
        self.use_slicing = False
