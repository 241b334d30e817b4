"""The commands of `weightport`, one a module: `add(commands, common)` makes its parser, with `run`
to run it."""

import os


def without_blas() -> None:
    """Keep numpy, if it is not imported yet, from starting BLAS threads: converting never uses
    them."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
