"""Configs: how they are read and written, and those of models checked key by key, so that no option
is ignored."""

from __future__ import annotations

import reprlib
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Real
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

from ...errors import printable
from ...io.atomic import merged
from ...io.config_files import DIFFUSERS_VERSION, json_text, write_json
from .source import Place, PlaceOptions, StrPath, open_source, split_options

_UNFIT = (
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    RuntimeError,
    TypeError,
    ValueError,
)
_LONGEST_REASON = 500
_LARGEST = 2**53  # of whole numbers, which others may read as floats


class Attributes(dict[str, Any]):
    """A dict whose keys are attributes too."""

    def __getattr__(self, key: str) -> Any:
        if key in self:
            return self[key]
        raise AttributeError(f"the {type(self).__name__.lower()} has no {key!r}")


class Config(Attributes):
    """The config of a model, complete with defaults, as in diffusers and transformers; it does not
    change."""

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError(
            "a config is read-only; make an object of another: from_config({**config, name: value})"
        )

    __setitem__ = __delitem__ = __setattr__ = __delattr__ = __ior__ = _refuse
    clear = pop = popitem = setdefault = update = _refuse

    def to_dict(self) -> dict[str, Any]:
        """A plain dict of it, to change."""
        return dict(self)

    def __reduce__(self) -> tuple[type[Config], tuple[dict[str, Any]]]:
        return type(self), (dict(self),)


class HasConfig:
    """What has a config in a JSON file of the name `config_name`.

    Attributes:
        refused: what diffusers' objects can do and ours cannot -> what to do instead.
    """

    config_name: ClassVar[str]
    refused: ClassVar[Mapping[str, str]] = {}
    config: Any

    if not TYPE_CHECKING:  # type checkers know `config`, and find misspelt names

        def __getattr__(self, name: str) -> Any:
            if advice := self.refused.get(name):
                raise AttributeError(f"{type(self).__name__} has no {name}: {advice}")
            if name == "config" or name.startswith("_") or name not in self.config:
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            advice = f"read {type(self).__name__}.config.{name}; the object itself has no {name}"
            warnings.warn(advice, FutureWarning, stacklevel=2)
            return self.config[name]

    def register_to_config(self, **options: Any) -> None:
        """Remember options in the config."""
        self.config = Config({**self.config, **options})

    def to_json_string(self) -> str:
        """The content of the file that `save_config` writes."""
        return json_text(self._saved_config())

    @classmethod
    def load_config(
        cls,
        pretrained_model_name_or_path: Place,
        return_unused_kwargs: bool = False,
        return_commit_hash: bool = False,
        **given: Any,
    ) -> Any:
        """The content of the config in a folder or on the Hub, as it is.

        Args:
            pretrained_model_name_or_path: a local folder, or the id of a repository on the Hub.
            return_unused_kwargs: return also a dict of the options that have no meaning here.
            return_commit_hash: return also the hash of the commit on the Hub, None for a folder.
            given: see `PlaceOptions`.

        Raises:
            OSError: there is no such file.
        """
        place, unused = split_options(given, PlaceOptions)
        source = open_source(pretrained_model_name_or_path, **place)
        config = source.json(cls.config_name)
        asked: list[Any] = [unused] if return_unused_kwargs else []
        if return_commit_hash:
            asked.append(source.commit)
        return (config, *asked) if asked else config

    def save_config(self, save_directory: StrPath) -> None:
        """Write the config, defaults included, into a folder that is made if it does not exist."""
        with merged(save_directory) as staging:
            write_json(staging / self.config_name, self._saved_config())

    def _saved_config(self) -> dict[str, Any]:
        options = {key: value for key, value in self.config.items() if not key.startswith("_")}
        return options | {
            "_class_name": type(self).__name__,
            "_diffusers_version": DIFFUSERS_VERSION,
        }


@contextmanager
def described_by(place: str) -> Iterator[None]:
    """Names the config that something cannot be made of.

    Raises:
        ValueError: whatever its making raised, in one line.
    """
    try:
        yield
    except _UNFIT as error:
        reason = printable(str(error), _LONGEST_REASON)
        raise ValueError(f"{place}: {reason}") from error


def check_kinds(owner: str, config: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Check that the options of `owner` are of the kind of their default: a number, text, a list of
    these, or anything but an object where there is none.

    Raises:
        ValueError: one is not.
    """
    for key, value in config.items():
        if key in defaults and not _fits(value, defaults[key]):
            kind = "a number" if isinstance(defaults[key], Real) else f"like {defaults[key]!r}"
            raise ValueError(f"{owner}: {key} = {reprlib.repr(value)} must be {kind}")


def _fits(value: object, default: object) -> bool:
    if isinstance(value, list | tuple):  # often a value for each level
        one = default[0] if isinstance(default, list | tuple) and default else default
        return all(_fits(item, one) for item in value)
    if isinstance(value, int) and abs(value) > _LARGEST:
        return False
    if default is None or value is None or isinstance(default, list | tuple):
        return not isinstance(value, dict)
    if isinstance(default, str):
        return isinstance(value, str)
    return isinstance(value, Real)  # true and false are numbers too


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
        ValueError: a value that is not implemented, or an unknown key that is neither null nor
            false.
    """
    unknown = {}
    for key, value in config.items():
        if key in choices:
            if value not in choices[key]:
                supported = " or ".join(map(repr, choices[key]))
                raise ValueError(
                    f"{model}: {key} = {value!r} is not supported; it must be {supported}"
                )
        elif key not in defaults:
            unknown[key] = value
        elif value is None and defaults[key] is not None and key not in irrelevant:
            raise ValueError(f"{model}: {key} must not be null")
    check_kinds(model, config, defaults)
    refuse_unknown(model, unknown, irrelevant)
    first = {key: values[0] for key, values in choices.items()}
    return Config({**first, **defaults, **config})


def refuse_unknown(model: str, options: Mapping[str, Any], irrelevant: Collection[str]) -> None:
    """Raise a ValueError if options, which a class does not have, ask for something: they are
    neither irrelevant nor null nor false."""
    for key, value in options.items():
        if key not in irrelevant and not key.startswith("_") and value not in (None, False):
            raise ValueError(f"{model}: unknown option {key} = {value!r}")
