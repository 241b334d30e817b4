"""The `config.json` of a model: checked key by key, so that no option is silently ignored."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

DIFFUSERS_VERSION = "0.35.0"  # whose format is written; older readers look at it


class Attributes(dict[str, Any]):
    """A dict whose keys are attributes too."""

    def __getattr__(self, key: str) -> Any:
        try:
            return self[key]
        except KeyError:
            raise AttributeError(f"the {type(self).__name__.lower()} has no {key!r}") from None


class Config(Attributes):
    """The config of a model, complete with defaults, as in diffusers and transformers."""


def read_config(
    model: str,
    config: Mapping[str, Any],
    defaults: Mapping[str, Any],
    choices: Mapping[str, Sequence[Any]],
    irrelevant: Collection[str],
) -> Config:
    """`config` with the missing keys filled in.

    Args:
        model: the class name, for messages.
        config: the content of a `config.json`; keys with a leading underscore are bookkeeping.
        defaults: free options and the value each takes when it is absent.
        choices: options of which only some values are implemented; the first is the default.
        irrelevant: keys that other code reads, or that matter only in training.

    Raises:
        ValueError: a value that is not implemented, or an unknown key that is neither null nor false.
    """
    for key, value in config.items():
        if key in choices:
            if value not in choices[key]:
                supported = " or ".join(map(repr, choices[key]))
                raise ValueError(f"{model}: {key} = {value!r} is not supported; it must be {supported}")
        elif key in defaults:
            if value is None and defaults[key] is not None:
                raise ValueError(f"{model}: {key} must not be null")
        elif key not in irrelevant and not key.startswith("_") and value not in (None, False):
            raise ValueError(f"{model}: unknown option {key} = {value!r}")
    return Config({**defaults, **{key: values[0] for key, values in choices.items()}, **config})
