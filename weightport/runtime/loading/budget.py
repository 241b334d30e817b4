"""A config may not ask for a model that its file cannot fill: each part takes time and memory,
also on the meta device."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules import module as hooks

MOST_PARAMETERS = 20_000
"""Of any model; the UNet of SDXL has 1,680."""

MOST_NUMBERS = 1 << 26
"""That are made up where weights have another shape than the config says; SD's largest tensor, the
table of tokens, has 38 million."""

_SPARE = 1_000  # so that a config which is a little too large is told by what is missing


def parameters_for(tensors: int) -> int:
    """How many parameters a model may have, of which a file has so many tensors."""
    return min(2 * tensors + _SPARE, MOST_PARAMETERS)


def check_numbers(wanted: int, where: str) -> None:
    """Check how many random numbers stand for weights that do not fit.

    Raises:
        ValueError: they would take more memory than a small model.
    """
    if wanted > MOST_NUMBERS:
        raise ValueError(
            f"{where}: {wanted} numbers of other shapes than its config says; at most"
            f" {MOST_NUMBERS} are made up"
        )


@contextmanager
def at_most(parameters: int) -> Iterator[None]:
    """Within it, this thread may not build models of more parameters, nor of more parts.

    Raises:
        ValueError: it is about to.
    """
    thread = threading.get_ident()
    made = {"parameters": 0, "parts": 0}

    def count(what: str, limit: int) -> None:
        if threading.get_ident() == thread:
            made[what] += 1
            if made[what] > limit:
                raise ValueError(f"more than {limit} {what} are asked for; the weights have fewer")

    def parameter(_: nn.Module, name: str, value: object) -> None:
        count("parameters", parameters)

    def part(_: nn.Module, name: str, value: object) -> None:
        count("parts", 10 * parameters)

    handles = (
        hooks.register_module_parameter_registration_hook(parameter),
        hooks.register_module_module_registration_hook(part),
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
