"""Options of models and schedulers: the parameters of `__init__`, in the order of diffusers; the
values that one can have are in the type of the parameter, where that is a `Literal`."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import (
    Any,
    ClassVar,
    Concatenate,
    Literal,
    ParamSpec,
    Protocol,
    TypeVar,
    get_args,
    get_origin,
    get_type_hints,
)

Options = dict[str, Any]


class _Configurable(Protocol):
    ignored: ClassVar[tuple[str, ...]]

    def _configure(self, options: Options, init: Callable[..., None]) -> None: ...


P = ParamSpec("P")
S = TypeVar("S", bound=_Configurable)


def configured(init: Callable[Concatenate[S, P], None]) -> Callable[Concatenate[S, P], None]:
    """An `__init__` whose parameters are the options of the object: before it begins, `config` has
    them.

    Raises:
        TypeError: an option that the class does not have.
        ValueError: a value that it cannot serve.
    """
    signature = inspect.signature(init)

    @functools.wraps(init)
    def configured_init(self: S, *args: P.args, **kwargs: P.kwargs) -> None:
        name = type(self).__name__
        if args and isinstance(args[0], Mapping):
            raise TypeError(f"{name} takes options; a config is for {name}.from_config")
        unknown = sorted(kwargs.keys() - signature.parameters.keys())
        if set(unknown) - set(self.ignored):
            raise TypeError(f"{name} has no option {', '.join(unknown)}")
        if unknown:
            warnings.warn(f"{name} has no use for {', '.join(unknown)}", stacklevel=2)
            for option in unknown:
                del kwargs[option]
        _, *options = signature.bind(self, *args, **kwargs).arguments.items()
        self._configure(dict(options), init)
        init(self, *args, **kwargs)

    return configured_init  # type: ignore[return-value]  # Concatenate has no names


def defaults_of(init: Callable[..., None]) -> Options:
    """The options that an `__init__` has, and their defaults."""
    _, *parameters = inspect.signature(init).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters}


@functools.cache
def choices_of(init: Callable[..., None]) -> dict[str, tuple[Any, ...]]:
    """The options that take only some values, and these."""
    hints = get_type_hints(init)
    return {name: get_args(hint) for name, hint in hints.items() if get_origin(hint) is Literal}
