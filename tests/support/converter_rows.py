"""Where a table's rows go, beside where diffusers' converter of single files puts them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from weightport.mappings.table import Link

from .transformer_families import State


def assert_rows_go_where_theirs_go(
    links: Sequence[Link],
    targets: Mapping[str, tuple[int, ...]],
    convert: Callable[[dict[str, Any]], Mapping[str, torch.Tensor]],
    prefix: str = "",
) -> None:
    """Assert that a converter puts every row of every source where the links put it.

    Told by numbers that are the same along the other axes, so that they take no memory.

    Args:
        prefix: of the sources' names, which the converter does not expect.
    """
    rng = np.random.default_rng(0)
    checkpoint = {}
    expected: State = {}
    for link in links:
        shape = link.source_shape(targets)
        column = rng.standard_normal((shape[0], *[1] * (len(shape) - 1)), np.float32)
        source = np.broadcast_to(column.astype(np.float16), shape)
        name = link.sources[0].removeprefix(prefix)
        checkpoint[name] = torch.from_numpy(column).half().expand(shape)
        results = link.op.apply([source], len(link.targets)) if link.op else [source]
        expected |= dict(zip(link.targets, results, strict=True))
    theirs = convert(checkpoint)
    assert theirs.keys() == expected.keys()
    for key, array in expected.items():
        assert tuple(theirs[key].shape) == array.shape, key
        first: tuple[Any, ...] = (slice(None), *[0] * (array.ndim - 1))
        assert np.array_equal(theirs[key].numpy()[first], array[first]), key
