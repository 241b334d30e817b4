"""Damaged copies of weights and of what lies beside them; `scripts/fuzz.py` reads many more."""

from __future__ import annotations

from pathlib import Path

import pytest

from ..support.fuzzing import KINDS, Kind, faults, weight_kinds


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_damaged_files_are_refused_in_one_line(kind: Kind, tmp_path: Path) -> None:
    assert faults(kind, tmp_path, 200, seed=1) == []


@pytest.mark.filterwarnings("ignore")
def test_damaged_weights_are_refused_in_one_line(tmp_path: Path) -> None:
    for kind in weight_kinds(tmp_path):
        assert faults(kind, tmp_path, 100, seed=1) == []
