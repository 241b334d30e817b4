"""Gradio, which only the page needs, without what only its own authors need."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
from collections.abc import Iterator, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from ..errors import ConversionError

_WRITES_STUBS = "gradio.component_meta"


class _WithoutStubs(MetaPathFinder):
    """Has Gradio leave its type stubs alone, which it compares with its sources and writes again
    at every import: half of the time that importing it takes."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The module as others find it, changed once it is loaded."""
        if name != _WRITES_STUBS:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        loader = spec.loader
        load = loader.exec_module

        def load_changed(module: ModuleType) -> None:
            load(module)
            module.create_or_modify_pyi = lambda *arguments: None  # type: ignore[attr-defined]

        loader.exec_module = load_changed  # type: ignore[method-assign]
        return spec


# nothing is asked of anyone outside
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
sys.meta_path.insert(0, _WithoutStubs())
try:
    import gradio as gr
except ImportError:
    raise ConversionError('the page needs Gradio; run `pip install "weightport[app]"`') from None

__all__ = ["drawing", "gr"]


@contextlib.contextmanager
def drawing() -> Iterator[None]:
    """While a page is drawn, Gradio makes it two web servers that it throws away; not here."""
    from gradio.routes import App

    maker: Any = App
    made = maker.create_app
    maker.create_app = staticmethod(lambda *arguments, **options: None)
    try:
        yield
    finally:
        maker.create_app = staticmethod(made)
