"""The `scheduler_config.json`: the options of a scheduler are the parameters of its `__init__`, and
the values that one can have are in the type of the parameter, where that is a `Literal`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

FILE = "scheduler_config.json"
MOST_STEPS = 100_000  # of training; known models have 1,000
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


def check(name: str, config: Mapping[str, Any], choices: Mapping[str, tuple[Any, ...]]) -> None:
    """Raise a ValueError if an option of the scheduler `name` has none of its values, or if the
    training that it tells of is longer than any."""
    steps = config.get("num_train_timesteps", 1)
    if not 1 <= steps <= MOST_STEPS:
        raise ValueError(f"{name}: num_train_timesteps = {steps} must be 1 to {MOST_STEPS}")
    for key, allowed in choices.items():
        if config[key] not in allowed:
            expected = " or ".join(map(repr, allowed))
            raise ValueError(f"{name}: {key} = {config[key]!r} must be {expected}")
