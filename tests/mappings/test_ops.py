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
        "0 o -> o 0",
        "2 2 -> 2 2",
        "2 o -> o 3",
        "(i (o p)) -> i o p",
        "q+k i -> (q+v) i",
        "q+k i -> (q+2k) i",
        "q+q i -> (q+q) i",
        "q+k i -> q k i",
        "q+k i+o -> (q+k) (i+o)",
        "q+k i -> (q+k) o",
        "q+0k i -> (q+0k) i",
        "q+2 i -> (q+2) i",
        "q+k i",
        "(q+k -> q+k",
        "((q+k) i) -> (q+k) i",
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


# --- numbers and sums -----------------------------------------------------------------------------


def test_a_number_is_an_axis_of_that_size() -> None:
    op = Op.parse("i 12 d -> (12 d) i")
    array = _array(5, 12, 3)
    (result,) = op.apply([array])
    np.testing.assert_array_equal(result, array.transpose(1, 2, 0).reshape(36, 5))
    assert op.inverse.shapes([(36, 5)]) == [(5, 12, 3)]
    np.testing.assert_array_equal(op.inverse.apply([result])[0], array)
    with pytest.raises(MappingError, match=r"shape \(5, 10, 3\): axis `12` of size 10"):
        op.shapes([(5, 10, 3)])
    with pytest.raises(MappingError, match=r"axis `\(12 d\)` of size 35"):
        op.inverse.shapes([(35, 5)])


def test_one_in_a_group_counts_for_nothing() -> None:
    """As where a model has one head."""
    op = Op.parse("i 1 d -> (1 d) i")
    array = _array(5, 1, 3)
    (result,) = op.apply([array])
    np.testing.assert_array_equal(result, array[:, 0].T)
    np.testing.assert_array_equal(op.inverse.apply([result])[0], array)
    assert op.permutation(3) is not None
    (row,) = Op.parse("1 d -> (1 d)").apply([_array(1, 3)])
    np.testing.assert_array_equal(row, _array(1, 3)[0])


def test_sections_change_places() -> None:
    op = Op.parse("(shift+scale) ... -> (scale+shift) ...")
    for shape in [(6,), (6, 4), (6, 4, 2)]:
        array = _array(*shape)
        (result,) = op.apply([array])
        np.testing.assert_array_equal(result, np.concatenate([array[3:], array[:3]]))
        assert op.shapes([shape]) == [shape]
        np.testing.assert_array_equal(op.inverse.apply([result])[0], array)
    assert op.results == 1
    assert op.inverse.inverse == op
    assert str(op) == "(shift+scale) ... -> (scale+shift) ..."


def test_one_tensor_to_unequal_ones_and_back() -> None:
    op = Op.parse("(q+k+v+4m) ... -> q+k+v+4m ...")
    array = _array(14, 3)
    parts = op.apply([array], 4)
    assert op.results == 4
    assert [part.shape for part in parts] == op.shapes([(14, 3)], 4) == [(2, 3)] * 3 + [(8, 3)]
    np.testing.assert_array_equal(np.concatenate(parts), array)
    assert op.inverse.results == 1
    assert op.inverse.shapes([part.shape for part in parts]) == [(14, 3)]
    np.testing.assert_array_equal(op.inverse.apply(parts)[0], array)


@given(st.data())
def test_sums_anywhere_are_undone(data: st.DataObject) -> None:
    """Sections of any shares, in any order, on any axis, in one tensor or in several."""
    names = data.draw(st.lists(st.sampled_from("abcd"), min_size=2, unique=True))
    shares = {name: data.draw(st.integers(1, 4)) for name in names}
    unit = data.draw(st.integers(0, 3))

    def side(order: list[str], axes: list[str], apart: bool) -> str:
        terms = "+".join(f"{shares[name]}{name}" for name in order)
        written = terms if apart else f"({terms})"
        return " ".join(written if axis == "+" else axis for axis in axes)

    axes = data.draw(st.permutations(["+", "i", "o"]))
    moved = data.draw(st.permutations(axes))
    order = data.draw(st.permutations(names))
    source_apart = data.draw(st.booleans())
    target_apart = data.draw(st.booleans())
    op = Op.parse(f"{side(names, axes, source_apart)} -> {side(order, moved, target_apart)}")
    sizes = {"i": 2, "o": 3}

    def section(name: str) -> np.ndarray:
        shape = [sizes.get(axis, unit * shares[name]) for axis in axes]
        return _array(*shape) + 1000 * names.index(name)

    sections = [section(name) for name in names]
    at = axes.index("+")
    sources = sections if source_apart else [np.concatenate(sections, at)]
    results = op.apply(sources, len(names) if target_apart else 1)
    order_of_axes = [axes.index(axis) for axis in moved]
    expected = [sections[names.index(name)].transpose(order_of_axes) for name in order]
    if not target_apart:
        expected = [np.concatenate(expected, moved.index("+"))]
    for result, wanted in zip(results, expected, strict=True):
        np.testing.assert_array_equal(result, wanted)
    assert op.shapes([source.shape for source in sources]) == [r.shape for r in results]
    for restored, source in zip(op.inverse.apply(results), sources, strict=True):
        np.testing.assert_array_equal(restored, source)
    assert op.inverse.inverse == op
    assert Op.parse(str(op)) == op
    if op.keeps_order:
        rows = [_taken(op, part, len(results), sources) for part in range(len(results))]
        assert [row.tolist() for row in rows] == [result.tolist() for result in results]


def _taken(op: Op, part: int, parts: int, sources: list[np.ndarray]) -> np.ndarray:
    """A result put together from the runs of rows that the op names."""
    rows = []
    for run in op.runs(part, parts, len(sources)):
        source = sources[run.source]
        share = len(source) // run.of
        rows.append(source[run.first * share : run.last * share])
    return np.concatenate(rows)


def test_what_a_sum_does_not_fit_is_refused_by_axis_and_size() -> None:
    op = Op.parse("(q+k+v+4m) ... -> q+k+v+4m ...")
    with pytest.raises(MappingError, match=r"axis `\(q\+k\+v\+4m\)` of size 13 has not 7 equal"):
        op.shapes([(13, 2)], 4)
    with pytest.raises(MappingError, match="takes 1 tensors, not 2"):
        op.shapes([(14, 2), (14, 2)], 4)
    back = op.inverse
    with pytest.raises(MappingError, match=r"section `4m` has shape \(7, 3\), .* have \(8, 3\)"):
        back.shapes([(2, 3), (2, 3), (2, 3), (7, 3)])
    with pytest.raises(MappingError, match=r"section `k` has shape \(2, 4\)"):
        back.shapes([(2, 3), (2, 4), (2, 3), (8, 3)])
    with pytest.raises(MappingError, match="takes 4 tensors, not 3"):
        back.shapes([(2, 3), (2, 3), (2, 3)])
    with pytest.raises(MappingError, match="axis `4m` of size 7 has not 4 equal"):
        Op.parse("4m+q i -> (4m+q) i").shapes([(7, 3), (2, 3)])
    with pytest.raises(MappingError, match="does not fit 3 axes"):
        Op.parse("(a+b) i -> (b+a) i").shapes([(2, 3, 4)])
