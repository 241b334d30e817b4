"""The model card of an adapter or an embedding alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import printable
from ...mappings.facts import facts
from .card import front_matter, table


@dataclass(frozen=True)
class Described:
    """What a card says of a file.

    Attributes:
        kind: a key of `changes` in `facts/card.toml`.
        tags: what cards call such models.
        families: titles of those whose models it is for.
        words: what prompts say.
        facts: rows of what it holds.
        names: of the files, the one to load first.
        in_diffusers: whether diffusers loads it as it is.
    """

    kind: str
    tags: Sequence[str]
    families: Sequence[str]
    words: Sequence[str]
    facts: Sequence[tuple[str, str]]
    names: Sequence[str]
    in_diffusers: bool


def adapter_card(
    described: Described,
    repo_id: str,
    sha256: Mapping[str, str],
    *,
    license: str | None,
    base_model: str | None,
) -> str:
    """The text of a card.

    Args:
        repo_id: what the usage snippets load.
        sha256: file -> digest.
        base_model: the Hub id of the model that it changes.
    """
    known = facts("card")["changes"][described.kind]
    data: dict[str, Any] = {
        "base_model": base_model,
        "base_model_relation": "adapter" if base_model else None,
        "instance_prompt": json.dumps(", ".join(described.words)) if described.words else None,
        "library_name": "diffusers",
        "license": license,
        "pipeline_tag": "text-to-image",
        "tags": [known["tag"], *described.tags, "weightport"],
    }
    head = front_matter({key: value for key, value in data.items() if value is not None})
    rows = [*described.facts, *((name, f"`{digest}`") for name, digest in sha256.items())]
    sections = [f"# {known['title']} for {' or '.join(described.families) or 'diffusion models'}"]
    if described.words:
        listed = ", ".join(f"`{printable(word)}`" for word in described.words)
        sections.append(f"Trigger words: {listed}")
    sections += ["## Use", *_snippets(described, repo_id, base_model or "BASE_MODEL")]
    sections += ["## What it holds", table(("", ""), rows)]
    return f"---\n{head}---\n\n" + "\n\n".join(sections) + "\n"


def _snippets(described: Described, repo_id: str, base_model: str) -> list[str]:
    """How to load it."""
    known = facts("card")["changes"][described.kind]
    libraries = ["weightport", "diffusers"] if described.in_diffusers else ["weightport"]
    prompt = described.words[0] if described.words else facts("card")["prompt"]
    snippets = []
    for library in libraries:
        lines = [
            f"from {library} import DiffusionPipeline",
            "",
            f'pipe = DiffusionPipeline.from_pretrained("{base_model}")',
            f'pipe.{known["method"]}("{repo_id}", weight_name={json.dumps(described.names[0])})',
            f"image = pipe({json.dumps(prompt, ensure_ascii=False)}).images[0]",
        ]
        snippets.append("```python\n" + "\n".join(lines) + "\n```")
    if not described.in_diffusers:
        snippets.append("diffusers does not load this file as it is.")
    return snippets
