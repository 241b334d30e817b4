"""Patterns of PEFT's configs, against Python's regular expressions, which PEFT asks."""

from __future__ import annotations

import random
import re

import pytest

from weightport.adapters.patterns import Patterns

NAMES = ("down_blocks.0.attentions.1.attn1.to_q", "conv_in", "a.a.ab", "aab.ba.b")
SIGNS = ("a", "b", r"\.", ".", "[ab]", "[^a]", r"\w", r"\d", "[0-3]", "blocks", "to_q", "attn")


def some_pattern(rng: random.Random, depth: int = 0) -> str:
    """An expression of everything that is understood."""
    pieces = []
    for _ in range(rng.randint(1, 4)):
        if rng.random() < 0.2 and depth < 2:
            ways = "|".join(some_pattern(rng, depth + 1) for _ in range(rng.randint(1, 3)))
            pieces.append(f"{rng.choice(['(', '(?:'])}{ways}){rng.choice(['', '?'])}")
        else:
            pieces.append(rng.choice(SIGNS) + rng.choice(["", "", "*", "+", "?"]))
    return "".join([rng.choice(["", "", "", "^"]), *pieces, rng.choice(["", "", "", "$"])])


def test_random_patterns_fit_as_in_python() -> None:
    rng = random.Random(0)
    fitting = 0
    for _ in range(3000):
        pattern = some_pattern(rng)
        if len(pattern) > 200:
            continue
        for name in NAMES:
            expected = re.match(rf"(.*\.)?({pattern})$", name) is not None
            if re.fullmatch(r"\^?[\w.]+\$?", pattern):
                continue  # a plain name, whose dots are dots
            assert (Patterns({pattern: 1.0}).first(name) is not None) == expected, (pattern, name)
            fitting += expected
    assert fitting > 500


def test_the_first_counts() -> None:
    one, other = {"to_q": 1.0}, {r"attn\d\.to_.": 2.0}
    assert Patterns(one | other).first(NAMES[0]) == 1
    assert Patterns(other | one).first(NAMES[0]) == 2
    assert Patterns(other | one).first("conv_in") is None


@pytest.mark.parametrize(
    "pattern",
    ["(a", "a)", "(a+)+", "(a|b)*", "[", "[z-a]", "a{3}", "\\", "(?=a)", "(?P<x>a)", "a*" * 200],
)
def test_what_is_not_understood_is_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match=re.escape(pattern)):
        Patterns({pattern: 1.0})


@pytest.mark.parametrize("pattern", [".*" * 140 + "x", "(" * 140 + "a|" * 9 + ")" * 140])
def test_no_pattern_backtracks(pattern: str) -> None:
    """With Python's own this test would not end."""
    patterns = Patterns({pattern: 1.0})
    assert all(patterns.first(f"{NAMES[0]}_{i}") is None for i in range(100))
