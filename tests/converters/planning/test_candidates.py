"""What is expanded to find out what a checkpoint is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from weightport.converters.layouts.source import Source
from weightport.converters.layouts.sources import open_source
from weightport.converters.planning.candidates import candidates

from ...support.transformer_families import original, write


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_no_table_is_expanded_that_names_nothing_of_a_file(family: str, tmp_path: Path) -> None:
    """To expand one takes time; a score is 0 without."""
    file = write(tmp_path / "m.safetensors", original(family, "transformer"))
    (checkpoint,) = open_source(Source(file))
    expanded = {}
    for candidate in map(replace, candidates("ldm")):
        score = candidate.score(checkpoint)
        expanded[candidate.part, candidate.table.name] = "links" in vars(candidate)
        assert score == 0 or "links" in vars(candidate)
    mine = "ldm_mmdit" if family == "sd3" else "ldm_flux"
    assert expanded["transformer", mine]
    assert not expanded["unet", "ldm_unet"]
