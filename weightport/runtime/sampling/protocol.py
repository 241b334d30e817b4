"""What the sampling loop asks of a pipeline."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor

from .arguments import Arguments
from .state import Images, Run


class Sampled(Protocol):
    """A pipeline, as the loop sees it."""

    def prepare(self, arguments: Arguments) -> Run:
        """Conditions, timesteps and first latents of a run."""
        ...

    def running(self, run: Run) -> AbstractContextManager[Any]:
        """Within it the run goes on; gives its progress bar."""
        ...

    def predict(self, run: Run, i: int, x: Tensor) -> Tensor:
        """What the model makes of the scaled latents in step `i`, guided."""
        ...

    def finish(self, run: Run) -> Images:
        """Latents to images."""
        ...
