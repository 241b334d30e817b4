"""Outputs: a dataclass that is a dict too."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass
from typing import Any

import pytest

from weightport.runtime.outputs import Output


@dataclass(eq=False)
class Pair(Output):
    first: Any
    second: Any = None


def test_fields_are_keys_unless_they_are_none() -> None:
    one = Pair(1)
    assert one == {"first": 1}
    assert (one[0], one["first"], one.first, one.second) == (1, 1, 1, None)
    both = Pair(1, 2)
    assert both[-1] == 2
    assert both[:2] == both.to_tuple() == (1, 2)
    assert list(both) == ["first", "second"]
    with pytest.raises(KeyError):
        _ = one["second"]


def test_a_change_is_seen_both_ways() -> None:
    pair = Pair(1)
    pair.second = 3
    pair["first"] = 2
    assert pair == {"first": 2, "second": 3}
    assert pair.first == 2
    pair.second = None
    assert pair.to_tuple() == (2,)


@pytest.mark.parametrize("name", ["pop", "update", "setdefault", "clear", "popitem"])
def test_fields_stay(name: str) -> None:
    with pytest.raises(TypeError, match="the fields of a Pair stay"):
        getattr(Pair(1), name)("first")
    with pytest.raises(TypeError, match="the fields of a Pair stay"):
        del Pair(1)["first"]


def test_copies_are_whole() -> None:
    pair = Pair([1], None)
    for again in (copy.deepcopy(pair), pickle.loads(pickle.dumps(pair))):
        assert type(again) is Pair
        assert (again.first, again.second, again) == ([1], None, {"first": [1]})


def test_a_plain_tuple_on_demand() -> None:
    assert Pair.asked(True, 1, None) == {"first": 1}
    plain: Any = Pair.asked(False, 1, None)
    assert plain == (1,)
