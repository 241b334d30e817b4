"""The YAML at the top of a model card, checked before anything is built of it."""

from __future__ import annotations

from pathlib import Path

from ..errors import ConversionError, printable
from ..io.documents import check

_MAX_LENGTH = 64 << 10  # characters; PyYAML reads some 50,000 a second


def check_front_matter(text: str, path: Path) -> None:
    """Check the front matter of a card, if it has any; `path` is for messages.

    Raises:
        ConversionError: it is too long, no YAML, has aliases, with which few lines can stand for
            any number, or a field of another type than the Hub gives it.
    """
    import yaml
    from huggingface_hub.repocard import REGEX_YAML_BLOCK

    block = REGEX_YAML_BLOCK.search(text)
    if block is None:
        return
    front = block.group(2)
    if len(front) > _MAX_LENGTH:
        raise ConversionError(f"{path}: more than {_MAX_LENGTH} characters between its `---`")
    try:
        has_alias = any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(front))
        content = None if has_alias else yaml.safe_load(front)
    except Exception as error:  # whatever a constructor of PyYAML makes of a wrong value
        raise ConversionError(
            f"{path}: the YAML between its `---` cannot be read ({printable(error)})"
        ) from None
    if has_alias:
        raise ConversionError(f"{path}: the YAML between its `---` has aliases; write it out")
    check(content or {}, "card", path)
    if content and not all(isinstance(name, str) for name in content):
        raise ConversionError(f"{path}: a field between its `---` has a name that is no text")
