"""The arithmetic of rows: what it can do, and that it can do nothing else."""

from typing import Any

import pytest

from weightport.mappings.errors import MappingError
from weightport.mappings.expressions import evaluate

NAMES = {"i": 2, "n": 3, "kinds": ["a", "b", "c"]}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2*i + 1", 5),
        ("n*i - 1", 5),
        ("i // 2", 1),
        ("i % 2", 0),
        ("kinds[i]", "c"),
        ("1 + (kinds[i] != 'a')", 2),
        ("len(kinds)", 3),
        ("i if n < i else None", None),
        ("kinds[:i]", ["a", "b"]),
        ("kinds[::-1]", ["c", "b", "a"]),
        ("sum([i, n])", 5),
        ("spread(i, n)", [2, 2, 2]),
        ("spread(kinds, unknown)", ["a", "b", "c"]),
        ("same([i, 2]) == i", True),
        ("agree(kinds, ['a', None, 'c'])", True),
        ("agree(kinds, ['a', None])", False),
        ("[] or None or i", 2),
        ("not i and unknown", False),
        ("'b' in kinds", True),
    ],
)
def test_values(text: str, value: Any) -> None:
    assert evaluate(text, NAMES) == value


@pytest.mark.parametrize(
    "text",
    [
        "().__class__",
        "2**9**9",
        "__import__('os')",
        "open('x')",
        "kinds.append(1)",
        "[1]*9",
        "'a'*9",
        "lambda: 1",
        "unknown",
        "-" * 5000 + "1",
        "kinds[7]",
        "1/2",
        "spread(1, 10**9)",
        "spread(1, 1000000000)",
        "1 //0",
        "",
        "1;2",
        "f'{i}'",
    ],
)
def test_everything_else_is_refused(text: str) -> None:
    with pytest.raises(MappingError):
        evaluate(text, NAMES)
