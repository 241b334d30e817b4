"""The layouts: whose names the tensors of a file have, and what is true of all files in one."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

from .facts import facts

NAMES = ("diffusers", "kerascv", "kerashub", "ldm")
"""Every layout; each has its file in `facts/`."""

CANONICAL = "diffusers"
"""The layout in the middle: every table is between it and another one."""


class TextActivation(NamedTuple):
    """A choice that no file of a layout tells.

    Attributes:
        families: in whose text encoders there is one.
        note: why it must be chosen, in words.
        choices: what the user says -> `hidden_act` of the text encoder.
    """

    families: tuple[str, ...]
    note: str
    choices: Mapping[str, str]


class Layout(NamedTuple):
    """What is true of every model in a layout.

    Attributes:
        title: what it is called.
        tags: of model cards of what comes from it.
        scheduler: the `scheduler_config.json` of every model; None where files differ in it.
        pad_token: what fills prompts up; None where families differ in it.
        text_encoder: options of every text encoder's config.
        text_activation: what the user must say of a text encoder.
        base_models: family -> the Hub id of the model whose weights its programs start from.
        stock_files: family -> the names of the files that its programs download.
    """

    name: str
    title: str
    tags: tuple[str, ...]
    scheduler: Mapping[str, Any] | None
    pad_token: str | None
    text_encoder: Mapping[str, Any]
    text_activation: TextActivation | None
    base_models: Mapping[str, str]
    stock_files: Mapping[str, list[str]]


@cache
def layouts() -> dict[str, Layout]:
    """Every known layout by name. Treat as read-only."""
    return {name: _layout(name) for name in NAMES}


def _layout(name: str) -> Layout:
    known = facts(name)
    activation = known.get("text_activation")
    return Layout(
        name=name,
        title=known["title"],
        tags=tuple(known.get("tags", ())),
        scheduler=known.get("scheduler"),
        pad_token=known.get("pad_token"),
        text_encoder=known.get("text_encoder", {}),
        text_activation=_text_activation(activation) if activation else None,
        base_models=known.get("base_models", {}),
        stock_files=known.get("stock_files", {}),
    )


def _text_activation(entry: Mapping[str, Any]) -> TextActivation:
    return TextActivation(tuple(entry["families"]), entry["note"], entry["choices"])
