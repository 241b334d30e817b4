"""Pages from templates: whole, with nothing to fetch, and with every name in them escaped."""

from __future__ import annotations

import base64
import io
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import ConversionError
from ..io.sizes import in_words

if TYPE_CHECKING:
    from jinja2 import Environment

FOLDER = Path(__file__).parent


def render(template: str, **values: Any) -> str:
    """The page that a template makes of values.

    Raises:
        ConversionError: Jinja2 is not installed.
    """
    return _environment().get_template(template).render(values)


@cache
def _environment() -> Environment:
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
    except ImportError:
        raise lacking("Jinja2") from None
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        loader=FileSystemLoader([FOLDER / "templates", FOLDER]),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"data_uri": data_uri, "file_uri": file_uri, "words": in_words}
    return environment


def lacking(package: str) -> ConversionError:
    """What to do where a package of the reports is not installed."""
    return ConversionError(f'a report needs {package}; run `pip install "weightport[report]"`')


def data_uri(image: np.ndarray[Any, Any]) -> str:
    """A uint8 image (h, w, 3) as a PNG inside a URI."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(image).save(file, "png", optimize=True)
    return _png_uri(file.getvalue())


def file_uri(file: Path) -> str:
    """A PNG file inside a URI."""
    return _png_uri(file.read_bytes())


def _png_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
