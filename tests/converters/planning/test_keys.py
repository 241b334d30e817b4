"""Long key lists in one line, and the same key in none of them twice."""

from __future__ import annotations

import pytest

from weightport.converters.planning.keys import brief, collapse


@pytest.mark.parametrize(
    ("keys", "pattern"),
    [
        (["a.weight"], "a.weight"),
        (["a.0.b", "a.1.b", "a.2.b"], "a.{0..2}.b"),
        (["a.0.b", "a.2.b"], "a.{0,2}.b"),
        (["a.10.b", "a.9.b"], "a.{9..10}.b"),
        (["a.0.b.1", "a.1.b.1"], "a.{0..1}.b.1"),
        (["conv1.weight"], "conv1.weight"),
        (["3"], "3"),
    ],
)
def test_keys_that_differ_in_numbers_are_one_pattern(keys: list[str], pattern: str) -> None:
    assert collapse(keys) == [(pattern, keys)]


def test_patterns_come_in_order_and_hold_every_key_once() -> None:
    keys = ["b.1.w", "a.w", "b.0.w", "b.0.v", "b.3.w"]
    patterns = collapse(keys)
    assert [pattern for pattern, _ in patterns] == ["b.{0,1,3}.w", "a.w", "b.0.v"]
    assert sorted(key for _, group in patterns for key in group) == sorted(keys)


def test_a_number_inside_a_name_or_longer_than_any_count_is_a_part_of_it() -> None:
    keys = ["layer1.w", "layer2.w", "a.1234567890.w", "a.1234567891.w"]
    assert [pattern for pattern, _ in collapse(keys)] == keys


def test_in_one_line_with_how_many_more() -> None:
    keys = [*(f"a.{n}" for n in range(4)), "b", "c", "d.0", "d.1"]
    assert brief(keys) == "a.{0..3} (4), b, c and 2 more"
    assert brief(keys, limit=4) == "a.{0..3} (4), b, c, d.{0..1} (2)"
    assert brief([]) == ""
