"""What mkdocs cannot do alone: pages made from the code, and pages that lie beside `docs`."""

from __future__ import annotations

import logging
import re
import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "scripts")]

import cli_page  # noqa: E402  beside this file
import rosetta  # noqa: E402

BESIDE = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "reporting.md",
}

# weightport.__all__ ends with names that the registry holds; who reads without running cannot know
logging.getLogger("mkdocs.plugins.griffe").addFilter(
    lambda record: "Unsupported item in weightport.__all__" not in record.getMessage()
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are no files of `docs`."""
    made = {"cli.md": cli_page.page(), "rosetta.md": rosetta.page()}
    for name, page in BESIDE.items():
        made[page] = _moved((ROOT / name).read_text(encoding="utf-8"))
    for name, text in made.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links to files that are no pages become their names."""
    return re.sub(r"\[([^\]]*)\]\((?:\.\./)[^)]*\)", r"`\1`", markdown)


def _moved(text: str) -> str:
    """Markdown of the repository's root, for a page among those of `docs`."""
    for name, page in BESIDE.items():
        text = text.replace(f"]({name})", f"]({page})")
    return re.sub(r"\]\(docs/", "](", text)
