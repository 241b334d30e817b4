"""Runs a source framework and our runtime on the same inputs, and judges the results."""

from __future__ import annotations

import os
import platform
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from .bench import Bench, Progress
from .drawing import drawing_of
from .images import compare_images
from .pairs import files_of, pairs_of
from .result import Parity


def parity(
    repo: Path,
    sources: Sequence[Path],
    progress: Progress,
    *,
    component: str | None = None,
    ema: bool = False,
    source_python: str = sys.executable,
    layers: bool = False,
    dtype: str = "float32",
    latent_side: int = 16,
    images: bool = True,
) -> Parity:
    """Compare a repo with its sources, or with what diffusers makes of it where none is given.

    Raises:
        ConversionError: a file that cannot be read, a framework that is not installed or does not
            take the file.
    """
    pairs = pairs_of(repo, sources, component=component, ema=ema, source_python=source_python)
    with tempfile.TemporaryDirectory(prefix="weightport-parity-") as folder:
        bench = Bench(Path(folder), dtype, latent_side, source_python, progress)
        drawing = drawing_of(pairs, latent_side) if images and dtype == "float32" else None
        checks = bench.judge(pairs, layers, drawing)
        failed = [pair for pair, check in zip(pairs, checks, strict=True) if not check.passed]
        if failed and not layers:  # once more, to see where
            again = {check.name: check for check in bench.judge(failed, True)}
            checks = [again.get(check.name, check) for check in checks]
        pictures = compare_images(bench, drawing) if drawing else None
    return Parity(
        repo=repo.absolute().name,
        family=pairs[0].family.name,
        dtype=dtype,
        checks=tuple(checks),
        images=pictures,
        environment={
            "machine": f"{platform.system()} {platform.machine()}",
            "cores": os.cpu_count(),
            **bench.reports,
        },
        files=files_of(pairs),
    )
