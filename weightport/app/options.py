"""Fields for the options of a conversion, made from what describes them for the command line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..converters.settings import Option, Settings, options
from ..errors import ConversionError, printable
from ..reports.page import render
from .framework import gr

ALWAYS = ("to", "dtype")
"""Options that the page asks for in any case."""

_OURS = ("sync", "hashes", "overwrite", "dry_run", "revision")  # the page decides them
_FILES = ("vae", "lora", "embedding")  # they name further files
_BY_EVIDENCE = "by the evidence"


@dataclass(frozen=True)
class OptionField:
    """An option, with a place for the evidence beside it.

    Attributes:
        group: what is shown or hidden.
        evidence: an HTML component.
        component: the field itself.
    """

    name: str
    option: Option
    group: Any
    evidence: Any
    component: Any

    def value(self, given: Any) -> Any:
        """What `convert` takes for it.

        Raises:
            ConversionError: it is not a value of the option.
        """
        if isinstance(self.option.typed, bool):
            return bool(given) is not self.option.typed
        text = str(given or "").strip()
        if text in ("", _BY_EVIDENCE):
            return None
        try:
            if isinstance(self.option.typed, tuple) and self.option.parse is str:
                return tuple(line.strip() for line in text.splitlines() if line.strip())
            return self.option.parse(text)
        except ValueError:
            raise ConversionError(f"{self.label}: {printable(text)} is not a value of it") from None

    @property
    def label(self) -> str:
        """Its name, for people."""
        return label(self.name)


def label(name: str) -> str:
    """The name of an option, for people."""
    return name.replace("_", " ").capitalize()


def option_fields() -> list[OptionField]:
    """A hidden field for every option that a visitor may choose."""
    fields = []
    for name, option in options(Settings).items():
        if name not in (*ALWAYS, *_OURS, *_FILES):
            with gr.Group(visible=False, elem_id=f"option-{name}") as group:
                evidence = gr.HTML()
                fields.append(OptionField(name, option, group, evidence, field(name, option)))
    return fields


def field(name: str, option: Option) -> Any:
    """The field of an option."""
    shown: dict[str, Any] = {"label": label(name), "info": option.help, "elem_id": f"value-{name}"}
    if isinstance(option.typed, bool):
        return gr.Checkbox(value=False, **shown)
    if option.choices:
        first = [] if option.typed else [_BY_EVIDENCE]
        choices = [*first, *option.choices]
        kind = gr.Radio if len(choices) <= _FEW else gr.Dropdown
        return kind(choices, value=choices[0] if first else option.typed, **shown)
    several = isinstance(option.typed, tuple) and option.parse is str
    more = "one a line" if several else (option.metavar or "")
    return gr.Textbox(value="", lines=1, placeholder=more, **shown)


_FEW = 12  # choices that are shown side by side


def given(fields: list[OptionField], values: Mapping[str, Any]) -> dict[str, Any]:
    """The options that a visitor set.

    Raises:
        ConversionError: a value is none of its option.
    """
    found = {one.name: one.value(values[one.name]) for one in fields}
    return {name: value for name, value in found.items() if value not in (None, ())}


def shown_evidence(sentences: list[str]) -> str:
    """The sentences that leave an option open, for the page."""
    return render("app/evidence.html", sentences=sentences)
