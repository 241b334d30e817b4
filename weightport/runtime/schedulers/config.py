"""The `scheduler_config.json`: the options of a scheduler are the parameters of its `__init__`, and
the values that one can have are in the type of the parameter, where that is a `Literal`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import (
    Any,
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

FILE = "scheduler_config.json"
RESPACING = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")

EpsilonOrV = Literal["epsilon", "v_prediction"]
Prediction = Literal["epsilon", "sample", "v_prediction"]
FlowPrediction = Literal["epsilon", "sample", "v_prediction", "flow_prediction"]
Variance = Literal[
    None,
    "fixed_small",
    "fixed_small_log",
    "fixed_large",
    "fixed_large_log",
    "learned",
    "learned_range",
]
Ends = Literal["zero", "sigma_min"]
Spread = Literal["karras", "exponential"]
TimeShift = Literal["exponential", "linear"]


class _Configurable(Protocol):
    def _configure(self, options: Options, init: Callable[..., None]) -> None: ...


P = ParamSpec("P")
S = TypeVar("S", bound=_Configurable)


def configured(init: Callable[Concatenate[S, P], None]) -> Callable[Concatenate[S, P], None]:
    """An `__init__` whose parameters are the options of the scheduler: before it begins, `config`
    has them.

    Raises:
        TypeError: an option that the scheduler does not have.
        ValueError: a value that it cannot serve.
    """
    signature = inspect.signature(init)

    @functools.wraps(init)
    def configured_init(self: S, *args: P.args, **kwargs: P.kwargs) -> None:
        if unknown := sorted(kwargs.keys() - signature.parameters.keys()):
            raise TypeError(f"{type(self).__name__} has no option {', '.join(unknown)}")
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


def check(name: str, config: Mapping[str, Any], choices: Mapping[str, tuple[Any, ...]]) -> None:
    """Raise a ValueError if an option of the scheduler `name` has none of its values."""
    for key, allowed in choices.items():
        if config[key] not in allowed:
            expected = " or ".join(map(repr, allowed))
            raise ValueError(f"{name}: {key} = {config[key]!r} must be {expected}")
