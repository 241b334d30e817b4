"""What scripts take from `diffusers.utils`: images in and out."""

from __future__ import annotations

import io
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image, ImageOps

from ..runtime.images import numpy_to_pil, pt_to_pil

__all__ = ["load_image", "make_image_grid", "numpy_to_pil", "pt_to_pil"]

_MAX_BYTES = 200_000_000  # of an image that is downloaded
_TIMEOUT = 60  # seconds


def load_image(
    image: str | Path | Image.Image,
    convert_method: Callable[[Image.Image], Image.Image] | None = None,
) -> Image.Image:
    """An image of a file or an address, the right way up, in RGB.

    Args:
        image: a local path, `http://…` or `https://…`, or an image.
        convert_method: what is done to it in place of the conversion to RGB.

    Raises:
        ValueError: it is none of these, or too large to download.
    """
    if isinstance(image, (str, Path)):
        image = _opened(image)
    elif not isinstance(image, Image.Image):
        raise ValueError(f"an image must be a path, an address or a PIL image, not {image!r}")
    upright = ImageOps.exif_transpose(image)
    return upright.convert("RGB") if convert_method is None else convert_method(upright)


def _opened(place: str | Path) -> Image.Image:
    if str(place).startswith(("http://", "https://")):
        with urllib.request.urlopen(str(place), timeout=_TIMEOUT) as answer:
            content = answer.read(_MAX_BYTES + 1)
        if len(content) > _MAX_BYTES:
            raise ValueError(f"{place}: more than {_MAX_BYTES} bytes; download it yourself")
        return Image.open(io.BytesIO(content))
    if not Path(place).is_file():
        raise ValueError(f"{place}: neither a file nor an address that begins with http")
    return Image.open(place)


def make_image_grid(
    images: Sequence[Image.Image], rows: int, cols: int, resize: int | None = None
) -> Image.Image:
    """Images side by side, row by row.

    Args:
        images: `rows` times `cols` of them; the size of the first one is that of a cell.
        rows: of the grid.
        cols: of the grid.
        resize: make them squares of this edge first.

    Raises:
        ValueError: there is another number of them.
    """
    if len(images) != rows * cols:
        raise ValueError(f"{len(images)} images do not fill {rows} rows of {cols}")
    cells = [one.resize((resize, resize)) for one in images] if resize else list(images)
    width, height = cells[0].size
    grid = Image.new("RGB", (cols * width, rows * height))
    for place, cell in enumerate(cells):
        row, column = divmod(place, cols)
        grid.paste(cell, (column * width, row * height))
    return grid
