"""The op language: einops notation, shapes, inverses, refusals."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightport.mappings.errors import MappingError
from weightport.mappings.ops import Op


def _array(*shape: int) -> np.ndarray:
    return np.arange(math.prod(shape), dtype=np.float32).reshape(shape)


@pytest.mark.parametrize(
    ("text", "shape", "expected"),
    [
        ("... i o -> o i ...", (5, 7), lambda a: a.T),
        ("... i o -> o i ...", (3, 2, 5, 7), lambda a: a.transpose(3, 2, 0, 1)),
        ("1 1 i o -> o i", (1, 1, 5, 7), lambda a: a[0, 0].T),
        ("o i -> o i 1 1", (5, 7), lambda a: a[:, :, None, None]),
        ("(h d) i -> (d h) i", None, None),
    ],
)
def test_apply_matches_numpy(
    text: str,
    shape: tuple[int, ...],
    expected: Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]],
) -> None:
    op = Op.parse(text)
    if shape is None:
        with pytest.raises(MappingError, match="does not fit"):
            op.apply([_array(6, 4)])
        return
    (result,) = op.apply([_array(*shape)])
    np.testing.assert_array_equal(result, expected(_array(*shape)))
    assert op.shapes([shape]) == [result.shape]
    assert op.inverse.inverse == op


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("... i o -> o i ...", (5, 7)),
        ("... i o -> o i ...", (3, 2, 5, 7)),
        ("1 1 i o -> o i", (1, 1, 5, 7)),
        ("o i -> 1 1 i o", (5, 7)),
    ],
)
def test_permutation_and_reshape_are_the_op(text: str, shape: tuple[int, ...]) -> None:
    op = Op.parse(text)
    permutation = op.permutation(len(shape))
    (expected,) = op.apply([_array(*shape)])
    np.testing.assert_array_equal(
        _array(*shape).transpose(permutation).reshape(expected.shape), expected
    )


def test_fused_tensors_split_and_merge() -> None:
    split = Op.parse("(p o) i -> p o i")
    fused = _array(6, 4)
    parts = split.apply([fused], 3)
    assert [part.tolist() for part in parts] == [
        fused[:2].tolist(),
        fused[2:4].tolist(),
        fused[4:].tolist(),
    ]
    assert split.permutation(2) is None
    np.testing.assert_array_equal(split.inverse.apply(parts)[0], fused)
    assert split.shapes([(6, 4)], 3) == [(2, 4)] * 3
    assert split.inverse.shapes([(2, 4)] * 3) == [(6, 4)]


@given(st.permutations(range(4)), st.lists(st.integers(0, 4), min_size=4, max_size=4))
def test_inverse_restores_every_permutation(order: list[int], shape: tuple[int, ...]) -> None:
    names = "abcd"
    op = Op.parse(f"{' '.join(names)} -> {' '.join(names[i] for i in order)}")
    array = _array(*shape)
    np.testing.assert_array_equal(op.inverse.apply(op.apply([array]))[0], array)


@pytest.mark.parametrize(
    "text",
    [
        "i o",
        "i o -> o",
        "i i -> i i",
        "i (o -> o i",
        "i o) -> o i",
        "i o -> o j",
        "i-o -> o i",
        "2 o -> o 2",
    ],
)
def test_nonsense_is_refused(text: str) -> None:
    with pytest.raises(MappingError):
        Op.parse(text)


def test_a_shape_that_does_not_fit_is_refused() -> None:
    with pytest.raises(MappingError, match="does not fit shape"):
        Op.parse("1 1 i o -> o i").apply([_array(3, 3, 2, 2)])
    with pytest.raises(MappingError, match="does not fit shape"):
        Op.parse("i o -> o i").shapes([(1, 2, 3)])
